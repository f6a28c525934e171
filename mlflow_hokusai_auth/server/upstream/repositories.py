"""The confinement of MLflow's artifact repositories to this server's roots, whatever rows say.

MLflow's registry makes every object that reads or writes artifacts, in `get_artifact_repository`.
This module wraps that method, and each repository that it returns checks the paths that it gets:
MLflow reads below its artifacts' destination by the path of a stored `mlflow-artifacts:` URI, and
before 3.17 it follows a `..` in that path.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import re
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ErrorCode
from mlflow.server import handlers
from mlflow.store.artifact import artifact_repo, artifact_repository_registry
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.utils.uri import get_uri_scheme

from mlflow_hokusai_auth.core.locations import (
    MAX_DECODING,
    Location,
    Roots,
    inside,
    leads_out,
    opening_problem,
    read,
)

from .artifact_roots import (
    SETTING,
    Watch,
    is_local,
    local_place,
    real_folder,
)

_REGISTRY = artifact_repository_registry._artifact_repository_registry
#: Schemes whose repository resolves a name, and asks the registry again for the location.
_REFERENCES = ("runs", "models")
#: MLflow's names for the argument that is a path below a repository's root.
_PATHS = ("path", "artifact_path", "remote_file_path")
#: Its names for the argument whose last segment is the name of the file in that path.
_FILES = ("local_file", "artifact_file_name")
#: Public methods that only read. Any other method with a path changes artifacts.
READING = frozenset(
    {
        "download_artifacts",
        "download_trace_attachment",
        "download_trace_attachment_to_file",
        "full_path",
        "get_download_presigned_url",
        "get_local_path",
        "list_artifacts",
    }
)
#: Methods that store one file.
STORING = frozenset(
    {
        "abort_multipart_upload",
        "complete_multipart_upload",
        "create_multipart_upload",
        "create_presigned_upload_url",
        "log_artifact",
        "log_artifact_from_async_stream",
        "log_artifact_from_stream",
    }
)
_DELETING = "delete_artifacts"
#: Characters of a path, at most. MLflow cuts longer messages, which show the path twice.
_MAX_PATH = 4096
#: Bytes of a file's name, at most, on all file systems that Linux usually has.
_MAX_NAME = 255
#: Methods that read, and are judged. `full_path` opens nothing. MLflow's base class downloads each file
#: in a thread, which does not know the caller, so it is judged before.
JUDGED_READING = READING - {"full_path"}


class Change(NamedTuple):
    """A change of the file at `place`, or, without `file`, of a folder with all that is in it."""

    place: Location
    file: bool
    deletes: bool


class Changes(Protocol):
    """Judges changes of artifacts by the caller of the request."""

    @property
    def looks(self) -> bool:
        """True if this caller's changes are judged."""

    def check(self, change: Change, *, last: bool = True) -> bool:
        """Return whether the caller may make this change, or raise MlflowException. Blocks.

        It is asked again, with `last`, when all bytes have come.
        """

    @property
    def hides(self) -> bool:
        """True if this caller sees only some artifacts."""

    def sees(self, place: Location) -> bool:
        """Return whether the caller sees the file or folder at `place`. Blocks."""


def confine(roots: Roots, watch: Watch, changes: Changes | None = None) -> None:
    """Let MLflow in this process open only artifacts in `roots`, and judge `changes`, from now on."""
    inner = _REGISTRY.get_artifact_repository
    # Tests assemble several applications in one process, and only one wrapper may remain.
    inner = getattr(inner, "__wrapped__", inner)
    opener = Opener(roots, watch, changes)

    @functools.wraps(inner)
    def get_artifact_repository(artifact_uri: str, *args: Any, **kwargs: Any) -> Any:
        opener.check(artifact_uri)
        return opener.confined(inner(artifact_uri, *args, **kwargs))

    # MLflow's modules import a function by name, which calls this method on the instance.
    _REGISTRY.get_artifact_repository = get_artifact_repository
    # Before 3.17 this helper turns an exception into a response, as a route does. Its callers take the
    # response for a repository, so that a refusal would become a 500.
    helper = handlers._get_artifact_repo
    handlers._get_artifact_repo = getattr(helper, "__wrapped__", helper)


@dataclass(frozen=True, slots=True)
class Opener:
    """Decides which artifact repositories MLflow may open, and confines them to the roots."""

    roots: Roots
    watch: Watch
    changes: Changes | None = None
    _classes: dict[type, type] = field(default_factory=dict)

    def check(self, uri: str) -> None:
        """Raise MlflowException if `uri` must not be opened."""
        if self.watch.looks and (problem := self._problem(str(uri))) is not None:
            self._refuse(str(uri), problem)

    def _problem(self, uri: str) -> str | None:
        if is_local(uri):
            return self._local_problem(uri)
        if get_uri_scheme(uri) in _REFERENCES:
            return "it names another server" if urlsplit(uri).netloc else None
        return opening_problem(uri, self.roots.written)

    def _local_problem(self, path: str) -> str | None:
        try:
            place = local_place(path)
        except ValueError:
            return "it has a NUL in it"
        allowed = self.roots.root_of(place) is not None
        return None if allowed else "it is outside the server's artifact roots"

    def _refuse(self, uri: str, problem: str) -> None:
        self.watch.refuse(
            "LOCATION_REFUSED",
            "opened",
            uri,
            f"This server does not open the location of these artifacts: {problem}. Its operator may "
            f"add the location to {SETTING}.",
        )

    def confined(self, repository: Any) -> Any:
        """Return `repository`, which from now on refuses paths that lead out of its root."""
        kind = type(repository)
        if getattr(repository, "repo", None) is None and kind not in self._classes.values():
            # The methods go into a new class. As attributes of the repository they would make a cycle,
            # and the repository's threads would live until the next garbage collection.
            if kind not in self._classes:
                self._classes[kind] = self._class(kind)
            repository.__class__ = self._classes[kind]
        return repository

    def _class(self, kind: type) -> type:
        methods: dict[str, Any] = {}
        for name in dir(kind):
            method = inspect.getattr_static(kind, name)
            if not inspect.isfunction(method):
                continue
            # The methods of MLflow's base class call the others, which check the path.
            if method.__module__ == artifact_repo.__name__ and name not in JUDGED_READING:
                continue
            parameters = inspect.signature(method).parameters
            if argument := next((path for path in _PATHS if path in parameters), None):
                methods[name] = self._guarded(method, argument)
        return type(kind)(kind.__name__, (kind,), {"__module__": kind.__module__, **methods})

    def _guarded(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        title = method.__name__
        if title in JUDGED_READING and self.changes is not None:
            return self._reading(method, name, self.changes)
        changes = None if title.startswith("_") or title in READING else self.changes
        signature = inspect.signature(method)

        def look(args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments | None:
            """Check the path; return the arguments of a call that is to be judged."""
            bound = signature.bind(*args, **kwargs)
            path, file = str(bound.arguments.get(name) or ""), _file(bound.arguments)
            if self.watch.looks:
                _check_length(args[0], f"{path}/{file}" if file else path)
                if path:
                    self._check_path(args[0], path)
            return None if changes is None or not changes.looks else bound

        def judge(given: dict[str, Any], *, last: bool) -> bool:
            assert changes is not None
            places = self._places(given["self"], str(given.get(name) or ""), _file(given))
            return all(
                changes.check(Change(where, title in STORING, title == _DELETING), last=last)
                for where in places
            )

        @functools.wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            bound = look(args, kwargs)
            if bound is None:
                return method(*args, **kwargs)
            look_at = functools.partial(judge, dict(bound.arguments))
            streams = "stream" in bound.arguments
            if look_at(last=not streams) and streams:
                again = functools.partial(look_at, last=True)
                bound.arguments["stream"] = _Stream(bound.arguments["stream"], again)
            return method(*bound.args, **bound.kwargs)

        @functools.wraps(method)
        async def guarded_async(*args: Any, **kwargs: Any) -> Any:
            bound = look(args, kwargs)
            if bound is None:
                return await method(*args, **kwargs)
            look_at = functools.partial(judge, dict(bound.arguments))
            streams = "chunks" in bound.arguments
            if await asyncio.to_thread(look_at, last=not streams) and streams:
                again = functools.partial(look_at, last=True)
                bound.arguments["chunks"] = _chunks(bound.arguments["chunks"], again)
            return await method(*bound.args, **bound.kwargs)

        return guarded_async if inspect.iscoroutinefunction(method) else guarded

    def _reading(
        self, method: Callable[..., Any], name: str, changes: Changes
    ) -> Callable[..., Any]:
        """Return `method`, which finds nothing where the caller sees nothing."""
        signature = inspect.signature(method)

        @functools.wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            path = str(bound.arguments.get(name) or "")
            if path and self.watch.looks:
                _check_length(args[0], path)
                self._check_path(args[0], path)
            if not changes.hides:
                return method(*args, **kwargs)
            if path:
                # MLflow decodes a path in some places only, and its messages would show in which.
                bound.arguments[name] = path = _decoded(path)
            if all(map(changes.sees, self._places(args[0], path, ""))):
                return method(*bound.args, **bound.kwargs)
            # MLflow answers for itself that there is no such file, in the words of its repository.
            before, segment, after = self._hidden(args[0], path, changes)
            # As long as the segment, because paths and messages have a greatest length.
            missing = uuid.uuid4().hex.rjust(len(segment), "0")
            bound.arguments[name] = f"{before}{missing}{after}"
            try:
                return method(*bound.args, **bound.kwargs)
            except MlflowException as error:
                message = str(error.message).replace(missing, segment)
                raise MlflowException(message, error_code=_code(error)) from None

        return guarded

    def _hidden(
        self, repository: ArtifactRepository, path: str, changes: Changes
    ) -> tuple[str, str, str]:
        """Return the first segment of `path` where the caller sees nothing, and what is around it.

        MLflow's message shows the path as written and without `.`, and says whether a part of it is a
        file, so all around this segment must stay.
        """
        parts = [match for match in re.finditer("[^/]+", path) if match[0] != "."]
        for part in parts:
            if not all(map(changes.sees, self._places(repository, path[: part.end()], ""))):
                return path[: part.start()], part[0], path[part.end() :]
        return "", path, ""

    def _places(self, repository: ArtifactRepository, path: str, file: str) -> set[Location]:
        """Return the place of a change: as written, as MLflow may decode it, and without links."""
        local = isinstance(repository, LocalArtifactRepository)
        if local:
            root = real_folder(repository.artifact_dir)
        else:
            root = self.roots.place(read(repository.artifact_uri))
        found = set()
        for written in {path, _decoded(path)}:
            parts = [part for part in (*written.split("/"), file) if part not in ("", ".")]
            found.add(Location(root.scheme, root.authority, (*root.parts, *parts)))
            if local:
                found.add(real_folder(os.path.join("/", *root.parts, *parts)))  # noqa: PTH118
        return found

    def _check_path(self, repository: ArtifactRepository, path: str) -> None:
        problem = "its path leads out of its root" if leads_out(path) else None
        where = f"{repository.artifact_uri}/{path}"
        if problem is None and isinstance(repository, LocalArtifactRepository):
            root = os.path.realpath(repository.artifact_dir)
            place = real_folder(os.path.join(root, path))  # noqa: PTH118
            if not inside(place, real_folder(root)) and self.roots.root_of(place) is None:
                problem = "a link leads out of its root"
        if problem is not None:
            self._refuse(where, problem)


def _file(arguments: Mapping[str, Any]) -> str:
    """Return the name of the file that a call stores below its path, or "" if it names none."""
    file = next((str(arguments[one]) for one in _FILES if one in arguments), "")
    return os.path.basename(file)  # noqa: PTH119


def _check_length(repository: ArtifactRepository, path: str) -> None:
    """Raise MlflowException for a path that MLflow would cut in messages, or no file system has."""
    local = isinstance(repository, LocalArtifactRepository)
    names = path.encode("utf-8", "surrogatepass").split(b"/")
    if len(path) > _MAX_PATH or (local and max(map(len, names)) > _MAX_NAME):
        raise MlflowException(
            f"The path of an artifact has at most {_MAX_PATH} characters here, and each name in it at "
            f"most {_MAX_NAME} bytes.",
            error_code=ErrorCode.Value("INVALID_PARAMETER_VALUE"),
        )


def _code(error: MlflowException) -> int:
    return int(ErrorCode.Value(error.error_code))


def _decoded(path: str) -> str:
    """Return `path` after as many decodings as `leads_out` allows."""
    for _ in range(MAX_DECODING):
        path = unquote(path)
    return path


class _Stream:
    """A stream whose end is judged again: a slow upload may end after its place was frozen."""

    def __init__(self, stream: Any, again: Callable[[], object]) -> None:
        self._stream, self._again = stream, again

    def read(self, *size: int) -> bytes:
        data: bytes = self._stream.read(*size)
        if not data:
            self._again()
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


async def _chunks(
    chunks: AsyncIterable[bytes], again: Callable[[], object]
) -> AsyncIterator[bytes]:
    """Yield `chunks`, and judge again before the file gets its place."""
    async for chunk in chunks:
        yield chunk
    await asyncio.to_thread(again)

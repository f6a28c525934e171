"""MLflow opens artifacts in this server's roots only, whatever location is stored.

MLflow has one place where it makes the object that reads and writes artifacts: the registry's
`get_artifact_repository`. It is wrapped there, and each object that it makes checks the paths that it
gets: MLflow reads below its artifacts' destination by the path of a stored `mlflow-artifacts:` URI,
and before 3.17 it follows a `..` in it.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from mlflow.server import handlers
from mlflow.store.artifact import artifact_repo, artifact_repository_registry
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.utils.uri import get_uri_scheme

from mlflow_hokusai_auth.core.locations import Roots, inside, leads_out, opening_problem

from .artifact_roots import (
    SETTING,
    Watch,
    is_local,
    local_place,
    real_folder,
)

_REGISTRY = artifact_repository_registry._artifact_repository_registry
#: Which resolve a name, and come back for what it resolves to.
_REFERENCES = ("runs", "models")
#: What MLflow calls a path below a repository's root.
_PATHS = ("path", "artifact_path", "remote_file_path")


def confine(roots: Roots, watch: Watch) -> None:
    """Let MLflow open what is in `roots` only, in this process, from now on."""
    inner = _REGISTRY.get_artifact_repository
    # The tests put more than one application together.
    inner = getattr(inner, "__wrapped__", inner)
    opener = Opener(roots, watch)

    @functools.wraps(inner)
    def get_artifact_repository(artifact_uri: str, *args: Any, **kwargs: Any) -> Any:
        opener.check(artifact_uri)
        return opener.confined(inner(artifact_uri, *args, **kwargs))

    # On the instance: the function that MLflow's modules have imported by its name calls it there.
    _REGISTRY.get_artifact_repository = get_artifact_repository
    # Before 3.17 this helper makes a response of an exception, as a route does, and its callers then
    # take that for a repository: a refusal would be a 500.
    helper = handlers._get_artifact_repo
    handlers._get_artifact_repo = getattr(helper, "__wrapped__", helper)


@dataclass(frozen=True, slots=True)
class Opener:
    """Says which artifact repositories may be opened, and confines them to the roots."""

    roots: Roots
    watch: Watch
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
        known = self.roots.root_of(place) is not None
        return None if known else "it is outside the server's artifact roots"

    def _refuse(self, uri: str, problem: str) -> None:
        self.watch.refuse(
            "LOCATION_REFUSED",
            "opened",
            uri,
            f"This server does not open the location of these artifacts: {problem}. Its operator may "
            f"add the location to {SETTING}.",
        )

    def confined(self, repository: Any) -> Any:
        """`repository`, which raises MlflowException for a path that leads out of its root."""
        kind = type(repository)
        if getattr(repository, "repo", None) is None and kind not in self._classes.values():
            # A class of its own, and no attributes: these would make a cycle, in which the repository's
            # threads would outlive their use.
            if kind not in self._classes:
                self._classes[kind] = self._class(kind)
            repository.__class__ = self._classes[kind]
        return repository

    def _class(self, kind: type) -> type:
        methods: dict[str, Any] = {}
        for name in dir(kind):
            method = inspect.getattr_static(kind, name)
            # What MLflow's base class does it does by the others.
            if not inspect.isfunction(method) or method.__module__ == artifact_repo.__name__:
                continue
            parameters = inspect.signature(method).parameters
            if found := next((each for each in _PATHS if each in parameters), None):
                methods[name] = self._guarded(method, list(parameters).index(found), found)
        return type(kind)(kind.__name__, (kind,), {"__module__": kind.__module__, **methods})

    def _guarded(self, method: Callable[..., Any], place: int, name: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            path = args[place] if len(args) > place else kwargs.get(name)
            if path and self.watch.looks:
                self._check_path(args[0], str(path))
            return method(*args, **kwargs)

        return guarded

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

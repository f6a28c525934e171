"""The confinement of MLflow's artifact repositories to this server's roots, whatever rows say.

MLflow's registry makes every object that reads or writes artifacts, in `get_artifact_repository`.
This module wraps that method, and each repository that it returns checks the paths that it gets:
MLflow reads below its artifacts' destination by the path of a stored `mlflow-artifacts:` URI, and
before 3.17 it follows a `..` in that path.
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
#: Schemes whose repository resolves a name, and asks the registry again for the location.
_REFERENCES = ("runs", "models")
#: MLflow's names for the argument that is a path below a repository's root.
_PATHS = ("path", "artifact_path", "remote_file_path")


def confine(roots: Roots, watch: Watch) -> None:
    """Let MLflow in this process open only artifacts in `roots` from now on."""
    inner = _REGISTRY.get_artifact_repository
    # Tests assemble several applications in one process, and only one wrapper may remain.
    inner = getattr(inner, "__wrapped__", inner)
    opener = Opener(roots, watch)

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
            # The methods of MLflow's base class call the others, which check the path.
            if not inspect.isfunction(method) or method.__module__ == artifact_repo.__name__:
                continue
            parameters = inspect.signature(method).parameters
            if argument := next((path for path in _PATHS if path in parameters), None):
                place = list(parameters).index(argument)
                methods[name] = self._guarded(method, place, argument)
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

"""MLflow's tracking store and artifact repository, as its request handlers make them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE

from mlflow_hokusai_auth.server import caller as callers

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository
    from sqlalchemy.engine import Engine


def unavailable(message: str) -> MlflowException:
    """Return the exception that MLflow answers with 503."""
    return MlflowException(message, error_code=TEMPORARILY_UNAVAILABLE)


def invalid(message: str) -> MlflowException:
    """Return the exception that MLflow answers with 400."""
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


def open_by_itself() -> None:
    """Let the server itself, and not the caller of the request, open MLflow's stores from now on.

    A store that is opened may make tables and the Default experiment. MLflow opens the first ones at
    some request, and with `MlflowClient()` another one inside `create_model_version`.
    """
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as Tracking

    for store in (Tracking, Registry):
        _wrap(store)


def _wrap(store: Any) -> None:
    inner = store.__init__
    if hasattr(inner, "__wrapped__"):
        return

    @functools.wraps(inner)
    def opened(*args: Any, **kwargs: Any) -> None:
        with callers.acting("store"):
            inner(*args, **kwargs)

    store.__init__ = opened


def tracking_engine() -> Engine | None:
    """Return the engine of the tracking store; None if the store is not a database."""
    from mlflow.server import handlers

    engine: Engine | None = getattr(handlers._get_tracking_store(), "engine", None)
    return engine


def shared_engine() -> Engine | None:
    """Return the engine of the database with both runs and registered models; None without one."""
    from mlflow.server import handlers

    engine = tracking_engine()
    registry: Engine | None = getattr(handlers._get_model_registry_store(), "engine", None)
    return engine if engine and registry and engine.url == registry.url else None


def has_workspaces() -> bool:
    """Return whether MLflow's workspaces are enabled."""
    try:
        from mlflow.environment_variables import MLFLOW_ENABLE_WORKSPACES
    except ImportError:  # MLflow before workspaces
        return False
    return bool(MLFLOW_ENABLE_WORKSPACES.get())


@callers.seeing_all("whether the store answers")
def query_tracking_store() -> None:
    """Read one experiment. Raises MLflow's or SQLAlchemy's exception if the store fails."""
    from mlflow.server.handlers import _get_tracking_store

    try:
        from mlflow.utils.workspace_context import set_server_request_workspace
    except ImportError:  # MLflow before workspaces
        pass
    else:
        # With --enable-workspaces the store needs a workspace. This one holds for this thread only.
        set_server_request_workspace("default")
    _get_tracking_store().search_experiments(max_results=1)


def served_artifacts() -> Path | ArtifactRepository | None:
    """Return the folder or the repository whose artifacts MLflow serves; None if it serves none."""
    from mlflow.server import handlers
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    if not handlers._is_serving_proxied_artifacts():
        return None
    repository: ArtifactRepository = handlers._get_artifact_repo_mlflow_artifacts()
    if isinstance(repository, LocalArtifactRepository):
        return Path(repository.artifact_dir)
    return repository

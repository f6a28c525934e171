"""The confinement of MLflow's server-side jobs to this server's artifact roots.

Jobs run in processes of their own, without the rest of the server, but on its machine and with its role
in a cloud. The locations that they open come from clients, for example in a trace's tags. Before
MLflow 3.17 a job would also send its credential to any http(s) host.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from mlflow.store.artifact import artifact_repository_registry


def install() -> None:
    """Confine this process when it opens artifacts for the first time.

    This runs during `import mlflow`, when the modules that the confinement needs can't be imported yet.
    """
    # The metric files of a process that lives for one job would stay until the server ends.
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    registry = artifact_repository_registry._artifact_repository_registry
    inner = registry.get_artifact_repository

    @functools.wraps(inner)
    def get_artifact_repository(*args: Any, **kwargs: Any) -> Any:
        _confine()
        return registry.get_artifact_repository(*args, **kwargs)

    registry.get_artifact_repository = get_artifact_repository


def _confine() -> None:
    from mlflow_hokusai_auth.server import live_settings, settings
    from mlflow_hokusai_auth.server.upstream import artifact_roots, repositories
    from mlflow_hokusai_auth.store.keys import LocalStore

    config = settings.load()
    mode = live_settings.Mode(config.mode, config.force_mode)
    database = LocalStore(config.database_uri.get_secret_value()).database
    live_settings.follow(database, mode, live_settings.Isolation(mode))
    roots = artifact_roots.load(config.artifact_roots)
    repositories.confine(roots, artifact_roots.Watch(mode))

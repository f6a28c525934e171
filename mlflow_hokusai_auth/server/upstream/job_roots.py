"""MLflow's server-side jobs open artifacts in this server's roots only, too.

They run in processes of their own, where nothing else of the server's part is, on the server's
machine and with its role in a cloud; and what they open stands in rows that clients have made, such as
a trace's tags. On MLflow before 3.17 they would also send the jobs' credential to any http(s) host.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from mlflow.store.artifact import artifact_repository_registry


def install() -> None:
    """Confine this process when it opens the first artifacts.

    Called while MLflow is imported: what the server's part needs of MLflow can't be imported yet.
    """
    # Numbers of a process that lives for one job would stay, in files, until the server ends.
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
    live_settings.follow(LocalStore(config.database_uri.get_secret_value()).database, mode)
    roots = artifact_roots.load(config.artifact_roots)
    repositories.confine(roots, artifact_roots.Watch(mode))

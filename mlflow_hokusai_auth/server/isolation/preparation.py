"""The tables of ownership, made at start, or the reason why this server can't have them."""

from __future__ import annotations

import os
from collections.abc import Mapping

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable, StoreError
from mlflow_hokusai_auth.server.upstream import tables
from mlflow_hokusai_auth.server.upstream.artifact_roots import REGISTRY, TRACKING
from mlflow_hokusai_auth.store import ownership


def prepare(environ: Mapping[str, str] = os.environ) -> str | None:
    """Make the tables of ownership in MLflow's database; return why they can't be used, or None.

    Nothing is kept in memory or open, because this process may fork afterwards.
    """
    database = environ.get(TRACKING, "")
    if not tables.is_database(database):
        return "MLflow's backend store is no database"
    if (environ.get(REGISTRY) or database) != database:
        return "the model registry is in another store than the runs"
    try:
        with tables.connect(database) as connection:
            ownership.prepare(connection.engine)
            # Before the first request: plain MLflow may have made versions, whose files are frozen.
            ownership.catch_up(connection.engine)
    except (StoreError, AuthorityUnavailable) as error:
        return str(error)
    except Exception as error:
        return f"MLflow's database can't be used: {type(error).__name__}"
    return None

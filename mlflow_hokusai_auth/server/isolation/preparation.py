"""The tables of ownership, made at start, or the reason why this server can't have them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import NamedTuple

import mlflow

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable, StoreError
from mlflow_hokusai_auth.core.isolation import advice
from mlflow_hokusai_auth.core.types import ISOLATING, MOST_ISOLATION
from mlflow_hokusai_auth.server.live_settings import Isolation
from mlflow_hokusai_auth.server.upstream import stores, tables
from mlflow_hokusai_auth.server.upstream.artifact_roots import REGISTRY, TRACKING
from mlflow_hokusai_auth.store import ownership

from .facts import Facts

#: The oldest MLflow whose tables isolation knows.
_SINCE = (3, 9)

_log = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """The isolation that a server can keep in MLflow's database, or its obstacle."""

    #: The isolation that holds unless a person sets another one.
    isolation: str
    #: The reason why owners can't be known here; None if they can.
    obstacle: str | None = None
    #: True if the obstacle may pass: the database can't be reached.
    passing: bool = False
    #: The numbers of models and of experiments that nobody owns, if they are why isolation is observe.
    unowned: tuple[int, int] = (0, 0)


def prepare(environ: Mapping[str, str] = os.environ) -> Prepared:
    """Make the tables of ownership in MLflow's database, unless this server can't have them.

    Nothing is kept in memory or open, because this process may fork afterwards.
    """
    database = environ.get(TRACKING, "")
    if obstacle := _obstacle(database, environ.get(REGISTRY) or database):
        return Prepared("off", obstacle)
    try:
        with tables.connect(database) as connection:
            decided = ownership.prepare(connection.engine)
            # This comes before the first request: plain MLflow may have made versions, whose files are
            # frozen.
            ownership.catch_up(connection.engine)
            left = (0, 0) if decided in ISOLATING else ownership.unowned(connection)
            return Prepared(decided, unowned=left)
    except StoreError as error:
        return Prepared("off", str(error))
    except AuthorityUnavailable as error:
        reason = str(error)
    except Exception as error:
        reason = f"MLflow's database can't be used: {type(error).__name__}"
    # The earlier decision can't be read now. It may have been for the most isolation.
    return Prepared(MOST_ISOLATION, reason, passing=True)


def _obstacle(database: str, registry: str) -> str | None:
    if not tables.is_database(database):
        return "MLflow's backend store is no database"
    if registry != database:
        return "the model registry is in another store than the runs"
    if tuple(int(part) for part in mlflow.__version__.split(".")[:2]) < _SINCE:
        return f"MLflow {mlflow.__version__} is older than 3.9"
    if stores.has_workspaces():
        return "MLflow's workspaces are enabled"
    return None


class Preparation:
    """Prepares the tables for this process, again and again while the database can't be reached.

    `isolation` and `facts` follow.
    """

    def __init__(self, isolation: Isolation, facts: Facts) -> None:
        self._isolation = isolation
        self._facts = facts
        self.found = prepare()
        self._follow()

    def look_again(self) -> None:
        """Prepare the tables if they could not be reached before."""
        if self.found.passing:
            self.found = prepare()
            self._follow()
            if not self.found.passing:
                self.report()

    def _follow(self) -> None:
        found = self.found
        self._facts.usable = found.obstacle is None
        self._isolation.decide(found.isolation, found.obstacle)

    def report(self) -> None:
        """Log what the operator must know about isolation, once it is known what people have set."""
        isolation, found = self._isolation, self.found
        if found.obstacle is not None:
            _log.warning(
                "Owners are not recorded, and ISOLATION IS %s%s: %s",
                isolation.level,
                f", SO SUPPLIERS CAN'T {isolation.closes.upper()}" if isolation.closes else "",
                found.obstacle,
            )
        elif isolation.is_decided and isolation.level not in ISOLATING:
            _log.warning("ISOLATION IS %s. %s", isolation.level, advice(*found.unowned))

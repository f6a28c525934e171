"""Facts for decisions about MLflow's data, read in the transaction of the change.

Only two facts stay in memory: the experiment of a run or of a logged model, which never changes, and
the owner of an experiment, for `FRESH` seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from cachetools import LRUCache, TTLCache
from sqlalchemy.engine import Connection

from mlflow_hokusai_auth.core.artifact_places import Named
from mlflow_hokusai_auth.server.upstream import tables
from mlflow_hokusai_auth.store import ownership

#: Seconds for which the owner of an experiment is kept.
FRESH = 1.0
_SIZE = 100_000


class Facts:
    """Reads owners. `usable` is False while MLflow's database has no tables of ownership."""

    def __init__(self, *, usable: bool, timer: Callable[[], float] = time.monotonic) -> None:
        self.usable = usable
        self._lock = threading.Lock()
        self._experiments: LRUCache[tuple[str, object], int] = LRUCache(_SIZE)
        self._owners: TTLCache[int, str | None] = TTLCache(_SIZE, FRESH, timer)

    def experiment_of(self, connection: Connection, kind: str, name: object) -> int | None:
        """Return the experiment that holds a run, a logged model or a dataset; None if none does."""
        if kind == "experiment":
            return int(str(name))
        with self._lock:
            found = self._experiments.get((kind, name))
        if found is None:
            found = tables.experiment_of(kind, str(name), connection)
            if found is not None:
                with self._lock:
                    self._experiments[kind, name] = found
        return found

    def experiments_of(self, connection: Connection, things: Iterable[Named]) -> dict[Named, int]:
        """Return the experiments of those of `things`, runs and logged models, that exist."""
        with self._lock:
            found = {thing: self._experiments.get(thing) for thing in things}
        if missing := [thing for thing, number in found.items() if number is None]:
            read = tables.experiments_of(missing, connection)
            with self._lock:
                for thing, number in read.items():
                    self._experiments[thing] = found[thing] = number
        return {thing: number for thing, number in found.items() if number is not None}

    def experiment_owner(self, connection: Connection, number: int) -> str | None:
        """Return the owner of an experiment, at most `FRESH` seconds old."""
        with self._lock:
            # One step reads the owner, which could get too old between two. Nothing but owners is kept.
            if (kept := self._owners.get(number)) is not None:
                return kept
        owner = ownership.experiment_owner(connection, number)
        if owner is not None:
            with self._lock:
                self._owners[number] = owner
        return owner

    def name_owner(self, connection: Connection, kind: str, name: str) -> str | None:
        """Return the owner of the name of a "model" or an "experiment"; None if nobody owns it."""
        if kind == "model":
            return ownership.model_owner(connection, name)
        number = tables.experiment_named(name, connection)
        return None if number is None else ownership.experiment_owner(connection, number)

    def is_taken(self, connection: Connection, kind: str, name: str) -> bool:
        """Return whether there is a "model" or an "experiment" of this name."""
        if kind == "model":
            return tables.has_registered_model(name, connection)
        return tables.experiment_named(name, connection) is not None

    def level(self, connection: Connection, owner: str, name: str) -> str | None:
        """Return what grants give `owner` on the registered model `name` now."""
        return ownership.access(connection, owner, name, time.time())

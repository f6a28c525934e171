"""How often each key is used, by the minute: counted in memory, written in the background.

A request only adds one to a number. What a process has counted and not yet written is lost if it is
killed, at most `INTERVAL` seconds of it.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from .database import KEYS, USES, Database

#: Seconds between two writes.
INTERVAL = 5.0
#: Seconds for which the minutes' counts are kept.
KEPT = 31 * 86400.0
#: Hours that `by_hour` tells of.
HOURS = 24

_log = logging.getLogger(__name__)


class UseCounter:
    """Counts uses of keys in this process, for `database`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, int]] = Counter()
        self._writer: threading.Thread | None = None

    def add(self, key_id: str) -> None:
        """Count one use, now. Does no I/O."""
        minute = int(time.time()) // 60
        with self._lock:
            self._counts[key_id, minute] += 1
            if self._writer is None or not self._writer.is_alive():
                # On first use, so that it lives in the process that serves (pre-fork).
                self._writer = threading.Thread(
                    target=self._write_on, name="hokusai-auth-uses", daemon=True
                )
                self._writer.start()
                atexit.register(self.write)

    def write(self) -> None:
        """Write what was counted since the last time; on failure it is kept for the next."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        if not counts:
            return
        try:
            _write(self._database, counts)
        except Exception as error:
            _log.warning("Uses of keys are not written for now: %s", error)
            with self._lock:
                self._counts.update(counts)

    def _write_on(self) -> None:
        while True:
            time.sleep(INTERVAL)
            self.write()


def _write(database: Database, counts: Counter[tuple[str, int]]) -> None:
    insert: Any = (
        sqlite.insert(USES) if database.engine.dialect.name == "sqlite" else postgresql.insert(USES)
    )
    statement = insert.on_conflict_do_update(
        index_elements=["key_id", "minute"],
        set_={"uses": USES.c.uses + insert.excluded.uses},
    )
    last: dict[str, int] = {}
    for key_id, minute in counts:
        last[key_id] = max(last.get(key_id, 0), minute)
    with database.changing(generation=False) as change:
        known = set()
        for key_id, minute in sorted(last.items()):
            at = minute * 60.0
            updated = change.connection.execute(
                sa.update(KEYS)
                .where(KEYS.c.key_id == key_id)
                .values(
                    last_used_at=sa.case((KEYS.c.last_used_at > at, KEYS.c.last_used_at), else_=at)
                )
            )
            if updated.rowcount:  # else it is a key of another authority
                known.add(key_id)
        rows = [
            {"key_id": key_id, "minute": minute, "uses": uses}
            for (key_id, minute), uses in sorted(counts.items())
            if key_id in known
        ]
        if rows:
            change.connection.execute(statement, rows)
        oldest = int(time.time() - KEPT) // 60
        change.connection.execute(sa.delete(USES).where(USES.c.minute < oldest))


def by_hour(database: Database, key_ids: Iterable[str]) -> dict[str, list[int]]:
    """How often each key was used in each of the last `HOURS` hours, the present one last."""
    ids = list(key_ids)
    this_hour = int(time.time()) // 3600
    found = {key_id: [0] * HOURS for key_id in ids}
    hour = (USES.c.minute // 60).label("hour")
    query = (
        sa.select(USES.c.key_id, hour, sa.func.sum(USES.c.uses).label("uses"))
        .where(USES.c.key_id.in_(ids), USES.c.minute >= (this_hour - HOURS + 1) * 60)
        .group_by(USES.c.key_id, hour)
    )
    with database.reading() as connection:
        for row in connection.execute(query):
            position = int(row.hour) - this_hour + HOURS - 1
            if 0 <= position < HOURS:
                found[row.key_id][position] = int(row.uses)
    return found

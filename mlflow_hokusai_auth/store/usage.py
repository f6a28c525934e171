"""Uses of each key, counted by the minute."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from functools import partial

import sqlalchemy as sa

from .database import Database
from .tables import KEYS, USES
from .write_behind import WriteBehindCounter

#: Seconds for which a minute's count is kept.
KEPT = 31 * 86400.0
#: Hours that `by_hour` returns, and days that `by_day` does.
HOURS, DAYS = 24, 31
_ID, _AT = sa.bindparam("id", type_=sa.String), sa.bindparam("at", type_=sa.Float)
_SEEN = (
    sa.update(KEYS)
    .where(KEYS.c.key_id == _ID)
    .values(last_used_at=sa.case((KEYS.c.last_used_at > _AT, KEYS.c.last_used_at), else_=_AT))
)
#: No row for another authority's key, which is not in this store.
_USE = sa.select(
    KEYS.c.key_id,
    sa.bindparam("minute", type_=sa.BigInteger),
    sa.bindparam("uses", type_=sa.BigInteger),
).where(KEYS.c.key_id == _ID)


class UseCounter:
    """Counts uses of keys in this process, and writes the counts to `database`."""

    def __init__(self, database: Database) -> None:
        self._batch: WriteBehindCounter[tuple[str, int]] = WriteBehindCounter(
            "Uses of keys", partial(_write, database)
        )
        self.write = self._batch.write

    def add(self, key_id: str) -> None:
        """Count one use at the present minute. Does no I/O."""
        self._batch.add((key_id, int(time.time()) // 60))


def _write(database: Database, counts: Counter[tuple[str, int]]) -> None:
    insert = database.insert(USES).from_select(["key_id", "minute", "uses"], _USE)
    add = insert.on_conflict_do_update(
        index_elements=["key_id", "minute"],
        set_={"uses": USES.c.uses + insert.excluded.uses},
    )
    last: dict[str, int] = {}
    for key_id, minute in counts:
        last[key_id] = max(last.get(key_id, 0), minute)
    # The statements do not depend on the number of keys, because sqlite3 caches the last 128 of each
    # connection, with their parameters. The rows are sorted, so that two processes can't deadlock.
    with database.changing(generation=False) as change:
        seen = [{"id": key_id, "at": last[key_id] * 60.0} for key_id in sorted(last)]
        change.connection.execute(_SEEN, seen)
        rows = [
            {"id": key_id, "minute": minute, "uses": uses}
            for (key_id, minute), uses in sorted(counts.items())
        ]
        change.connection.execute(add, rows)
        oldest = int(time.time() - KEPT) // 60
        change.connection.execute(sa.delete(USES).where(USES.c.minute < oldest))


def by_hour(database: Database, key_ids: Iterable[str]) -> dict[str, list[int]]:
    """Return each key's uses in each of the last `HOURS` hours, the present one last.

    Raises AuthorityUnavailable.
    """
    ids = list(key_ids)
    this_hour = int(time.time()) // 3600
    counts = {key_id: [0] * HOURS for key_id in ids}
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
                counts[row.key_id][position] = int(row.uses)
    return counts


def by_day(database: Database, key_id: str) -> dict[int, int]:
    """Return a key's uses on each of the last `DAYS` days (UTC) by the day's beginning, today last.

    The beginnings are in seconds since the epoch. Raises AuthorityUnavailable.
    """
    today = int(time.time()) // 86400
    day = (USES.c.minute // 1440).label("day")
    query = (
        sa.select(day, sa.func.sum(USES.c.uses).label("uses"))
        .where(USES.c.key_id == key_id, USES.c.minute >= (today - DAYS + 1) * 1440)
        .group_by(day)
    )
    with database.reading() as connection:
        counts = {int(row.day): int(row.uses) for row in connection.execute(query)}
    return {n * 86400: counts.get(n, 0) for n in range(today - DAYS + 1, today + 1)}

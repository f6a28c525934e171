"""The report of mode observe: requests that it would have refused, for operators to read first.

There is one row for each reason, rule, key and address, with a count and the first and last time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import sqlalchemy as sa

from mlflow_hokusai_auth.core.types import Principal

from .database import Database
from .tables import OBSERVED
from .write_behind import WriteBehindCounter

#: Seconds for which a row is kept after its last request.
KEPT = 31 * 86400.0
#: Above this number of rows, further requests count under `OTHERS`: anybody may send requests.
MAX_ROWS = 10_000
OTHERS = "others"


class WouldRefuse(NamedTuple):
    """A request that would have been refused, at `minute` (minutes since the epoch)."""

    reason: str
    rule: str
    key_id: str
    address: str
    owner: str
    minute: int

    @classmethod
    def now(cls, reason: str, rule: str, principal: Principal | None, address: str) -> WouldRefuse:
        """Return the report on a request of this minute; `principal` is None for an unknown key."""
        key_id, owner = (principal.key_id, principal.owner) if principal else ("", "")
        return cls(reason, rule, key_id, address, owner, int(time.time()) // 60)


class Observed:
    """Counts such requests in this process, and writes the counts to `database`."""

    def __init__(self, database: Database) -> None:
        self._batch: WriteBehindCounter[WouldRefuse] = WriteBehindCounter(
            "Reports of mode observe", partial(_write, database)
        )
        self.add = self._batch.add
        self.write = self._batch.write


def _write(database: Database, counts: Counter[WouldRefuse]) -> None:
    keys = ("reason", "rule", "key_id", "address")
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    with database.changing(generation=False) as change:
        oldest = time.time() - KEPT
        change.connection.execute(sa.delete(OBSERVED).where(OBSERVED.c.last_at < oldest))
        stored = change.connection.execute(sa.select(sa.func.count()).select_from(OBSERVED))
        full = stored.scalar_one() + len(counts) > MAX_ROWS
        for request, count in sorted(counts.items()):
            fields = {**request._asdict(), "rule": request.rule[:255]}
            at = fields.pop("minute") * 60.0
            if full:
                fields.update(rule=OTHERS, key_id=OTHERS, address=OTHERS, owner=OTHERS)
            row = rows.setdefault(
                tuple(fields[name] for name in keys), {**fields, "requests": 0, "first_at": at}
            )
            row["requests"] += count
            row["last_at"] = max(row.get("last_at", at), at)
        insert = database.insert(OBSERVED)
        new = insert.excluded
        statement = insert.on_conflict_do_update(
            index_elements=keys,
            set_={
                "requests": OBSERVED.c.requests + new.requests,
                "owner": new.owner,
                "last_at": sa.case(
                    (OBSERVED.c.last_at > new.last_at, OBSERVED.c.last_at), else_=new.last_at
                ),
            },
        )
        change.connection.execute(statement, list(rows.values()))


def report(database: Database, since: float) -> list[Mapping[str, Any]]:
    """Return the rows with a request after `since` (seconds since the epoch), most requests first.

    Raises AuthorityUnavailable.
    """
    query = (
        sa.select(OBSERVED)
        .where(OBSERVED.c.last_at >= since)
        .order_by(OBSERVED.c.requests.desc(), *OBSERVED.primary_key)
    )
    with database.reading() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]

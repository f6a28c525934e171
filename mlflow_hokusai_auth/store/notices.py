"""Events for keys that end soon (`key.ending`) or that nobody uses (`key.unused`).

Each process of each server looks for such keys once an hour. A row of the table of notices
decides which process writes the event, so there is one event for each key and threshold. If the key's
end is changed, or the key is used again, the thresholds count anew.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from .database import Actor, Change, Database
from .records import KeyFilter, conditions
from .tables import KEYS, NOTICES

#: Days before its end at which a key is announced.
ENDING_DAYS = (14, 3)
#: Days without a use after which a key is announced.
UNUSED_DAYS = 90
#: Events of each notice in one look, at most: a large store that is upgraded may have thousands.
BATCH = 500

DAY = 86400.0
#: The actor of events that no person caused.
SERVER = Actor("server")

#: The last use of a key, or its creation if it was never used.
_LAST_USED = sa.func.coalesce(KEYS.c.last_used_at, KEYS.c.created_at)


@dataclass(frozen=True, slots=True)
class Notice:
    """A threshold: `days` before the end, or without a use, by `event`."""

    event: str
    days: int
    #: The nearer threshold, in days, from which on another notice is given instead.
    until: int = 0

    @property
    def name(self) -> str:
        """The name in the table of notices, such as "ending.14"."""
        return f"{self.event.removeprefix('key.')}.{self.days}"

    @property
    def about(self) -> sa.ColumnElement[float]:
        """The time that the notice is about: the end, or the last use."""
        return KEYS.c.expires_at if self.event == "key.ending" else _LAST_USED

    def applies(self, now: float) -> tuple[sa.ColumnElement[bool], ...]:
        """Return the conditions on `KEYS` at `now`, in seconds since the epoch."""
        if self.event == "key.unused":
            return tuple(conditions(KeyFilter(state="active", unused_for=self.days * DAY), now))
        return (
            *conditions(KeyFilter(state="active", expires_within=self.days * DAY), now),
            # A key that was made for a few days needs no notice: its maker knows that it ends soon.
            KEYS.c.created_at < KEYS.c.expires_at - self.days * DAY,
        )

    def is_due(self, now: float) -> tuple[sa.ColumnElement[bool], ...]:
        """Return the conditions under which this notice is the one to give, and was not given."""
        given = sa.exists().where(
            NOTICES.c.key_id == KEYS.c.key_id,
            NOTICES.c.notice == self.name,
            NOTICES.c.about == self.about,
        )
        nearer = (KEYS.c.expires_at > now + self.until * DAY,) if self.until else ()
        return (*self.applies(now), *nearer, ~given)

    def audit(self, change: Change, row: Any) -> None:
        """Write the event about the key in `row`."""
        time_of = "expires_at" if self.event == "key.ending" else "last_used_at"
        detail = {"owner": row.owner, "days": self.days, time_of: getattr(row, time_of)}
        change.audit(self.event, SERVER, row.key_id, **detail)


_FAR, _NEAR = ENDING_DAYS
NOTICES_GIVEN = (
    Notice("key.ending", _FAR, until=_NEAR),
    Notice("key.ending", _NEAR),
    Notice("key.unused", UNUSED_DAYS),
)


def counts(database: Database) -> Mapping[tuple[str, int], int]:
    """Return the number of active keys to which each notice applies, by event and days.

    A key that ends within the nearer number of days counts for the farther one as well. Raises
    AuthorityUnavailable.
    """
    now = time.time()
    with database.reading() as connection:
        return {
            (notice.event, notice.days): int(
                connection.execute(
                    sa.select(sa.func.count()).select_from(KEYS).where(*notice.applies(now))
                ).scalar_one()
            )
            for notice in NOTICES_GIVEN
        }


def announce(database: Database) -> bool:
    """Write the events that are due. Return True if there may be more than `BATCH` of one notice.

    Raises AuthorityUnavailable.
    """
    now = time.time()
    more = False
    for notice in NOTICES_GIVEN:
        due = sa.select(KEYS, notice.about.label("about")).where(*notice.is_due(now))
        with database.reading() as connection:
            # All processes go through the keys in one order, so that two can't deadlock.
            rows = connection.execute(due.order_by(KEYS.c.key_id).limit(BATCH)).all()
        if rows:
            _give(database, notice, rows)
        more = more or len(rows) == BATCH
    return more


def _give(database: Database, notice: Notice, rows: Any) -> None:
    insert = database.insert(NOTICES)
    statement = insert.on_conflict_do_update(
        index_elements=["key_id", "notice"],
        set_={"about": insert.excluded.about},
        where=NOTICES.c.about != insert.excluded.about,
    ).returning(NOTICES.c.key_id)
    with database.changing(generation=False) as change:
        for row in rows:
            values = {"key_id": row.key_id, "notice": notice.name, "about": row.about}
            # No row is changed, and so none returned, if another process was faster.
            if change.connection.execute(statement, values).first():
                notice.audit(change, row)

"""The history of a key: who made it, what it replaced, who ended it, and where it was used from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import sqlalchemy as sa

from .database import Database
from .tables import AUDIT, KEYS

#: Addresses that are shown, at most.
MAX_ADDRESSES = 10

Event = Mapping[str, Any]


class Address(NamedTuple):
    """An address that a key was used from, and the last time, in seconds since the epoch."""

    address: str
    last_at: float


class History(NamedTuple):
    """The past of a key, as far as the store knows it. Events are rows of the audit log."""

    #: The event that made the key; None for a key older than the audit log.
    made: Event | None
    #: The id of the key that it replaced.
    replaces: str | None
    #: The event that revoked the key.
    revoked: Event | None
    #: The addresses from which it signed in and managed keys, last first. Other uses leave none.
    addresses: list[Address]


def of(database: Database, key_id: str) -> History:
    """Return the history of a key. Raises AuthorityUnavailable."""
    with database.reading() as connection:
        replaced = sa.select(KEYS.c.key_id).where(KEYS.c.replaced_by == key_id).limit(1)
        replaces = connection.execute(replaced).scalar_one_or_none()

        def last(of: str, *events: str) -> Event | None:
            query = sa.select(AUDIT).where(AUDIT.c.key_id == of, AUDIT.c.event.in_(events))
            query = query.order_by(AUDIT.c.id.desc()).limit(1)
            row = connection.execute(query).mappings().one_or_none()
            return None if row is None else dict(row)

        # A rotation is an event of the old key.
        made = last(replaces, "key.rotated") if replaces else None
        last_at = sa.func.max(AUDIT.c.at).label("last_at")
        addresses = connection.execute(
            sa.select(AUDIT.c.address, last_at)
            .where(AUDIT.c.actor_key_id == key_id, AUDIT.c.address != "")
            .group_by(AUDIT.c.address)
            .order_by(last_at.desc())
            .limit(MAX_ADDRESSES)
        )
        return History(
            made or last(key_id, "key.created", "key.imported"),
            replaces,
            last(key_id, "key.revoked", "key.leaked"),
            [Address(row.address, row.last_at) for row in addresses],
        )

"""What the store knows of a key, and how keys are chosen for a list."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from .database import StoreError
from .tables import KEYS

STATES = ("active", "deprecated", "expired", "revoked")


class KeyNotFound(StoreError):
    """No key has this id."""


class KeyConflict(StoreError):
    """The key is not in a state in which this can be done."""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What the store knows of a key; never the key. Times are seconds since the epoch."""

    key_id: str
    environment: str
    owner: str
    name: str
    scopes: tuple[str, ...]
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    note: str = ""
    #: Addresses and networks (CIDR) that the key may be used from; none for everywhere.
    networks: tuple[str, ...] = ()
    #: Requests in any hour, or None without a limit.
    rate_limit_per_hour: int | None = None
    #: When `replaced_by`, another key's id, was made to replace it; it ends at `expires_at`.
    deprecated_at: float | None = None
    replaced_by: str | None = None
    #: To the minute.
    last_used_at: float | None = None

    def state(self, now: float) -> str:
        """One of `STATES` at `now`; "deprecated" is replaced, and good until it expires."""
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and self.expires_at <= now:
            return "expired"
        return "active" if self.deprecated_at is None else "deprecated"


@dataclass(frozen=True, slots=True)
class KeyFilter:
    """Which keys to list; None for any."""

    owner: str | None = None
    environment: str | None = None
    #: One of `STATES`.
    state: str | None = None
    #: A part of the owner, the name or the id, in any case.
    query: str | None = None


EVERY = KeyFilter()


def from_row(row: Any) -> KeyRecord:
    """The record in a row of `KEYS`."""
    fields = {name: getattr(row, name) for name in KeyRecord.__slots__}
    return KeyRecord(**{**fields, "scopes": tuple(row.scopes), "networks": tuple(row.networks)})


def conditions(which: KeyFilter, now: float) -> Collection[sa.ColumnElement[bool]]:
    """What holds in `KEYS` for the keys that `which` describes; raises StoreError for a wrong state."""
    found: list[sa.ColumnElement[bool]] = []
    if which.owner is not None:
        found.append(KEYS.c.owner == which.owner)
    if which.environment is not None:
        found.append(KEYS.c.environment == which.environment)
    if which.query is not None:
        # One text is searched three times as fast as three are.
        text = KEYS.c.owner + " " + KEYS.c.name + " " + KEYS.c.key_id
        found.append(text.icontains(which.query, autoescape=True))
    if which.state is not None:
        if which.state not in STATES:
            raise StoreError(f"state must be one of {', '.join(STATES)}.")
        ended = sa.and_(KEYS.c.expires_at.is_not(None), KEYS.c.expires_at <= now)
        if which.state == "revoked":
            found.append(KEYS.c.revoked_at.is_not(None))
        else:
            found += [KEYS.c.revoked_at.is_(None), ended if which.state == "expired" else ~ended]
            if which.state in ("active", "deprecated"):
                replaced = KEYS.c.deprecated_at.is_not(None)
                found.append(replaced if which.state == "deprecated" else ~replaced)
    return found

"""What the store knows of a key, how that is kept, and how keys are chosen for a list."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from mlflow_hokusai_auth.core import keys as key_format
from mlflow_hokusai_auth.core.errors import InvalidRequest, KeyNotFound

from .database import Change
from .tables import KEYS

STATES = ("active", "deprecated", "expired", "revoked")


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
    """The conditions on `KEYS` that `which` describes. Raises InvalidRequest for an unknown state."""
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
            raise InvalidRequest(f"state must be one of {', '.join(STATES)}.")
        ended = sa.and_(KEYS.c.expires_at.is_not(None), KEYS.c.expires_at <= now)
        if which.state == "revoked":
            found.append(KEYS.c.revoked_at.is_not(None))
        else:
            found += [KEYS.c.revoked_at.is_(None), ended if which.state == "expired" else ~ended]
            if which.state in ("active", "deprecated"):
                replaced = KEYS.c.deprecated_at.is_not(None)
                found.append(replaced if which.state == "deprecated" else ~replaced)
    return found


def new(key: str, *, owner: str, scopes: Iterable[str], **fields: Any) -> KeyRecord:
    """The record of a new key; `fields` are others of its own that are not to be empty."""
    return KeyRecord(
        key_id=new_id(),
        environment=key_format.environment(key),
        owner=owner,
        scopes=tuple(sorted(set(scopes))),
        created_at=time.time(),
        **{"name": "", **fields},
    )


def new_id() -> str:
    """A public name for a key, which tells nothing of it."""
    return f"key_{secrets.token_hex(8)}"


def insert(change: Change, record: KeyRecord, key: str) -> None:
    """Store `record` with the digest of its key. Raises IntegrityError for one that is there."""
    fields = {name: getattr(record, name) for name in record.__slots__}
    change.connection.execute(
        sa.insert(KEYS).values(**columns(fields), digest=key_format.digest(key))
    )


def columns(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` as JSON and the columns have them."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()
    }


def audited(record: KeyRecord) -> dict[str, Any]:
    """What the audit log says of a new key."""
    return columns(
        {
            name: getattr(record, name)
            for name in ("owner", "name", "scopes", "expires_at", "networks", "rate_limit_per_hour")
        }
    )


def get(connection: sa.Connection, key_id: str) -> KeyRecord:
    """The record with this id; raises KeyNotFound."""
    row = None
    # PostgreSQL takes a NUL for an error of ours.
    if key_id.isascii() and key_id.isprintable():
        row = connection.execute(sa.select(KEYS).where(KEYS.c.key_id == key_id)).one_or_none()
    if row is None:
        raise KeyNotFound(
            f"There is no key {key_format.redact(key_id)!r}; `hokusai-auth keys list` shows them."
        )
    return from_row(row)

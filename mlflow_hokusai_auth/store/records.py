"""Records of keys: their fields, their rows in the table of keys, and filters for lists."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from mlflow_hokusai_auth.core import keys as key_format
from mlflow_hokusai_auth.core.errors import (
    Forbidden,
    InvalidRequest,
    KeyConflict,
    KeyNotFound,
    StaffNarrowed,
)
from mlflow_hokusai_auth.core.scopes import KNOWN, are_staff
from mlflow_hokusai_auth.core.suggest import did_you_mean
from mlflow_hokusai_auth.core.trust import Trust

from .database import Change
from .tables import KEYS, LINKS, TRUSTS

STATES = ("active", "deprecated", "expired", "revoked")
#: The values of `KeyFilter.state`: a state, or "valid" for the first two, or "ended" for the others.
STATE_FILTERS = (*STATES, "valid", "ended")


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """The store's data about a key, without the key itself. Times are seconds since the epoch."""

    key_id: str
    environment: str
    owner: str
    name: str
    scopes: tuple[str, ...]
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    note: str = ""
    #: Addresses and networks (CIDR) from which the key may be used; empty for all.
    networks: tuple[str, ...] = ()
    #: Requests in any hour, or None without a limit.
    rate_limit_per_hour: int | None = None
    #: The time at which a rotation replaced the key; it ends at `expires_at`.
    deprecated_at: float | None = None
    #: The id of the key that replaced it.
    replaced_by: str | None = None
    #: The start of the minute of its last use.
    last_used_at: float | None = None
    #: Patterns (`core.ownership`) of the registered models that the key may change; empty for all.
    models: tuple[str, ...] = ()
    #: True if the key may not delete anything.
    no_delete: bool = False
    #: The trust and the job, if the key was exchanged for an identity token.
    trust_id: str | None = None
    source: str = ""
    #: The last four characters of the key; None for a key that an earlier version stored.
    last_four: str | None = None

    def state(self, now: float) -> str:
        """Return one of `STATES` at `now`. A "deprecated" (replaced) key is good until it expires."""
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and self.expires_at <= now:
            return "expired"
        return "active" if self.deprecated_at is None else "deprecated"


@dataclass(frozen=True, slots=True)
class KeyFilter:
    """The fields by which keys are chosen for a list; None matches every key."""

    owner: str | None = None
    #: Keys that were exchanged for an identity token match only if this is `keys.EPHEMERAL`.
    environment: str | None = None
    #: One of `STATE_FILTERS`.
    state: str | None = None
    #: A part of the owner, the name or the id; case does not matter.
    query: str | None = None
    #: A scope that the key has, among others.
    scope: str | None = None
    #: Valid keys that expire within so many seconds.
    expires_within: float | None = None
    #: Valid keys that were not used, and not made, within so many seconds.
    unused_for: float | None = None


EVERY = KeyFilter()
#: Characters in `KeyRecord.last_four`.
LAST = 4


def from_row(row: Any) -> KeyRecord:
    """Return the record in a row of `KEYS`."""
    fields = {name: getattr(row, name) for name in KeyRecord.__slots__}
    lists = {name: tuple(fields[name]) for name in ("scopes", "networks", "models")}
    return KeyRecord(**{**fields, **lists})


def conditions(which: KeyFilter, now: float) -> Collection[sa.ColumnElement[bool]]:
    """Return `which` as conditions on `KEYS`. Raises InvalidRequest for an unknown state or scope."""
    wanted: list[sa.ColumnElement[bool]] = []
    if which.owner is not None:
        wanted.append(KEYS.c.owner == which.owner)
    if which.environment is not None:
        wanted.append(KEYS.c.environment == which.environment)
    if which.environment != key_format.EPHEMERAL:
        wanted.append(KEYS.c.trust_id.is_(None))
    if which.query is not None:
        # Searching one joined text is three times as fast as searching three.
        text = KEYS.c.owner + " " + KEYS.c.name + " " + KEYS.c.key_id
        wanted.append(text.icontains(which.query, autoescape=True))
    if which.scope is not None:
        wanted.append(_has_scope(which.scope))
    states = _states(now)
    if which.state is not None:
        if which.state not in states:
            raise InvalidRequest(
                f"state must be one of {', '.join(STATE_FILTERS)}."
                f"{did_you_mean(which.state, STATE_FILTERS)}"
            )
        wanted.append(states[which.state])
    if which.expires_within is not None:
        wanted += [states["valid"], KEYS.c.expires_at <= now + which.expires_within]
    if which.unused_for is not None:
        seen = sa.func.coalesce(KEYS.c.last_used_at, KEYS.c.created_at)
        wanted += [states["valid"], seen <= now - which.unused_for]
    return wanted


def state_number(now: float) -> sa.ColumnElement[float | str]:
    """Return the place of a key's state in `STATES` at `now`."""
    states = _states(now)
    return sa.case(*((states[state], number) for number, state in enumerate(STATES)))


def _states(now: float) -> dict[str, sa.ColumnElement[bool]]:
    """Return the condition for each of `STATE_FILTERS` at `now`."""
    revoked = KEYS.c.revoked_at.is_not(None)
    expired = sa.and_(KEYS.c.expires_at.is_not(None), KEYS.c.expires_at <= now)
    replaced = KEYS.c.deprecated_at.is_not(None)
    valid = sa.and_(~revoked, ~expired)
    return {
        "active": sa.and_(valid, ~replaced),
        "deprecated": sa.and_(valid, replaced),
        "expired": sa.and_(~revoked, expired),
        "revoked": revoked,
        "valid": valid,
        "ended": ~valid,
    }


def _has_scope(scope: str) -> sa.ColumnElement[bool]:
    if scope not in KNOWN:
        known = ", ".join(sorted(KNOWN))
        raise InvalidRequest(f"scope must be one of {known}.{did_you_mean(scope, KNOWN)}")
    return sa.cast(KEYS.c.scopes, sa.Text).contains(f'"{scope}"', autoescape=True)


def new(key: str, *, owner: str, scopes: Iterable[str], **fields: Any) -> KeyRecord:
    """Return the record of a new `key`; `fields` are the optional ones of `KeyRecord`."""
    return KeyRecord(
        key_id=new_id(),
        environment=key_format.environment(key),
        owner=owner,
        scopes=tuple(sorted(set(scopes))),
        created_at=time.time(),
        last_four=key[-LAST:],
        **{"name": "", **fields},
    )


def new_id() -> str:
    """Return a new random id for a key."""
    return f"key_{secrets.token_hex(8)}"


def refuse_narrowed_staff(record: KeyRecord | Trust) -> None:
    """Raise StaffNarrowed if `record` is narrowed, and its scopes are those of the server's staff."""
    if (record.models or record.no_delete) and are_staff(frozenset(record.scopes)):
        message = (
            "models and no_delete narrow a supplier's key, and staff's keys are never narrowed: "
            f"{', '.join(record.scopes)}. Give the key model:read or model:write instead, or leave the "
            "narrowing out."
        )
        raise StaffNarrowed(message, {"models" if record.models else "no_delete": message})


def refuse_look_alike(change: Change, owner: str, but: str = "") -> None:
    """Raise KeyConflict if the owner of a key, trust or waiting link differs from `owner` in case only.

    An owner that has one may have more, even if both spellings exist. The key `but` does not count.
    """
    others = KEYS.c.key_id != but
    known = sa.select(KEYS.c.key_id).where(KEYS.c.owner == owner, others).limit(1)
    if change.connection.execute(known).first() is not None:
        return
    # Neither database folds all letters as Python does.
    owners = sa.union(
        sa.select(KEYS.c.owner).where(others),
        sa.select(TRUSTS.c.owner),
        sa.select(LINKS.c.owner).where(*waiting_links(time.time())),
    )
    found = set(change.connection.execute(owners).scalars())
    for other in () if owner in found else sorted(found):
        if other.casefold() == owner.casefold():
            message = (
                f"The owner {other!r} exists, and differs in upper and lower case only. Use that "
                "spelling, or a name that nobody takes for it."
            )
            raise KeyConflict(message, {"owner": message})


def refuse_revoked(change: Change, key_id: str) -> None:
    """Raise Forbidden if the key of a request, which was good when it came, is revoked now."""
    revoked = sa.select(KEYS.c.key_id).where(
        KEYS.c.key_id == key_id, KEYS.c.revoked_at.is_not(None)
    )
    if change.connection.execute(revoked).first() is not None:
        raise Forbidden(f"The key {key_id} was revoked just now.")


def waiting_links(now: float) -> tuple[sa.ColumnElement[bool], ...]:
    """Return the conditions for a one-time link that can be opened at `now`."""
    return (LINKS.c.opened_at.is_(None), LINKS.c.revoked_at.is_(None), LINKS.c.expires_at > now)


def insert(change: Change, record: KeyRecord, key: str, *, token_digest: str | None = None) -> None:
    """Store `record` with the digest of `key`. Raises IntegrityError if the key is stored already."""
    fields = {name: getattr(record, name) for name in record.__slots__}
    digests = {"digest": key_format.digest(key), "token_digest": token_digest}
    change.connection.execute(sa.insert(KEYS).values(**columns(fields), **digests))


def columns(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return `fields` with lists for tuples, as JSON and the columns need them."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()
    }


def audited(record: KeyRecord) -> dict[str, Any]:
    """Return the fields of a new key that go into the audit log."""
    names = ("owner", "name", "scopes", "expires_at", "networks", "rate_limit_per_hour")
    return columns({name: getattr(record, name) for name in (*names, "models", "no_delete")})


def get(connection: sa.Connection, key_id: str) -> KeyRecord:
    """Return the record with this id. Raises KeyNotFound."""
    row = None
    # PostgreSQL raises an error for a NUL.
    if key_id.isascii() and key_id.isprintable():
        row = connection.execute(sa.select(KEYS).where(KEYS.c.key_id == key_id)).one_or_none()
    if row is None:
        raise KeyNotFound(
            f"There is no key {key_format.redact(key_id)!r}; `hokusai-auth keys list` shows them."
        )
    return from_row(row)


def valid_of(connection: sa.Connection, owner: str) -> list[KeyRecord]:
    """Return all valid keys of `owner`, newest first, exchanged ones included."""
    # PostgreSQL raises an error for a NUL.
    if not owner.isprintable():
        return []
    query = sa.select(KEYS).where(KEYS.c.owner == owner, _states(time.time())["valid"])
    return [from_row(row) for row in connection.execute(query.order_by(KEYS.c.created_at.desc()))]

"""The embedded key store: it creates, looks up, edits, rotates and revokes keys.

Only a key's digest is stored. A lookup is one indexed query by the digest.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import sqlalchemy as sa

from mlflow_hokusai_auth.core import keys as key_format
from mlflow_hokusai_auth.core.errors import InvalidRequest, KeyConflict
from mlflow_hokusai_auth.core.lifetimes import UNLIMITED, Lifetimes
from mlflow_hokusai_auth.core.scopes import ADMIN
from mlflow_hokusai_auth.core.types import Principal, Rejected

from . import key_pages, records, trusts
from .database import NOBODY, Actor, Change, Database
from .key_pages import NEWEST_FIRST, KeyPage, Order
from .records import EVERY, STATES, KeyFilter, KeyRecord, conditions, from_row
from .tables import KEYS, LINKS

#: Seconds for which a rotated key stays good, by default.
OVERLAP = 86400.0
#: Keys on one page of `page`, at most.
MAX_RESULTS = 1000

# The statement is built once, because building it takes longer than executing it.
_LOOKUP = sa.select(
    KEYS.c.key_id,
    KEYS.c.owner,
    KEYS.c.scopes,
    KEYS.c.expires_at,
    KEYS.c.revoked_at,
    KEYS.c.networks,
    KEYS.c.rate_limit_per_hour,
    KEYS.c.deprecated_at,
    KEYS.c.models,
    KEYS.c.no_delete,
    KEYS.c.source,
).where(KEYS.c.digest == sa.bindparam("digest"))


class RevokedOwner(NamedTuple):
    """The end of all that gives keys to an owner."""

    #: The keys that were ended, exchanged keys too, and why the others stay.
    keys: list[KeyRecord]
    kept: list[KeyConflict]
    #: The ids of the waiting links that were revoked, and of the trusts that were removed.
    links: list[str]
    trusts: list[str]


class LocalStore:
    """The keys in the database at `uri`, an SQLAlchemy URL."""

    name = "local"
    by_address = False
    watched = True

    def __init__(self, uri: str) -> None:
        self.database = Database(uri)
        self.generation = self.database.generation
        self.migrate = self.database.migrate
        self.is_current = self.database.is_current

    def lookup(self, key: str, address: str = "") -> Principal | Rejected:
        """Return the principal of `key`, or Rejected if it is unknown. Raises AuthorityUnavailable."""
        with self.database.reading() as connection:
            row = connection.execute(_LOOKUP, {"digest": key_format.digest(key)}).one_or_none()
        if row is None:
            return Rejected()
        return _principal(row)

    # Every method below raises AuthorityUnavailable, and KeyNotFound for an unknown id.

    def create(
        self,
        *,
        owner: str,
        scopes: Iterable[str],
        environment: str = "live",
        by: Actor = NOBODY,
        **fields: Any,
    ) -> tuple[KeyRecord, str]:
        """Create a key. Return its record and the key itself, which can't be read again.

        `fields` are optional ones of `KeyRecord`: name, note, expires_at, networks,
        rate_limit_per_hour, models, no_delete. Raises StaffNarrowed, and KeyConflict if another owner
        differs from `owner` in case only.
        """
        key = key_format.generate(environment)
        record = records.new(key, owner=owner, scopes=scopes, **fields)
        records.refuse_narrowed_staff(record)
        with self.database.changing() as change:
            records.refuse_look_alike(change, record.owner)
            records.insert(change, record, key)
            change.audit("key.created", by, record.key_id, **records.audited(record))
        return record, key

    def add(
        self, key: str, *, owner: str, scopes: Iterable[str], by: Actor = NOBODY, **fields: Any
    ) -> KeyRecord:
        """Import `key`.

        Raises InvalidRequest for a wrong form, StaffNarrowed, and KeyConflict for a stored key and if
        another owner differs from `owner` in case only.
        """
        if not key_format.importable(key):
            reason = key_format.problem(key) or (
                "it must be hk_live_, hk_test_ or hk_dev_ and 32 or 40 letters and digits, or a key "
                "of this package"
            )
            message = f"This is not a key that can be imported: {reason}."
            raise InvalidRequest(message, {"key": message})
        record = records.new(key, owner=owner, scopes=scopes, **fields)
        records.refuse_narrowed_staff(record)
        try:
            with self.database.changing() as change:
                records.refuse_look_alike(change, record.owner)
                records.insert(change, record, key)
                change.audit("key.imported", by, record.key_id, **records.audited(record))
        except sa.exc.IntegrityError:
            message = "This key is in the store already."
            raise KeyConflict(message, {"key": message}) from None
        return record

    def page(
        self,
        which: KeyFilter = EVERY,
        *,
        order: Order = NEWEST_FIRST,
        max_results: int = 100,
        page_token: str | None = None,
    ) -> KeyPage:
        """Return a page of the keys that match `which`.

        Raises InvalidRequest for an unknown `page_token`, for one of another order, and for
        `max_results` that is not from 1 to `MAX_RESULTS`.
        """
        if not 1 <= max_results <= MAX_RESULTS:
            raise InvalidRequest(f"max_results must be from 1 to {MAX_RESULTS}.")
        now = time.time()
        at = None if page_token is None else key_pages.place(order, page_token)
        places, more = self._places(which, order, now, at, max_results)
        if at is not None and at.back and not more:
            # The first page is a whole one, even if the way back to it is shorter.
            at = None
            places, more = self._places(which, order, now, at, max_results)
        total, before = self._count(which, now), 0
        if at is not None and places:
            first = key_pages.Place(*places[0][1:], back=True)
            value = key_pages.expression(order, now)
            before = self._count(which, now, key_pages.beyond(order, value, first))

        def token(row: int, *, back: bool) -> str:
            return key_pages.token(order, key_pages.Place(*places[row][1:], back))

        return KeyPage(
            [record for record, *_ in places],
            token(-1, back=False) if places and before + len(places) < total else None,
            token(0, back=True) if before else None,
            total,
            before,
        )

    def _places(
        self,
        which: KeyFilter,
        order: Order,
        now: float,
        at: key_pages.Place | None,
        max_results: int,
    ) -> tuple[list[tuple[KeyRecord, float | str, str]], bool]:
        """Return the records of the page at `at`, with their places, and whether more lie beyond."""
        value = key_pages.expression(order, now)
        back = at is not None and at.back
        query = sa.select(KEYS, value.label("place")).where(*conditions(which, now))
        if at is not None:
            query = query.where(key_pages.beyond(order, value, at))
        query = query.order_by(*key_pages.ordered(order, value, back=back)).limit(max_results + 1)
        with self.database.reading() as connection:
            rows = connection.execute(query).all()
        found = [(from_row(row), row.place, row.key_id) for row in rows[:max_results]]
        return found[::-1] if back else found, len(rows) > max_results

    def _count(self, which: KeyFilter, now: float, *more: sa.ColumnElement[bool]) -> int:
        """Return the number of keys that match `which` and the conditions `more`."""
        query = sa.select(sa.func.count()).select_from(KEYS)
        with self.database.reading() as connection:
            matching = query.where(*conditions(which, now), *more)
            return int(connection.execute(matching).scalar_one())

    def each(self, which: KeyFilter = EVERY) -> Iterator[KeyRecord]:
        """Yield every key that matches `which`, newest first."""
        at: key_pages.Place | None = None
        more = True
        while more:
            places, more = self._places(which, NEWEST_FIRST, time.time(), at, MAX_RESULTS)
            for record, *_ in places:
                yield record
            if more:
                at = key_pages.Place(*places[-1][1:])

    def counts(self) -> dict[str, int]:
        """Return the number of keys in each state."""
        now = time.time()
        return {state: self._count(KeyFilter(state=state), now) for state in STATES}

    def get(self, key_id: str) -> KeyRecord:
        """Return the record with this id."""
        with self.database.reading() as connection:
            return records.get(connection, key_id)

    def principal(self, key_id: str) -> Principal:
        """Return what `lookup` returns for the key with this id."""
        return _principal(self.get(key_id))

    def find(self, key: str) -> KeyRecord | None:
        """Return the record of `key`, or None."""
        with self.database.reading() as connection:
            row = connection.execute(
                sa.select(KEYS).where(KEYS.c.digest == key_format.digest(key))
            ).one_or_none()
        return None if row is None else from_row(row)

    def ending_in(self, last_four: str) -> list[KeyRecord]:
        """Return the records of the keys that end in these four characters, newest first.

        They are of keys that this version or a later one stored, and at most `MAX_RESULTS`.
        """
        query = sa.select(KEYS).where(KEYS.c.last_four == last_four)
        query = query.order_by(KEYS.c.created_at.desc()).limit(MAX_RESULTS)
        with self.database.reading() as connection:
            return [from_row(row) for row in connection.execute(query)]

    def owners(self) -> list[str]:
        """Return the owner of each key, once. Raises AuthorityUnavailable."""
        with self.database.reading() as connection:
            return list(connection.execute(sa.select(KEYS.c.owner).distinct()).scalars())

    def edit(self, key_id: str, changes: Mapping[str, Any], by: Actor = NOBODY) -> KeyRecord:
        """Change fields of a key: the owner, the scopes, and the optional ones of `create`.

        Raises StaffNarrowed, and KeyConflict for a revoked key, for a replaced key without an expiry,
        if no key that may manage the others would be left, and if another key's owner differs from the
        new one in case only.
        """
        with self.database.changing() as change:
            before = records.get(change.connection, key_id)
            if before.revoked_at is not None:
                raise KeyConflict(f"Key {key_id} was revoked, so it can't be changed.")
            _refuse_ephemeral(before)
            changed: dict[str, Any] = {
                name: tuple(sorted(set(value))) if name == "scopes" else value
                for name, value in changes.items()
            }
            after = replace(before, **changed)
            if after.deprecated_at is not None and after.expires_at is None:
                raise KeyConflict(f"Key {key_id} was replaced, so it must keep an expiry.")
            records.refuse_narrowed_staff(after)
            if after.owner != before.owner:
                records.refuse_look_alike(change, after.owner, but=key_id)
            if _is_admin(before) and not _is_admin(after):
                _leave_an_admin(change, before)
            change.connection.execute(
                sa.update(KEYS).where(KEYS.c.key_id == key_id).values(records.columns(changed))
            )
            change.audit("key.edited", by, key_id, **records.columns(changed))
        return after

    def rotate(
        self,
        key_id: str,
        *,
        overlap: float = OVERLAP,
        by: Actor = NOBODY,
        lifetimes: Lifetimes = UNLIMITED,
        renewed: bool = False,
    ) -> tuple[KeyRecord, str, KeyRecord]:
        """Replace a key. Return the new record, the new key, and the old record.

        The old key stays good for `overlap` seconds, unless it expires before. The new key has the same
        owner, scopes, limits and narrowing. It also has the same expiry or, if `renewed`, the same
        lifetime, within the maximum of `lifetimes`. Raises KeyConflict for a key that has ended or was
        replaced.
        """
        with self.database.changing() as change:
            return rotate(change, key_id, overlap, by, lifetimes, renewed=renewed)

    def rotate_several(
        self,
        key_ids: Iterable[str],
        *,
        overlap: float = OVERLAP,
        by: Actor = NOBODY,
        lifetimes: Lifetimes = UNLIMITED,
        renewed: bool = False,
    ) -> tuple[list[tuple[KeyRecord, str]], list[KeyConflict]]:
        """Replace keys as `rotate` does, all in one transaction: if the store fails, none is made.

        Return the new records with their keys, and why each of the other keys can't be replaced.
        """
        made, refused = [], []
        with self.database.changing() as change:
            for key_id in key_ids:
                try:
                    new, key, _ = rotate(change, key_id, overlap, by, lifetimes, renewed=renewed)
                    made.append((new, key))
                except KeyConflict as error:
                    refused.append(error)
        return made, refused

    def predecessor_lives(self, key_id: str) -> bool:
        """Return whether the key that `key_id` replaced is still good."""
        replaced = KeyFilter(state="deprecated")
        with self.database.reading() as connection:
            query = sa.select(KEYS.c.key_id).where(
                *conditions(replaced, time.time()), KEYS.c.replaced_by == key_id
            )
            return connection.execute(query).first() is not None

    def revoke(
        self,
        key_id: str,
        by: Actor = NOBODY,
        *,
        force: bool = False,
        event: str = "key.revoked",
        **detail: str,
    ) -> KeyRecord:
        """End a key now and for good; `event` and `detail` go into the audit log.

        A key that is revoked already keeps its time. Links that wait to replace it are revoked.
        Unless `force`, raises KeyConflict for the last key that may manage the others.
        """
        with self.database.changing() as change:
            _revoke_links(change, LINKS.c.replaces, key_id, by)
            record = records.get(change.connection, key_id)
            return _revoke(change, record, by, force=force, event=event, **detail)

    def valid_of(self, owner: str) -> list[KeyRecord]:
        """Return the keys of `owner` that `revoke_owner` ends, newest first."""
        with self.database.reading() as connection:
            return records.valid_of(connection, owner)

    def revoke_owner(self, owner: str, by: Actor = NOBODY, *, force: bool = False) -> RevokedOwner:
        """End all valid keys, waiting links and trusts of `owner`, in one transaction.

        A key that is rotated, a link that is made or opened, a trust that is added or a token that is
        exchanged in the same moment leaves no other key behind, and no link that waits and no trust,
        unless it begins after this has ended. With `force`, no key stays: see `revoke`.
        """
        ended, kept = [], []
        with self.database.changing(generation=False) as change:
            # Trusts come first: an edit or an exchange takes its trust before the generation.
            removed = trusts.remove_of(change, owner, by)
            change.bump()
            # One may have been added just before that. None is added afterwards: see `Trusts.add`.
            removed += trusts.remove_of(change, owner, by)
            links = _revoke_links(change, LINKS.c.owner, owner, by)
            going = records.valid_of(change.connection, owner)
            # If one that may manage the others has to stay, it is that of the caller.
            for record in sorted(going, key=lambda one: one.key_id == by.key_id):
                try:
                    ended.append(_revoke(change, record, by, force=force))
                except KeyConflict as error:
                    kept.append(error)
        return RevokedOwner(ended, kept, links, removed)


def _principal(row: Any) -> Principal:
    """Return the principal of a row of `_LOOKUP`, or of a record."""
    return Principal(
        row.key_id,
        row.owner,
        frozenset(row.scopes),
        row.expires_at,
        row.revoked_at,
        networks=tuple(row.networks),
        rate_limit_per_hour=row.rate_limit_per_hour,
        deprecated_at=row.deprecated_at,
        owner_id=row.owner,
        models=tuple(row.models),
        no_delete=row.no_delete,
        source=row.source,
    )


def check_rotation(change: Change, key_id: str, now: float) -> KeyRecord:
    """Return the record of a key that can be replaced at `now`. Raises KeyNotFound and KeyConflict."""
    old = records.get(change.connection, key_id)
    _refuse_ephemeral(old)
    if (state := old.state(now)) != "active":
        raise KeyConflict(
            f"Key {key_id} was replaced by {old.replaced_by} already."
            if state == "deprecated"
            else f"Key {key_id} is {state}; create a new one instead."
        )
    return old


def rotate(
    change: Change,
    key_id: str,
    overlap: float,
    by: Actor,
    lifetimes: Lifetimes,
    *,
    renewed: bool,
) -> tuple[KeyRecord, str, KeyRecord]:
    """Do what `LocalStore.rotate` does, in `change`. If it raises KeyConflict, nothing changes."""
    now = time.time()
    old = check_rotation(change, key_id, now)
    key = key_format.generate(old.environment)
    new = replace(
        old,
        key_id=records.new_id(),
        created_at=now,
        last_used_at=None,
        expires_at=lifetimes.end_after_rotation(
            old.created_at, old.expires_at, now, renewed=renewed
        ),
        last_four=key[-records.LAST :],
    )
    ends = now + overlap if old.expires_at is None else min(now + overlap, old.expires_at)
    changed: dict[str, Any] = {
        "deprecated_at": now,
        "replaced_by": new.key_id,
        "expires_at": ends,
    }
    records.insert(change, new, key)
    change.connection.execute(sa.update(KEYS).where(KEYS.c.key_id == key_id).values(changed))
    change.audit("key.rotated", by, key_id, replaced_by=new.key_id, expires_at=ends)
    return new, key, replace(old, **changed)


def _revoke(
    change: Change,
    record: KeyRecord,
    by: Actor,
    *,
    force: bool,
    event: str = "key.revoked",
    **detail: str,
) -> KeyRecord:
    """Do what `LocalStore.revoke` does, in `change`. If it raises KeyConflict, nothing changes."""
    if record.revoked_at is not None:
        return record
    if not force and _is_admin(record):
        _leave_an_admin(change, record)
    record = replace(record, revoked_at=time.time())
    change.connection.execute(
        sa.update(KEYS).where(KEYS.c.key_id == record.key_id).values(revoked_at=record.revoked_at)
    )
    change.audit(event, by, record.key_id, **detail)
    return record


def _revoke_links(change: Change, column: sa.Column[Any], value: str, by: Actor) -> list[str]:
    """Revoke the waiting one-time links with `value` in `column`. Return their ids."""
    # PostgreSQL raises an error for a NUL.
    if not value.isprintable():
        return []
    now = time.time()
    these = sa.update(LINKS).where(column == value, *records.waiting_links(now))
    taken = these.values(revoked_at=now).returning(LINKS.c.link_id, LINKS.c.owner)
    links = sorted((row.link_id, row.owner) for row in change.connection.execute(taken))
    for link_id, owner in links:
        change.audit("link.revoked", by, link_id=link_id, owner=owner)
    return [link_id for link_id, _ in links]


def _refuse_ephemeral(record: KeyRecord) -> None:
    if record.trust_id is not None:
        raise KeyConflict(
            f"Key {record.key_id} was exchanged for an identity token, so it is neither changed nor "
            f"replaced: it ends by itself. Exchange another token, or change {record.trust_id}."
        )


def _is_admin(record: KeyRecord) -> bool:
    return not ADMIN.isdisjoint(record.scopes)


def _leave_an_admin(change: Change, going: KeyRecord) -> None:
    """Raise KeyConflict if no active key but `going` may manage keys."""
    now = time.time()
    if going.state(now) == "expired":
        return
    rows = change.connection.execute(
        sa.select(KEYS).where(
            *conditions(KeyFilter(state="active"), now),
            KEYS.c.key_id != going.key_id,
            sa.cast(KEYS.c.scopes, sa.Text).contains("admin"),
        )
    )
    if not any(_is_admin(from_row(row)) for row in rows):
        raise KeyConflict(
            f"{going.key_id} is the last key that may manage keys. Create another one first, or force "
            "it: after that, only the server's command line can create keys."
        )

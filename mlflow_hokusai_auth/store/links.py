"""One-time links: each makes a key at the moment at which the first person opens it.

Only the digest of a link's code is stored. Opening is one transaction: it takes the link's row, makes
the key and writes the audit log. Locks are taken in one order everywhere: the generation, the link, the
keys. Whatever makes a link or a key, or revokes them, takes the generation first. So of a link that is
made and a revocation in the same moment, one is whole before the other begins: the revocation ends the
link, or the link is made after it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from mlflow_hokusai_auth.core import keys as key_format
from mlflow_hokusai_auth.core.errors import Conflict, KeyConflict, NotFound
from mlflow_hokusai_auth.core.lifetimes import UNLIMITED, Lifetimes

from . import records
from .database import NOBODY, Actor, Change, Database
from .keys import OVERLAP, check_rotation, rotate
from .records import KeyFilter, KeyRecord
from .tables import KEYS, LINKS

#: Seconds for which a link can be opened, by default and at most.
LIFETIME = 86400.0
MAX_LIFETIME = 7 * 86400.0
#: Refused attempts to open a link that are audited, each in a row. Further ones are only counted, so
#: that nobody fills the audit log with an old link.
MAX_AUDITED = 100
#: Seconds for which a link is kept after it has expired, to say so to whoever tries it.
KEPT = 30 * 86400.0

_BY_DIGEST = sa.select(LINKS).where(LINKS.c.digest == sa.bindparam("digest"))


@dataclass(frozen=True, slots=True)
class LinkRecord:
    """The store's data about a link, without its code. Times are seconds since the epoch."""

    link_id: str
    owner: str
    #: The fields of the key that the link makes; empty if it replaces one.
    fields: Mapping[str, Any]
    #: The id of the key that the new one replaces, and seconds for which that one stays good.
    replaces: str | None
    overlap: float
    created_at: float
    created_by: str
    expires_at: float
    revoked_at: float | None = None
    opened_at: float | None = None
    #: The address of whoever opened it.
    opened_from: str = ""
    #: The id of the key that was made.
    key_id: str | None = None
    #: Attempts to open it that were refused, and the time of the last one.
    refused: int = 0
    refused_at: float | None = None
    #: True if it can't replace its key: that has ended, was replaced, or belongs to somebody else.
    void: bool = False

    def state(self, now: float) -> str:
        """Return "waiting" or "void", or "opened", "revoked" or "expired" at `now`."""
        if self.opened_at is not None:
            return "opened"
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at <= now:
            return "expired"
        return "void" if self.void else "waiting"


@dataclass(frozen=True, slots=True)
class Opened:
    """A link that was opened now, and the key that it made."""

    link: LinkRecord
    record: KeyRecord
    key: str
    #: The record of the key that was replaced.
    replaced: KeyRecord | None


@dataclass(frozen=True, slots=True)
class Refused:
    """A link that can't be opened: its `state`, or "waiting" with the conflict that keeps it so."""

    link: LinkRecord
    state: str
    conflict: str = ""


class Links:
    """One-time links in `database`. Every method raises AuthorityUnavailable if it can't be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        *,
        owner: str,
        scopes: Iterable[str],
        lifetime: float | None = None,
        expires_in: float = LIFETIME,
        by: Actor = NOBODY,
        **fields: Any,
    ) -> tuple[LinkRecord, str]:
        """Return a new link, and its code, to a key that lives `lifetime` seconds (None: for ever).

        `fields` are those of `LocalStore.create`. The link can be opened for `expires_in` seconds.
        Raises StaffNarrowed, and KeyConflict if another owner differs from `owner` in case only.
        """
        of_key = {"scopes": sorted(set(scopes)), "lifetime": lifetime, **records.columns(fields)}
        with self._database.changing() as change:
            link, code = _new(owner, of_key, None, 0.0, expires_in, by)
            # The key itself is made when the link is opened. This one only shows that it can be.
            record, _ = _key_of(link, time.time(), UNLIMITED)
            records.refuse_narrowed_staff(record)
            records.refuse_look_alike(change, owner)
            shown = {**records.audited(record), "lifetime": lifetime, "expires_at": link.expires_at}
            _insert(change, link, code, by, **shown)
        return link, code

    def create_rotation(
        self,
        key_id: str,
        *,
        overlap: float = OVERLAP,
        expires_in: float = LIFETIME,
        by: Actor = NOBODY,
    ) -> tuple[LinkRecord, str]:
        """Return a new link, and its code, to a key that replaces `key_id` once the link is opened.

        The old key stays good for `overlap` seconds from then on. Raises KeyNotFound, and KeyConflict
        for a key that has ended or was replaced.
        """
        with self._database.changing() as change:
            old = check_rotation(change, key_id, time.time())
            link, code = _new(old.owner, {}, key_id, overlap, expires_in, by)
            shown = {"owner": link.owner, "replaces": key_id, "expires_at": link.expires_at}
            _insert(change, link, code, by, **shown)
        return link, code

    def each(self) -> list[LinkRecord]:
        """Return all links, newest first; each is kept for `KEPT` seconds after it has expired."""
        query = sa.select(LINKS, _void(time.time()))
        query = query.order_by(LINKS.c.created_at.desc(), LINKS.c.link_id)
        with self._database.reading() as connection:
            return [_record(row) for row in connection.execute(query)]

    def waiting_of(self, owner: str) -> list[LinkRecord]:
        """Return the links that `LocalStore.revoke_owner` ends, newest first: void ones as well."""
        now = time.time()
        of_owner = [one for one in self.each() if one.owner == owner]
        return [one for one in of_owner if one.state(now) in ("waiting", "void")]

    def counts(self) -> tuple[int, int, int]:
        """Return the numbers of links that wait, that were refused, and refused after opening."""
        tried, now = LINKS.c.refused > 0, time.time()
        query = sa.select(
            sa.func.count().filter(*records.waiting_links(now), ~_void(now)),
            sa.func.count().filter(tried),
            sa.func.count().filter(tried, LINKS.c.opened_at.is_not(None)),
        ).select_from(LINKS)
        with self._database.reading() as connection:
            waiting, refused, again = connection.execute(query).one()
        return int(waiting), int(refused), int(again)

    def revoke(self, link_id: str, by: Actor = NOBODY) -> LinkRecord:
        """Revoke a link that waits, so that nobody can open it. Raises NotFound and Conflict."""
        now = time.time()
        with self._database.changing(generation=False) as change:
            _get(change.connection, link_id)
            this = sa.update(LINKS).where(LINKS.c.link_id == link_id, *records.waiting_links(now))
            done = change.connection.execute(this.values(revoked_at=now)).rowcount == 1
            link = _get(change.connection, link_id)
            if not done:
                made = f" It made {link.key_id}: revoke that key." if link.key_id else ""
                raise Conflict(f"{link_id} is {link.state(now)} already.{made}")
            change.audit("link.revoked", by, link_id=link_id, owner=link.owner)
        return link

    def open(
        self, code: str, *, lifetimes: Lifetimes = UNLIMITED, by: Actor = NOBODY
    ) -> Opened | Refused | None:
        """Make the key of the link with this code, or say why not; return None for an unknown code.

        Of several people who open a link at once, on any number of servers, exactly one gets a key.
        A refusal is counted, and the first `MAX_AUDITED` are audited, because the link is in more hands
        than one.
        """
        digest = {"digest": key_format.digest(code)}
        with self._database.reading() as connection:
            row = connection.execute(_BY_DIGEST, digest).first()
        # Guessing costs no lock, and an old link not the one that all changes wait for.
        if row is None:
            return None
        conflict = ""
        if _record(row).state(time.time()) == "waiting":
            try:
                with self._database.changing() as change:
                    return _open(change, digest, lifetimes, by)
            except KeyConflict as error:
                conflict = str(error)
        with self._database.changing(generation=False) as change:
            return _refuse(change, digest, by, conflict)


def _open(
    change: Change, digest: Mapping[str, str], lifetimes: Lifetimes, by: Actor
) -> Opened | Refused | None:
    now = time.time()
    taken = change.connection.execute(
        sa.update(LINKS)
        .where(LINKS.c.digest == digest["digest"], *records.waiting_links(now))
        .values(opened_at=now, opened_from=by.address[:64])
    )
    if taken.rowcount != 1:
        return _refuse(change, digest, by)
    link = _record(change.connection.execute(_BY_DIGEST, digest).one())
    replaced = None
    by = Actor(f"link:{link.link_id}", "", by.address, by.request_id)
    if link.replaces is not None:
        record, key, replaced = rotate(
            change, link.replaces, link.overlap, by, lifetimes, renewed=True
        )
        if record.owner != link.owner:
            # An edit gave the key away, and the link is still in the hands of the owner before.
            raise KeyConflict(f"Key {link.replaces} belongs to somebody else now.")
    else:
        # While a link waits, nobody can take a name that differs from its owner's in case only.
        record, key = _key_of(link, now, lifetimes)
        records.insert(change, record, key)
        change.audit("key.created", by, record.key_id, **records.audited(record))
    change.connection.execute(
        sa.update(LINKS).where(LINKS.c.link_id == link.link_id).values(key_id=record.key_id)
    )
    change.audit("link.opened", by, record.key_id, link_id=link.link_id, owner=link.owner)
    return Opened(link, record, key, replaced)


def _refuse(
    change: Change, digest: Mapping[str, str], by: Actor, conflict: str = ""
) -> Refused | None:
    now = time.time()
    change.connection.execute(
        sa.update(LINKS)
        .where(LINKS.c.digest == digest["digest"])
        .values(refused=LINKS.c.refused + 1, refused_at=now)
    )
    row = change.connection.execute(_BY_DIGEST, digest).one_or_none()
    if row is None:  # it was swept just now
        return None
    link = _record(row)
    state = link.state(now)
    known = {"link_id": link.link_id, "owner": link.owner, "state": state}
    if state == "opened":
        known["opened_from"] = link.opened_from
    if conflict:
        known["conflict"] = conflict
    if link.refused <= MAX_AUDITED:
        change.audit("link.refused", by, link.key_id or "", **known)
    return Refused(link, state, conflict)


def _new(
    owner: str,
    fields: Mapping[str, Any],
    replaces: str | None,
    overlap: float,
    expires_in: float,
    by: Actor,
) -> tuple[LinkRecord, str]:
    now = time.time()
    link_id = f"link_{secrets.token_hex(8)}"
    ends = now + expires_in
    link = LinkRecord(link_id, owner, fields, replaces, overlap, now, by.name[:255], ends)
    return link, key_format.link_code()


def _insert(change: Change, link: LinkRecord, code: str, by: Actor, **audited: object) -> None:
    """Store a new link."""
    names = set(LinkRecord.__slots__) - {"void"}
    values: dict[str, Any] = {name: getattr(link, name) for name in names}
    values["digest"] = key_format.digest(code)
    change.connection.execute(sa.insert(LINKS).values(values))
    change.audit("link.created", by, link.replaces or "", link_id=link.link_id, **audited)


def _key_of(link: LinkRecord, now: float, lifetimes: Lifetimes) -> tuple[KeyRecord, str]:
    """Return the key that `link` makes at `now`, and its record."""
    fields = dict(link.fields)
    key = key_format.generate(fields.pop("environment", "live"))
    expires_at = lifetimes.end(fields.pop("lifetime"), now)
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return records.new(key, owner=link.owner, expires_at=expires_at, **{**fields, **lists}), key


def _void(now: float) -> sa.ColumnElement[bool]:
    """Return the column `void` of a link at `now`."""
    active = records.conditions(KeyFilter(state="active"), now)
    same = (KEYS.c.key_id == LINKS.c.replaces, KEYS.c.owner == LINKS.c.owner)
    replaceable = sa.select(KEYS.c.key_id).where(*same, *active).exists()
    return sa.and_(LINKS.c.replaces.is_not(None), ~replaceable).label("void")


def _get(connection: sa.Connection, link_id: str) -> LinkRecord:
    row = None
    # PostgreSQL raises an error for a NUL.
    if link_id.isprintable():
        query = sa.select(LINKS, _void(time.time())).where(LINKS.c.link_id == link_id)
        row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFound(
            f"There is no link {key_format.redact(link_id)!r}; `hokusai-auth links list` shows them."
        )
    return _record(row)


def _record(row: Any) -> LinkRecord:
    fields = {name: getattr(row, name) for name in LinkRecord.__slots__ if name != "void"}
    return LinkRecord(**fields, void=bool(getattr(row, "void", False)))

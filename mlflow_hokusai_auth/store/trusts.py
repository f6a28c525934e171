"""Trusts, and the exchange of a workload's identity token for a key that lives for minutes.

An exchange is one transaction: it takes the trust's row, judges the claims by it again, uses the token
up, and makes the key. Locks are taken in one order everywhere: the trust, the generation, the keys.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from mlflow_hokusai_auth.core import keys as key_format
from mlflow_hokusai_auth.core.errors import Conflict, InvalidRequest, NotFound
from mlflow_hokusai_auth.core.lifetimes import UNLIMITED, Lifetimes
from mlflow_hokusai_auth.core.scopes import ADMIN
from mlflow_hokusai_auth.core.trust import Refused, Trust, Workload, judge, repository

from . import records
from .database import NOBODY, Actor, Change, Database
from .records import KeyRecord
from .tables import KEYS, TRUSTS, USED_TOKENS

#: Seconds for which a key stays good after the same token was exchanged again.
OVERLAP = 60.0
#: Seconds for which keys that have ended, and tokens that nobody takes any more, are kept.
KEPT = 86400.0
#: Trusts of a store, and of one owner, at most.
MAX_TRUSTS, MAX_OF_OWNER = 1000, 100

_OF_ISSUER = (
    sa.select(TRUSTS)
    .where(TRUSTS.c.issuer == sa.bindparam("issuer"))
    .order_by(TRUSTS.c.created_at, TRUSTS.c.trust_id)
)
# The statements of an exchange are built once, because building them takes half of its time.
_GET = sa.select(TRUSTS).where(TRUSTS.c.trust_id == sa.bindparam("id"))
_TAKE = (
    sa.update(TRUSTS)
    .where(TRUSTS.c.trust_id == sa.bindparam("id"))
    .values(
        exchanges=TRUSTS.c.exchanges + sa.bindparam("more"),
        last_used_at=sa.func.coalesce(
            sa.bindparam("used_at", type_=sa.Float), TRUSTS.c.last_used_at
        ),
    )
    .returning(TRUSTS)
)
_USE_UP = sa.insert(USED_TOKENS)

#: The key that signed the token may have been taken out of the trust's key set.
_CHANGED = Refused(
    "TOKEN_UNTRUSTED", "The trust in this workload was changed just now. Ask for a key once more."
)


@dataclass(frozen=True, slots=True)
class TrustRecord:
    """A trust with what the store knows about it. Times are seconds since the epoch."""

    trust: Trust
    created_at: float
    last_used_at: float | None = None
    #: Tokens that were exchanged for keys.
    exchanges: int = 0


class _Refusal(Exception):
    """Raised to undo an exchange."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.code)
        self.refused = refused


class Trusts:
    """The trusts in `database`. Every method raises AuthorityUnavailable if it can't be used.

    With `owner`, trusts of others are missing: their ids are as unknown as made-up ones. `check` raises
    an error for a trust that the caller may not add, or have after an edit. No key of an exchange lives
    longer than the maximum of `lifetimes`, and no trust gets a longer `ttl`.
    """

    def __init__(
        self,
        database: Database,
        owner: str | None = None,
        check: Callable[[Trust], object] = lambda _: None,
        lifetimes: Lifetimes = UNLIMITED,
    ) -> None:
        self._database = database
        self._lifetimes = lifetimes
        self._owner = owner
        self._check = check

    def of(self, owner: str, check: Callable[[Trust], object]) -> Trusts:
        """Return the trusts of `owner` alone; `check` judges each that is added or edited."""
        return Trusts(self._database, owner, check, self._lifetimes)

    def each(self) -> list[TrustRecord]:
        """Return all trusts, oldest first."""
        query = sa.select(TRUSTS).order_by(TRUSTS.c.created_at, TRUSTS.c.trust_id)
        if self._owner is not None:
            query = query.where(TRUSTS.c.owner == self._owner)
        with self._database.reading() as connection:
            return [_record(row) for row in connection.execute(query)]

    def of_issuer(self, issuer: str) -> list[Trust]:
        """Return the trusts of exactly this issuer, oldest first."""
        # PostgreSQL raises an error for a NUL.
        if not issuer.isprintable():
            return []
        with self._database.reading() as connection:
            return [
                _record(row).trust for row in connection.execute(_OF_ISSUER, {"issuer": issuer})
            ]

    def get(self, trust_id: str) -> TrustRecord:
        """Return the trust with this id. Raises NotFound."""
        with self._database.reading() as connection:
            return self._own(_get(connection, trust_id))

    def add(
        self,
        workload: Workload,
        *,
        owner: str,
        scopes: tuple[str, ...],
        ttl: float,
        models: tuple[str, ...] = (),
        no_delete: bool = False,
        jwks: str | None = None,
        by: Actor = NOBODY,
    ) -> TrustRecord:
        """Trust `workload` to get keys of `owner` that live `ttl` seconds.

        Raises InvalidRequest, StaffNarrowed, and Conflict for too many trusts, for one that exists, and
        if another owner differs from `owner` in case only. An owner who sees its own trusts only also
        gets Conflict for a repository that another's trust is about, because it could take over those
        jobs, and Forbidden if the key of `by` was revoked meanwhile.
        """
        trust = Trust(
            f"trust_{secrets.token_hex(8)}",
            owner,
            workload.kind,
            workload.issuer,
            workload.claims,
            tuple(sorted(set(scopes))),
            models,
            no_delete,
            ttl,
            workload.single_use,
            jwks=jwks,
        )
        _refuse_power(trust)
        self._check(trust)
        self._lifetimes.check(ttl, "ttl")
        record = TrustRecord(trust, time.time())
        with self._database.changing() as change:
            if self._owner is not None:
                # A leaver's trust must not come after the end of its keys.
                records.refuse_revoked(change, by.key_id)
            records.refuse_look_alike(change, owner)
            before = [_record(row) for row in change.connection.execute(sa.select(TRUSTS))]
            if len(before) >= MAX_TRUSTS:
                raise Conflict(f"There are {MAX_TRUSTS} trusts already. Remove some first.")
            if sum(one.trust.owner == owner for one in before) >= MAX_OF_OWNER:
                raise Conflict(f"{owner} has {MAX_OF_OWNER} trusts already. Remove some first.")
            for other in (one.trust for one in before):
                if self._owner not in (None, other.owner):
                    if repository(other) == repository(trust):
                        raise Conflict(
                            "The repository is not free: only the server's operator can add this trust."
                        )
                    continue
                if other.issuer == trust.issuer and dict(other.claims) == dict(trust.claims):
                    raise Conflict(
                        f"{other.trust_id} is about this workload already. Edit or remove it first."
                    )
            change.connection.execute(sa.insert(TRUSTS).values(**_columns(record)))
            change.audit("trust.added", by, **_audited(trust))
        return record

    def edit(
        self,
        trust_id: str,
        changes: Mapping[str, Any],
        by: Actor = NOBODY,
        *,
        forget_ids: bool = False,
        seen: str | None = None,
    ) -> TrustRecord:
        """Change scopes, models, no_delete, ttl or jwks of a trust; `forget_ids` pins anew.

        With `seen`, the `edition` that the changes were made for, raises Conflict if it is another now.

        Keys that were exchanged before end now, unless only `ttl` changes: they have rights, or were
        made for a workload or with a signing key, that the trust may be about no more. Raises NotFound,
        InvalidRequest and StaffNarrowed.
        """
        changed = dict(changes)
        if "scopes" in changed:
            changed["scopes"] = tuple(sorted(set(changed["scopes"])))
        if forget_ids:
            changed["pins"] = ()
        if "ttl" in changed:
            self._lifetimes.check(changed["ttl"], "ttl")
        with self._database.changing(generation=False) as change:
            before = self._own(_take(change, trust_id))
            if seen not in (None, edition(before.trust)):
                raise Conflict(
                    "Somebody changed this trust after you had opened the form, so nothing was saved. "
                    "These are its values now."
                )
            after = replace(before, trust=replace(before.trust, **changed))
            _refuse_power(after.trust)
            self._check(after.trust)
            if changed.keys() - {"ttl"}:
                _end_keys(change, trust_id)
            values = {name: _columns(after)[name] for name in changed}
            this = sa.update(TRUSTS).where(TRUSTS.c.trust_id == trust_id)
            change.connection.execute(this.values(**values))
            shown = records.columns(changed)
            if "jwks" in shown:
                shown["jwks"] = shown["jwks"] is not None
            change.audit("trust.edited", by, trust_id=trust_id, **shown)
        return after

    def remove(self, trust_id: str, by: Actor = NOBODY) -> TrustRecord:
        """Trust a workload no more, and end its keys now. Raises NotFound."""
        with self._database.changing(generation=False) as change:
            record = self._own(_take(change, trust_id))
            ended = _end_keys(change, trust_id)
            change.connection.execute(sa.delete(TRUSTS).where(TRUSTS.c.trust_id == trust_id))
            change.audit("trust.removed", by, **_audited(record.trust), ended=ended)
        return record

    def exchange(
        self,
        trust_id: str,
        claims: Mapping[str, object],
        *,
        jwks: str | None,
        digest: str,
        token_id: str,
        ends_at: float,
        by: Actor = NOBODY,
    ) -> tuple[KeyRecord, str] | Refused:
        """Return a new key, and its record, for a verified token with these `claims`.

        `jwks` is the trust's key set that it was verified with (None: its issuer's). `digest` is the
        token's, `token_id` its own id, and `ends_at` (seconds since the epoch) the time from which on
        no server takes it. Of several exchanges of a token that is exchanged once only, on any number
        of servers, exactly one gets a key.
        """
        now = time.time()
        key = key_format.generate(key_format.EPHEMERAL)
        try:
            with self._database.changing(generation=False) as change:
                trust = _take(change, trust_id, used_at=now).trust
                verdict = judge(trust, claims, now) if trust.jwks == jwks else _CHANGED
                if isinstance(verdict, Refused):
                    raise _Refusal(verdict)
                if trust.single_use:
                    _use_up(change, trust.issuer, token_id, ends_at)
                else:
                    _end_earlier(change, digest, now)
                if verdict.pins:
                    this = sa.update(TRUSTS).where(TRUSTS.c.trust_id == trust_id)
                    pins = [list(pin) for pin in verdict.pins]
                    change.connection.execute(this.values(pins=pins))
                record = records.new(
                    key,
                    owner=trust.owner,
                    scopes=trust.scopes,
                    # The maximum may have been lowered after the trust was made.
                    expires_at=self._lifetimes.end(verdict.ttl, now),
                    models=trust.models,
                    no_delete=trust.no_delete,
                    trust_id=trust_id,
                    source=verdict.source,
                )
                again = None if trust.single_use else digest
                records.insert(change, record, key, token_digest=again)
                workload = replace(by, name=verdict.source)
                change.audit(
                    "key.exchanged",
                    workload,
                    record.key_id,
                    **records.audited(record),
                    trust_id=trust_id,
                    source=verdict.source,
                )
        except _Refusal as refusal:
            return refusal.refused
        except NotFound:
            return Refused("TOKEN_UNTRUSTED", "The trust in this workload was removed just now.")
        except sa.exc.IntegrityError:
            return Refused(
                "TOKEN_USED",
                "This token was exchanged for a key already (claim jti). Ask the CI for a new one.",
                "jti",
            )
        return record, key

    def _own(self, record: TrustRecord) -> TrustRecord:
        """Return `record`. Raises NotFound for another owner's, as for an unknown id."""
        if self._owner not in (None, record.trust.owner):
            raise _unknown(record.trust.trust_id)
        return record


def remove_of(change: Change, owner: str, by: Actor) -> list[str]:
    """Remove all trusts of `owner`, who leaves, and return their ids. The caller ends their keys."""
    # PostgreSQL raises an error for a NUL.
    if not owner.isprintable():
        return []
    these = sa.delete(TRUSTS).where(TRUSTS.c.owner == owner).returning(TRUSTS)
    gone = {row.trust_id: _record(row).trust for row in change.connection.execute(these)}
    for trust_id in sorted(gone):
        change.audit("trust.removed", by, **_audited(gone[trust_id]))
    return sorted(gone)


def edition(trust: Trust) -> str:
    """Return a text that is another one after each edit of what the form of a trust shows."""
    # SQLite returns whole numbers as such after an UPDATE.
    values = (trust.scopes, trust.models, trust.no_delete, float(trust.ttl))
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _audited(trust: Trust) -> dict[str, Any]:
    """Return the fields of a trust that go into the audit log."""
    names = ("trust_id", "owner", "kind", "issuer", "scopes", "models", "no_delete", "ttl")
    fields = records.columns({name: getattr(trust, name) for name in names})
    return {**fields, "claims": dict(trust.claims), "single_use": trust.single_use}


def _refuse_power(trust: Trust) -> None:
    if powers := sorted(ADMIN & set(trust.scopes)):
        raise InvalidRequest(
            f"A trust can't give {', '.join(powers)}: with it, a job could make itself keys that "
            "outlive the trust."
        )
    records.refuse_narrowed_staff(trust)


def _end_keys(change: Change, trust_id: str) -> int:
    """Revoke the live keys of a trust, and return their number."""
    change.bump()
    now = time.time()
    live = (
        KEYS.c.trust_id == trust_id,
        # The index of exchanged keys is used only for a statement that says this.
        KEYS.c.trust_id.is_not(None),
        KEYS.c.expires_at > now,
        KEYS.c.revoked_at.is_(None),
    )
    return change.connection.execute(sa.update(KEYS).where(*live).values(revoked_at=now)).rowcount


def _use_up(change: Change, issuer: str, token_id: str, ends_at: float) -> None:
    """Keep a token from being exchanged again. Raises IntegrityError if it was exchanged already."""
    text = f"{issuer}\0{token_id}".encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(text).hexdigest()
    change.connection.execute(_USE_UP, {"digest": digest, "ends_at": ends_at})


def _end_earlier(change: Change, digest: str, now: float) -> None:
    """Let the key that the same token was exchanged for before end soon."""
    ends = now + OVERLAP
    earlier = (
        KEYS.c.trust_id.is_not(None),
        KEYS.c.expires_at > ends,
        KEYS.c.token_digest == digest,
        KEYS.c.revoked_at.is_(None),
    )
    if change.connection.execute(sa.select(KEYS.c.key_id).where(*earlier)).first() is not None:
        change.bump()
        change.connection.execute(sa.update(KEYS).where(*earlier).values(expires_at=ends))


def _take(change: Change, trust_id: str, used_at: float | None = None) -> TrustRecord:
    """Return a trust whose row is locked until the end of `change`. Raises NotFound.

    With `used_at`, a time in seconds since the epoch, that exchange counts.
    """
    row = None
    # PostgreSQL raises an error for a NUL.
    if trust_id.isprintable():
        values = {"id": trust_id, "more": 0 if used_at is None else 1, "used_at": used_at}
        row = change.connection.execute(_TAKE, values).one_or_none()
    if row is None:
        raise _unknown(trust_id)
    return _record(row)


def _get(connection: sa.Connection, trust_id: str) -> TrustRecord:
    row = None
    # PostgreSQL raises an error for a NUL.
    if trust_id.isprintable():
        row = connection.execute(_GET, {"id": trust_id}).one_or_none()
    if row is None:
        raise _unknown(trust_id)
    return _record(row)


def _unknown(trust_id: str) -> NotFound:
    return NotFound(
        f"There is no trust {key_format.redact(trust_id)!r}; `hokusai-auth trust list` shows them."
    )


def _record(row: Any) -> TrustRecord:
    trust = Trust(
        row.trust_id,
        row.owner,
        row.kind,
        row.issuer,
        tuple((name, value) for name, value in row.claims),
        tuple(row.scopes),
        tuple(row.models),
        row.no_delete,
        row.ttl,
        row.single_use,
        tuple((name, value) for name, value in row.pins),
        row.jwks,
    )
    return TrustRecord(trust, row.created_at, row.last_used_at, row.exchanges)


def _columns(record: TrustRecord) -> dict[str, Any]:
    trust = record.trust
    names = Trust.__slots__
    fields = records.columns({name: getattr(trust, name) for name in names})
    # Lists of lists, and no tuples, are what JSON keeps.
    pairs: dict[str, Any] = json.loads(json.dumps({"claims": trust.claims, "pins": trust.pins}))
    own = {"created_at": record.created_at, "last_used_at": record.last_used_at}
    return {**fields, **pairs, **own, "exchanges": record.exchanges}

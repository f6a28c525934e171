"""Sessions: a random token in a browser's cookie stands for the key that the user pasted.

Each request of a session needs the key, because only its authority can say whether it is still good.
So the store keeps the key, but encrypted with a secret that only the cookie holds. A reader of the
database gets neither keys nor sessions.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections import Counter
from functools import partial
from typing import NamedTuple

import sqlalchemy as sa
from cryptography.fernet import Fernet

from mlflow_hokusai_auth.core.keys import session_token

from .database import Actor, Change, Database
from .tables import SESSIONS
from .write_behind import WriteBehindCounter

_FIND = sa.select(SESSIONS.c.sealed_key, SESSIONS.c.expires_at).where(
    SESSIONS.c.digest == sa.bindparam("digest")
)
#: Seconds between two rows of the audit log about failed sign-ins from one address.
REFUSED_INTERVAL = 60.0
#: The addresses with the most failed sign-ins get rows of their own, up to this number each time:
#: anybody may cause failures, from many addresses, and nothing is deleted from the audit log.
MAX_REFUSED = 50


class _Refused(NamedTuple):
    address: str
    reason: str


class Sessions:
    """The sessions in `database`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._refused: WriteBehindCounter[_Refused] = WriteBehindCounter(
            "Failed sign-ins", partial(_write_refused, database), REFUSED_INTERVAL
        )
        #: Write the failed sign-ins that are not in the audit log yet.
        self.write = self._refused.write

    def begin(self, key: str, lifetime: float, by: Actor) -> str:
        """Begin a session of `lifetime` seconds for `key`, and return its token, which is not stored.

        Raises AuthorityUnavailable.
        """
        token = session_token()
        now = time.time()
        with self._database.changing(generation=False) as change:
            change.connection.execute(
                sa.insert(SESSIONS).values(
                    digest=_digest(token),
                    key_id=by.key_id,
                    owner=by.name,
                    sealed_key=_seal(token).encrypt(key.encode()).decode(),
                    expires_at=now + lifetime,
                )
            )
            change.audit("session.begun", by, by.key_id)
        return token

    def find(self, token: str) -> tuple[str, float] | None:
        """Return a session's key and end (seconds since the epoch), or None without such a session.

        Raises AuthorityUnavailable.
        """
        with self._database.reading() as connection:
            row = connection.execute(_FIND, {"digest": _digest(token)}).one_or_none()
        if row is None or row.expires_at <= time.time():
            return None
        return _seal(token).decrypt(row.sealed_key.encode()).decode(), row.expires_at

    def end(self, token: str, *, address: str, request_id: str) -> None:
        """End a session, unless it has ended already. Raises AuthorityUnavailable."""
        # Anybody may send made-up tokens, for which a look is enough.
        with self._database.reading() as connection:
            if connection.execute(_FIND, {"digest": _digest(token)}).one_or_none() is None:
                return
        this = SESSIONS.c.digest == _digest(token)
        with self._database.changing(generation=False) as change:
            row = change.connection.execute(
                sa.select(SESSIONS.c.key_id, SESSIONS.c.owner).where(this)
            ).one_or_none()
            if row is not None:
                change.connection.execute(sa.delete(SESSIONS).where(this))
                by = Actor(row.owner, row.key_id, address, request_id)
                change.audit("session.ended", by, by.key_id)

    def count_failed_sign_in(self, address: str, reason: str) -> None:
        """Count a failed sign-in from `address`; `reason` is an error code. Does no I/O.

        Each process writes one row per address and `REFUSED_INTERVAL` to the audit log.
        """
        self._refused.add(_Refused(address, reason))


def _write_refused(database: Database, counts: Counter[_Refused]) -> None:
    by_address: dict[str, Counter[str]] = {}
    for (address, reason), count in counts.items():
        by_address.setdefault(address, Counter())[reason] += count
    ordered = sorted(by_address.items(), key=lambda item: -item[1].total())
    with database.changing(generation=False) as change:
        for address, reasons in ordered[:MAX_REFUSED]:
            _audit_refused(change, address, reasons)
        if others := ordered[MAX_REFUSED:]:
            total = sum((reasons for _, reasons in others), Counter[str]())
            _audit_refused(change, "", total, addresses=len(others))


def _audit_refused(change: Change, address: str, reasons: Counter[str], **detail: int) -> None:
    by = Actor("", "", address)
    change.audit(
        "session.refused",
        by,
        by.key_id,
        count=reasons.total(),
        reason=", ".join(sorted(reasons)),
        **detail,
    )


def _digest(token: str) -> str:
    return hashlib.sha256(b"digest of session\0" + token.encode()).hexdigest()


def _seal(token: str) -> Fernet:
    # A token has 256 random bits, so its hash is strong enough as an encryption key.
    secret = hashlib.sha256(b"seal of session\0" + token.encode()).digest()
    return Fernet(base64.urlsafe_b64encode(secret))

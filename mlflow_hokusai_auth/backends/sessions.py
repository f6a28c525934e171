"""Sign-ins: a random token in a browser's cookie stands for the key that was pasted.

The key is needed for as long as the session lives, since it is its authority that says whether it is
still good. So it is kept, but sealed with a secret that only the cookie holds: whoever reads the
database has neither keys nor sessions.
"""

from __future__ import annotations

import base64
import hashlib
import time

import sqlalchemy as sa
from cryptography.fernet import Fernet

from mlflow_hokusai_auth.core.keys import session_token

from .database import Actor, Database
from .tables import SESSIONS

_FIND = sa.select(SESSIONS.c.sealed_key, SESSIONS.c.expires_at).where(
    SESSIONS.c.digest == sa.bindparam("digest")
)


class Sessions:
    """The sessions in `database`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(self, key: str, lifetime: float, by: Actor) -> str:
        """A new session of `lifetime` seconds for `key`; its token, which nothing here keeps.

        Raises AuthorityUnavailable.
        """
        token = session_token()
        now = time.time()
        with self._database.changing(generation=False) as change:
            change.connection.execute(sa.delete(SESSIONS).where(SESSIONS.c.expires_at <= now))
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
        """The key of a session and the time, since the epoch, when it ends; None without one.

        Raises AuthorityUnavailable.
        """
        with self._database.reading() as connection:
            row = connection.execute(_FIND, {"digest": _digest(token)}).one_or_none()
        if row is None or row.expires_at <= time.time():
            return None
        return _seal(token).decrypt(row.sealed_key.encode()).decode(), row.expires_at

    def end(self, token: str, *, address: str, request_id: str) -> None:
        """End a session, unless it has ended already. Raises AuthorityUnavailable."""
        this = SESSIONS.c.digest == _digest(token)
        with self._database.changing(generation=False) as change:
            found = change.connection.execute(
                sa.select(SESSIONS.c.key_id, SESSIONS.c.owner).where(this)
            ).one_or_none()
            if found is not None:
                change.connection.execute(sa.delete(SESSIONS).where(this))
                by = Actor(found.owner, found.key_id, address, request_id)
                change.audit("session.ended", by, by.key_id)

    def refused(self, by: Actor, reason: str) -> None:
        """Write down that `by` could not sign in. Raises AuthorityUnavailable."""
        with self._database.changing(generation=False) as change:
            change.audit("session.refused", by, by.key_id, reason=reason)


def _digest(token: str) -> str:
    return hashlib.sha256(b"digest of session\0" + token.encode()).hexdigest()


def _seal(token: str) -> Fernet:
    # A token has 256 random bits, so that a hash of it is a key.
    secret = hashlib.sha256(b"seal of session\0" + token.encode()).digest()
    return Fernet(base64.urlsafe_b64encode(secret))

"""The authority for browser sessions: it replaces a session token by the key behind it."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

from cachetools import TTLCache

from mlflow_hokusai_auth.core.keys import is_session_token
from mlflow_hokusai_auth.core.types import Principal, Rejected
from mlflow_hokusai_auth.store.sessions import Sessions

from . import Authority
from .cache import MAX_UNCONFIRMED


class _Session(NamedTuple):
    key: str
    expires_at: float


class SessionAuthority:
    """Looks up the key behind a session token in `inner`, and every other key unchanged.

    A session is read again from `sessions` after `MAX_UNCONFIRMED` seconds, so that every process
    notices a sign-out within a second.
    """

    def __init__(self, inner: Authority, sessions: Sessions) -> None:
        self._inner = inner
        self._sessions = sessions
        self._lock = threading.Lock()
        self._known: TTLCache[str, _Session] = TTLCache(10_000, MAX_UNCONFIRMED)

    def peek(self, key: str, address: str) -> Principal | Rejected | None:
        """See `Authority`."""
        if not is_session_token(key):
            return self._inner.peek(key, address)
        with self._lock:
            session = self._known.get(key)
        if session is None or session.expires_at <= time.time():
            return None
        return self._inner.peek(session.key, address)

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        """See `Authority`."""
        if not is_session_token(key):
            return self._inner.lookup(key, address)
        row = self._sessions.find(key)
        if row is None:
            return Rejected()
        session = _Session(*row)
        with self._lock:
            self._known[key] = session
        return self._inner.lookup(session.key, address)

"""Recognises the token of a browser's session as the key that it stands for."""

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
    """Asks `inner` about the key behind a session's token, and about every other key as it is.

    Whether a session is still there is asked of `sessions` anew after as long as a key may go
    unconfirmed, so that signing out is known everywhere within a second, too.
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
        found = self._sessions.find(key)
        if found is None:
            return Rejected()
        session = _Session(*found)
        with self._lock:
            self._known[key] = session
        return self._inner.lookup(session.key, address)

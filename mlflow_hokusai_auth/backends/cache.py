"""A bounded cache of identities in front of a backend, so that a known key costs no I/O.

What is cached is who a key belongs to, never whether it may do something. A revocation reaches every
process within `MAX_UNCONFIRMED` seconds: a thread asks the backend's generation every `POLL` seconds
and empties the cache when it changed, and an entry counts only while that answer is recent. If the
thread can't ask, entries stop counting and each request asks the backend itself.
"""

from __future__ import annotations

import logging
import threading
import time

from cachetools import TTLCache

from mlflow_hokusai_auth.core.keys import digest
from mlflow_hokusai_auth.core.types import Principal

from . import Backend

#: Seconds between two questions for the generation.
POLL = 0.25
#: Seconds for which an entry counts after the generation was last confirmed.
MAX_UNCONFIRMED = 0.9

_log = logging.getLogger(__name__)


class CachedBackend:
    """`backend` with a cache of at most `size` identities, each kept for `ttl` seconds."""

    def __init__(self, backend: Backend, *, ttl: float, size: int = 10_000) -> None:
        self._backend = backend
        self._entries: TTLCache[str, Principal] = TTLCache(size, ttl, timer=time.monotonic)
        self._lock = threading.Lock()
        self._generation: int | None = None
        self._confirmed = float("-inf")
        self._watcher: threading.Thread | None = None

    def peek(self, key: str) -> Principal | None:
        """Whom `key` belongs to if that is known here, else None. No I/O."""
        if time.monotonic() - self._confirmed > MAX_UNCONFIRMED:
            return None
        with self._lock:
            return self._entries.get(digest(key))

    def lookup(self, key: str) -> Principal | None:
        """Whom `key` belongs to, asking the backend; raises BackendUnavailable."""
        self._watch()
        generation = self._generation
        principal = self._backend.lookup(key)
        if principal is not None:
            with self._lock:
                # An answer from before a change must not outlive the change.
                if generation is not None and generation == self._generation:
                    self._entries[digest(key)] = principal
        return principal

    def _watch(self) -> None:
        """Start the watcher on first use, so that it lives in the process that serves (pre-fork)."""
        if self._watcher is not None and self._watcher.is_alive():
            return
        with self._lock:
            if self._watcher is not None and self._watcher.is_alive():
                return
            self._watcher = threading.Thread(
                target=self._poll, name="hokusai-auth-generation", daemon=True
            )
            self._watcher.start()

    def _poll(self) -> None:
        failing = False
        while True:
            asked = time.monotonic()
            try:
                generation = self._backend.generation()
            except Exception as error:
                # Of any kind: a watcher that ended would leave every request to ask for itself.
                if not failing:
                    _log.warning("Keys are no longer served from the cache: %s", error)
                failing = True
            else:
                failing = False
                with self._lock:
                    if generation != self._generation:
                        self._entries.clear()
                        self._generation = generation
                    self._confirmed = asked
            time.sleep(POLL)

"""Identities in front of a backend, so that a known key costs no I/O and an outage costs no wait.

What is cached is who a key belongs to, never whether it may do something, and never an error.

A backend that tells of changes (`watched`) is polled for them: a thread asks its generation every
`POLL` seconds and empties the cache when it changed, and an entry counts only while that answer is
younger than `MAX_UNCONFIRMED`. A revocation, or a new key, is so known in every process within that
time. If the thread can't ask, entries stop counting and each request asks the backend itself. For any
other backend an entry counts until its time to live is over, which bounds a revocation instead.
"""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import NamedTuple

from cachetools import TLRUCache

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable, NoVerdict, Throttled
from mlflow_hokusai_auth.core.types import Principal, Rejected
from mlflow_hokusai_auth.store import metrics

from . import Backend
from .guarded import GuardedBackend
from .redis_identities import SharedCache

#: Seconds between two questions for the generation.
POLL = 0.25
#: Seconds for which an entry counts after the generation was last confirmed.
MAX_UNCONFIRMED = 0.9
#: Share of a time to live that is taken off at random, so that entries do not all end at once.
JITTER = 0.1
#: Hits after which they are told to Prometheus, which takes longer than a hit.
_HITS = 100
#: Characters of a rejection's reason that are kept, so that the bound on entries bounds memory.
MAX_REASON = 500

_log = logging.getLogger(__name__)


class _Entry(NamedTuple):
    """An answer, and the readings of the clock until which it counts and is kept as stale."""

    answer: Principal | Rejected
    fresh_until: float
    kept_until: float


class _Flight(NamedTuple):
    """A question that is under way, since when by the clock."""

    began: float
    answer: Future[Principal | Rejected]


class CachedBackend:
    """`backend`, with what it answered, a breaker, and one question at a time for each key.

    The backend answers, or fails, within `timeout` seconds; a lookup waits little longer for another
    one of the same key.

    Principals are kept for `ttl` seconds, `size` of them at most. Rejections are kept for
    `negative_ttl` seconds and apart, `negative_size` of them, so that a flood of made-up keys evicts
    no real one. While the backend is unavailable a principal that it named within the last `ttl` +
    `stale_if_error` seconds is still served; with 0, the default, never. Not while it throttles, or
    answers what is no verdict: it may do so to wrong keys alone, of which a revoked one is one.

    Entries are found by HMAC-SHA256 under `secret`; no key is held. `namespace` is mixed in: what tells
    this authority from others that share `shared` and `secret`, such as its URL. `shared` is asked
    before the backend, unless the backend is watched: then its own word is as near, and newer.
    `timer` is a monotonic clock, in seconds.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        ttl: float,
        secret: bytes,
        timeout: float = 5,
        negative_ttl: float = 5,
        stale_if_error: float = 0,
        size: int = 10_000,
        negative_size: int = 10_000,
        shared: SharedCache | None = None,
        namespace: str = "",
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        if not secret:
            raise ValueError("the cache needs a secret")
        self._backend = GuardedBackend(backend, timer, timeout)
        self._by_address = backend.by_address
        self._watched: bool = getattr(backend, "watched", True)
        self._shared = None if self._watched else shared
        padded = (secret if len(secret) <= 64 else hashlib.sha256(secret).digest()).ljust(64, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in padded))
        self._prefix = f"{backend.name}\0{namespace}\0" if namespace else f"{backend.name}\0"
        self._hit_count = 0
        self._hits = metrics.CACHE.labels(backend.name, "hit")
        self._misses = metrics.CACHE.labels(backend.name, "miss")
        self._ttl = ttl
        self._negative_ttl = negative_ttl
        self._stale_if_error = stale_if_error
        self._timer = timer
        # Guards everything below. Never held while anything is asked or waited for.
        self._lock = threading.Lock()
        self._known: TLRUCache[bytes, _Entry] = TLRUCache(size, _end, timer)
        self._rejected: TLRUCache[bytes, _Entry] = TLRUCache(negative_size, _end, timer)
        self._flights: dict[tuple[bytes, int | None], _Flight] = {}
        # A question that has taken longer than this is not joined: its answer may be from before what
        # has changed since, or may never come.
        self._max_wait = timeout + 1
        self._joinable = MAX_UNCONFIRMED if self._watched else self._max_wait
        self._generation: int | None = None
        self._confirmed = float("-inf")
        self._watcher: threading.Thread | None = None

    def peek(self, key: str, address: str) -> Principal | Rejected | None:
        """What is known here of `key`, sent from `address`, or None. Does no I/O."""
        digest = self._digest(key, address)
        with self._lock:
            answer = self._fresh(digest)
            self._hit_count += answer is not None
        if self._hit_count >= _HITS:
            self._tell_hits()
        return answer

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        """Whom `key`, sent from `address`, belongs to; may block.

        Raises AuthorityUnavailable, or Throttled, when the backend does, or at once while it is left
        alone, or when another lookup of the same key takes too long.
        """
        if self._watched:
            self._watch()
        self._tell_hits()
        digest = self._digest(key, address)
        try:
            return self._join(digest, key, address)
        except (Throttled, NoVerdict):
            raise
        except AuthorityUnavailable:
            with self._lock:
                entry = self._known.get(digest) if self._stale_if_error > 0 else None
            if entry is None:
                raise
            metrics.CACHE.labels(self._backend.name, "stale").inc()
            return entry.answer

    def _tell_hits(self) -> None:
        with self._lock:
            count, self._hit_count = self._hit_count, 0
        if count:
            self._hits.inc(count)

    def _digest(self, key: str, address: str) -> bytes:
        # Neither a name nor a key has a NUL, so the parts can't be divided in another way.
        text = f"{self._prefix}{key}\0{address}" if self._by_address else self._prefix + key
        # HMAC by hand, from states with the secret in them: `hmac.digest` takes twice as long, which
        # would be most of the time of a hit.
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(text.encode("utf-8", "surrogatepass"))
        outer.update(inner.digest())
        return outer.digest()

    def _fresh(self, digest: bytes) -> Principal | Rejected | None:
        """What counts now; to be called with the lock held."""
        now = self._timer()
        if self._watched and now - self._confirmed > MAX_UNCONFIRMED:
            return None
        for entries in (self._known, self._rejected):
            try:
                entry = entries[digest]
            except KeyError:
                continue
            if now < entry.fresh_until:
                return entry.answer
        return None

    def _join(self, digest: bytes, key: str, address: str) -> Principal | Rejected:
        """The answer of the one lookup of this key that is under way, or of a new one."""
        own: Future[Principal | Rejected] = Future()
        with self._lock:
            if (answer := self._fresh(digest)) is not None:
                self._hit_count += 1
                return answer
            # With the generation, so that nobody joins a question from before a change.
            generation = self._generation
            name = (digest, generation)
            flight, now = self._flights.get(name), self._timer()
            if flight is None or now - flight.began > self._joinable:
                flight = self._flights[name] = _Flight(now, own)
        if flight.answer is not own:
            self._misses.inc()
            try:
                return flight.answer.result(self._max_wait)
            except FutureTimeout:
                raise AuthorityUnavailable(f"{self._backend.name} is slow to answer") from None
        try:
            self._misses.inc()
            answer = self._find(digest, generation, key, address)
        except BaseException as error:
            # Whatever ends this thread's question must not end the others' threads.
            ordinary = isinstance(error, Exception)
            own.set_exception(error if ordinary else AuthorityUnavailable("interrupted"))
            raise
        else:
            own.set_result(answer)
            return answer
        finally:
            with self._lock:
                if self._flights.get(name) is flight:
                    del self._flights[name]

    def _find(
        self, digest: bytes, generation: int | None, key: str, address: str
    ) -> Principal | Rejected:
        # Times to live count from before the question, as the answer may be from right after it.
        asked = self._timer()
        spread = 1 - JITTER * random.random()  # noqa: S311
        if self._shared is not None and (found := self._shared.get(digest)) is not None:
            principal, left = found
            self._keep(digest, generation, principal, asked + min(left, spread * self._ttl))
            return principal
        answer = self._backend.lookup(key, address)
        rejected = isinstance(answer, Rejected)
        until = asked + spread * (self._negative_ttl if rejected else self._ttl)
        self._keep(digest, generation, answer, until)
        if self._shared is not None:
            if isinstance(answer, Principal):
                now = self._timer()
                self._shared.put(digest, answer, until - now, now - asked)
            else:
                self._shared.forget(digest)
        return answer

    def _keep(
        self, digest: bytes, generation: int | None, answer: Principal | Rejected, until: float
    ) -> None:
        with self._lock:
            if self._watched and (generation is None or generation != self._generation):
                return  # an answer from before a change must not outlive the change
            if isinstance(answer, Rejected):
                self._known.pop(digest, None)
                answer = Rejected(answer.reason[:MAX_REASON])
                self._rejected[digest] = _Entry(answer, until, until)
            else:
                self._rejected.pop(digest, None)
                self._known[digest] = _Entry(answer, until, until + self._stale_if_error)

    def _watch(self) -> None:
        """Start the watcher on first use, so that it lives in the process that serves (pre-fork)."""
        with self._lock:
            if self._watcher is None or not self._watcher.is_alive():
                name = "hokusai-auth-generation"
                self._watcher = threading.Thread(target=self._poll, name=name, daemon=True)
                self._watcher.start()

    def _poll(self) -> None:
        failing = False
        while True:
            asked = self._timer()
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
                        self._known.clear()
                        self._rejected.clear()
                        self._generation = generation
                    self._confirmed = asked
            self._tell_hits()
            time.sleep(POLL)


def _end(_digest: bytes, entry: _Entry, _now: float) -> float:
    return entry.kept_until

"""A cache in front of a backend: a known key costs no I/O, and an outage costs no wait.

The cache holds who a key belongs to, never what the key may do, and never an error.

A thread reads the generation of a watched backend every `POLL` seconds and empties the cache when it
has changed. An entry is used only while the last reading is younger than `MAX_UNCONFIRMED`, so every
process notices a revocation or a new key within that time. If the thread can't read the generation,
entries are no longer used and each request makes its own lookup. For a backend that is not watched, an
entry is used until its time to live is over, and that bounds how long a revoked key still works.
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

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable, Throttled, UnusableReply
from mlflow_hokusai_auth.core.types import Principal, Rejected
from mlflow_hokusai_auth.store import metrics

from . import Backend
from .breaker import GuardedBackend
from .redis_identities import SharedCache

#: Seconds between two readings of the generation.
POLL = 0.25
#: Seconds for which entries are used after the generation was last read.
MAX_UNCONFIRMED = 0.9
#: Largest share of a time to live that is cut at random, so that entries don't all expire at once.
JITTER = 0.1
#: Hits per update of the Prometheus counter: an update takes longer than a hit.
_HITS = 100
#: Characters of a rejection's reason that are kept, so that the limit on entries limits memory.
MAX_REASON = 500

_log = logging.getLogger(__name__)


class _Entry(NamedTuple):
    """An answer, and the readings of the clock until which it is fresh, and kept as stale."""

    answer: Principal | Rejected
    fresh_until: float
    kept_until: float


class _Flight(NamedTuple):
    """A lookup that is under way, and the reading of the clock when it began."""

    began: float
    answer: Future[Principal | Rejected]


class CachedBackend:
    """`backend` with a cache, a circuit breaker, and one lookup at a time for each key.

    The backend answers or fails within `timeout` seconds. A thread that needs the same key as a lookup
    under way waits for it, at most a second longer.

    At most `size` principals are kept, for `ttl` seconds. Rejections are kept apart, at most
    `negative_size` for `negative_ttl` seconds, so that a flood of invented keys evicts no real one.
    While the backend is unavailable, a principal is served for `stale_if_error` seconds longer (0, the
    default: never). Stale entries are never served after a 429 or an unusable reply: the authority may
    answer that way only for bad keys, and this key may just have been revoked.

    Entries are found by BLAKE2b (RFC 7693), keyed with `secret`; the cache holds no key. `namespace` is
    part of the hashed text and separates authorities that have `shared` and `secret` in common.
    `shared` is read before the backend is, unless the backend is watched: reading the key store takes
    no longer than reading Redis, and is never out of date. `timer` is a monotonic clock, in seconds.
    Raises ValueError without a secret.
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
        self._watched = backend.watched
        self._shared = None if self._watched else shared
        key = secret if len(secret) <= 64 else hashlib.blake2b(secret).digest()
        # Neither a name nor a key contains NUL, so two different inputs never give the same text.
        prefix = f"{backend.name}\0{namespace}\0" if namespace else f"{backend.name}\0"
        text = prefix.encode("utf-8", "surrogatepass")
        self._hash = hashlib.blake2b(text, key=key, digest_size=32)
        self._hit_count = 0
        self._hits = metrics.CACHE.labels(backend.name, "hit")
        self._misses = metrics.CACHE.labels(backend.name, "miss")
        self._ttl = ttl
        self._negative_ttl = negative_ttl
        self._stale_if_error = stale_if_error
        self._timer = timer
        # The lock guards everything below. It is never held during I/O or while a thread waits.
        self._lock = threading.Lock()
        self._known: TLRUCache[bytes, _Entry] = TLRUCache(size, _end, timer)
        self._rejected: TLRUCache[bytes, _Entry] = TLRUCache(negative_size, _end, timer)
        self._flights: dict[tuple[bytes, int | None], _Flight] = {}
        # A lookup that has taken longer than this is not joined: its answer may be older than a change,
        # or may never come.
        self._max_wait = timeout + 1
        self._joinable = MAX_UNCONFIRMED if self._watched else self._max_wait
        self._generation: int | None = None
        self._confirmed = float("-inf")
        self._watcher: threading.Thread | None = None

    def peek(self, key: str, address: str) -> Principal | Rejected | None:
        """Return the fresh answer for `key` from `address`, or None. Does no I/O."""
        digest = self._digest(key, address)
        with self._lock:
            answer = self._fresh(digest)
            self._hit_count += answer is not None
        if self._hit_count >= _HITS:
            self._report_hits()
        return answer

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        """Return the owner of `key`, which came from `address`; may block.

        Raises the backend's error. Raises AuthorityUnavailable at once while
        the breaker is open, or if another lookup of the same key takes too long.
        """
        if self._watched:
            self._watch()
        self._report_hits()
        digest = self._digest(key, address)
        try:
            return self._join(digest, key, address)
        except (Throttled, UnusableReply):
            raise
        except AuthorityUnavailable:
            with self._lock:
                entry = self._known.get(digest) if self._stale_if_error > 0 else None
            if entry is None:
                raise
            metrics.CACHE.labels(self._backend.name, "stale").inc()
            return entry.answer

    def _report_hits(self) -> None:
        with self._lock:
            count, self._hit_count = self._hit_count, 0
        if count:
            self._hits.inc(count)

    def _digest(self, key: str, address: str) -> bytes:
        text = f"{key}\0{address}" if self._by_address else key
        digest = self._hash.copy()
        digest.update(text.encode("utf-8", "surrogatepass"))
        return digest.digest()

    def _fresh(self, digest: bytes) -> Principal | Rejected | None:
        """Return the answer that is fresh now, or None. The caller holds the lock."""
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
        """Return the answer of the lookup of this key that is under way, or of a new one."""
        own: Future[Principal | Rejected] = Future()
        with self._lock:
            if (answer := self._fresh(digest)) is not None:
                self._hit_count += 1
                return answer
            # The generation is part of the name, so that no thread joins a lookup from before a change.
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
            answer = self._fetch(digest, generation, key, address)
        except BaseException as error:
            # KeyboardInterrupt or SystemExit must end this thread only, not those that wait for it.
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

    def _fetch(
        self, digest: bytes, generation: int | None, key: str, address: str
    ) -> Principal | Rejected:
        """Return the answer from Redis or the backend, and keep it."""
        # Times to live start before the lookup, as the authority may decide right at its beginning.
        began = self._timer()
        spread = 1 - JITTER * random.random()  # noqa: S311
        if self._shared is not None and (entry := self._shared.get(digest)) is not None:
            principal, left = entry
            self._keep(digest, generation, principal, began + min(left, spread * self._ttl))
            return principal
        answer = self._backend.lookup(key, address)
        rejected = isinstance(answer, Rejected)
        until = began + spread * (self._negative_ttl if rejected else self._ttl)
        self._keep(digest, generation, answer, until)
        if self._shared is not None:
            if isinstance(answer, Principal):
                now = self._timer()
                self._shared.put(digest, answer, until - now, now - began)
            else:
                self._shared.forget(digest)
        return answer

    def _keep(
        self, digest: bytes, generation: int | None, answer: Principal | Rejected, until: float
    ) -> None:
        with self._lock:
            if self._watched and (generation is None or generation != self._generation):
                return  # The answer may be older than the change of the store.
            if isinstance(answer, Rejected):
                self._known.pop(digest, None)
                answer = Rejected(answer.reason[:MAX_REASON])
                self._rejected[digest] = _Entry(answer, until, until)
            else:
                self._rejected.pop(digest, None)
                self._known[digest] = _Entry(answer, until, until + self._stale_if_error)

    def _watch(self) -> None:
        """Start the watcher if this process has none: a thread does not survive a fork."""
        with self._lock:
            if self._watcher is None or not self._watcher.is_alive():
                name = "hokusai-auth-generation"
                self._watcher = threading.Thread(target=self._poll, name=name, daemon=True)
                self._watcher.start()

    def _poll(self) -> None:
        failing = False
        while True:
            began = self._timer()
            try:
                generation = self._backend.generation()
            except Exception as error:
                # If the watcher ended, every request would have to make its own lookup.
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
                    self._confirmed = began
            self._report_hits()
            time.sleep(POLL)


def _end(_digest: bytes, entry: _Entry, _now: float) -> float:
    return entry.kept_until

"""Threads that wait for the key authority, so that a slow one can't take those of MLflow.

Keys that were good here lately have threads of their own, and no address has more than a quarter of
the others: a flood of made-up keys keeps nobody else waiting.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from cachetools import TTLCache

#: Threads of each process for keys that were good here lately; as many again for all others.
THREADS = 8
#: Requests that wait for one of these threads, or for what it does. A stall of the authority must not
#: let them grow without end; each takes about 3 kB.
MAX_PENDING = 5000
#: The part of the threads, and of the places of those who wait, that one address may have: a quarter.
SHARE = 4
#: Keys that are remembered as good, and for how many seconds.
MAX_RECENT = 10_000
RECENT = 86400.0

_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)


class RecentKeys:
    """Keys that were good in this process within the last day, at most `size` of them.

    Only digests are kept, under a secret of the process. `timer` is a monotonic clock, in seconds.
    """

    def __init__(self, size: int = MAX_RECENT, timer: Callable[[], float] = time.monotonic) -> None:
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._digests: TTLCache[bytes, bool] = TTLCache(size, RECENT, timer)

    def add(self, key: str) -> None:
        """Remember `key`, which is good now."""
        digest = self._digest(key)
        with self._lock:
            self._digests[digest] = True

    def __contains__(self, key: str) -> bool:
        digest = self._digest(key)
        with self._lock:
            return digest in self._digests

    def _digest(self, key: str) -> bytes:
        text = key.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(text, digest_size=16, key=self._secret).digest()


class LookupPool:
    """Questions to the authority, for whose answers requests wait up to `patience` seconds."""

    def __init__(self, patience: float = 10.0) -> None:
        self.patience = patience
        self._recent = _Lane("hokusai-auth-recent")
        self._new = _Lane("hokusai-auth")

    def begin(
        self,
        question: Callable[[], _Result],
        otherwise: Callable[[], _Result],
        address: str = "",
        *,
        crowded: Callable[[], _Result] | None = None,
        recent: bool = False,
    ) -> Future[_Result]:
        """Run `question` in a thread, for `address`, in the threads of `recent` keys or of the others.

        The future resolves to `otherwise()` if no thread is free by the deadline, or no place to wait
        for one is left; to `crowded()` if `address` has its quarter of the places already.
        """
        deadline = time.monotonic() + self.patience
        answer: Future[_Result] = Future()

        def work() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                # Nobody waits for the answer after that.
                answer.set_result(question() if time.monotonic() < deadline else otherwise())
            except BaseException as error:
                answer.set_exception(error)

        lane = self._recent if recent else self._new
        if (full := lane.submit(address, work)) is not None:
            answer.set_result((crowded or otherwise)() if full == "address" else otherwise())
        return answer


class _Lane:
    """Threads that serve addresses in turn, and a bounded queue for each address."""

    def __init__(self, name: str) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix=name)
        # Guards everything below. Never held while work is done.
        self._lock = threading.Lock()
        #: What waits, by address; the address whose turn is next comes first.
        self._waiting: dict[str, deque[Callable[[], None]]] = {}
        self._running: Counter[str] = Counter()
        #: What waits or runs.
        self._held: Counter[str] = Counter()
        self._pending = 0
        self._busy = 0

    def submit(self, address: str, work: Callable[[], None]) -> str | None:
        """Do `work`, which doesn't raise, in a thread.

        Returns None, or, if there is no place for it, what is full: "address" or "all".
        """
        with self._lock:
            if self._pending >= MAX_PENDING:
                full = "all"
            elif self._held[address] >= MAX_PENDING // SHARE:
                full = "address"
            else:
                full = None
                self._pending += 1
                self._held[address] += 1
                starts = self._busy < THREADS and self._may_run(address)
                if starts:
                    self._busy += 1
                    self._running[address] += 1
                else:
                    self._waiting.setdefault(address, deque()).append(work)
        if full == "all":
            _log.error("A request was refused with 503: %d wait for the authority", MAX_PENDING)
        if full is None and starts:
            try:
                self._threads.submit(self._work, address, work)
            except BaseException:  # no thread to be had
                with self._lock:
                    self._leave(address)
                    self._busy -= 1
                raise
        return full

    def _work(self, address: str, work: Callable[[], None]) -> None:
        while True:
            work()
            with self._lock:
                self._leave(address)
                following = self._take()
                if following is None:
                    self._busy -= 1
                    return
            address, work = following

    def _may_run(self, address: str) -> bool:
        return self._running[address] < THREADS // SHARE

    def _leave(self, address: str) -> None:
        self._pending -= 1
        for counts in (self._running, self._held):
            counts[address] -= 1
            if not counts[address]:
                del counts[address]

    def _take(self) -> tuple[str, Callable[[], None]] | None:
        """The work whose turn it is. An address that has its turn goes to the end."""
        for address in self._waiting:
            if self._may_run(address):
                queue = self._waiting.pop(address)
                work = queue.popleft()
                if queue:
                    self._waiting[address] = queue
                self._running[address] += 1
                return address, work
        return None

"""Threads for lookups, so that a slow authority can't occupy MLflow's threads.

Keys that were good lately have threads of their own. One address gets at most a quarter of the other
threads, so that its flood of made-up keys doesn't delay other clients.
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

#: Threads in each process for keys that were good lately, and as many for all other keys.
THREADS = 8
#: The largest number of requests that wait for either group of threads. Each takes about 3 kB, and
#: without a limit a stalled authority would let them grow without end.
MAX_PENDING = 5000
#: One address may have one part in SHARE of the threads, and of the places in the queue.
SHARE = 4
#: The largest number of keys that are remembered as good, and the seconds for which they are.
MAX_RECENT = 10_000
RECENT = 86400.0

_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)


class RecentKeys:
    """Keys that were good in this process within the last day, at most `size` of them.

    Only digests are kept, keyed with a secret of the process. `timer` is a monotonic clock in seconds.
    """

    def __init__(self, size: int = MAX_RECENT, timer: Callable[[], float] = time.monotonic) -> None:
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._digests: TTLCache[bytes, bool] = TTLCache(size, RECENT, timer)

    def add(self, key: str) -> None:
        """Remember that `key` is good now."""
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
    """A bounded pool of threads. Requests wait up to `timeout` seconds for the answers."""

    def __init__(self, timeout: float = 10.0) -> None:
        self.timeout = timeout
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
        """Run `question` in a thread of the lane for `recent` keys, or of the other lane.

        The future resolves to `otherwise()` if the queue is full or no thread is free by the deadline,
        and to `crowded()` if `address` has its quarter of the queue already.
        """
        deadline = time.monotonic() + self.timeout
        answer: Future[_Result] = Future()

        def work() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                # After the deadline nobody waits for the answer.
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
        # The lock guards everything below. No work is done under it.
        self._lock = threading.Lock()
        #: Address -> its waiting work. The first address has the next turn.
        self._waiting: dict[str, deque[Callable[[], None]]] = {}
        self._running: Counter[str] = Counter()
        #: Address -> how much of its work waits or runs.
        self._held: Counter[str] = Counter()
        self._pending = 0
        self._busy = 0

    def submit(self, address: str, work: Callable[[], None]) -> str | None:
        """Do `work`, which must not raise, in a thread.

        Return None, or the limit that is reached: "all" for the queue, "address" for its part.
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
            except BaseException:  # the process can't start a thread
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
        """Take the next work. Its address goes to the end of the line."""
        for address in self._waiting:
            if self._may_run(address):
                queue = self._waiting.pop(address)
                work = queue.popleft()
                if queue:
                    self._waiting[address] = queue
                self._running[address] += 1
                return address, work
        return None

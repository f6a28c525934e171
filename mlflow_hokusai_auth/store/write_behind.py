"""Counters in memory that a thread writes to the database."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

#: Seconds between two writes.
INTERVAL = 5.0
#: Different items in memory, at most. While the database fails, further ones are not counted.
LIMIT = 100_000

T = TypeVar("T")

_log = logging.getLogger(__name__)


class WriteBehindCounter(Generic[T]):
    """Counts of `what` in this process, passed to `write` every `interval` seconds.

    Counts that are not written yet are lost if the process is killed.
    """

    def __init__(
        self, what: str, write: Callable[[Counter[T]], None], interval: float = INTERVAL
    ) -> None:
        self._what = what
        self._write = write
        self._interval = interval
        # This lock is held during a write, so that the last one, at exit, waits for the others.
        self._writing = threading.Lock()
        self._lock = threading.Lock()
        self._counts: Counter[T] = Counter()
        self._writer: threading.Thread | None = None

    def add(self, item: T) -> None:
        """Count `item` once. Does no I/O."""
        with self._lock:
            self._keep(item, 1)
            if self._writer is None or not self._writer.is_alive():
                # The thread starts on first use, so that a forked worker has its own.
                self._writer = threading.Thread(
                    target=self._write_on, name=f"hokusai-auth {self._what}", daemon=True
                )
                self._writer.start()
                atexit.register(self.write)

    def write(self) -> None:
        """Write the counts since the last write; if that fails, keep them for the next."""
        with self._writing:
            with self._lock:
                counts, self._counts = self._counts, Counter()
            if not counts:
                return
            try:
                self._write(counts)
            except Exception as error:
                _log.warning("%s can't be written now: %s", self._what, error)
                with self._lock:
                    for item, count in counts.items():
                        self._keep(item, count)

    def _keep(self, item: T, count: int) -> None:
        if len(self._counts) < LIMIT or item in self._counts:
            self._counts[item] += count

    def _write_on(self) -> None:
        while True:
            time.sleep(self._interval)
            self.write()

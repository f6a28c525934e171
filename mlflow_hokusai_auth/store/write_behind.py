"""Counts that requests make in memory, and a thread writes to the database."""

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
#: Different items that are kept while they can't be written; further ones are not counted then.
LIMIT = 100_000

T = TypeVar("T")

_log = logging.getLogger(__name__)


class WriteBehindCounter(Generic[T]):
    """Counts of `what` in this process, handed to `write` every `interval` seconds.

    What was counted and is not yet written is lost if the process is killed.
    """

    def __init__(
        self, what: str, write: Callable[[Counter[T]], None], interval: float = INTERVAL
    ) -> None:
        self._what = what
        self._write = write
        self._interval = interval
        # Held during a write, so that the last one waits for one that is under way.
        self._writing = threading.Lock()
        self._lock = threading.Lock()
        self._counts: Counter[T] = Counter()
        self._writer: threading.Thread | None = None

    def add(self, item: T) -> None:
        """Count `item` once. Does no I/O."""
        with self._lock:
            self._keep(item, 1)
            if self._writer is None or not self._writer.is_alive():
                # On first use, so that it lives in the process that serves (pre-fork).
                self._writer = threading.Thread(
                    target=self._write_on, name=f"hokusai-auth {self._what}", daemon=True
                )
                self._writer.start()
                atexit.register(self.write)

    def write(self) -> None:
        """Write what was counted since the last time; on failure it is kept for the next."""
        with self._writing:
            with self._lock:
                counts, self._counts = self._counts, Counter()
            if not counts:
                return
            try:
                self._write(counts)
            except Exception as error:
                _log.warning("%s are not written for now: %s", self._what, error)
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

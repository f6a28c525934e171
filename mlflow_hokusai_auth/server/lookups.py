"""Threads that wait for the key authority, so that a slow one can't take those of MLflow."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

#: Threads of each process.
THREADS = 8
#: Requests that wait for one of them, or for what it does. A stall of the authority must not let them
#: grow without end; each takes about 3 kB.
MAX_PENDING = 5000

_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)


class Lookups:
    """Questions to the authority, for whose answers requests wait up to `patience` seconds."""

    def __init__(self, patience: float = 10.0) -> None:
        self.patience = patience
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="hokusai-auth")
        self._places = threading.BoundedSemaphore(MAX_PENDING)

    def begin(
        self, question: Callable[[], _Result], otherwise: Callable[[], _Result]
    ) -> Future[_Result]:
        """The answer to come: what `question` returns, asked in a thread.

        Of `otherwise` instead, if there is no place for it, or no thread in time.
        """
        deadline = time.monotonic() + self.patience
        if not self._places.acquire(blocking=False):
            _log.error("A request was refused with 503: %d wait for the authority", MAX_PENDING)
            full: Future[_Result] = Future()
            full.set_result(otherwise())
            return full
        try:
            asked = self._threads.submit(
                # Nobody waits for the answer after that.
                lambda: question() if time.monotonic() < deadline else otherwise()
            )
        except BaseException:  # no thread to be had
            self._places.release()
            raise
        asked.add_done_callback(lambda _: self._places.release())
        return asked

"""Work that each process of each server does once an hour."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable

#: Seconds between two times.
INTERVAL = 3600.0
#: Seconds until the next time if the store failed.
RETRY = 60.0

_log = logging.getLogger(__name__)


class Hourly:
    """Does `work`, once in `INTERVAL` seconds of `clock` however often it looks.

    `work` returns True if it is to be called again at the next look. `failing` is logged if it raises.
    """

    def __init__(
        self,
        work: Callable[[], bool | None],
        failing: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work = work
        self._failing = failing
        self._clock = clock
        self._next = clock()

    def look(self) -> None:
        """Do the work, unless the last time was a short time ago. Never raises."""
        if self._clock() < self._next:
            return
        wait = RETRY
        try:
            wait = 0.0 if self._work() else INTERVAL
        except AuthorityUnavailable:
            pass  # The store's other users log the outage.
        except Exception:
            _log.exception(self._failing)
        self._next = self._clock() + wait

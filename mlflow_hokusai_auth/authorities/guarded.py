"""A backend behind a circuit breaker, so that requests don't wait during its outage."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable, NoVerdict, Throttled
from mlflow_hokusai_auth.core.types import Principal, Rejected
from mlflow_hokusai_auth.store import metrics

from . import Backend
from .breaker import Breaker

#: Longest time for which the breaker stops calls, in seconds.
COOL_DOWN = 1.0

_log = logging.getLogger(__name__)


class GuardedBackend:
    """`backend` behind a circuit breaker.

    The backend answers within `timeout` seconds; `timer` is a monotonic clock, in seconds.
    """

    def __init__(self, backend: Backend, timer: Callable[[], float], timeout: float) -> None:
        self.name = backend.name
        self.generation = backend.generation
        self._backend = backend
        self._timer = timer
        self._breaker = Breaker(max_probe=2 * timeout)
        self._lock = threading.Lock()

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        """Return the backend's answer. Raises AuthorityUnavailable while the breaker is open, too."""
        with self._lock:
            ticket = self._breaker.begin(self._timer())
        if ticket is None:
            self._count("skipped")
            raise AuthorityUnavailable(
                f"{self.name} failed repeatedly and gets no lookups for a second"
            )
        began = self._timer()
        try:
            answer = self._backend.lookup(key, address)
        except (Throttled, NoVerdict) as error:
            self._count("throttled" if isinstance(error, Throttled) else "failed", began)
            # The backend did answer, and the cause may be this key alone: other keys must not suffer.
            self._answered(ticket)
            raise
        except BaseException as error:
            self._count("failed", began)
            # A random part keeps the servers of a site from coming back all at once.
            cool_down = COOL_DOWN * random.uniform(0.5, 1)  # noqa: S311
            with self._lock:
                first = self._breaker.closed
                opened = self._breaker.failed(ticket, self._timer(), cool_down)
            if opened:
                metrics.BREAKER_OPEN.labels(self.name).set(1)
            if opened and first:
                _log.warning("%s is left alone, as it keeps failing: %s", self.name, error)
            raise
        self._answered(ticket)
        self._count("rejected" if isinstance(answer, Rejected) else "accepted", began)
        return answer

    def _answered(self, ticket: int) -> None:
        with self._lock:
            before = self._breaker.closed
            self._breaker.succeeded(ticket)
            recovered = self._breaker.closed and not before
        if recovered:
            metrics.BREAKER_OPEN.labels(self.name).set(0)

    def _count(self, result: str, began: float | None = None) -> None:
        metrics.AUTHORITY_CALLS.labels(self.name, result).inc()
        if began is not None:
            metrics.AUTHORITY_SECONDS.labels(self.name).observe(self._timer() - began)

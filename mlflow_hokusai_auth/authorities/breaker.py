"""A circuit breaker: it stops calls for a while after several failures in a row.

`Breaker` holds the states only; its owner brings the clock and the calls. A closed breaker permits
every call. `threshold` failures in a row open it, and it permits no call until the cool-down is over.
Then it permits one call, the probe: success closes the breaker, failure opens it again. A probe whose
outcome is never reported is replaced by another one.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable, Throttled, UnusableReply
from mlflow_hokusai_auth.core.types import Principal, Rejected
from mlflow_hokusai_auth.store import metrics

from . import Backend

#: Longest time for which a breaker stops calls, in seconds.
COOL_DOWN = 1.0

_log = logging.getLogger(__name__)


class Breaker:
    """The states of a breaker, which threads share. `now` is in seconds of any monotonic clock.

    A probe that takes more than `max_probe` seconds is taken for lost.
    """

    def __init__(self, threshold: int = 5, max_probe: float = 10.0) -> None:
        self._threshold = threshold
        self._max_probe = max_probe
        self._lock = threading.Lock()
        self._failures = 0
        self._opened_at: float | None = None
        self._cool_down = 0.0
        self._probing = False
        self._probe_began = 0.0
        # A ticket is the number of the state in which its call began. The outcome of a call that began
        # in an earlier state is out of date: it neither closes the breaker nor keeps it open.
        self._ticket = 0

    @property
    def closed(self) -> bool:
        """True if every call is permitted."""
        return self._opened_at is None

    def begin(self, now: float) -> int | None:
        """Return a ticket for a call, or None if no call is permitted now.

        The caller must report the call's outcome with `succeeded` or `failed`, however it ends.
        """
        with self._lock:
            if self._opened_at is None:
                return self._ticket
            if self._probing:
                if self._probe_began <= now < self._probe_began + self._max_probe:
                    return None
            else:
                # If the clock was set back, the cool-down starts again, so that it lasts no longer.
                self._opened_at = min(self._opened_at, now)
                if now - self._opened_at < self._cool_down:
                    return None
            self._probing = True
            self._probe_began = now
            self._ticket += 1
            return self._ticket

    def succeeded(self, ticket: int) -> bool:
        """Report that the call with `ticket` was answered; return True if that closed the breaker."""
        with self._lock:
            if ticket != self._ticket:
                return False
            self._failures = 0
            if self._opened_at is None:
                return False
            self._opened_at = None
            self._probing = False
            self._ticket += 1
            return True

    def failed(self, ticket: int, now: float, cool_down: float | None = None) -> bool:
        """Report that the call with `ticket` failed; return True if that opened a closed breaker.

        The breaker then stays open for `cool_down` seconds, by default half of `COOL_DOWN` or more, at
        random, so that the servers of a site don't come back all at once.
        """
        if cool_down is None:
            cool_down = COOL_DOWN * random.uniform(0.5, 1)  # noqa: S311
        with self._lock:
            if ticket != self._ticket:
                return False
            self._failures += 1
            if self._failures < self._threshold:
                return False
            closed = self._opened_at is None
            self._opened_at = now
            self._cool_down = cool_down
            self._probing = False
            self._ticket += 1
            return closed


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

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        """Return the backend's answer. Raises AuthorityUnavailable while the breaker is open, too."""
        ticket = self._breaker.begin(self._timer())
        if ticket is None:
            self._count("skipped")
            raise AuthorityUnavailable(
                f"{self.name} failed repeatedly and gets no lookups for a second"
            )
        began = self._timer()
        try:
            answer = self._backend.lookup(key, address)
        except (Throttled, UnusableReply) as error:
            self._count("throttled" if isinstance(error, Throttled) else "failed", began)
            # The backend did answer, and the cause may be this key alone: other keys must not suffer.
            self._answered(ticket)
            raise
        except BaseException as error:
            self._count("failed", began)
            if self._breaker.failed(ticket, self._timer()):
                metrics.BREAKER_OPEN.labels(self.name).set(1)
                _log.warning(
                    "%s keeps failing and gets no lookups for a second: %s", self.name, error
                )
            raise
        self._answered(ticket)
        self._count("rejected" if isinstance(answer, Rejected) else "known", began)
        return answer

    def _answered(self, ticket: int) -> None:
        if self._breaker.succeeded(ticket):
            metrics.BREAKER_OPEN.labels(self.name).set(0)

    def _count(self, result: str, began: float | None = None) -> None:
        metrics.AUTHORITY_CALLS.labels(self.name, result).inc()
        if began is not None:
            metrics.AUTHORITY_SECONDS.labels(self.name).observe(self._timer() - began)

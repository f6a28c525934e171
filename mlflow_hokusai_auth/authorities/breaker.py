"""A circuit breaker: it stops calls for a while after several failures in a row.

`Breaker` holds the states only; its owner brings the clock, the lock and the calls. A closed breaker
permits every call. `threshold` failures in a row open it, and it permits no call until the cool-down is
over. Then it permits one call, the probe: success closes the breaker, failure opens it again. A probe
whose outcome is never reported is replaced by another one.
"""

from __future__ import annotations


class Breaker:
    """Not thread-safe. `now` is in seconds of any clock, best a monotonic one.

    A probe that takes more than `max_probe` seconds is taken for lost.
    """

    def __init__(self, threshold: int = 5, max_probe: float = 10.0) -> None:
        self._threshold = threshold
        self._max_probe = max_probe
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

    @property
    def probing(self) -> bool:
        """True while the probe is under way."""
        return self._probing

    def begin(self, now: float) -> int | None:
        """Return a ticket for a call, or None if no call is permitted now.

        The caller must report the call's outcome with `succeeded` or `failed`, however it ends.
        """
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

    def succeeded(self, ticket: int) -> None:
        """Report that the call with `ticket` was answered."""
        if ticket != self._ticket:
            return
        self._failures = 0
        if self._opened_at is not None:
            self._opened_at = None
            self._probing = False
            self._ticket += 1

    def failed(self, ticket: int, now: float, cool_down: float) -> bool:
        """Report that the call with `ticket` failed; return True if that opened the breaker.

        It then stays open for `cool_down` seconds.
        """
        if ticket != self._ticket:
            return False
        self._failures += 1
        if self._failures < self._threshold:
            return False
        self._opened_at = now
        self._cool_down = cool_down
        self._probing = False
        self._ticket += 1
        return True

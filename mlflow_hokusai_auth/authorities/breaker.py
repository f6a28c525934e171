"""A circuit breaker: what fails several times in a row is left alone for a while.

Only the states; whoever owns a breaker brings the clock, the lock and the calls. Closed, every call may
be made. After `threshold` failures in a row it opens, and no call may be made until the cool-down is
over. Then one call, the probe, may: its success closes the breaker, its failure opens it anew. A probe
that is not heard of again gives way to another one.
"""

from __future__ import annotations


class Breaker:
    """Not thread-safe. `now` is in seconds of any clock, best a monotonic one.

    A probe counts no more after `max_probe` seconds.
    """

    def __init__(self, threshold: int = 5, max_probe: float = 10.0) -> None:
        self._threshold = threshold
        self._max_probe = max_probe
        self._failures = 0
        self._opened_at: float | None = None
        self._cool_down = 0.0
        self._probing = False
        self._probe_began = 0.0
        # A ticket is the number of the state in which its call began. What a call that began in an
        # earlier state has to tell is old news: it neither closes the breaker nor keeps it open.
        self._ticket = 0

    @property
    def closed(self) -> bool:
        """Whether calls may be made without restriction."""
        return self._opened_at is None

    @property
    def probing(self) -> bool:
        """Whether the probe is under way."""
        return self._probing

    def begin(self, now: float) -> int | None:
        """A ticket for a call that may be made now, or None if none may.

        The call's outcome must be told, by `succeeded` or `failed`, whatever happens to it.
        """
        if self._opened_at is None:
            return self._ticket
        if self._probing:
            if self._probe_began <= now < self._probe_began + self._max_probe:
                return None
        else:
            # If the clock was set back, the cool-down begins anew; it must not last for the difference.
            self._opened_at = min(self._opened_at, now)
            if now - self._opened_at < self._cool_down:
                return None
        self._probing = True
        self._probe_began = now
        self._ticket += 1
        return self._ticket

    def succeeded(self, ticket: int) -> None:
        """The call that `begin` gave `ticket` to was answered."""
        if ticket != self._ticket:
            return
        self._failures = 0
        if self._opened_at is not None:
            self._opened_at = None
            self._probing = False
            self._ticket += 1

    def failed(self, ticket: int, now: float, cool_down: float) -> bool:
        """The call that `begin` gave `ticket` to failed; whether that opened the breaker.

        `cool_down` is how many seconds it then stays open.
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

"""The wait that clients are asked for while no authority can check keys."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

#: The longest wait that a client is asked for, in seconds.
MAX_WAIT = 30.0


class Outage:
    """An outage of the authority. The longer it lasts, the longer clients are asked to wait.

    MLflow's client tries seven times and waits exactly as long as `Retry-After` says. With a second
    or two each time it would give up during an outage that its own growing pauses would outlast.
    """

    def __init__(self, timer: Callable[[], float] = time.monotonic) -> None:
        self._timer = timer
        self._since: float | None = None

    def wait(self) -> float:
        """Return seconds until the next try, spread so that clients don't come back all at once."""
        now = self._timer()
        since = self._since = self._since if self._since is not None else now
        return random.uniform(1, 2) * min(max(now - since, 1.0), MAX_WAIT / 2)  # noqa: S311

    def end(self) -> None:
        """Note that keys can be checked again."""
        self._since = None

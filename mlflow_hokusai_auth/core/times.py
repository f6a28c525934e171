"""Times and spans of time as people read them: in one form, in UTC."""

from __future__ import annotations

import math
from datetime import datetime, timezone

from .counts import counted


def date(at: float) -> str:
    """Return `at`, in seconds since the epoch, to the minute: `2026-11-30 14:00Z`.

    Raises OverflowError, ValueError and OSError for a time that no calendar has.
    """
    return f"{datetime.fromtimestamp(at, timezone.utc):%Y-%m-%d %H:%MZ}"


def moment(at: float) -> str:
    """Return `at`, in seconds since the epoch, to the second: `2026-11-30 14:00:05Z`.

    Raises as `date` does.
    """
    return f"{datetime.fromtimestamp(at, timezone.utc):%Y-%m-%d %H:%M:%SZ}"


def span(seconds: float) -> str:
    """Return a number of seconds in words, rounded: `12 days`, `5 hours`, `1 minute`, `0 seconds`."""
    sizes = {"day": 86400, "hour": 3600, "minute": 60, "second": 1}
    unit = next((unit for unit, size in sizes.items() if seconds >= size), "second")
    return counted(round(max(seconds, 0) / sizes[unit]), unit)


def wait(seconds: float) -> str:
    """Return the time to wait in words: to the second up to two minutes, and about beyond."""
    whole = max(math.ceil(seconds), 1)
    if whole < 120:
        return counted(whole, "second")
    return f"about {span(whole)}"

"""Says at once that the server tells MLflow to wait, which MLflow does in silence for minutes.

urllib3 repeats MLflow's requests below `requests`, so no hook of `requests` sees the refusals that are
repeated, and at the end MLflow only says "too many 429 error responses". urllib3 calls `increment` for
each of them.
"""

from __future__ import annotations

import json
import time
from typing import Any

from urllib3.util import Retry

from mlflow_hokusai_auth.core import keys

from . import profile

#: Codes of refusals after which a repeated request may succeed.
_CODES = ("RATE_LIMITED", "AUTHORITY_UNAVAILABLE", "INTERCEPTOR_FAILED", "MISCONFIGURED")
_MAX_BODY = 8 * 1024
_MAX_MESSAGE = 300
#: Seconds for which a server's code is not repeated, at least.
_QUIET = 60.0
_MAX_TOLD = 64

#: The times from which each server's code may be said again, on the monotonic clock.
_told: dict[tuple[profile.Origin, str], float] = {}


def saying(retry: type[Retry]) -> type[Retry]:
    """Return a subclass of `retry` that warns of each wait which a server of ours asks for."""

    class Saying(retry):  # type: ignore[misc,valid-type]
        def increment(
            self,
            method: str | None = None,
            url: str | None = None,
            response: Any = None,
            error: Exception | None = None,
            _pool: Any = None,
            _stacktrace: Any = None,
        ) -> Retry:
            # It raises for the last answer, whose body is left to `requests`.
            following: Retry = super().increment(method, url, response, error, _pool, _stacktrace)
            if response is not None:
                _say(response, _pool, following)
            return following

    Saying.__name__ = Saying.__qualname__ = retry.__name__
    return Saying


def _say(response: Any, pool: Any, following: Retry) -> None:
    """Warn of the wait that `response` asks for, once while it lasts. Never raises."""
    try:
        host = f"[{pool.host}]" if ":" in pool.host else pool.host
        url = f"{pool.scheme}://{host}:{pool.port}"
        origin = profile.origin(url)
        if response.status not in (429, 503) or origin is None or not profile.origin_allowed(url):
            return
        body = json.loads(response.read(_MAX_BODY, decode_content=True))
        code = body["error"]
        if code not in _CODES:
            return
        headers = response.headers
        reset = headers.get("RateLimit-Reset", "") if code == "RATE_LIMITED" else ""
        wait = int(reset or headers.get("Retry-After", "0"))
        if time.monotonic() < _told.get((origin, code), 0.0):
            return
        if len(_told) >= _MAX_TOLD:
            _told.clear()
        _told[origin, code] = time.monotonic() + max(wait, _QUIET)
        what = f"served again in {wait} s." if reset else _message(str(body["message"]))
        times = f"up to {following.total + 1} times" if following.total else "once"
        profile.warn(f"{code}: {what} MLflow waits and tries again, {times}.")
    except Exception:
        return


def _message(text: str) -> str:
    """Return the advice in the message of a refusal, as one printable line without keys."""
    text = keys.one_line(text.rpartition("). ")[2])
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "…"

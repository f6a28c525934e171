"""How often a key may be used, and how often an address may fail.

Counted by the `limits` library in a moving window: in this process, or in Redis for all of a site's. A
Redis that fails is left alone for a second at a time, and each process counts for itself meanwhile.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from limits import RateLimitItem, RateLimitItemPerHour, RateLimitItemPerMinute
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import MovingWindowRateLimiter, SlidingWindowCounterRateLimiter

from mlflow_hokusai_auth.authorities.redis_client import BestEffortRedis, NoAnswer, client
from mlflow_hokusai_auth.core.types import Allow, Deny
from mlflow_hokusai_auth.server import metrics

#: Attempts to sign in from one address, in any minute.
SIGN_INS_PER_MINUTE = 10
#: Addresses that are told apart at a time. While there are more, each counts as one of `CROWDS`, which
#: nobody can choose: with one for all, whoever has that many addresses (IPv6) would lock out everybody.
MAX_ADDRESSES = 10_000
CROWDS = 1000
#: Seconds that a question to Redis may take, name resolution included.
BUDGET = 0.5
#: Seconds by which the clock may be set back without counting anew.
MAX_STEP = 60.0

_Result = TypeVar("_Result")
_SIGN_INS = RateLimitItemPerMinute(SIGN_INS_PER_MINUTE)
_ALL_SIGN_INS = RateLimitItemPerMinute(SIGN_INS_PER_MINUTE * 30)


class Limits:
    """Counts requests, those with a good key in the Redis at `redis_url` if one is named.

    More than `failures_per_minute` wrong keys from one address in a minute are too many; 0 for never.
    Raises ValueError or ModuleNotFoundError for a URL that can't be used, as `shared.client` does.
    """

    def __init__(self, redis_url: str = "", *, failures_per_minute: int = 0) -> None:
        self._failures = (
            RateLimitItemPerMinute(failures_per_minute) if failures_per_minute else None
        )
        self._keys = MovingWindowRateLimiter(MemoryStorage())
        self._counted_at = time.time()
        self._addresses_storage = MemoryStorage()
        self._addresses = SlidingWindowCounterRateLimiter(self._addresses_storage)
        self._shared = None
        if redis_url:
            pool = client(redis_url, BUDGET).connection_pool
            storage = RedisStorage(
                redis_url,
                connection_pool=pool,
                key_prefix="hokusai-auth:limits",
                wrap_exceptions=True,
            )
            self._shared = MovingWindowRateLimiter(storage)
        self._patience = BestEffortRedis(BUDGET, "each process counts limits for itself")

    @property
    def does_io(self) -> bool:
        """Whether `admit` may ask Redis, and so must not be called where nothing may block."""
        return self._shared is not None

    def admit(self, allow: Allow) -> Allow | Deny:
        """`allow`, counted, with what is left of its key's limit; or the refusal if nothing is."""
        principal = allow.principal
        if principal is None or principal.rate_limit_per_hour is None:
            return allow
        item = RateLimitItemPerHour(principal.rate_limit_per_hour)
        name = principal.key_id
        admitted, left, reset = self._ask(
            lambda limiter: (limiter.hit(item, name), *_window(limiter, item, name))
        )
        headers = _headers(item.amount, left, reset)
        if admitted:
            return replace(allow, headers=allow.headers + headers)
        metrics.RATE_LIMITED.labels("key").inc()
        return Deny(
            "RATE_LIMITED",
            f"Key {name} may be used {item.amount} times in an hour, and has been. The next request "
            f"is served in {reset} s.",
            retry_after=reset,
            headers=headers,
        )

    def left(self, key_id: str, limit: int) -> tuple[int, int]:
        """Requests left to a key of `limit` an hour, and seconds until one more is."""
        item = RateLimitItemPerHour(limit)
        return self._ask(lambda limiter: _window(limiter, item, key_id))

    def failed(self, address: str) -> float | None:
        """Count a wrong key from `address`; seconds to wait if there were too many, else None."""
        if self._failures is None:
            return None
        return self._count(self._failures, "failures", self._bucket(address))

    def over(self, address: str) -> float | None:
        """Seconds to wait, 60 at most, if `address` sent too many wrong keys; None if it didn't.

        Counts nothing.
        """
        if self._failures is None:
            return None
        name = self._bucket(address)
        if self._addresses.test(self._failures, "failures", name):
            return None
        metrics.RATE_LIMITED.labels("failures").inc()
        return self._wait(self._failures, "failures", name)

    def sign_in(self, address: str) -> float | None:
        """Count an attempt to sign in; seconds to wait if there were too many, else None."""
        wait = self._count(_SIGN_INS, "sign-ins", self._bucket(address))
        # Only then for everybody, lest one address could keep all others out.
        return wait or self._count(_ALL_SIGN_INS, "sign-ins", "everybody")

    def _count(self, item: RateLimitItem, kind: str, name: str) -> float | None:
        if self._addresses.hit(item, kind, name):
            return None
        metrics.RATE_LIMITED.labels(kind).inc()
        return self._wait(item, kind, name)

    def _wait(self, item: RateLimitItem, kind: str, name: str) -> float:
        reset = self._addresses.get_window_stats(item, kind, name).reset_time
        return min(max(reset - time.time(), 1.0), 60.0)

    def _bucket(self, address: str) -> str:
        name = customer(address)
        crowded = len(self._addresses_storage.storage) >= MAX_ADDRESSES
        # Python's hash of a text depends on a secret of the process.
        return f"crowd {hash(name) % CROWDS}" if crowded else name

    def _ask(self, question: Callable[[MovingWindowRateLimiter], _Result]) -> _Result:
        shared = self._shared
        if shared is not None:
            with contextlib.suppress(NoAnswer):
                return self._patience.ask(lambda: question(shared))
        return question(self._own())

    def _own(self) -> MovingWindowRateLimiter:
        """What this process counts, begun anew if the clock was set back.

        What was counted in a future by then would count until that is over, not for an hour.
        """
        before, self._counted_at = self._counted_at, time.time()
        if self._counted_at < before - MAX_STEP:
            self._keys = MovingWindowRateLimiter(MemoryStorage())
        return self._keys


def customer(address: str) -> str:
    """`address`, or the network of one IPv6 customer, who may use any address of it."""
    if ":" not in address:
        return address
    return str(ipaddress.ip_network((address, 64), strict=False))


def _window(limiter: MovingWindowRateLimiter, item: RateLimitItem, name: str) -> tuple[int, int]:
    stats = limiter.get_window_stats(item, name)
    return stats.remaining, max(math.ceil(stats.reset_time - time.time()), 1)


def _headers(limit: int, left: int, reset: int) -> tuple[tuple[str, str], ...]:
    """As draft-ietf-httpapi-ratelimit-headers-06 has them, seconds as the unit of the last."""
    return (
        ("RateLimit-Limit", str(limit)),
        ("RateLimit-Remaining", str(left)),
        ("RateLimit-Reset", str(reset)),
    )

"""Rate limits of keys, and of addresses that send wrong keys or sign in.

The `limits` library counts in a moving window: in this process, or in Redis for all processes of a
site. After a failure of Redis, each process counts for itself and doesn't ask Redis for a second.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import time
from collections.abc import Callable
from typing import TypeVar

from limits import RateLimitItem, RateLimitItemPerHour, RateLimitItemPerMinute
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import MovingWindowRateLimiter, SlidingWindowCounterRateLimiter

from mlflow_hokusai_auth.authorities.redis_client import BestEffortRedis, NoAnswer, client
from mlflow_hokusai_auth.core.types import Allow, Deny
from mlflow_hokusai_auth.server import metrics

#: Attempts to sign in that one address has in any minute.
SIGN_INS_PER_MINUTE = 10
#: Identity tokens that one address may exchange in any minute: many jobs may share an address.
EXCHANGES_PER_MINUTE = 120
#: Attempts to open a one-time link that one address has in any minute.
LINKS_PER_MINUTE = 10
#: The largest number of addresses that are counted apart. Further addresses share `CROWDS` buckets,
#: and no client can choose its bucket. If they shared one bucket, a client with that many addresses
#: (IPv6) would lock out all others.
MAX_ADDRESSES = 10_000
CROWDS = 1000
#: Seconds that a request to Redis may take, name resolution included.
BUDGET = 0.5
#: Seconds by which the clock may be set back before the counts start at zero.
MAX_STEP = 60.0

_Result = TypeVar("_Result")
_SIGN_INS = RateLimitItemPerMinute(SIGN_INS_PER_MINUTE)
_EXCHANGES = RateLimitItemPerMinute(EXCHANGES_PER_MINUTE)
_LINKS = RateLimitItemPerMinute(LINKS_PER_MINUTE)
_ALL_SIGN_INS = RateLimitItemPerMinute(SIGN_INS_PER_MINUTE * 30)


class Limits:
    """Counts requests with a good key (in the Redis at `redis_url`, if given), wrong keys and sign-ins.

    An address may send `failures_per_minute` wrong keys; 0 stands for no limit. Raises ValueError or
    ModuleNotFoundError for a URL that can't be used, as `redis_client.client` does.
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
        self._redis = BestEffortRedis(BUDGET, "each process counts limits for itself")

    @property
    def does_io(self) -> bool:
        """True if `admit` sends requests to Redis, so that the event loop must not call it."""
        return self._shared is not None

    def admit(self, allow: Allow) -> Allow | Deny:
        """Count a request. Return `allow` with RateLimit headers, or a 429 beyond the limit."""
        principal = allow.principal
        if principal is None or principal.rate_limit_per_hour is None:
            return allow
        item = RateLimitItemPerHour(principal.rate_limit_per_hour)
        name = principal.key_id
        admitted, left, reset = self._with_limiter(
            lambda limiter: (limiter.hit(item, name), *_window(limiter, item, name))
        )
        headers = _headers(item.amount, left, reset)
        if admitted:
            return allow._replace(headers=allow.headers + headers)
        metrics.RATE_LIMITED.labels("key").inc()
        return Deny(
            "RATE_LIMITED",
            f"Key {name} has had its requests of this hour (limit: {item.amount}).",
            retry_after=reset,
            headers=headers,
        )

    def left(self, key_id: str, limit: int) -> tuple[int, int]:
        """Return the requests left of `limit` an hour, and seconds until there is one more."""
        item = RateLimitItemPerHour(limit)
        return self._with_limiter(lambda limiter: _window(limiter, item, key_id))

    def failed(self, address: str) -> float | None:
        """Count a wrong key from `address`. Return seconds to wait if there are too many, or None."""
        if self._failures is None:
            return None
        return self._count(self._failures, "failures", self._bucket(address))

    def wait_for(self, address: str) -> float | None:
        """Return seconds to wait, at most 60, if `address` sent too many wrong keys; otherwise None.

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
        """Count an attempt to sign in. Return seconds to wait if there are too many, or None."""
        wait = self._count(_SIGN_INS, "sign-ins", self._bucket(address))
        # An attempt beyond the address's limit doesn't count towards the limit of all addresses:
        # otherwise one address could keep all others from signing in.
        return wait or self._count(_ALL_SIGN_INS, "sign-ins", "everybody")

    def exchange(self, address: str) -> float | None:
        """Count an exchange of an identity token, good or not. Return seconds to wait, or None."""
        return self._count(_EXCHANGES, "exchanges", self._bucket(address))

    def open_link(self, address: str) -> float | None:
        """Count an attempt to open a one-time link. Return seconds to wait, or None."""
        return self._count(_LINKS, "links", self._bucket(address))

    def _count(self, item: RateLimitItem, kind: str, name: str) -> float | None:
        if self._addresses.hit(item, kind, name):
            return None
        metrics.RATE_LIMITED.labels(kind).inc()
        return self._wait(item, kind, name)

    def _wait(self, item: RateLimitItem, kind: str, name: str) -> float:
        reset = self._addresses.get_window_stats(item, kind, name).reset_time
        return min(max(reset - time.time(), 1.0), 60.0)

    def _bucket(self, address: str) -> str:
        name = client_network(address)
        crowded = len(self._addresses_storage.storage) >= MAX_ADDRESSES
        # Python's hash of a text depends on a secret of the process.
        return f"crowd {hash(name) % CROWDS}" if crowded else name

    def _with_limiter(self, question: Callable[[MovingWindowRateLimiter], _Result]) -> _Result:
        shared = self._shared
        if shared is not None:
            with contextlib.suppress(NoAnswer):
                return self._redis.ask(lambda: question(shared))
        return question(self._own())

    def _own(self) -> MovingWindowRateLimiter:
        """Return the counts of this process, or new ones if the clock was set back.

        The old counts would then lie in the future, and hold until the clock has passed them.
        """
        before, self._counted_at = self._counted_at, time.time()
        if self._counted_at < before - MAX_STEP:
            self._keys = MovingWindowRateLimiter(MemoryStorage())
        return self._keys


def client_network(address: str) -> str:
    """Return `address`, or the /64 of an IPv6 address: a customer can use all of that network."""
    if ":" not in address:
        return address
    return str(ipaddress.ip_network((address, 64), strict=False))


def _window(limiter: MovingWindowRateLimiter, item: RateLimitItem, name: str) -> tuple[int, int]:
    stats = limiter.get_window_stats(item, name)
    return stats.remaining, max(math.ceil(stats.reset_time - time.time()), 1)


def _headers(limit: int, left: int, reset: int) -> tuple[tuple[str, str], ...]:
    """Return the headers of draft-ietf-httpapi-ratelimit-headers-06. `reset` is in seconds."""
    return (
        ("RateLimit-Limit", str(limit)),
        ("RateLimit-Remaining", str(left)),
        ("RateLimit-Reset", str(reset)),
    )

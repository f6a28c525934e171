"""Principals shared through Redis: a key that one server verified costs the others no lookup.

Redis only makes misses rarer. An operation never raises and never takes longer than its budget, and
after a few failures Redis is tried in the background only, until it answers again.

Only principals are shared, each for the rest of its time to live: that bounds, for all servers
together, how long a revoked key still works. When the authority rejects a key, the server also removes
the key's entry from Redis.

An entry is stored under a hash of the cache's digest and signed with that digest, which is itself
keyed with the servers' secret. So the content of Redis does not help to find a key, and a client of
Redis can't forge a principal. The time of the lookup is signed as well: an entry that is saved and
written back, such as after a revocation, is valid no longer than it was before.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Callable
from dataclasses import asdict

from mlflow_hokusai_auth.core.types import Principal

from .redis_client import BestEffortRedis, NoAnswer, client

# The number is that of the entries' form: a principal that lacks a field must not be read.
_PREFIX = "hokusai-auth:6:"
#: An entry is ignored if its server's clock is further ahead than this (seconds).
MAX_SKEW = 10.0


class SharedCache:
    """The principals in the Redis at `url`: `redis://`, `rediss://` (verified TLS) or `unix://`.

    An entry is valid for `max_age` seconds after the lookup, by the servers' clocks (`clock`, seconds
    since the epoch), and never longer than the time for which it was put. An operation takes at most
    `budget` seconds, name resolution and connecting included. Raises ValueError for an unusable URL,
    and ModuleNotFoundError, which names the extra to install, without redis-py.
    """

    def __init__(
        self,
        url: str,
        *,
        max_age: float,
        budget: float = 0.1,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._max_age = max_age
        self._clock = clock
        self._redis = client(url, budget)
        self._operations = BestEffortRedis(budget, "verified keys are not shared between servers")

    def get(self, digest: bytes) -> tuple[Principal, float] | None:
        """Return the principal stored for `digest` and its remaining seconds to live, or None."""
        name = _name(digest)
        try:
            value, left = self._operations.ask(
                lambda: self._redis.pipeline(transaction=True).get(name).pttl(name).execute()
            )
        except NoAnswer:
            return None
        entry = _decode(digest, value) if left > 0 else None
        if entry is None:
            return None
        principal, verified = entry
        age = self._clock() - verified
        # A client of Redis can change an entry's time to live there, but not its signed age.
        if not -MAX_SKEW <= age < self._max_age:
            return None
        return principal, min(left / 1000, self._max_age - max(age, 0.0))

    def put(self, digest: bytes, principal: Principal, ttl: float, age: float = 0.0) -> None:
        """Store `principal` for `digest` for `ttl` seconds; the lookup was `age` seconds ago.

        Returns at once.
        """
        milliseconds = int(ttl * 1000)
        if milliseconds > 0:
            name, value = _name(digest), _encode(digest, principal, self._clock() - age)
            self._operations.submit(lambda: self._redis.set(name, value, px=milliseconds))

    def forget(self, digest: bytes) -> None:
        """Remove the entry for `digest`. Returns at once."""
        name = _name(digest)
        self._operations.submit(lambda: self._redis.delete(name))


def _name(digest: bytes) -> str:
    return _PREFIX + hashlib.sha256(digest).hexdigest()


def _signature(digest: bytes, text: bytes) -> bytes:
    """Return the keyed BLAKE2b (RFC 7693) of `text`: 32 bytes."""
    return hashlib.blake2b(text, key=digest, digest_size=32).digest()


def _encode(digest: bytes, principal: Principal, verified: float) -> bytes:
    """Return a signature under `digest`, then the principal and the time of the lookup as JSON."""
    fields = {**asdict(principal), "verified": verified}
    fields["scopes"] = sorted(principal.scopes)
    fields["roles"] = sorted(principal.roles)
    text = json.dumps(fields).encode()
    return _signature(digest, text) + text


def _decode(digest: bytes, value: bytes) -> tuple[Principal, float] | None:
    """Return the arguments of `_encode`, or None if `value` was not made by it for `digest`."""
    signature, text = value[:32], value[32:]
    if not hmac.compare_digest(signature, _signature(digest, text)):
        return None
    try:
        fields = json.loads(text)
        fields["scopes"] = frozenset(fields["scopes"])
        fields["roles"] = frozenset(fields["roles"])
        fields["networks"] = tuple(fields["networks"])
        fields["models"] = tuple(fields["models"])
        verified = float(fields.pop("verified"))
        return Principal(**fields), verified
    except (KeyError, TypeError, ValueError):
        return None  # Another version of this package has other fields.

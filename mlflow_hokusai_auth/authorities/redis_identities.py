"""Identities shared through Redis, so that a key that one server verified is known to the others.

Redis only makes misses rarer. An operation never raises and never takes longer than its budget, and
after a few failures Redis is asked in the background only, until it answers again.

Only principals are shared, each for the rest of its time to live: that bounds, for all servers
together, for how long a revoked key is still served. A server to which the authority rejects a key also
removes what Redis has of it.

An entry is stored under a hash of the cache's digest and signed with that digest, which is itself an
HMAC under the servers' secret. So what Redis holds is of no use for finding a key, and whoever can
write to it can't make up an identity. The time at which the authority was asked is signed as well: an
entry that somebody kept and puts back, as after a revocation, counts no longer than it would have.
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

_PREFIX = "hokusai-auth:2:"
#: Seconds by which another server's clock may be ahead of this one's for its entries to count here.
MAX_SKEW = 10.0


class SharedCache:
    """The identities in the Redis at `url`, `redis://`, `rediss://` (verified) or `unix://`.

    An entry counts for `max_age` seconds after the authority was asked, by the servers' clocks
    (`clock`, seconds since the epoch), and never for longer than it was put for.
    `budget` is the number of seconds that an operation may take in all, name resolution and connecting
    included. Raises ValueError for a URL that can't be used, and ModuleNotFoundError, with what to
    install, without redis-py.
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
        self._patience = BestEffortRedis(budget, "identities are not shared between servers")

    def get(self, digest: bytes) -> tuple[Principal, float] | None:
        """The principal kept under `digest` and the seconds left of its time to live, or None."""
        name = _name(digest)
        try:
            value, left = self._patience.ask(
                lambda: self._redis.pipeline(transaction=True).get(name).pttl(name).execute()
            )
        except NoAnswer:
            return None
        entry = _decode(digest, value) if left > 0 else None
        if entry is None:
            return None
        principal, verified = entry
        age = self._clock() - verified
        # Whoever writes to Redis decides how long it keeps an entry, but not how old the entry is.
        if not -MAX_SKEW <= age < self._max_age:
            return None
        return principal, min(left / 1000, self._max_age - max(age, 0.0))

    def put(self, digest: bytes, principal: Principal, ttl: float, age: float = 0.0) -> None:
        """Keep `principal` under `digest` for `ttl` seconds. Returns at once.

        `age` is how many seconds ago the authority was asked.
        """
        milliseconds = int(ttl * 1000)
        if milliseconds > 0:
            name, value = _name(digest), _encode(digest, principal, self._clock() - age)
            self._patience.tell(lambda: self._redis.set(name, value, px=milliseconds))

    def forget(self, digest: bytes) -> None:
        """Remove what is kept under `digest`. Returns at once."""
        name = _name(digest)
        self._patience.tell(lambda: self._redis.delete(name))


def _name(digest: bytes) -> str:
    return _PREFIX + hashlib.sha256(digest).hexdigest()


def _encode(digest: bytes, principal: Principal, verified: float) -> bytes:
    """The principal, and when it was `verified`, as JSON behind an HMAC-SHA256 under `digest`."""
    fields = {**asdict(principal), "verified": verified}
    fields["scopes"] = sorted(principal.scopes)
    fields["roles"] = sorted(principal.roles)
    text = json.dumps(fields).encode()
    return hmac.digest(digest, text, "sha256") + text


def _decode(digest: bytes, value: bytes) -> tuple[Principal, float] | None:
    """What `_encode` was given for this digest, or None if it did not make `value` for it."""
    signature, text = value[:32], value[32:]
    if not hmac.compare_digest(signature, hmac.digest(digest, text, "sha256")):
        return None
    try:
        fields = json.loads(text)
        fields["scopes"] = frozenset(fields["scopes"])
        fields["roles"] = frozenset(fields["roles"])
        fields["networks"] = tuple(fields["networks"])
        verified = float(fields.pop("verified"))
        return Principal(**fields), verified
    except (KeyError, TypeError, ValueError):
        return None  # another version of this package has other fields

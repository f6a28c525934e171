"""Identities shared through Redis, so that a key that one server verified is known to the others.

Redis only makes misses rarer. An operation never raises and never takes longer than its budget, and
after a few failures Redis is asked in the background only, until it answers again.

Only principals are shared, each for the rest of its time to live: that bounds, for all servers
together, for how long a revoked key is still served. A server to which the authority rejects a key also
removes what Redis has of it.

An entry is stored under a hash of the cache's digest and signed with that digest, which is itself an
HMAC under the servers' secret. So what Redis holds is of no use for finding a key, and whoever can
write to it can't make up an identity.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any
from urllib.parse import parse_qs, urlsplit

from mlflow_hokusai_auth.core.breaker import Breaker
from mlflow_hokusai_auth.core.types import Principal

#: Seconds between two attempts at a Redis that failed, at most.
COOL_DOWN = 1.0
#: Operations under way at once. With more, further ones are skipped: it is only a cache.
_MAX_PENDING = 32
_WORKERS = 4
_PREFIX = "hokusai-auth:1:"

_log = logging.getLogger(__name__)


class SharedCache:
    """The identities in the Redis at `url`, `redis://`, `rediss://` (verified) or `unix://`.

    `budget` is the number of seconds that an operation may take in all, name resolution and connecting
    included. Raises ValueError for a URL that can't be used, and ModuleNotFoundError, with what to
    install, without redis-py.
    """

    def __init__(self, url: str, *, budget: float = 0.1) -> None:
        self._redis = client(url, budget)
        self._budget = budget
        self._lock = threading.Lock()
        self._breaker = Breaker()
        self._pending = threading.BoundedSemaphore(_MAX_PENDING)
        # In threads of its own: timeouts of a socket bound neither name resolution nor a server that
        # sends a byte now and then.
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="hokusai-auth-redis")

    def get(self, digest: bytes) -> tuple[Principal, float] | None:
        """The principal kept under `digest` and the seconds left of its time to live, or None."""
        name = _name(digest)
        started = self._start(
            lambda: self._redis.pipeline(transaction=True).get(name).pttl(name).execute()
        )
        if started is None:
            return None
        ticket, found = started
        if not self._breaker.closed:
            # The probe. Nobody waits for a Redis that failed, not even to learn that it is back.
            self._follow(ticket, found)
            return None
        try:
            value, left = found.result(self._budget)
        except Exception as error:
            found.cancel()
            self._failed(ticket, error)
            return None
        self._succeeded(ticket)
        principal = _decode(digest, value) if left > 0 else None
        return None if principal is None else (principal, left / 1000)

    def put(self, digest: bytes, principal: Principal, ttl: float) -> None:
        """Keep `principal` under `digest` for `ttl` seconds. Returns at once."""
        milliseconds = int(ttl * 1000)
        if milliseconds > 0:
            name, value = _name(digest), _encode(digest, principal)
            self._do(lambda: self._redis.set(name, value, px=milliseconds))

    def forget(self, digest: bytes) -> None:
        """Remove what is kept under `digest`. Returns at once."""
        name = _name(digest)
        self._do(lambda: self._redis.delete(name))

    def _do(self, operation: Callable[[], Any]) -> None:
        if (started := self._start(operation)) is not None:
            self._follow(*started)

    def _start(self, operation: Callable[[], Any]) -> tuple[int, Future[Any]] | None:
        """The breaker's ticket for `operation`, and the operation under way, unless it may not be."""
        if not self._pending.acquire(blocking=False):
            return None
        with self._lock:
            ticket = self._breaker.begin(time.monotonic())
        if ticket is None:
            self._pending.release()
            return None
        try:
            started = self._workers.submit(operation)
        except RuntimeError as error:  # no threads to be had, as when the interpreter shuts down
            self._pending.release()
            self._failed(ticket, error)
            return None
        started.add_done_callback(lambda _: self._pending.release())
        return ticket, started

    def _follow(self, ticket: int, started: Future[Any]) -> None:
        """Tell the breaker how an operation that nobody waits for ends."""
        began = time.monotonic()

        def ended(done: Future[Any]) -> None:
            error = done.exception()
            if error is None and time.monotonic() - began > self._budget:
                error = TimeoutError()
            if error is None:
                self._succeeded(ticket)
            else:
                self._failed(ticket, error)

        started.add_done_callback(ended)

    def _succeeded(self, ticket: int) -> None:
        with self._lock:
            self._breaker.succeeded(ticket)

    def _failed(self, ticket: int, error: BaseException) -> None:
        cool_down = COOL_DOWN * random.uniform(0.5, 1)  # noqa: S311
        with self._lock:
            first = self._breaker.closed
            opened = self._breaker.failed(ticket, time.monotonic(), cool_down)
        if opened and first:
            # Only the kind of error, as its text may quote the URL.
            _log.warning("Doing without Redis, which fails: %s", type(error).__name__)


def client(url: str, budget: float) -> Any:
    """A client of the Redis at `url` whose every operation takes `budget` seconds at most, or fails.

    Raises ValueError, which quotes nothing of the URL, or ModuleNotFoundError.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError(
            "the Redis URL must start with redis://, rediss:// (TLS) or unix://, as in "
            "rediss://:password@redis.example.com:6379/0"
        )
    tls = parts.scheme == "rediss"
    # redis-py takes any argument of its own from the query, `ssl_cert_reqs=none` among them.
    may_set = {"db", "ssl_ca_certs"} if tls else {"db"}
    if other := set(parse_qs(parts.query, keep_blank_values=True)) - may_set:
        raise ValueError(
            f"the Redis URL must not set {', '.join(sorted(other))}, only db and, with rediss://, "
            "ssl_ca_certs; certificates are always verified"
        )
    try:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a Redis URL is set, which needs the extra: pip install 'mlflow-hokusai-auth[redis]'",
            name=error.name,
        ) from None
    verified = {"ssl_cert_reqs": "required", "ssl_check_hostname": True} if tls else {}
    try:
        return redis.Redis.from_url(
            url,
            protocol=2,  # enough, and one question less when connecting
            socket_timeout=budget,
            socket_connect_timeout=budget,
            retry=Retry(NoBackoff(), 0),
            **verified,
        )
    except ValueError:
        # Its text may quote a part of the password.
        raise ValueError("the Redis URL has a host, port or db that can't be read") from None


def _name(digest: bytes) -> str:
    return _PREFIX + hashlib.sha256(digest).hexdigest()


def _encode(digest: bytes, principal: Principal) -> bytes:
    """The principal as JSON behind its signature: HMAC-SHA256 under `digest`."""
    fields = asdict(principal)
    fields["scopes"] = sorted(principal.scopes)
    fields["roles"] = sorted(principal.roles)
    text = json.dumps(fields).encode()
    return hmac.digest(digest, text, "sha256") + text


def _decode(digest: bytes, value: bytes) -> Principal | None:
    """The principal in `value`, or None if `_encode` did not make it for this digest."""
    signature, text = value[:32], value[32:]
    if not hmac.compare_digest(signature, hmac.digest(digest, text, "sha256")):
        return None
    try:
        fields = json.loads(text)
        fields["scopes"] = frozenset(fields["scopes"])
        fields["roles"] = frozenset(fields["roles"])
        fields["networks"] = tuple(fields["networks"])
        return Principal(**fields)
    except (KeyError, TypeError, ValueError):
        return None  # another version of this package has other fields

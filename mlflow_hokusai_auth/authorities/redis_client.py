"""Redis for requests that can do without it: a request waits briefly, and never for a failing Redis."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

from mlflow_hokusai_auth.core.errors import HokusaiAuthError

from .breaker import Breaker

#: Most operations under way at once; further ones are skipped.
_MAX_PENDING = 32
#: One thread for each lookup that may run at once: twice `server.gate.lookup_pool.THREADS`.
_WORKERS = 16

_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)


class NoAnswer(HokusaiAuthError):
    """Raised if Redis gave no answer in time, or got no operation because it kept failing."""


class BestEffortRedis:
    """Operations that delay a request by at most `budget` seconds, name resolution included.

    After a few failures, operations are tried one at a time in the background until one succeeds.
    `without` is the log's text for what happens meanwhile.
    """

    def __init__(self, budget: float, without: str) -> None:
        self._budget = budget
        self._without = without
        self._breaker = Breaker()
        self._pending = threading.BoundedSemaphore(_MAX_PENDING)
        # Operations run in threads, as a socket's timeout bounds neither name resolution nor a server
        # that sends a byte now and then.
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="hokusai-auth-redis")

    def ask(self, operation: Callable[[], _Result]) -> _Result:
        """Run `operation` and return its result. Raises NoAnswer."""
        ticket, started = self._start(operation)
        if not self._breaker.closed:
            # This is the probe. No request waits for a Redis that failed, not even for its recovery.
            self._report_later(ticket, started)
            raise NoAnswer
        try:
            answer = started.result(self._budget)
        except Exception as error:
            started.cancel()
            self._failed(ticket, error)
            raise NoAnswer from None
        self._breaker.succeeded(ticket)
        return answer

    def submit(self, operation: Callable[[], object]) -> None:
        """Start `operation` if Redis seems to work. Returns at once."""
        with contextlib.suppress(NoAnswer):
            self._report_later(*self._start(operation))

    def _start(self, operation: Callable[[], _Result]) -> tuple[int, Future[_Result]]:
        """Start `operation`; return the breaker's ticket and the result to come. Raises NoAnswer."""
        if not self._pending.acquire(blocking=False):
            raise NoAnswer
        ticket = self._breaker.begin(time.monotonic())
        if ticket is None:
            self._pending.release()
            raise NoAnswer
        try:
            started = self._workers.submit(operation)
        except RuntimeError as error:  # No thread can start, as when the interpreter shuts down.
            self._pending.release()
            self._failed(ticket, error)
            raise NoAnswer from None
        started.add_done_callback(lambda _: self._pending.release())
        return ticket, started

    def _report_later(self, ticket: int, started: Future[Any]) -> None:
        """Report the outcome to the breaker when an operation ends that no request waits for."""
        began = time.monotonic()

        def ended(done: Future[Any]) -> None:
            error = done.exception()
            if error is None and time.monotonic() - began > self._budget:
                error = TimeoutError()
            if error is None:
                self._breaker.succeeded(ticket)
            else:
                self._failed(ticket, error)

        started.add_done_callback(ended)

    def _failed(self, ticket: int, error: BaseException) -> None:
        if self._breaker.failed(ticket, time.monotonic()):
            # The message has the error's class only, as its text may quote the URL.
            _log.warning("Redis fails (%s): %s", type(error).__name__, self._without)


def client(url: str, budget: float) -> Any:
    """Return a client of the Redis at `url`; each step of an operation takes at most `budget` seconds.

    Raises ValueError, which quotes nothing of the URL, or ModuleNotFoundError without redis-py.
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
            protocol=2,  # RESP2 needs no HELLO when connecting.
            socket_timeout=budget,
            socket_connect_timeout=budget,
            retry=Retry(NoBackoff(), 0),
            **verified,
        )
    except ValueError:
        # The original error's text may quote a part of the password.
        raise ValueError("the Redis URL has a host, port or db that can't be read") from None

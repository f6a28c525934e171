"""Counts requests for Prometheus, shortly after they are over.

Counters that processes share through files are slower than most of the gate's work. So a request only
joins a queue, and a thread empties the queue every `INTERVAL` seconds. The thread also makes the spans.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from mlflow_hokusai_auth.core.types import Deny, Operation
from mlflow_hokusai_auth.server import metrics

from . import tracing

if TYPE_CHECKING:
    from mlflow_hokusai_auth.server.exchange import Exchange

#: Seconds between two counts.
INTERVAL = 0.1

_STATUSES = frozenset(str(status.value) for status in HTTPStatus)
_STEPS = {
    "registered-models/create": "model",
    "model-versions/create": "version",
}

_log = logging.getLogger(__name__)


class Recorder:
    """The queue of requests that are over and not counted yet."""

    def __init__(self) -> None:
        # A deque needs no lock for `append` and `popleft`.
        self._queue: deque[tuple[Exchange, str]] = deque()
        self._thread: threading.Thread | None = None
        self._flushing = threading.Lock()

    def add(self, exchange: Exchange, outcome: str) -> None:
        """Queue a request for counting. Does no I/O."""
        self._queue.append((exchange, outcome))
        if self._thread is None:
            # A thread does not survive a fork, so the process that serves starts it.
            thread = threading.Thread(target=self._count, name="hokusai-auth-recorder", daemon=True)
            thread.start()
            self._thread = thread
            os.register_at_fork(after_in_child=self._forget_thread)
            atexit.register(self.flush)

    def flush(self) -> None:
        """Count all requests in the queue."""
        counts: Counter[Any] = Counter()
        spans = tracing.provider()
        with self._flushing:
            while self._queue:
                exchange, outcome = self._queue.popleft()
                try:
                    counts.update(_counters(exchange, outcome))
                    _time(exchange)
                    if spans is not None:
                        tracing.record(spans, exchange, outcome)
                except Exception:
                    _log.exception("A request was not counted")
            # Under load, one increment stands for tens or hundreds of requests, which makes it cheap.
            for counter, count in counts.items():
                counter.inc(count)

    def _forget_thread(self) -> None:
        self._thread = None
        self._flushing = threading.Lock()

    def _count(self) -> None:
        while True:
            time.sleep(INTERVAL)
            # If the thread ended, the queue would grow for as long as the process lives.
            try:
                self.flush()
            except Exception:
                _log.exception("Requests were not counted")


def _counters(exchange: Exchange, outcome: str) -> Iterator[Any]:
    """Yield the counters that this request increments."""
    operation = exchange.operation
    kind, access = _names(operation)
    yield _requests(kind, access, exchange.prefix, exchange.status, outcome)
    if isinstance(exchange.verdict, Deny):
        yield _decisions("would_refuse" if exchange.passed else "refused", exchange.verdict.code)
    elif exchange.verdict is not None:
        yield _decisions("allowed", "ok")
    if exchange.query_key:
        yield metrics.QUERY_KEYS
    # Without a status, the client disconnected before it had sent the whole request.
    if operation is not None and exchange.status and (step := _step(operation.rule)):
        yield metrics.REGISTRATIONS.labels(step, "tried")
        yield metrics.REGISTRATIONS.labels(step, _registered(exchange, outcome))


def _time(exchange: Exchange) -> None:
    metrics.GATE_SECONDS.observe(exchange.decided - exchange.began)
    if exchange.answered:
        access = _names(exchange.operation)[1]
        _mlflow_seconds(access).observe(exchange.answered - exchange.decided)


def _registered(exchange: Exchange, outcome: str) -> str:
    if outcome in ("refused", "unavailable", "host"):
        return "refused"
    if outcome == "mlflow_error":
        return "failed"
    return "succeeded" if exchange.status == 200 else "rejected"


@lru_cache(maxsize=1024)
def _step(rule: str) -> str | None:
    method, _, path = rule.partition(" ")
    name = path.partition("/mlflow/")[2]
    return _STEPS.get(name) if method == "POST" else None


def _names(operation: Operation | None) -> tuple[str, str]:
    return (operation.kind, operation.access.name.lower()) if operation else ("unknown", "admin")


# `labels` takes a lock and hashes a tuple of strings, which is most of the time of a count.
@lru_cache(maxsize=4096)
def _requests(kind: str, access: str, prefix: str, status: int, outcome: str) -> Any:
    code = str(status) if str(status) in _STATUSES else "other"
    return metrics.REQUESTS.labels(kind, access, prefix or "/", code, outcome)


@lru_cache(maxsize=256)
def _decisions(outcome: str, reason: str) -> Any:
    return metrics.DECISIONS.labels(outcome, reason)


@lru_cache(maxsize=16)
def _mlflow_seconds(access: str) -> Any:
    return metrics.MLFLOW_SECONDS.labels(access)

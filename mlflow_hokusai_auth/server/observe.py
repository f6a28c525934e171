"""What is told of each request once it is over: metrics, and a line of JSON in the decision log.

The line is logged for every refusal, every failure and every change, and for a sample of what only
reads, under the logger `mlflow_hokusai_auth.decisions`. No header, no query and no key is in it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from mlflow_hokusai_auth.backends.observed import WouldRefuse
from mlflow_hokusai_auth.core.credentials import QUERY_PLACE
from mlflow_hokusai_auth.core.keys import redact
from mlflow_hokusai_auth.core.types import Access, Allow, Deny, Operation, Request

from .interceptors import RequestView
from .tally import Tally

log = logging.getLogger("mlflow_hokusai_auth.decisions")

headers_log = logging.getLogger("mlflow_hokusai_auth.headers")

_CREDENTIALS = frozenset(
    {b"authorization", b"x-api-key", b"x-mlflow-authorization", b"cookie", b"proxy-authorization"}
)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}", re.ASCII)
#: Outcomes of which, for what only reads, a sample is enough.
_WELL = ("allowed", "public", "unchecked")


@dataclass(slots=True)
class Exchange:
    """One request and what became of it. Times are readings of `time.perf_counter`, in seconds."""

    request: Request
    prefix: str
    request_id: str
    began: float
    operation: Operation | None = None
    #: The gate's own verdict; with mode observe the request was let pass whatever it was.
    verdict: Allow | Deny | None = None
    decided: float = 0.0
    #: Of the first byte of MLflow's answer, 0 if there was none.
    answered: float = 0.0
    #: When it was over.
    ended: float = 0.0
    status: int = 0
    #: MLflow's own refusal of Host or Origin, told by its form: text where all else is JSON or HTML.
    host_refusal: bool = False
    #: Bytes of the response's body.
    sent: int = 0
    #: Whether MLflow was called.
    passed: bool = False
    broke_off: bool = False
    #: Headers that interceptors add to the request for MLflow.
    added: list[tuple[bytes, bytes]] = field(default_factory=list)
    #: Headers that code behind the gate adds to the answer.
    answer: list[tuple[str, str]] = field(default_factory=list)

    def view(self) -> RequestView:
        """What interceptors see of it."""
        who = self.verdict.principal if self.verdict is not None else None
        return RequestView(
            self.request.method,
            self.request.path,
            self.prefix,
            self.request_id,
            self.operation.rule if self.operation is not None else "",
            who.key_id if who else "",
            who.owner if who else "",
            self.request.address,
        )

    @property
    def query_key(self) -> bool:
        """Whether the request's key was in its query."""
        credential = self.verdict.credential if isinstance(self.verdict, Allow) else None
        return credential is not None and QUERY_PLACE in credential.places

    def started(self, status: int, content_type: str) -> None:
        """MLflow begins to answer."""
        self.answered = time.perf_counter()
        self.status = status
        self.host_refusal = status == 403 and content_type.startswith("text/plain")


def request_id(request: Request) -> str:
    """The client's X-Request-Id, if it is a plain one and no key, or a new one."""
    sent = request.headers if request.header(b"x-request-id") is not None else ()
    for name, value in sent:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            text = value.decode("ascii")
            if redact(text) == text:
                return text
    return f"{random.getrandbits(64):016x}"


class Observer:
    """Tells of requests: `sample` is the share of those that only read, and went well, to log.

    `observed` is called for those that mode observe let pass.
    """

    def __init__(
        self,
        *,
        sample: float = 0.0,
        observed: Callable[[WouldRefuse], object] = repr,
    ) -> None:
        self._sample = sample
        self._observed = observed
        self._tally = Tally()
        self.settle = self._tally.settle

    def over(self, exchange: Exchange) -> None:
        """Log a request that is over, and have it counted within `tally.INTERVAL`. Never raises."""
        try:
            exchange.ended = time.perf_counter()
            outcome = outcome_of(exchange)
            self._tally.add(exchange, outcome)
            if exchange.passed and isinstance(exchange.verdict, Deny):
                self._observed(_would_refuse(exchange, exchange.verdict))
            if self._is_told(exchange, outcome):
                level = logging.INFO if outcome in _WELL else logging.WARNING
                if log.isEnabledFor(level):
                    text = json.dumps(line(exchange, outcome))
                    # Without `log.log`, which looks through the stack for whoever called it.
                    log.handle(log.makeRecord(log.name, level, __file__, 0, "%s", (text,), None))
        except Exception:
            logging.getLogger(__name__).exception("A request was not told of")

    def _is_told(self, exchange: Exchange, outcome: str) -> bool:
        if outcome not in _WELL:
            return True
        operation = exchange.operation
        if operation is not None and operation.access >= Access.WRITE:
            return True
        return self._sample > 0 and random.random() < self._sample  # noqa: S311


def show_headers(exchange: Exchange, after: Iterable[tuple[bytes, bytes]]) -> None:
    """Log which headers came and which MLflow gets: names, and fingerprints of what may be a key."""
    told = {
        "event": "headers",
        "request_id": exchange.request_id,
        "before": [_fingerprinted(*header) for header in exchange.request.headers],
        "after": [_fingerprinted(*header) for header in after],
    }
    headers_log.info("%s", json.dumps(told))


def _fingerprinted(name: bytes, value: bytes) -> str:
    text = redact(name.decode("latin-1"))
    spelt = name.replace(b"_", b"-")
    if spelt not in _CREDENTIALS:
        return text
    # Eight digits tell two keys apart, and are of no use to whoever would guess one.
    return f"{text}: sha256 {hashlib.sha256(value).hexdigest()[:8]}, {len(value)} bytes"


def outcome_of(exchange: Exchange) -> str:
    """One word for how a request ended, of those that `metrics.REQUESTS` describes."""
    if not exchange.passed and isinstance(exchange.verdict, Deny):
        return "unavailable" if exchange.status == 503 else "refused"
    if exchange.broke_off or exchange.status >= 500:
        # Our own routes fail only where the store or a part of the server does.
        ours = exchange.operation is not None and exchange.operation.kind == "hokusai"
        return "unavailable" if ours else "mlflow_error"
    if exchange.host_refusal:
        return "host"
    verdict = exchange.verdict
    if not isinstance(verdict, Allow):
        return "would_refuse"
    if verdict.principal is None:
        return "public" if verdict.operation.access is Access.PUBLIC else "unchecked"
    return "allowed"


def line(exchange: Exchange, outcome: str) -> dict[str, Any]:
    """The decision log's fields for a request; times in milliseconds."""
    operation, verdict = exchange.operation, exchange.verdict
    principal = verdict.principal if verdict is not None else None
    told: dict[str, Any] = {
        "at": round(time.time(), 3),
        "event": "request",
        "request_id": exchange.request_id,
        "outcome": outcome,
        "reason": reason_of(verdict),
        "status": exchange.status,
        "method": redact(exchange.request.method[:16]),
        "prefix": exchange.prefix,
        "rule": operation.rule if operation else "",
        "kind": operation.kind if operation else "",
        "access": operation.access.name.lower() if operation else "",
        "key_id": principal.key_id if principal else "",
        "owner": principal.owner if principal else "",
        "address": exchange.request.address,
        "gate_ms": round((exchange.decided - exchange.began) * 1000, 3),
        "mlflow_ms": round((exchange.answered - exchange.decided) * 1000, 3)
        if exchange.answered
        else None,
        "bytes": exchange.sent,
    }
    if operation is None or not operation.rule:
        told["path"] = redact(exchange.request.path)[:200]
    return told


def _would_refuse(exchange: Exchange, deny: Deny) -> WouldRefuse:
    principal = deny.principal
    return WouldRefuse(
        deny.code,
        exchange.operation.rule if exchange.operation else "",
        principal.key_id if principal else "",
        exchange.request.address,
        principal.owner if principal else "",
        int(time.time()) // 60,
    )


def reason_of(verdict: Allow | Deny | None) -> str:
    """The refusal's code, or "ok"."""
    return verdict.code if isinstance(verdict, Deny) else "ok"

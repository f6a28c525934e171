"""The report about each request that is over: metrics, and a line of JSON in the decision log.

The logger `mlflow_hokusai_auth.decisions` gets a line for every refusal, failure and change, and for a
sample of the requests that only read. The line has no header and no key, and from the query only the
path of an artifact that is uploaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

from mlflow_hokusai_auth.core import artifact_paths
from mlflow_hokusai_auth.core.folders import BY_NUMBER, Folders
from mlflow_hokusai_auth.core.keys import redact
from mlflow_hokusai_auth.core.types import Access, Allow, Deny
from mlflow_hokusai_auth.server.exchange import Exchange
from mlflow_hokusai_auth.server.upstream.experiment_folders import ExperimentFolders
from mlflow_hokusai_auth.store.dry_run import WouldRefuse

from .recorder import Recorder

log = logging.getLogger("mlflow_hokusai_auth.decisions")

headers_log = logging.getLogger("mlflow_hokusai_auth.headers")

_CREDENTIALS = frozenset(
    {b"authorization", b"x-api-key", b"x-mlflow-authorization", b"cookie", b"proxy-authorization"}
)
#: With these outcomes, a sample of the requests that only read is enough.
_SAMPLED = ("allowed", "public", "unchecked")


class DecisionLog:
    """The gate's `Observer`. `sample` is the share to log of the requests that succeed and only read.

    `observed` is called for each request that only mode observe let pass. `folders` decide which
    experiment an artifact's path belongs to.
    """

    def __init__(
        self,
        *,
        sample: float = 0.0,
        observed: Callable[[WouldRefuse], object] = lambda _: None,
        folders: ExperimentFolders | None = None,
        debug_headers: bool = False,
    ) -> None:
        self.debug_headers = debug_headers
        self._sample = sample
        self._folders = folders or ExperimentFolders()
        self._observed = observed
        self._recorder = Recorder()
        self.flush = self._recorder.flush

    def report(self, exchange: Exchange) -> None:
        """Log a request that is over, and queue it for `Recorder`. Never raises."""
        try:
            exchange.ended = time.perf_counter()
            outcome = outcome_of(exchange)
            self._recorder.add(exchange, outcome)
            if exchange.passed and isinstance(exchange.verdict, Deny):
                rule = exchange.operation.rule if exchange.operation else ""
                deny, address = exchange.verdict, exchange.request.address
                self._observed(WouldRefuse.now(deny.code, rule, deny.principal, address))
            if self._is_logged(exchange, outcome):
                level = logging.INFO if outcome in _SAMPLED else logging.WARNING
                if log.isEnabledFor(level):
                    text = json.dumps(line(exchange, outcome, self._folders.known))
                    # `log.log` is slower, as it searches the stack for its caller.
                    log.handle(log.makeRecord(log.name, level, __file__, 0, "%s", (text,), None))
        except Exception:
            logging.getLogger(__name__).exception("A request was not logged")

    def show_headers(self, exchange: Exchange, after: Iterable[tuple[bytes, bytes]]) -> None:
        """Log the names of the request's headers, and of those that MLflow gets (`after`).

        A header that may hold a key is logged with a fingerprint of its value.
        """
        fields = {
            "event": "headers",
            "request_id": exchange.request_id,
            "before": [_fingerprinted(*header) for header in exchange.request.headers],
            "after": [_fingerprinted(*header) for header in after],
        }
        headers_log.info("%s", json.dumps(fields))

    def _is_logged(self, exchange: Exchange, outcome: str) -> bool:
        if outcome not in _SAMPLED:
            return True
        operation = exchange.operation
        if operation is not None and operation.access >= Access.WRITE:
            return True
        return self._sample > 0 and random.random() < self._sample  # noqa: S311


def _fingerprinted(name: bytes, value: bytes) -> str:
    text = redact(name.decode("latin-1"))
    if name.replace(b"_", b"-") not in _CREDENTIALS:
        return text
    # Eight digits distinguish two keys, and don't help to guess one.
    return f"{text}: sha256 {hashlib.sha256(value).hexdigest()[:8]}, {len(value)} bytes"


def outcome_of(exchange: Exchange) -> str:
    """Return the outcome of a request that is over: one of those in `metrics.REQUESTS`."""
    if not exchange.passed and isinstance(exchange.verdict, Deny):
        return "unavailable" if exchange.status == 503 else "refused"
    if exchange.broke_off or exchange.status >= 500:
        # Our own routes fail only if the store or another part of the server does.
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


def line(exchange: Exchange, outcome: str, folders: Folders = BY_NUMBER) -> dict[str, Any]:
    """Return the decision log's fields for a request; times are in milliseconds."""
    operation, verdict = exchange.operation, exchange.verdict
    principal = verdict.principal if verdict is not None else None
    fields: dict[str, Any] = {
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
        named = {"path": exchange.request.path}
    else:
        request = exchange.request
        named = artifact_paths.named(operation, request.path, request.query, folders)
    fields.update({name: redact(text)[:200] for name, text in {**named, **exchange.named}.items()})
    return fields


def reason_of(verdict: Allow | Deny | None) -> str:
    """Return the refusal's code, or "ok"."""
    return verdict.code if isinstance(verdict, Deny) else "ok"

"""A span for each request, if OpenTelemetry's SDK is configured (by `opentelemetry-instrument`).

The span is made after the request, from the times in the exchange, so that it costs nothing without the
SDK. Its parent is the client's span, from `traceparent` (W3C Trace Context).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind, Status, StatusCode, TracerProvider

from mlflow_hokusai_auth import __version__
from mlflow_hokusai_auth.core.keys import redact

if TYPE_CHECKING:
    from mlflow_hokusai_auth.server.exchange import Exchange


def provider() -> TracerProvider | None:
    """Return the SDK's tracer provider, or None if there is only the API, which makes no spans."""
    provider = trace.get_tracer_provider()
    without_sdk = isinstance(provider, (trace.ProxyTracerProvider, trace.NoOpTracerProvider))
    return None if without_sdk else provider


def record(provider: TracerProvider, exchange: Exchange, outcome: str) -> None:
    """Make the span of a request that is over."""
    headers = {
        name.decode("latin-1"): value.decode("latin-1") for name, value in exchange.request.headers
    }
    now, wall = time.perf_counter(), time.time_ns()
    began = wall - int((now - exchange.began) * 1e9)
    ended = wall - int((now - exchange.ended) * 1e9)
    rule = exchange.operation.rule if exchange.operation is not None else ""
    span = provider.get_tracer("mlflow_hokusai_auth", __version__).start_span(
        rule or "unknown route",
        context=propagate.extract(headers),
        kind=SpanKind.SERVER,
        start_time=began,
        attributes={
            "http.request.method": redact(exchange.request.method[:16]),
            "http.route": rule.partition(" ")[2],
            "http.response.status_code": exchange.status,
            "client.address": exchange.request.address,
            "hokusai.outcome": outcome,
            "hokusai.request_id": exchange.request_id,
            "hokusai.gate_ms": (exchange.decided - exchange.began) * 1000,
        },
    )
    if exchange.status >= 500 or exchange.broke_off:
        span.set_status(Status(StatusCode.ERROR))
    span.end(ended)

"""The span of a request with OpenTelemetry's SDK."""

from __future__ import annotations

import time

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.operations import UNKNOWN, classify
from mlflow_hokusai_auth.core.types import Request
from mlflow_hokusai_auth.server.exchange import Exchange
from mlflow_hokusai_auth.server.observe import tracing
from mlflow_hokusai_auth.server.observe.recorder import Recorder

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PATH = "/api/2.0/mlflow/experiments/get"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """An exporter for the spans of this test; a process can set its provider only once."""
    found = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(found))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return found


def exchange(method: str = "GET", status: int = 200, **headers: str) -> Exchange:
    sent = tuple((name.encode(), value.encode()) for name, value in headers.items())
    request = Request(method, PATH, b"experiment_id=1", sent, "192.0.2.1")
    made = Exchange(request, "/mlflow", "id-1", time.perf_counter() - 0.5, classify(method, PATH))
    made.decided = made.began + 0.2
    made.status = status
    return made


def record(one: Exchange, outcome: str) -> None:
    provider = tracing.provider()
    assert provider is not None
    tracing.record(provider, one, outcome)


def spans(exporter: InMemorySpanExporter) -> list[ReadableSpan]:
    """Return the spans of this test; the recorder of another test may still make some."""
    found = exporter.get_finished_spans()
    return [one for one in found if (one.attributes or {})["hokusai.request_id"] == "id-1"]


def span(exporter: InMemorySpanExporter) -> ReadableSpan:
    (one,) = spans(exporter)
    return one


def test_the_span_says_what_the_request_was(exporter: InMemorySpanExporter) -> None:
    record(exchange(), "allowed")
    one = span(exporter)
    assert (one.name, one.kind, one.parent) == (f"GET {PATH}", SpanKind.SERVER, None)
    assert one.status.status_code is StatusCode.UNSET
    attributes = dict(one.attributes or {})
    assert attributes.pop("hokusai.gate_ms") == pytest.approx(200)
    assert attributes == {
        "http.request.method": "GET",
        "http.route": PATH,
        "http.response.status_code": 200,
        "client.address": "192.0.2.1",
        "hokusai.outcome": "allowed",
        "hokusai.request_id": "id-1",
    }


def test_span_lasts_as_long_as_the_request(exporter: InMemorySpanExporter) -> None:
    one = exchange()
    one.ended = one.began + 0.3
    record(one, "allowed")
    made = span(exporter)
    assert made.start_time is not None and made.end_time is not None
    assert (made.end_time - made.start_time) / 1e9 == pytest.approx(0.3, abs=1e-3)
    assert 0.4 < time.time() - made.start_time / 1e9 < 60


def test_parent_is_the_client_s_span(exporter: InMemorySpanExporter) -> None:
    record(exchange(traceparent=f"00-{TRACE}-{PARENT}-01"), "allowed")
    parent = span(exporter).parent
    assert parent is not None
    assert (f"{parent.trace_id:032x}", f"{parent.span_id:016x}") == (TRACE, PARENT)
    assert parent.is_remote and f"{span(exporter).get_span_context().trace_id:032x}" == TRACE


def test_wrong_parent_begins_a_trace(exporter: InMemorySpanExporter) -> None:
    for value in ("", "00-0-0-01", "x" * 1000, f"00-{'0' * 32}-{PARENT}-01", "\xe4"):
        exporter.clear()
        record(exchange(traceparent=value), "allowed")
        assert span(exporter).parent is None, value


def test_parent_that_is_not_sampled_takes_no_span(exporter: InMemorySpanExporter) -> None:
    record(exchange(traceparent=f"00-{TRACE}-{PARENT}-00"), "allowed")
    assert spans(exporter) == []


def test_failure_is_marked(exporter: InMemorySpanExporter) -> None:
    for status, broke_off, code in (
        (401, False, StatusCode.UNSET),
        (499, False, StatusCode.UNSET),
        (500, False, StatusCode.ERROR),
        (503, False, StatusCode.ERROR),
        (200, True, StatusCode.ERROR),
    ):
        exporter.clear()
        one = exchange(status=status)
        one.broke_off = broke_off
        record(one, "x")
        assert span(exporter).status.status_code is code, status


def test_unknown_route_has_one_name_and_no_key(exporter: InMemorySpanExporter) -> None:
    key = keys.generate()
    for operation in (None, UNKNOWN):
        one = exchange(key, authorization=f"Bearer {key}", cookie=key)
        one.operation = operation
        record(one, "refused")
    assert len(spans(exporter)) == 2
    for made in spans(exporter):
        assert made.name == "unknown route"
        assert key[8:13] not in made.to_json()


def test_exchange_is_not_read_without_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    for provider in (trace.ProxyTracerProvider(), trace.NoOpTracerProvider()):
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
        assert tracing.provider() is None


def test_recorder_makes_spans(exporter: InMemorySpanExporter) -> None:
    counts = Recorder()
    counts.add(exchange(), "allowed")
    counts.flush()
    assert span(exporter).name == f"GET {PATH}"

"""MLflow's requests to the server that no request header provider is asked for."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from types import ModuleType
from typing import Any

import mlflow
import pytest

from mlflow_hokusai_auth.client import beside
from mlflow_hokusai_auth.core import keys

from .conftest import Server

TRACES = "/api/mlflow/v1/traces"
CHAT = "/api/mlflow/gateway/mlflow/v1/chat/completions"


def send_a_span() -> None:
    """What `mlflow.otel.autolog()` sends for a span."""
    otel = pytest.importorskip("mlflow.otel", reason="this MLflow has none")
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    exporter = otel.OTLPSpanExporter(
        endpoint=mlflow.get_tracking_uri() + "/v1/traces",
        headers=otel.build_otlp_headers("0"),
        timeout=5,
    )
    provider = trace.TracerProvider()
    provider.add_span_processor(trace.export.SimpleSpanProcessor(exporter))
    with provider.get_tracer("test").start_as_current_span("span"):
        pass
    provider.shutdown()


def ask_a_judge() -> None:
    """What a judge with a model of the gateway asks."""
    pytest.importorskip("mlflow.genai.utils.gateway_utils", reason="this MLflow has none")
    from mlflow.metrics.genai import model_utils

    with contextlib.suppress(Exception):  # the answer is empty
        model_utils.score_model_on_payload("gateway:/chat", "Is this good?", {})


WAYS = pytest.mark.parametrize(
    ("path", "send"), [(TRACES, send_a_span), (CHAT, ask_a_judge)], ids=["otel", "gateway"]
)


def sent(server: Server) -> list[str]:
    """Each key with which `server` was asked, wherever it was."""
    found = []
    for request in server.seen:
        headers = {name.lower(): value for name, value in request.headers}
        found.append(headers.get("x-api-key") or headers.get("authorization", ""))
    return [text.removeprefix("Bearer ") for text in found]


@WAYS
def test_they_carry_the_key_of_the_moment(
    path: str, send: Any, tracking: Server, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    send()
    replaced = keys.generate("test")
    monkeypatch.setenv("HOKUSAI_API_KEY", replaced)
    send()
    assert [request.path for request in tracking.seen] == [path, path]
    assert sent(tracking) == [key, replaced]


@WAYS
def test_they_carry_it_to_no_other_origin(
    path: str, send: Any, tracking: Server, other: Server, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking.redirects[path] = (307, f"{other.origin}/taken")
    send()
    assert sent(tracking) == [key]
    assert not other.saw(key)
    # Where the key is for another server, it isn't sent at all.
    monkeypatch.setenv("HOKUSAI_ALLOWED_ORIGINS", "https://registry.example.com")
    tracking.seen.clear()
    send()
    assert sent(tracking) == [""]


@WAYS
def test_without_a_key_they_are_as_ever(
    path: str, send: Any, tracking: Server, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOKUSAI_API_KEY")
    send()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    send()
    assert sent(tracking) == ["", "Basic bWU6c2VjcmV0"]


def test_a_module_that_is_made_otherwise_is_left_alone() -> None:
    module = ModuleType("mlflow.otel")
    for change in (beside.change_otel, beside.change_gateway):
        change(module)
    for made in (int, ModuleType, print, "OTLPSpanExporter"):
        module.OTLPSpanExporter = made  # type: ignore[attr-defined]
        beside.change_otel(module)
        assert module.OTLPSpanExporter is made  # type: ignore[attr-defined]
    assert not beside.works_in(module)


@pytest.mark.parametrize("first", ["mlflow", "mlflow_hokusai_auth.client.beside"])
def test_a_program_that_imports_mlflow_only_has_it(first: str) -> None:
    code = (
        f"import {first}, mlflow.otel\n"
        "from mlflow.genai.utils import gateway_utils\n"
        "from mlflow_hokusai_auth.client import beside\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('mlflow.otel') is mlflow.otel.__spec__\n"
        "print(beside.works_in(mlflow.otel), beside.works_in(gateway_utils))"
    )
    pytest.importorskip("mlflow.otel")
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "True True\n", done.stderr

"""The requests of MLflow for which it asks no request header provider."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from types import ModuleType
from typing import Any

import mlflow
import pytest

from mlflow_hokusai_auth.client import patches
from mlflow_hokusai_auth.core import keys

from .conftest import Server

TRACES = "/api/mlflow/v1/traces"
CHAT = "/api/mlflow/gateway/mlflow/v1/chat/completions"


def send_a_span() -> None:
    """Send a span as `mlflow.otel.autolog()` does."""
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
    """Call the gateway as a judge with a gateway model does."""
    pytest.importorskip("mlflow.genai.utils.gateway_utils", reason="this MLflow has none")
    from mlflow.metrics.genai import model_utils

    with contextlib.suppress(Exception):  # the answer is empty
        model_utils.score_model_on_payload("gateway:/chat", "Is this good?", {})


WAYS = pytest.mark.parametrize(
    ("path", "send"), [(TRACES, send_a_span), (CHAT, ask_a_judge)], ids=["otel", "gateway"]
)


def sent(server: Server) -> list[str]:
    """The keys that `server` received, in any header."""
    found = []
    for request in server.seen:
        headers = {name.lower(): value for name, value in request.headers}
        found.append(headers.get("x-api-key") or headers.get("authorization", ""))
    return [text.removeprefix("Bearer ") for text in found]


@WAYS
def test_requests_carry_the_current_key(
    path: str, send: Any, tracking: Server, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    send()
    replaced = keys.generate("test")
    monkeypatch.setenv("HOKUSAI_API_KEY", replaced)
    send()
    assert [request.path for request in tracking.seen] == [path, path]
    assert sent(tracking) == [key, replaced]


@WAYS
def test_requests_to_other_origins_carry_no_key(
    path: str, send: Any, tracking: Server, other: Server, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking.redirects[path] = (307, f"{other.origin}/taken")
    send()
    assert sent(tracking) == [key]
    assert not other.saw(key)
    # If the key belongs to another server, it isn't sent at all.
    monkeypatch.setenv("HOKUSAI_ALLOWED_ORIGINS", "https://registry.example.com")
    tracking.seen.clear()
    send()
    assert sent(tracking) == [""]


@WAYS
def test_requests_are_unchanged_without_a_key(
    path: str, send: Any, tracking: Server, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOKUSAI_API_KEY")
    send()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    send()
    assert sent(tracking) == ["", "Basic bWU6c2VjcmV0"]


def test_unknown_modules_are_not_patched() -> None:
    module = ModuleType("mlflow.otel")
    for patch in (patches.patch_otel, patches.patch_gateway):
        patch(module)
    for made in (int, ModuleType, print, "OTLPSpanExporter"):
        module.OTLPSpanExporter = made  # type: ignore[attr-defined]
        patches.patch_otel(module)
        assert module.OTLPSpanExporter is made  # type: ignore[attr-defined]
    assert not patches.is_patched(module)


@pytest.mark.parametrize("first", ["mlflow", "mlflow_hokusai_auth.client.patches"])
def test_importing_mlflow_patches_the_modules(first: str) -> None:
    code = (
        f"import {first}, mlflow.otel\n"
        "from mlflow.genai.utils import gateway_utils\n"
        "from mlflow_hokusai_auth.client import patches\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('mlflow.otel') is mlflow.otel.__spec__\n"
        "from mlflow.utils import request_utils\n"
        "print(*map(patches.is_patched, (mlflow.otel, gateway_utils, request_utils)))"
    )
    pytest.importorskip("mlflow.otel")
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "True True True\n", done.stderr

"""Which of MLflow's code sends requests past its `http_request`, where no provider is asked."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from packaging.version import Version

from mlflow_hokusai_auth.client import patches

ROOT = Path(__file__).parents[2]
LIST = ROOT / "tests/vectors/mlflow_http.txt"
KINDS = {"provider", "changed", "user", "nothing", "storage", "elsewhere", "public", "server"}
#: What can send a request that may be for the tracking server. SDKs of clouds and model makers that
#: are only ever given those are not among them.
LIBRARIES = (
    *("requests", "httpx", "aiohttp", "urllib.request", "urllib3", "http.client", "websockets"),
    *("grpc", "opentelemetry.exporter", "litellm", "openai"),
)
#: MLflow's own functions for that, below `http_request` and beside it.
FUNCTIONS = {
    *(
        "read_mlflow_creds",
        "build_otlp_headers",
        "get_gateway_config",
        "get_gateway_litellm_config",
    ),
    *("_resolve_gateway_uri", "_get_http_response_with_retries", "_get_request_session"),
    *("cloud_storage_http_request", "download_chunk"),
}
#: Left out: what runs in the server, and is generated; credentials for `http_request`.
SKIPPED = ("server/", "protos/", "utils/credentials.py", "bedrock/")


def listed() -> dict[str, str]:
    """Module -> kind."""
    lines = [line.split() for line in LIST.read_text().splitlines() if line and line[0] != "#"]
    assert len({line[1] for line in lines}) == len(lines), "a module is listed twice"
    return {line[1]: line[0] for line in lines}


def senders() -> Iterator[str]:
    """The modules of the MLflow at hand that import any of `LIBRARIES` or `FUNCTIONS`, anywhere."""
    root = Path(mlflow.__file__).parent
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        if name.startswith(SKIPPED) or not any(
            word.rpartition(".")[2] in text for word in (*LIBRARIES, *FUNCTIONS)
        ):
            continue
        for node in ast.walk(ast.parse(text)):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            if any(
                one.rpartition(".")[2] in FUNCTIONS or f"{one}.".startswith(f"{library}.")
                for one in names
                for library in LIBRARIES
            ):
                yield name
                break


@pytest.mark.skipif(
    Version(mlflow.__version__) < Version("3.17"), reason="the list is of the newest MLflow"
)
def test_every_way_past_http_request_is_known() -> None:
    known, found = listed(), set(senders())
    assert set(known.values()) <= KINDS
    new = sorted(found - set(known))
    assert not new, f"look how these get a key, and add them to {LIST.name}: {new}"
    gone = sorted(set(known) - found)
    assert not gone, f"these send nothing any more: {gone}"


@pytest.mark.parametrize("name", ["mlflow.otel", "mlflow.genai.utils.gateway_utils"])
def test_patched_modules_are_patched(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error}")  # of an older MLflow, or without the exporter
    assert patches.is_patched(module)


def test_what_users_have_to_set_is_on_the_page() -> None:
    page = (ROOT / "docs/supplier/clients.md").read_text()
    table = page[page.index("## What takes which variable") :]
    for word in (
        *("mlflow.otel.autolog", "gateway:/", "OTEL_EXPORTER_OTLP_HEADERS", "http://me:KEY@"),
        *("MLFLOW_TRACKING_TOKEN", "docker_env", "fetch_metrics.py"),
    ):
        assert re.search(re.escape(word), table), word

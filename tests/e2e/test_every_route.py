"""Every route of a running server: closed without a key, and harmless to a key that may only read."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import sqlite3
from pathlib import Path

import pytest

from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.core.types import Access
from mlflow_hokusai_auth.server.upstream.routes import installed_routes, template
from tests.e2e.parts import post
from tests.harness import PREFIXES, Server, serve

pytestmark = pytest.mark.servers

NESTED = ("/mlflow/mlflow", "/api/mlflow/mlflow", "/api/mlflow/api/mlflow")

#: Fetches a catalogue of models from the internet, and waits for it.
FETCHES = ("/ajax-api/3.0/mlflow/gateway/supported-models",)


def body_for(path: str) -> bytes:
    """A JSON object, of which MLflow's demonstration does not take half a minute to make everything."""
    return b'{"features": []}' if path.endswith("/demo/generate") else b"{}"


def statuses(
    server: Server, requests: list[tuple[str, str]], headers: dict[str, str]
) -> dict[tuple[str, str], tuple[int, bytes]]:
    """What the server answers to each (method, path), over one connection where it lets us."""
    answers = {}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for method, path in requests:
        connection.request(method, path, body=body_for(path), headers=headers)
        response = connection.getresponse()
        answers[method, path] = (response.status, response.read())
    connection.close()
    return answers


@pytest.fixture(scope="module")
def routes() -> list[tuple[str, str]]:
    return sorted(
        {
            (method, re.sub(r"\{\w+(:path)?\}", "1", template(rule)))
            for method, rule, _ in installed_routes()
        }
    )


def test_the_server_has_the_routes_that_were_counted(routes: list[tuple[str, str]]) -> None:
    assert len(routes) > 200  # 234 in MLflow 3.4, 493 in 3.17


@pytest.mark.parametrize("kind", ["uvicorn", "gunicorn", "waitress"])
def test_no_route_answers_without_a_key(
    servers: dict[str, Server], kind: str, routes: list[tuple[str, str]]
) -> None:
    requests = [(m, prefix + path) for prefix in PREFIXES + NESTED for m, path in routes]
    open_to_all = {
        request
        for request, (status, _) in statuses(servers[kind], requests, {}).items()
        if status != 401
    }
    assert open_to_all == {("GET", f"{prefix}/health") for prefix in PREFIXES}


def test_a_read_key_changes_nothing(tmp_path: Path, routes: list[tuple[str, str]]) -> None:
    with serve(tmp_path) as server:
        admin = {"X-API-Key": server.key("mlflow:admin"), "Content-Type": "application/json"}
        for path in ("experiments/create", "registered-models/create"):
            url = f"/api/2.0/mlflow/{path}"
            post(server, url, server.key("mlflow:admin"), {"name": "kept"})
        upload = "/api/2.0/mlflow-artifacts/artifacts/kept.txt"
        assert server.request("PUT", upload, headers=admin, body=b"kept")[0] == 200

        writes = [
            request
            for request in routes
            if classify(*request).access in (Access.WRITE, Access.ADMIN)
        ]
        reader = {"X-API-Key": server.key("mlflow:read"), "Content-Type": "application/json"}
        before = contents(tmp_path)
        for (method, path), (status, body) in statuses(server, writes, reader).items():
            assert status == 403, (method, path, status)
            assert json.loads(body)["error"] == "SCOPE_MISSING"
        # Reading, by contrast, is let through to MLflow whatever it then says of the arguments.
        reads = [
            request
            for request in routes
            if classify(*request).access is Access.READ and request[1] not in FETCHES
        ]
        for (method, path), (status, body) in statuses(server, reads, reader).items():
            assert status not in (401, 403), (method, path, status, body)
        assert contents(tmp_path) == before

        writer = {"X-API-Key": server.key("mlflow:write"), "Content-Type": "application/json"}
        administration = [r for r in routes if classify(*r).access is Access.ADMIN]
        for request, (status, _) in statuses(server, administration, writer).items():
            assert status == 403, request

        # An administrator is refused nothing but the assistant, which is off.
        for request, (status, _) in statuses(server, writes, admin).items():
            refused = classify(*request).kind == "assistant"
            assert (status in (401, 403)) == refused, (request, status)


def contents(folder: Path) -> str:
    """A hash of MLflow's database, row by row, and of its artifact tree."""
    found = hashlib.sha256()
    with sqlite3.connect(folder / "mlflow.db") as database:
        for line in database.iterdump():
            found.update(line.encode())
    for path in sorted((folder / "artifacts").rglob("*")):
        found.update(str(path.relative_to(folder)).encode())
        if path.is_file():
            found.update(path.read_bytes())
    return found.hexdigest()

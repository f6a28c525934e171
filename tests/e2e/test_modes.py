"""What the settings change on a running server: the mode, the policy, and GraphQL by its body."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.harness import Server, serve

pytestmark = pytest.mark.slow  # servers of their own; `make test` has to be short

EXPERIMENT = "/api/2.0/mlflow/experiments/get?experiment_id=0"
CREATE = "/api/2.0/mlflow/experiments/create"
KEYS = "/api/2.0/hokusai/keys"
JSON = {"Content-Type": "application/json"}
QUERY = b'{"query": "{ test(inputString: \\"x\\") { output } }"}'
MUTATION = b'{"query": "mutation { testMutation(inputString: \\"x\\") { output } }"}'


@pytest.mark.parametrize("kind", ["uvicorn", "gunicorn"])
def test_graphql_is_told_apart_by_its_body(servers: dict[str, Server], kind: str) -> None:
    server = servers[kind]
    cases = [
        ("mlflow:read", QUERY, 200),
        ("mlflow:read", MUTATION, 403),
        ("mlflow:read", b"not json", 403),
        ("mlflow:read", b'{"query": "{ a }", "pad": "' + b"x" * 300_000 + b'"}', 403),
        ("mlflow:write", MUTATION, 200),
        ("model:write", QUERY, 403),
    ]
    for scope, body, status in cases:
        for prefix in ("", "/api/mlflow"):
            answer = server.request(
                "POST", f"{prefix}/graphql", key=server.key(scope), headers=JSON, body=body
            )
            assert answer[0] == status, (scope, body[:60], answer)
            if status == 200:
                assert json.loads(answer[2])["data"]


@pytest.mark.parametrize("kind", ["uvicorn", "gunicorn"])
def test_graphql_reads_no_body_of_a_key_that_may_not_read(
    servers: dict[str, Server], kind: str
) -> None:
    server = servers[kind]
    for key in ("hk_live_" + "a" * 32, server.key("model:write")):
        answer = server.raw(
            f"POST /graphql HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {key}\r\n"
            "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n".encode()
        )
        assert answer.startswith((b"HTTP/1.1 401 ", b"HTTP/1.1 403 "))


def would_refuse(server: Server) -> list[str]:
    lines = [line for line in server.log.splitlines() if '"would_refuse"' in line]
    return [json.loads(line)["reason"] for line in lines]


def test_observe_refuses_nobody_and_says_whom_it_would(tmp_path: Path) -> None:
    with serve(tmp_path, HOKUSAI_AUTH_MODE="observe") as server:
        reader = server.key("mlflow:read")
        assert server.request("GET", EXPERIMENT)[0] == 200
        body = b'{"name": "observed"}'
        assert server.request("POST", CREATE, key=reader, headers=JSON, body=body)[0] == 200
        assert server.request("GET", "/api/mlflow" + EXPERIMENT, key=reader)[0] == 200
        wrong = "hk_live_" + "b" * 32
        assert server.request("GET", EXPERIMENT, key=wrong)[0] == 200
        expected = ["KEY_MISSING", "SCOPE_MISSING", "KEY_UNKNOWN"]
        deadline = time.monotonic() + 5
        # A line is written once the answer is sent.
        while (found := would_refuse(server)) != expected:
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        assert "mode is observe" in server.log
        assert wrong not in server.log
        assert server.request("GET", KEYS)[0] == 401


def test_off_asks_nobody_and_says_so(tmp_path: Path) -> None:
    with serve(tmp_path, HOKUSAI_AUTH_MODE="off") as server:
        assert server.request("GET", EXPERIMENT)[0] == 200
        assert server.request("GET", "/api/mlflow" + EXPERIMENT)[0] == 200
        assert "MODE IS off" in server.log
        # Keys that are made while the gate is off would open it later.
        body = b'{"owner": "me", "scopes": ["mlflow:admin"]}'
        assert server.request("POST", KEYS, headers=JSON, body=body)[0] == 401
        assert server.request("GET", KEYS, key=server.key("mlflow:write"))[0] == 403


def test_the_admin_policy_locks_everybody_else_out(tmp_path: Path) -> None:
    with serve(tmp_path, HOKUSAI_AUTH_POLICY="admin", REGISTRY_ADMIN_SCOPES="ops") as server:
        assert server.request("GET", EXPERIMENT, key=server.key("mlflow:write"))[0] == 403
        assert server.request("GET", EXPERIMENT, key=server.key("mlflow:admin"))[0] == 200
        assert server.request("GET", EXPERIMENT, key=server.key("ops"))[0] == 200
        assert server.request("GET", "/health")[0] == 200

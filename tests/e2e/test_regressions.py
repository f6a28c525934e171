"""Faults that Hokusai's services have had, by their number in the list of them (22 to 38).

13 to 21 are in tests/authorities/test_service.py, 24 to 26 in tests/core/test_policy.py, 28, 29, 32
and 33 in tests/store and tests/authorities, 30 and 31 in tests/core/test_addresses.py.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.core.types import Access
from tests.e2e.parts import EXPERIMENT
from tests.harness import Server

JSON = {"Content-Type": "application/json"}
ROOT = Path(__file__).parent.parent.parent


def test_regression_22_scopes_are_enforced_and_not_only_fetched(server: Server) -> None:
    path, body = "/api/2.0/mlflow/registered-models/create", b'{"name": "scoped"}'
    for scope, status in (("model:read", 403), ("predict", 403), ("model:write", 200)):
        answer = server.request("POST", path, key=server.key(scope), headers=JSON, body=body)
        assert answer[0] == status


def test_regression_23_operations_are_told_by_their_rule() -> None:
    for method, path, access in (
        # It went by what the path contains.
        ("GET", "/api/2.0/mlflow-artifacts/artifacts/create/update/delete", Access.READ),
        ("DELETE", "/api/2.0/mlflow/webhooks/getting-started", Access.ADMIN),
        ("POST", "/api/2.0/mlflow/runs/search", Access.READ),
        ("GET", "/api/2.0/mlflow/runs/create", Access.ADMIN),
    ):
        assert classify(method, path).access is access, (method, path)


def test_regression_27_a_suppliers_key_registers_models_by_default(server: Server) -> None:
    body = b'{"name": "by a supplier"}'
    path = "/api/mlflow/api/2.0/mlflow/registered-models/create"
    key = server.key("model:write")
    assert server.request("POST", path, key=key, headers=JSON, body=body)[0] == 200


def test_regression_34_a_key_in_the_query_reaches_no_log(servers: dict[str, Server]) -> None:
    for kind in ("uvicorn", "gunicorn", "waitress"):
        server = servers[kind]
        key = server.key("mlflow:read")
        assert server.request("GET", f"{EXPERIMENT}&api_key={key}")[0] == 200, kind
        assert server.request("GET", f"/nowhere?api_key={key}")[0] == 403, kind
        assert key not in server.log, kind


def test_regression_35_an_empty_bearer_shadows_nothing(server: Server) -> None:
    headers = {"Authorization": "Bearer ", "X-API-Key": server.key("mlflow:read")}
    assert server.request("GET", EXPERIMENT, headers=headers)[0] == 200


def test_regression_36_no_whole_key_is_in_the_tree() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    whole = re.compile(r"hk_(?:live|test|dev)_[A-Za-z0-9]{32,}")
    for name in listed.stdout.split():
        text = (ROOT / name).read_text(errors="replace") if (ROOT / name).exists() else ""
        assert not whole.search(text), f"{name} has what looks like a key; generate it instead"


def test_regression_36_a_key_in_a_path_is_cut_from_the_log(server: Server) -> None:
    key = keys.generate()
    assert server.request("GET", f"/{key}")[0] == 401
    assert key not in server.log and "hk_live_***" in server.log


def test_regression_37_what_only_begins_like_a_public_path_is_closed(server: Server) -> None:
    for path in ("/healthz", "/health/", "/health/x", "/docs", "/static-filesX"):
        assert server.request("GET", path)[0] == 401, path


def test_regression_38_the_public_health_tells_nothing(server: Server) -> None:
    status, _, body = server.request("GET", "/health")
    assert (status, body) == (200, b"OK")
    refused = json.loads(server.request("GET", "/version")[2])
    assert set(refused) == {"error_code", "message", "detail", "error"}
    assert str(server.folder) not in refused["message"]

"""The fast path to Flask answers as MLflow's whole application does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import FastAPI
from mlflow.server import app as flask_app
from mlflow.server.fastapi_app import create_fastapi_app
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request as StarletteRequest
from starlette.responses import Response
from starlette.routing import Mount, Route

from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.core.types import Request
from mlflow_hokusai_auth.server.upstream import fast_path
from tests.contract.test_mlflow import VERSION
from tests.harness import environment


@pytest.mark.long  # thousands of requests
@pytest.mark.parametrize("origins", ["https://allowed.example", "*", ""])
def test_fast_path_gives_the_same_status_headers_and_body(tmp_path: Path, origins: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.server.compare_fast_path", str(tmp_path), origins],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print({name: value for name, value in found.items() if name != "differing"})
    assert found["built"]
    assert found["rules"] > 200 and found["compared"] > 1500
    assert {"200", "400", "404"} <= set(found["statuses"])
    assert found["differing"] == []


def test_only_what_flask_answers_without_a_workspace_fits() -> None:
    built = fast_path.build(create_fastapi_app(flask_app), flask_app)
    assert built is not None
    for line, headers, fits in (
        ("GET /version", (), True),
        ("POST /api/2.0/mlflow/runs/create", ((b"x-tenant", b"a"),), True),
        ("POST /api/2.0/mlflow/runs/create", ((b"x-mlflow-workspace", b"a"),), False),
        ("GET /ajax-api/3.0/jobs/1", (), False),
        ("POST /gateway/chat/invocations", (), False),
        ("GET /of/nobody", (), False),
    ):
        method, path = line.split()
        request = Request(method, path, b"", headers)
        assert built.fits(classify(method, path), request) is fits, line


async def foreign(request: StarletteRequest, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


def elsewhere(whole: FastAPI) -> None:
    mount = whole.router.routes[-1]
    assert isinstance(mount, Mount)
    whole.router.routes[-1] = Mount("/elsewhere", mount.app)


#: Parts that a future MLflow might have, and that the fast path would leave out.
CHANGES: dict[str, Callable[[FastAPI], object]] = {
    "a middleware that is not known": lambda whole: whole.add_middleware(
        BaseHTTPMiddleware, dispatch=foreign
    ),
    "Flask is below a path": elsewhere,
    "Flask is not mounted last": lambda whole: whole.router.routes.append(
        Route("/last", lambda _: Response())
    ),
    "another application is": lambda whole: whole.mount("", FastAPI()),
}


def test_fast_path_is_off_if_mlflow_is_built_otherwise() -> None:
    for name, change in CHANGES.items():
        whole = create_fastapi_app(flask_app)
        change(whole)
        assert fast_path.build(whole, flask_app) is None, name


@pytest.mark.skipif(VERSION < (3, 10), reason="MLflow has no workspaces before 3.10")
def test_fast_path_is_off_with_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_WORKSPACES", "true")
    assert fast_path.build(create_fastapi_app(flask_app), flask_app) is None

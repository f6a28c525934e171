"""Every route is found, however it was added, and printed in the spelling of the table of routes."""

from __future__ import annotations

import runpy

import flask
import mlflow
import pytest
from fastapi import APIRouter, FastAPI
from starlette.responses import Response
from starlette.routing import Route

from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.server.upstream.routes import mlflow_routes


def answer() -> str:
    return ""


def test_routes_of_both_frameworks_are_found() -> None:
    flask_app = flask.Flask("mlflow", static_folder=None)
    flask_app.add_url_rule("/one/<path:name>", methods=["GET", "POST"], view_func=answer)
    flask_app.add_url_rule("/asked", methods=["OPTIONS"], endpoint="asked", view_func=answer)
    router = APIRouter(prefix="/native")
    router.add_api_route("/{name}", answer, methods=["PUT"])
    router.add_api_route("/head", answer, methods=["HEAD"])
    fastapi_app = FastAPI(openapi_url=None)
    fastapi_app.include_router(router)
    fastapi_app.router.routes.append(Route("/plain", lambda _: Response()))
    flasks = [
        ("GET", "/one/<path:name>", "flask"),
        ("OPTIONS", "/asked", "flask"),
        ("POST", "/one/<path:name>", "flask"),
    ]
    assert mlflow_routes(flask_app) == flasks
    assert mlflow_routes(flask_app, fastapi_app) == sorted(
        [
            *flasks,
            ("GET", "/plain", "native"),
            ("HEAD", "/native/head", "native"),
            ("PUT", "/native/{name}", "native"),
        ]
    )


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_program_prints_the_routes_of_the_installed_mlflow(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # An import prints nothing.
    runpy.run_module(mlflow_routes.__module__, run_name="imported")
    assert capsys.readouterr().out == ""
    runpy.run_module(mlflow_routes.__module__, run_name="__main__")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) > 100 and {version for version, _, _ in lines} == {mlflow.__version__}
    assert ["GET", "/version"] in [line[1:] for line in lines]
    assert all(classify(method, path).rule for _, method, path in lines)

"""The caller as MLflow's handlers and the audit log see it."""

from __future__ import annotations

import contextvars
import json
from typing import Any

import flask
from werkzeug.test import EnvironBuilder, run_wsgi_app

from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import caller
from mlflow_hokusai_auth.store.database import Actor

SOMEBODY = Principal("key_1", "somebody", frozenset())


def ask(principal: Principal | None, app: flask.Flask, **environ: str) -> Any:
    """Return the application's response to a request of this caller."""

    def run() -> Any:
        caller.current.set(caller.Caller(principal, "192.0.2.1", "id-1"))
        return run_wsgi_app(app, EnvironBuilder().get_environ() | environ)

    return contextvars.copy_context().run(run)


def test_mlflow_and_the_audit_log_get_the_caller() -> None:
    found: list[object] = []
    app = flask.Flask("mlflow")
    caller.install(app)

    @app.get("/")
    def handler() -> str:
        found.extend((flask.g.get("mlflow_authenticated_user"), caller.actor()))
        return ""

    ask(SOMEBODY, app)
    assert found == ["somebody", Actor("somebody", "key_1", "192.0.2.1", "id-1")]
    found.clear()
    ask(None, app)
    assert found == [None, Actor("", "", "192.0.2.1", "id-1")]


def test_our_routes_take_a_key_in_every_spelling() -> None:
    for line, principal, status in (
        ("GET /api/2.0/hokusai/keys", None, 401),
        ("POST //api/2.0/hokusai/keys", None, 401),
        ("GET /hokusai/metrics", None, 401),
        ("GET /hokusai/login", None, 200),
        ("HEAD /api/health/mlflow", None, 200),
        ("OPTIONS /api/2.0/hokusai/keys", None, 200),
        ("GET /api/2.0/hokusai/keys", SOMEBODY, 200),
    ):
        app = flask.Flask("mlflow")
        blueprint = flask.Blueprint("ours", "ours")
        blueprint.before_request(caller.refuse_without_key)
        method, path = line.split()
        blueprint.add_url_rule("/" + path.lstrip("/"), "view", lambda: "", methods=["GET", "POST"])
        app.register_blueprint(blueprint)
        body, sent, headers = ask(principal, app, REQUEST_METHOD=method, PATH_INFO=path)
        assert int(sent.split()[0]) == status, line
        if status == 401:
            assert json.loads(b"".join(body))["error"] == "KEY_MISSING"
            assert "WWW-Authenticate" in headers

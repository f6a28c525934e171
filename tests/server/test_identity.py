"""Whom MLflow's handlers and the audit log take for the caller."""

from __future__ import annotations

import contextvars
import json
from typing import Any

import flask
import pytest
from werkzeug.test import EnvironBuilder, run_wsgi_app

from mlflow_hokusai_auth.backends.database import Actor
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import identity

SOMEBODY = Principal("key_1", "somebody", frozenset())


@pytest.mark.parametrize(
    ("principal", "user", "actor"),
    [
        (SOMEBODY, "somebody", Actor("somebody", "key_1", "192.0.2.1", "id-1")),
        (None, None, Actor("", "", "192.0.2.1", "id-1")),
    ],
)
def test_the_caller_is_named(principal: Principal | None, user: str | None, actor: Actor) -> None:
    app = flask.Flask("mlflow")
    identity.install(app)
    found: list[object] = []

    @app.get("/")
    def handler() -> str:
        found.extend((flask.g.get("mlflow_authenticated_user"), identity.actor()))
        return ""

    def ask() -> int:
        identity.current.set(identity.Caller(principal, "192.0.2.1", "id-1"))
        return app.test_client().get("/").status_code

    assert contextvars.copy_context().run(ask) == 200
    assert found == [user, actor]


@pytest.mark.parametrize(
    ("line", "principal", "status"),
    [
        ("GET /api/2.0/hokusai/keys", None, 401),
        ("POST //api/2.0/hokusai/keys", None, 401),
        ("GET /hokusai/metrics", None, 401),
        ("GET /hokusai/login", None, 200),
        ("HEAD /api/health/mlflow", None, 200),
        ("OPTIONS /api/2.0/hokusai/keys", None, 200),
        ("GET /api/2.0/hokusai/keys", SOMEBODY, 200),
    ],
)
def test_our_routes_take_a_key_whatever_the_gate_made_of_the_path(
    line: str, principal: Principal | None, status: int
) -> None:
    app = flask.Flask("mlflow")
    blueprint = flask.Blueprint("ours", "ours")
    blueprint.before_request(identity.required)
    method, path = line.split()
    blueprint.add_url_rule("/" + path.lstrip("/"), "view", lambda: "", methods=["GET", "POST"])
    app.register_blueprint(blueprint)

    def ask() -> tuple[Any, ...]:
        identity.current.set(identity.Caller(principal, "192.0.2.1", "id-1"))
        environ = {"REQUEST_METHOD": method, "PATH_INFO": path}
        return run_wsgi_app(app, EnvironBuilder().get_environ() | environ)

    body, line_sent, headers = contextvars.copy_context().run(ask)
    assert int(line_sent.split()[0]) == status
    if status == 401:
        assert json.loads(b"".join(body))["error"] == "KEY_MISSING"
        assert "WWW-Authenticate" in headers

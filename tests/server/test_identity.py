"""Whom MLflow's handlers and the audit log take for the caller."""

from __future__ import annotations

import contextvars

import flask
import pytest

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

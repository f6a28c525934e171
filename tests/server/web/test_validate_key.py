"""What one server tells another about a key."""

from __future__ import annotations

import contextvars

import flask
from werkzeug.test import TestResponse

from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import caller
from mlflow_hokusai_auth.server.web import validate_key

BOUND = Principal("key_1", "x", frozenset({"mlflow:read"}), networks=("198.51.100.0/24",))


def status(address: str, **body: str) -> int:
    """Of the answer to a server at `address`."""
    return asked(BOUND, address, **body).status_code


def asked(principal: Principal, address: str, /, *other: str, **body: str) -> TestResponse:
    """The answer to a server at `address`, whose caller sent the key of `principal`."""
    app = flask.Flask("tested")
    app.register_blueprint(validate_key.blueprint())

    def ask() -> TestResponse:
        caller.current.set(caller.Caller(principal, address, "request"))
        return app.test_client().post("/api/v1/keys/validate", json=list(other) or body)

    return contextvars.copy_context().run(ask)


def test_a_key_of_some_networks_is_valid_for_who_calls_from_there_alone() -> None:
    assert status("192.0.2.1", client_ip="198.51.100.7") == 200
    assert status("198.51.100.7", client_ip="192.0.2.1") == 401
    assert status("198.51.100.7", client_ip="nowhere") == 401
    assert status("198.51.100.7", client_ip="1" * 100_000) == 401
    # Who asks names no address: then its own counts.
    assert status("198.51.100.7") == 200
    assert status("192.0.2.1") == 401


def test_all_that_is_known_of_a_key_is_told() -> None:
    known = Principal(
        "key_2",
        "y",
        frozenset({"model:write", "mlflow:read"}),
        email="y@example.com",
        roles=frozenset({"member"}),
        is_admin=True,
        rate_limit_per_hour=5,
    )
    assert asked(known, "192.0.2.1", service_id="mlflow").json == {
        "is_valid": True,
        "key_id": "key_2",
        "user_id": "y",
        "service_id": "mlflow",
        "scopes": ["mlflow:read", "model:write"],
        "email": "y@example.com",
        "roles": ["member"],
        "is_admin": True,
        "rate_limit_per_hour": 5,
        "billing_plan": None,
        "monthly_prediction_limit": None,
        "error": None,
    }
    # A body that is no object names nothing.
    plain = asked(Principal("key_3", "z", frozenset()), "192.0.2.1", "service_id").json
    assert plain is not None and plain["email"] is None and plain["service_id"] == "platform"

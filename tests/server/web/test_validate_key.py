"""One server validates a key for another."""

from __future__ import annotations

import contextvars
from dataclasses import replace

import flask
from werkzeug.test import TestResponse

from mlflow_hokusai_auth.authorities import service_reply
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import caller
from mlflow_hokusai_auth.server.web import validate_key

BOUND = Principal("key_1", "x", frozenset({"mlflow:read"}), networks=("198.51.100.0/24",))


def status(address: str, **body: str) -> int:
    """The status of the answer to a server at `address`."""
    return validate(BOUND, address, **body).status_code


def validate(principal: Principal, address: str, /, *other: str, **body: str) -> TestResponse:
    """The answer to a server at `address` that sends the key of `principal`."""
    app = flask.Flask("tested")
    app.register_blueprint(validate_key.blueprint())

    def ask() -> TestResponse:
        caller.current.set(caller.Caller(principal, address, "request"))
        return app.test_client().post("/api/v1/keys/validate", json=list(other) or body)

    return contextvars.copy_context().run(ask)


def test_key_with_networks_is_valid_only_for_clients_in_them() -> None:
    assert status("192.0.2.1", client_ip="198.51.100.7") == 200
    assert status("198.51.100.7", client_ip="192.0.2.1") == 401
    assert status("198.51.100.7", client_ip="nowhere") == 401
    assert status("198.51.100.7", client_ip="1" * 100_000) == 401
    # If the calling server names no address, its own counts.
    assert status("198.51.100.7") == 200
    assert status("192.0.2.1") == 401


def test_answer_has_every_attribute_of_the_key() -> None:
    known = Principal(
        "key_2",
        "y",
        frozenset({"model:write", "mlflow:read"}),
        email="y@example.com",
        roles=frozenset({"member"}),
        is_admin=True,
        rate_limit_per_hour=5,
        owner_id="u-7",
        models=("b-*", "a"),
        no_delete=True,
    )
    assert validate(known, "192.0.2.1", service_id="mlflow").json == {
        "is_valid": True,
        "key_id": "key_2",
        "user_id": "u-7",
        "service_id": "mlflow",
        "scopes": ["mlflow:read", "model:write"],
        "email": "y@example.com",
        "roles": ["member"],
        "is_admin": True,
        "rate_limit_per_hour": 5,
        "models": ["b-*", "a"],
        "no_delete": True,
        "billing_plan": None,
        "monthly_prediction_limit": None,
        "error": None,
    }
    # A body that is not an object is ignored.
    plain = validate(Principal("key_3", "z", frozenset()), "192.0.2.1", "service_id").json
    assert plain is not None and plain["email"] is None and plain["service_id"] == "platform"
    assert plain["user_id"] is None


def test_other_server_reads_the_same_principal() -> None:
    for known in (
        Principal("key_1", "ACME", frozenset({"model:write"}), owner_id="ACME"),
        Principal("k", "a@b.c", frozenset({"read"}), email="a@b.c", owner_id="u-7", is_admin=True),
        replace(BOUND, networks=(), owner_id="x", models=("acme-*", "\u200b é"), no_delete=True),
        # The owner of these keys is not known, here or there.
        Principal("k", "a@b.c", frozenset({"read"}), email="a@b.c"),
        Principal("k", "k", frozenset()),
    ):
        answer = validate(known, "192.0.2.1")
        reply = service_reply.Reply(answer.status_code, answer.headers, answer.data)
        assert service_reply.read_reply(reply, "hk_live_x") == known

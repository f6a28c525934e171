"""What one server tells another about a key."""

from __future__ import annotations

import contextvars

import flask

from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import identity, validation

BOUND = Principal("key_1", "x", frozenset({"mlflow:read"}), networks=("198.51.100.0/24",))


def status(address: str, **body: str) -> int:
    """Of the answer to a server at `address`."""
    app = flask.Flask("tested")
    app.register_blueprint(validation.blueprint())

    def ask() -> int:
        identity.current.set(identity.Caller(BOUND, address, "request"))
        return app.test_client().post("/api/v1/keys/validate", json=body).status_code

    return contextvars.copy_context().run(ask)


def test_a_key_of_some_networks_is_valid_for_who_calls_from_there_alone() -> None:
    assert status("192.0.2.1", client_ip="198.51.100.7") == 200
    assert status("198.51.100.7", client_ip="192.0.2.1") == 401
    assert status("198.51.100.7", client_ip="nowhere") == 401
    # Who asks names no address: then its own counts.
    assert status("198.51.100.7") == 200
    assert status("192.0.2.1") == 401

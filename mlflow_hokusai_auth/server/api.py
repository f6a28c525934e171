"""`/api/2.0/hokusai/…`: key management and whoami, as a Flask blueprint beside MLflow's own routes.

Who may call what is decided by the gate (`core/routes.py`), before any of this runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import flask

from mlflow_hokusai_auth.backends import BackendUnavailable
from mlflow_hokusai_auth.backends.local import KeyNotFound, KeyRecord, LocalStore, StoreError
from mlflow_hokusai_auth.core import scopes as known_scopes
from mlflow_hokusai_auth.core.keys import ENVIRONMENTS
from mlflow_hokusai_auth.core.types import Principal

from . import identity

_FIELDS = {"owner", "name", "scopes", "environment", "expires_in"}


def describe(record: KeyRecord) -> dict[str, object]:
    """`record` as JSON shows it: its fields and its present state, never the key."""
    return {
        "key_id": record.key_id,
        "owner": record.owner,
        "name": record.name,
        "environment": record.environment,
        "scopes": list(record.scopes),
        "state": record.state(time.time()),
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "revoked_at": record.revoked_at,
    }


def new_key_arguments(body: object) -> dict[str, Any]:
    """The arguments of `LocalStore.create` in a request's JSON; raises StoreError for wrong ones."""
    if not isinstance(body, dict):
        raise StoreError("Send a JSON object with owner and scopes.")
    if unknown := sorted(set(body) - _FIELDS):
        raise StoreError(f"Unknown: {', '.join(map(str, unknown))}. Known: {', '.join(_FIELDS)}.")
    owner, name = body.get("owner"), body.get("name", "")
    if not isinstance(owner, str) or not owner.strip() or not owner.isprintable():
        raise StoreError("owner must say who the key is for, in printable text.")
    if not isinstance(name, str) or not (name.isprintable() or not name):
        raise StoreError("name must be printable text.")
    if len(owner) > 255 or len(name) > 255:
        raise StoreError("owner and name may have 255 characters.")
    scopes = body.get("scopes")
    if not isinstance(scopes, list) or not scopes or not all(isinstance(s, str) for s in scopes):
        raise StoreError("scopes must be a list with at least one scope.")
    if wrong := sorted(set(scopes) - known_scopes.KNOWN):
        raise StoreError(
            f"Unknown scope: {', '.join(wrong)}. Known: {', '.join(sorted(known_scopes.KNOWN))}."
        )
    environment = body.get("environment", "live")
    if environment not in ENVIRONMENTS:
        raise StoreError(f"environment must be one of {', '.join(ENVIRONMENTS)}.")
    expires_in = body.get("expires_in")
    if expires_in is not None and (
        isinstance(expires_in, bool)
        or not isinstance(expires_in, (int, float))
        or not 0 < expires_in < 10**10
    ):
        raise StoreError("expires_in must be a number of seconds above 0.")
    return {
        "owner": owner.strip(),
        "name": name.strip(),
        "scopes": scopes,
        "environment": environment,
        "expires_at": None if expires_in is None else time.time() + expires_in,
    }


def validation() -> flask.Blueprint:
    """`POST /api/v1/keys/validate`, the auth service's contract, for servers whose authority this is.

    The gate has checked the key by then, as for any request, and has answered 401 for one that is not
    good; here only its facts are told. A key in the body counts for nothing, as there.
    """
    routes = flask.Blueprint("hokusai_validation", __name__, url_prefix="/api/v1/keys")

    @routes.post("/validate")
    def validate() -> flask.Response:
        principal = _caller()
        body = flask.request.get_json(force=True, silent=True)
        service = body.get("service_id") if isinstance(body, dict) else None
        response = flask.jsonify(
            is_valid=True,
            key_id=principal.key_id,
            user_id=principal.owner,
            service_id=service if isinstance(service, str) else "platform",
            scopes=sorted(principal.scopes),
            email=principal.email or None,
            roles=sorted(principal.roles),
            is_admin=principal.is_admin,
            rate_limit_per_hour=None,
            billing_plan=None,
            monthly_prediction_limit=None,
            error=None,
        )
        response.headers["Cache-Control"] = "no-store"
        return response

    return routes


def _caller() -> Principal:
    principal = identity.current.get()
    assert principal is not None, "the gate lets nobody through here without a key"
    return principal


def blueprint(store: LocalStore) -> flask.Blueprint:
    """The routes, on `store`."""
    routes = flask.Blueprint("hokusai", __name__, url_prefix="/api/2.0/hokusai")

    @routes.get("/whoami")
    def whoami() -> flask.Response:
        principal = _caller()
        return flask.jsonify(
            key_id=principal.key_id,
            owner=principal.owner,
            scopes=sorted(principal.scopes),
            expires_at=principal.expires_at,
        )

    @routes.get("/keys")
    def list_keys() -> flask.Response:
        return flask.jsonify(keys=[describe(record) for record in store.list()])

    @routes.post("/keys")
    def create_key() -> tuple[flask.Response, int]:
        arguments = new_key_arguments(flask.request.get_json(force=True, silent=True))
        record, key = store.create(**arguments)
        return flask.jsonify(**describe(record), key=key), 201

    @routes.get("/keys/<key_id>")
    def get_key(key_id: str) -> flask.Response:
        return flask.jsonify(describe(store.get(key_id)))

    @routes.delete("/keys/<key_id>")
    def revoke_key(key_id: str) -> flask.Response:
        return flask.jsonify(describe(store.revoke(key_id)))

    @routes.after_request
    def no_store(response: flask.Response) -> flask.Response:
        response.headers["Cache-Control"] = "no-store"
        return response

    routes.register_error_handler(KeyNotFound, _error(404, "RESOURCE_DOES_NOT_EXIST"))
    routes.register_error_handler(StoreError, _error(400, "INVALID_PARAMETER_VALUE"))
    routes.register_error_handler(BackendUnavailable, _error(503, "TEMPORARILY_UNAVAILABLE"))
    return routes


def _error(status: int, error_code: str) -> Callable[[Exception], tuple[flask.Response, int]]:
    def handle(error: Exception) -> tuple[flask.Response, int]:
        return flask.jsonify(error_code=error_code, message=str(error)), status

    return handle

"""`/api/2.0/hokusai/…`: key management and whoami, as a Flask blueprint beside MLflow's own routes.

Who may call what is decided by the gate (`core/routes.py`), before any of this runs. What depends on
which key is asked about is decided here: a key may replace itself without being an administrator's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import flask

from mlflow_hokusai_auth.authorities.cache import MAX_UNCONFIRMED
from mlflow_hokusai_auth.core import policy
from mlflow_hokusai_auth.core.errors import (
    AuthorityUnavailable,
    Forbidden,
    InvalidRequest,
    KeyConflict,
    KeyNotFound,
    NotGenuine,
)
from mlflow_hokusai_auth.core.keys import problem, redact
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.store import usage
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.records import KeyFilter, KeyRecord

from . import leak_reports, openapi, schemas
from .schemas import describe

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    from mlflow_hokusai_auth.server.gate.gate import Gate

#: Seconds after which no process takes a key from its cache that was revoked before.
SETTLED = MAX_UNCONFIRMED + 0.1
#: Seconds before which a key with a limit may not replace itself: what limits count over.
LIMITED_AGE = 3600.0


def blueprint(
    store: LocalStore, gate: Gate, leak_keys: Mapping[str, EllipticCurvePublicKey]
) -> flask.Blueprint:
    """The routes, on `store`; reports of leaks are believed if one of `leak_keys` signed them."""
    routes = flask.Blueprint("hokusai", __name__, url_prefix="/api/2.0/hokusai")

    @routes.get("/whoami")
    def whoami() -> flask.Response:
        return flask.jsonify(identity_of(store, gate))

    @routes.get("/openapi.json")
    def description() -> flask.Response:
        return flask.jsonify(openapi.document())

    @routes.get("/keys")
    def list_keys() -> flask.Response:
        records, token = page(store, flask.request.args)
        return flask.jsonify(keys=with_uses(store, records), next_page_token=token)

    @routes.post("/keys")
    def create_key() -> tuple[flask.Response, int]:
        body = schemas.parse(schemas.NewKey, _json())
        record, key = store.create(
            **schemas.fields(body), environment=body.environment, by=callers.actor()
        )
        return flask.jsonify(**describe(record), key=key), 201

    @routes.post("/keys/import")
    def import_key() -> tuple[flask.Response, int]:
        body = schemas.parse(schemas.ExistingKey, _json())
        record = store.add(body.key.strip(), **schemas.fields(body), by=callers.actor())
        return flask.jsonify(describe(record)), 201

    @routes.get("/keys/export")
    def export_keys() -> flask.Response:
        lines = (json.dumps(describe(record)) + "\n" for record in store.each())
        response = flask.Response(_started(lines), mimetype="application/x-ndjson")
        response.headers["Content-Disposition"] = 'attachment; filename="hokusai-keys.ndjson"'
        return response

    @routes.get("/keys/<key_id>")
    def get_key(key_id: str) -> flask.Response:
        return flask.jsonify(with_uses(store, [store.get(key_id)])[0])

    @routes.patch("/keys/<key_id>")
    def edit_key(key_id: str) -> flask.Response:
        changes = schemas.changes(schemas.parse(schemas.KeyChanges, _json()))
        return flask.jsonify(describe(store.edit(key_id, changes, callers.actor())))

    @routes.post("/keys/<key_id>/rotate")
    def rotate_key(key_id: str) -> tuple[flask.Response, int]:
        caller = callers.principal()
        if key_id != caller.key_id and not policy.is_admin(caller, gate.policy):
            raise Forbidden("A key may be replaced by itself, or by a key with mlflow:admin.")
        _may_rotate_again(caller, store, gate)
        # Whatever type it is sent as: what is taken for no body leaves a leaked key its day.
        body = schemas.parse(schemas.Rotation, _json() if flask.request.get_data() else {})
        new, key, old = store.rotate(key_id, overlap=body.overlap, by=callers.actor())
        return flask.jsonify(**describe(new), key=key, replaces=describe(old)), 201

    @routes.delete("/keys/<key_id>")
    def revoke_key(key_id: str) -> flask.Response:
        wait, force = (_flag(name) for name in ("wait", "force"))
        record = store.revoke(key_id, callers.actor(), force=force)
        if wait:
            time.sleep(SETTLED)
        return flask.jsonify(describe(record))

    @routes.post("/keys/leaked")
    def leaked() -> flask.Response:
        headers, body = flask.request.headers, flask.request.get_data()
        signed_by = headers.get(leak_reports.IDENTIFIER_HEADER, "")
        if not leak_reports.verified(
            body, signed_by, headers.get(leak_reports.SIGNATURE_HEADER, ""), leak_keys
        ):
            raise NotGenuine("The report is not signed by a key that this server trusts.")
        try:
            found = leak_reports.parse(body)
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        return flask.jsonify([told for leak in found if (told := _end_leaked(store, leak))])

    @routes.after_request
    def describe_answer(response: flask.Response) -> flask.Response:
        response.headers["Cache-Control"] = "no-store"
        return response

    for error, status, error_code in (
        (NotGenuine, 401, "UNAUTHENTICATED"),
        (Forbidden, 403, "PERMISSION_DENIED"),
        (KeyNotFound, 404, "RESOURCE_DOES_NOT_EXIST"),
        (KeyConflict, 409, "RESOURCE_CONFLICT"),
        (InvalidRequest, 400, "INVALID_PARAMETER_VALUE"),
        (AuthorityUnavailable, 503, "TEMPORARILY_UNAVAILABLE"),
    ):
        routes.register_error_handler(error, _error(status, error_code))
    return routes


def identity_of(store: LocalStore, gate: Gate) -> dict[str, Any]:
    """What the key of this request may know of itself, as `schemas.Identity` has it."""
    caller = callers.principal()
    try:
        name = store.get(caller.key_id).name
    except KeyNotFound:  # another authority's key
        name = ""
    left = None
    if (limit := caller.rate_limit_per_hour) is not None:
        remaining, reset = gate.limits.left(caller.key_id, limit)
        left = schemas.LimitLeft(limit=limit, remaining=remaining, reset=reset)
    return schemas.Identity(
        key_id=caller.key_id,
        owner=caller.owner,
        name=name,
        scopes=sorted(caller.scopes),
        can=policy.abilities(caller, gate.policy),
        expires_at=caller.expires_at,
        deprecated_at=caller.deprecated_at,
        networks=list(caller.networks),
        rate_limit=left,
    ).model_dump()


def page(store: LocalStore, query: Mapping[str, str]) -> tuple[list[KeyRecord], str | None]:
    """The page of keys that a request's query asks for; raises InvalidRequest for a wrong one."""
    given = {name: value for name, value in query.items() if value}
    for name, value in given.items():
        if not value.isprintable() or len(value) > 255:
            raise InvalidRequest(
                f"{redact(name)[:40]!r} must be printable text of at most 255 characters."
            )
    results = given.get("max_results", "100")
    if not (results.isascii() and results.isdigit()) or len(results) > 9:
        raise InvalidRequest("max_results must be a whole number.")
    which = KeyFilter(*(given.get(name) for name in KeyFilter.__slots__))
    return store.page(which, max_results=int(results), page_token=given.get("page_token"))


def with_uses(store: LocalStore, records: list[KeyRecord]) -> list[dict[str, Any]]:
    """`records` as JSON shows them, each with its uses in the last hours."""
    counts = usage.by_hour(store.database, [record.key_id for record in records])
    return [{**describe(one), "uses_by_hour": counts[one.key_id]} for one in records]


def _may_rotate_again(caller: Principal, store: LocalStore, gate: Gate) -> None:
    """Raise KeyConflict where a key would get around its limit, which counts anew for its successor."""
    if caller.rate_limit_per_hour is None or policy.is_admin(caller, gate.policy):
        return
    young = time.time() - store.get(caller.key_id).created_at < LIMITED_AGE
    if young or store.predecessor_lives(caller.key_id):
        raise KeyConflict(
            f"Key {caller.key_id} has a limit, and may replace itself once it is an hour old and the "
            "key that it replaced has ended."
        )


def _end_leaked(store: LocalStore, leak: leak_reports.Leak) -> dict[str, str] | None:
    """Revoke the key in `leak`; what GitHub is told of it, or None if this can't be known here."""
    record = store.find(leak.token)
    if record is not None:
        where = {"found_at": leak.url, "source": leak.source}
        store.revoke(record.key_id, callers.actor(), force=True, event="key.leaked", **where)
    elif problem(leak.token) is None:
        return None  # it may be a key of another authority
    return leak_reports.feedback(leak, record is not None)


def _json() -> object:
    return schemas.read_json(flask.request.get_data())


def _flag(name: str) -> bool:
    value = flask.request.args.get(name, "false")
    if value not in ("true", "false"):
        raise InvalidRequest(f"{name} must be true or false.")
    return value == "true"


def _started(lines: Iterator[str]) -> Iterator[str]:
    """`lines`, the first of them read already, so that a store that fails at once is an error."""
    first = next(lines, "")

    def all_of_them() -> Iterator[str]:
        yield first
        yield from lines

    return all_of_them()


def _error(status: int, error_code: str) -> Callable[[Exception], tuple[flask.Response, int]]:
    def handle(error: Exception) -> tuple[flask.Response, int]:
        return flask.jsonify(error_code=error_code, message=str(error)), status

    return handle

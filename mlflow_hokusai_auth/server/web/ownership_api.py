"""`/api/2.0/hokusai/{owners,grants,prefixes,isolation}`: whose everything is, and what owners share.

The gate decides by `core/routes.py` who may call a route. A caller who is no administrator is an owner
here, who sees what exists, and shares what it owns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flask

from mlflow_hokusai_auth.core import policy
from mlflow_hokusai_auth.core.errors import Conflict, Forbidden, InvalidRequest
from mlflow_hokusai_auth.core.ownership import within
from mlflow_hokusai_auth.core.types import ISOLATING, ISOLATION
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.upstream import stores
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.owners import Ownership

from . import api, schemas
from . import ownership_schemas as owned

if TYPE_CHECKING:
    from mlflow_hokusai_auth.server.gate.gate import Gate


def blueprint(store: LocalStore, gate: Gate) -> flask.Blueprint:
    """Return the routes, on MLflow's database. Changes go into the audit log of `store`."""
    routes = api.blueprint("hokusai_ownership")

    def ownership() -> Ownership:
        return ownership_of(store, gate)

    @routes.get("/owners")
    def list_owners() -> flask.Response:
        query = flask.request.args
        page = ownership().list_owners(
            kind=_kind(),
            owner=query.get("owner") or None,
            unowned=api.flag("unowned"),
            max_results=api.max_results(query),
            page_token=query.get("page_token") or None,
        )
        return flask.jsonify(owners=page, next_page_token=page.token)

    @routes.get("/owners/of")
    def owners_of() -> flask.Response:
        return flask.jsonify(owners=ownership().owners_of(flask.request.args.get("name", "")))

    @routes.post("/owners/assign")
    def assign() -> flask.Response:
        body = schemas.parse(owned.Assignment, api.body()).model_dump()
        names = [
            {name: value for name, value in row.items() if value is not None}
            for row in body.pop("names")
        ]
        return flask.jsonify(ownership().assign_owner(**body, names=names))

    @routes.post("/owners/release")
    def release() -> flask.Response:
        body = schemas.parse(owned.ModelName, api.body())
        return flask.jsonify(ownership().release_name(body.name))

    @routes.get("/owners/check")
    def check() -> flask.Response:
        return flask.jsonify(problems=ownership().check_owners())

    @routes.get("/grants")
    def list_grants() -> flask.Response:
        query = flask.request.args
        page = ownership().list_grants(
            max_results=api.max_results(query), page_token=query.get("page_token") or None
        )
        return flask.jsonify(grants=page, next_page_token=page.token)

    @routes.post("/grants")
    def add_grant() -> tuple[flask.Response, int]:
        return flask.jsonify(share(ownership(), api.body())), 201

    @routes.delete("/grants/<grant_id>")
    def remove_grant(grant_id: str) -> flask.Response:
        return flask.jsonify(unshare(ownership(), grant_id))

    @routes.get("/prefixes")
    def list_prefixes() -> flask.Response:
        return flask.jsonify(prefixes=ownership().list_prefixes())

    @routes.post("/prefixes")
    def add_prefix() -> tuple[flask.Response, int]:
        body = schemas.parse(owned.NewPrefix, api.body())
        return flask.jsonify(ownership().add_prefix(**body.model_dump())), 201

    @routes.delete("/prefixes")
    def remove_prefix() -> flask.Response:
        prefix = flask.request.args.get("prefix", "")
        return flask.jsonify(ownership().remove_prefix(prefix=prefix, kind=_kind()))

    @routes.get("/isolation")
    def isolation() -> flask.Response:
        return flask.jsonify(_isolation(gate))

    @routes.post("/isolation")
    def set_isolation() -> flask.Response:
        wanted = schemas.parse(owned.NewIsolation, api.body()).isolation
        if wanted not in (*ISOLATION, "default"):
            raise InvalidRequest(f"isolation must be one of {', '.join(ISOLATION)}, default.")
        if wanted in ISOLATING and gate.isolation.obstacle is not None:
            raise Conflict(f"This server can't keep suppliers apart: {gate.isolation.obstacle}.")
        store.database.choose("isolation", ISOLATION, wanted, callers.actor())
        gate.isolation.follow(store.database.states())
        return flask.jsonify(_isolation(gate))

    return routes


def ownership_of(store: LocalStore, gate: Gate) -> Ownership:
    """Return ownership in MLflow's database, for the caller. Changes are noted in the log of `store`.

    Raises Conflict if this server can't record owners.
    """
    engine = stores.shared_engine()
    if engine is None:
        raise Conflict(
            "Ownership needs a database with both runs and registered models: set "
            "MLFLOW_BACKEND_STORE_URI to one, and no other registry store."
        )
    if gate.isolation.obstacle is not None:
        raise Conflict(f"This server can't record owners: {gate.isolation.obstacle}.")
    by, caller = callers.actor(), callers.principal()
    owner = None if policy.is_admin(caller, gate.policy) else callers.owner_id()
    return Ownership(
        engine,
        lambda event, detail: store.database.note(event, by, detail),
        owner,
        caller.key_id,
        store.owners,
    )


def share(ownership: Ownership, body: object) -> dict[str, Any]:
    """Add the grant that `body` asks for, and return it. Raises as `Ownership.add_grant` does."""
    grant = schemas.parse(owned.NewGrant, body)
    limits = callers.principal().models
    if limits and not within(grant.pattern, limits):
        raise Forbidden(f"This key shares only models named {' or '.join(sorted(limits))}.")
    return ownership.add_grant(**grant.model_dump())


def unshare(ownership: Ownership, grant_id: str) -> dict[str, Any]:
    """End a grant, and return it. Raises NotFound and Forbidden."""
    caller = callers.principal()
    if caller.no_delete:
        raise Forbidden("This key may not delete anything.")
    return ownership.remove_grant(grant_id, caller.models)


def _isolation(gate: Gate) -> dict[str, Any]:
    now = gate.isolation
    return owned.IsolationNow(
        isolation=now.level,
        in_effect=now.in_effect,
        mode=gate.mode.now,
        by_default=now.is_decided,
        obstacle=now.obstacle,
    ).model_dump()


def _kind() -> str:
    return flask.request.args.get("kind") or "model"

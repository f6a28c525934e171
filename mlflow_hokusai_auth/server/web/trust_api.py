"""`/api/2.0/hokusai/trust`: workloads that get keys for identity tokens, for administrators."""

from __future__ import annotations

import flask

from mlflow_hokusai_auth.core import trust as core_trust
from mlflow_hokusai_auth.core.errors import NotFound
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.store.trusts import Trusts

from . import api, schemas
from . import trust_schemas as trusted

#: The message on a server without a key store, where no trust can be kept.
ABSENT = (
    "This server exchanges no identity tokens: its keys are the auth service's alone "
    "(HOKUSAI_AUTH_BACKEND=service)."
)


def blueprint(trusts: Trusts, *, has_store: bool) -> flask.Blueprint:
    """Return the routes. Without a key store in use (`has_store`) each answers 404."""
    routes = api.blueprint("hokusai_trust")

    @routes.before_request
    def refuse_without_store() -> None:
        if not has_store:
            raise NotFound(ABSENT)

    @routes.get("/trust")
    def list_trusts() -> flask.Response:
        return flask.jsonify(trusts=[trusted.describe(record) for record in trusts.each()])

    @routes.post("/trust")
    def add_trust() -> tuple[flask.Response, int]:
        body = schemas.parse(trusted.NewTrust, api.body())
        record = trusts.add(workload(body), **trusted.fields(body), by=callers.actor())
        return flask.jsonify(trusted.describe(record)), 201

    @routes.patch("/trust/<trust_id>")
    def edit_trust(trust_id: str) -> flask.Response:
        changed, forget = trusted.changes(schemas.parse(trusted.TrustChanges, api.body()))
        record = trusts.edit(trust_id, changed, callers.actor(), forget_ids=forget)
        return flask.jsonify(trusted.describe(record))

    @routes.delete("/trust/<trust_id>")
    def remove_trust(trust_id: str) -> flask.Response:
        return flask.jsonify(trusted.describe(trusts.remove(trust_id, callers.actor())))

    return routes


def workload(body: trusted.NewTrust) -> core_trust.Workload:
    """Return the workload that `body` describes. Raises InvalidRequest."""
    return core_trust.workload(
        github=body.github,
        gitlab=body.gitlab,
        issuer=body.issuer,
        workflow=body.workflow,
        environment=body.environment,
        claims=body.claims,
        single_use=body.single_use,
    )

"""`/api/2.0/hokusai/trust`: workloads that get keys for identity tokens.

Administrators manage all trusts. Where `HOKUSAI_AUTH_SUPPLIER_TRUST` is true, a supplier manages those
of its own owner, and gives nothing that its own key does not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import flask

from mlflow_hokusai_auth.core import policy, supplier_trust
from mlflow_hokusai_auth.core import trust as core_trust
from mlflow_hokusai_auth.core.errors import (
    Forbidden,
    HokusaiAuthError,
    KeyNotFound,
    NotFound,
)
from mlflow_hokusai_auth.core.lifetimes import UNLIMITED, Lifetimes
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.trusts import TrustRecord, Trusts

from . import api, schemas
from . import trust_schemas as trusted

if TYPE_CHECKING:
    from mlflow_hokusai_auth.server.gate.gate import Gate

#: The message on a server without a key store, where no trust can be kept.
ABSENT = (
    "This server exchanges no identity tokens: its keys are the auth service's alone "
    "(HOKUSAI_AUTH_BACKEND=service)."
)


def blueprint(actions: TrustActions) -> flask.Blueprint:
    """Return the routes. Without a key store in use each answers 404."""
    routes = api.blueprint("hokusai_trust")

    @routes.get("/trust")
    def list_trusts() -> flask.Response:
        found = actions.trusts_of_caller().each()
        return flask.jsonify(trusts=[trusted.describe(record) for record in found])

    @routes.post("/trust")
    def add_trust() -> tuple[flask.Response, int]:
        return flask.jsonify(trusted.describe(actions.add(api.body()))), 201

    @routes.patch("/trust/<trust_id>")
    def edit_trust(trust_id: str) -> flask.Response:
        return flask.jsonify(trusted.describe(actions.edit(trust_id, api.body())))

    @routes.delete("/trust/<trust_id>")
    def remove_trust(trust_id: str) -> flask.Response:
        return flask.jsonify(trusted.describe(actions.remove(trust_id)))

    return routes


@dataclass(frozen=True)
class TrustActions:
    """The actions of the routes and of the page's forms on the trusts in `store`, for the caller.

    `body` is that of the REST API. Each action raises NotFound without a key store in use
    (`has_store`), Forbidden for what a supplier may not do, and otherwise as `Trusts` does.
    """

    store: LocalStore
    gate: Gate
    has_store: bool = True
    lifetimes: Lifetimes = UNLIMITED

    def trusts_of_caller(self) -> Trusts:
        """Return all trusts to an administrator, and to a supplier those of its own owner."""
        if not self.has_store:
            raise NotFound(ABSENT)
        trusts = Trusts(self.store.database, lifetimes=self.lifetimes)
        caller = callers.principal()
        if caller.source:
            raise Forbidden(
                "This key was exchanged for a job's identity token, and such keys manage no trusts. "
                "Use a key of your own."
            )
        if policy.is_admin(caller, self.gate.policy):
            return trusts
        self._check_supplier(caller)
        return trusts.of(caller.owner_id, lambda trust: self._check(trust, caller))

    def may_list(self) -> bool:
        """Return whether the caller has a list of trusts; False if that can't be found out now."""
        try:
            self.trusts_of_caller()
        except HokusaiAuthError:
            return False
        return True

    def add(self, body: object) -> TrustRecord:
        """Add the trust that `body` describes."""
        trusts = self.trusts_of_caller()
        new = schemas.parse(trusted.NewTrust, body)
        caller = callers.principal()
        if not policy.is_admin(caller, self.gate.policy):
            if new.owner not in (None, caller.owner_id):
                raise Forbidden("This key adds trusts of its own owner only: leave owner out.")
            if new.issuer is not None or new.claims or new.jwks is not None:
                raise Forbidden(
                    "Only the server's operator adds trusts with issuer, claims or jwks. This key adds "
                    "trusts for repositories on github.com and gitlab.com: github or gitlab, workflow "
                    "and environment."
                )
            new = new.model_copy(update={"owner": caller.owner_id})
        given = trusted.fields(new, self.lifetimes)
        return trusts.add(workload(new), **given, by=callers.actor())

    def edit(self, trust_id: str, body: object, *, seen: str | None = None) -> TrustRecord:
        """Change the fields of a trust that are in `body`; `seen` is that of `Trusts.edit`."""
        trusts = self._trusts_with(trust_id)
        given = schemas.parse(trusted.TrustChanges, body)
        changed, forget = trusted.changes(given)
        if "jwks" in changed and not policy.is_admin(callers.principal(), self.gate.policy):
            raise Forbidden("Only the server's operator changes the jwks of a trust.")
        return trusts.edit(trust_id, changed, callers.actor(), forget_ids=forget, seen=seen)

    def remove(self, trust_id: str) -> TrustRecord:
        """Remove a trust, and end its keys."""
        trusts = self._trusts_with(trust_id)
        if callers.principal().no_delete:
            raise Forbidden("This key may not delete anything.")
        return trusts.remove(trust_id, callers.actor())

    def _trusts_with(self, trust_id: str) -> Trusts:
        """Return the trusts of the caller, who may change this one for its models."""
        trusts = self.trusts_of_caller()
        trust = trusts.get(trust_id).trust
        if problem := supplier_trust.names_problem(trust, callers.principal()):
            raise Forbidden(problem)
        return trusts

    def _check_supplier(self, caller: Principal) -> None:
        """Raise Forbidden unless this key, which is no administrator's, manages its owner's trusts."""
        if not self.gate.policy.supplier_trust:
            raise Forbidden("Only the server's operator manages its trusts: ask the operator.")
        try:
            ours = self.store.get(caller.key_id).owner == caller.owner_id
        except KeyNotFound:
            ours = False
        if not ours:
            # Another authority does not say if it made the key for a job's identity token.
            raise Forbidden(
                "Only keys of this server's own key store manage trusts, and this one is another "
                "authority's. Ask the server's operator to add the trust."
            )

    def _check(self, trust: core_trust.Trust, caller: Principal) -> None:
        """Raise Forbidden if this supplier may not have this trust."""
        if problem := supplier_trust.problem(trust, caller, self.gate.policy):
            raise Forbidden(problem)


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

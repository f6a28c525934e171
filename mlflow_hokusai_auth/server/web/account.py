"""The routes from which MLflow's pages learn who is signed in, and which actions to offer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import flask

from mlflow_hokusai_auth.core import browser, denials, policy
from mlflow_hokusai_auth.core.types import Deny
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.store.sessions import Sessions

from .pages import shared

if TYPE_CHECKING:
    from mlflow_hokusai_auth.server.gate.gate import Gate


#: The place to which MLflow's account page sends a person who looks for the key, or for a way out.
_KEYS = "hokusai/keys on this server"


def blueprint(gate: Gate, sessions: Sessions) -> flask.Blueprint:
    """Return these routes."""
    routes = flask.Blueprint("hokusai_account", __name__)

    @routes.get("/api/2.0/mlflow/users/current")
    @routes.get("/ajax-api/2.0/mlflow/users/current")
    def current() -> flask.Response:
        caller, request = callers.principal(), shared.request()
        signed_in = bool(browser.session_tokens(request))
        if signed_in and browser.LOGOUT_COOKIE not in flask.request.cookies:
            # MLflow's page then loads itself again, which leads to the sign-in page.
            refusal = denials.render(Deny("SESSION_ENDED", policy.SIGNED_OUT))
            response = flask.Response(refusal.body, refusal.status, list(refusal.headers))
            shared.sign_out(response, request, sessions)
            return response
        # Nobody is an administrator in MLflow's sense: its pages for users and roles would be empty.
        user = {"id": caller.key_id, "username": caller.owner, "is_admin": False}
        # With basic auth, MLflow's account menu has "Logout", and its page a change of the password.
        return flask.jsonify(user=user, is_basic_auth=signed_in)

    @routes.patch("/api/2.0/mlflow/users/update-password")
    @routes.patch("/ajax-api/2.0/mlflow/users/update-password")
    def password() -> tuple[flask.Response, int]:
        message = f"You sign in with an API key, which has no password. Rotate the key at {_KEYS}."
        return flask.jsonify(error_code="INVALID_PARAMETER_VALUE", message=message), 400

    @routes.get("/api/3.0/mlflow/users/current/permissions")
    @routes.get("/ajax-api/3.0/mlflow/users/current/permissions")
    def permissions() -> flask.Response:
        # This only hides actions on MLflow's pages. The gate decides what is allowed.
        writes = "write" in policy.abilities(callers.principal(), gate.policy)
        grant = {
            "resource_type": "experiment",
            "resource_pattern": "*",
            "permission": "MANAGE" if writes else "READ",
            "workspace": "default",
        }
        return flask.jsonify(is_admin=False, permissions=[grant])

    @routes.get("/api/3.0/mlflow/users/roles/list")
    @routes.get("/ajax-api/3.0/mlflow/users/roles/list")
    def roles() -> flask.Response:
        # MLflow shows these names on its account page, and that is the only text there from a server.
        names = [*sorted(callers.principal().scopes), f"Your key: {_KEYS}"]
        found = [
            {"id": number, "name": name, "workspace": "default", "permissions": []}
            for number, name in enumerate(names, 1)
        ]
        return flask.jsonify(roles=found)

    return routes

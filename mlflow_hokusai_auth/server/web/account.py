"""The routes from which MLflow's pages learn who is signed in, and which actions to offer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import flask

from mlflow_hokusai_auth.core import policy
from mlflow_hokusai_auth.server import caller as callers

if TYPE_CHECKING:
    from mlflow_hokusai_auth.server.gate.gate import Gate


def blueprint(gate: Gate) -> flask.Blueprint:
    """Return these routes."""
    routes = flask.Blueprint("hokusai_account", __name__)

    @routes.get("/api/2.0/mlflow/users/current")
    @routes.get("/ajax-api/2.0/mlflow/users/current")
    def current() -> flask.Response:
        caller = callers.principal()
        # Nobody is an administrator in MLflow's sense: its pages for users and roles would be empty.
        user = {"id": caller.key_id, "username": caller.owner, "is_admin": False}
        return flask.jsonify(user=user, is_basic_auth=False)

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
        return flask.jsonify(roles=[])

    return routes

"""`POST /api/v1/keys/validate`: the auth service's contract, for servers that ask this one."""

from __future__ import annotations

import flask

from mlflow_hokusai_auth.core.addresses import inside
from mlflow_hokusai_auth.server import caller

from . import schemas


def blueprint() -> flask.Blueprint:
    """The route. The gate has checked the key by then, and has answered 401 for one that is not good.

    So only its facts are told here, and whether it may be used from the address that the asking server
    names. A key in the body counts for nothing, as there.
    """
    routes = flask.Blueprint("hokusai_validation", __name__, url_prefix="/api/v1/keys")

    @routes.post("/validate")
    def validate() -> tuple[flask.Response, int]:
        principal = caller.principal()
        body = schemas.read_json(flask.request.get_data())
        told = body if isinstance(body, dict) else {}
        address = told.get("client_ip") or caller.current.get().address
        if principal.networks and not inside(str(address), principal.networks):
            return flask.jsonify(is_valid=False, error="IP address not allowed"), 401
        service = told.get("service_id")
        return flask.jsonify(
            is_valid=True,
            key_id=principal.key_id,
            user_id=principal.owner,
            service_id=service if isinstance(service, str) else "platform",
            scopes=sorted(principal.scopes),
            email=principal.email or None,
            roles=sorted(principal.roles),
            is_admin=principal.is_admin,
            rate_limit_per_hour=principal.rate_limit_per_hour,
            billing_plan=None,
            monthly_prediction_limit=None,
            error=None,
        ), 200

    @routes.after_request
    def no_store(response: flask.Response) -> flask.Response:
        response.headers["Cache-Control"] = "no-store"
        return response

    return routes

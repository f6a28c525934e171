"""`POST /api/v1/keys/validate`: the auth service's contract, for other servers that use this one."""

from __future__ import annotations

import flask

from mlflow_hokusai_auth.core.addresses import inside
from mlflow_hokusai_auth.server import caller

from . import api


def blueprint() -> flask.Blueprint:
    """Return the route. The gate has already checked the key and answered 401 if it is not good.

    The route returns the key's attributes, or 401 if the key may not be used from `client_ip`, the
    address that the calling server names. A key in the body is ignored, as the auth service does.
    """
    routes = flask.Blueprint("hokusai_validation", __name__, url_prefix="/api/v1/keys")
    routes.after_request(api.no_store)

    @routes.post("/validate")
    def validate() -> tuple[flask.Response, int]:
        principal = caller.principal()
        body = api.body()
        fields = body if isinstance(body, dict) else {}
        address = fields.get("client_ip") or caller.current.get().address
        if principal.networks and not inside(str(address), principal.networks):
            return flask.jsonify(is_valid=False, error="IP address not allowed"), 401
        service = fields.get("service_id")
        return flask.jsonify(
            is_valid=True,
            key_id=principal.key_id,
            user_id=principal.owner_id or None,
            service_id=service if isinstance(service, str) else "platform",
            scopes=sorted(principal.scopes),
            email=principal.email or None,
            roles=sorted(principal.roles),
            is_admin=principal.is_admin,
            rate_limit_per_hour=principal.rate_limit_per_hour,
            models=list(principal.models),
            no_delete=principal.no_delete,
            billing_plan=None,
            monthly_prediction_limit=None,
            error=None,
        ), 200

    return routes

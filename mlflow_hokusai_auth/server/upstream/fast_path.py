"""A fast path to MLflow's Flask routes, past the FastAPI application around them.

In that application MLflow 3.17 runs two `BaseHTTPMiddleware` layers, each with a task and streams for
every request, and tries all of FastAPI's routes. Together that takes longer than many handlers, and the
gate has matched the route already. The fast path keeps MLflow's security middlewares in their order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.core.types import Operation, Request

from . import stores
from .flask_bridge import FlaskBridge
from .routes import mlflow_routes, native_routes, template

if TYPE_CHECKING:
    import flask
    from fastapi import FastAPI
    from starlette.types import ASGIApp

#: Functions of MLflow's middlewares that the fast path leaves out. The first does nothing for requests
#: without its header while workspaces are off, and the second nothing for routes outside /gateway/.
_IDLE = frozenset({"workspace_context_middleware", "gateway_timing_middleware"})
_WORKSPACE = b"x-mlflow-workspace"


class FastPath:
    """`app` answers requests that fit exactly as MLflow's whole application does."""

    def __init__(self, app: ASGIApp, rules: frozenset[str]) -> None:
        self.app = app
        self._rules = rules

    def fits(self, operation: Operation, request: Request) -> bool:
        """Return whether Flask answers the request and no middleware that is left out would act."""
        return operation.rule in self._rules and request.header(_WORKSPACE) is None


def build(fastapi_app: FastAPI, flask_app: flask.Flask) -> FastPath | None:
    """Return the fast path, or None if the installed MLflow is not built as this module expects."""
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.routing import Mount

    if stores.has_workspaces():
        return None
    mount = fastapi_app.router.routes[-1]
    if (
        not isinstance(mount, Mount)
        or mount.path
        or getattr(mount.app, "app", None) is not flask_app
    ):
        return None
    app: Any = FlaskBridge(flask_app)
    for layer in reversed(fastapi_app.user_middleware):
        make: Any = layer.cls
        if make is not BaseHTTPMiddleware:
            app = make(app, *layer.args, **layer.kwargs)
        elif getattr(layer.kwargs.get("dispatch"), "__name__", "") not in _IDLE:
            return None
    native = _rules(native_routes(fastapi_app))
    flasks = _rules(mlflow_routes(flask_app)) - native
    return FastPath(app, frozenset(rule for rule in flasks if "/gateway/" not in rule))


def _rules(routes: Any) -> set[str]:
    return {classify(method, template(rule)).rule for method, rule, _ in routes} - {""}

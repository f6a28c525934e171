"""A shorter way to MLflow's Flask routes than through the FastAPI application around them.

There MLflow 3.17 runs two `BaseHTTPMiddleware` layers, with a task and streams of their own for each
request, and tries all of FastAPI's routes: together that takes longer than many a handler. The gate has
matched the route already. Kept are MLflow's own security middlewares, in their order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.core.types import Operation, Request

from .flask_bridge import FlaskBridge
from .routes import mlflow_routes, native_routes, template

if TYPE_CHECKING:
    import flask
    from fastapi import FastAPI
    from starlette.types import ASGIApp

#: MLflow's middlewares, by the names of their functions, that do nothing: the first for requests
#: without its header, while workspaces are off; the second for other routes than /gateway/.
_IDLE = frozenset({"workspace_context_middleware", "gateway_timing_middleware"})
_WORKSPACE = b"x-mlflow-workspace"


class FastPath:
    """`app` answers what `fits`, exactly as MLflow's whole application does."""

    def __init__(self, app: ASGIApp, rules: frozenset[str]) -> None:
        self.app = app
        self._rules = rules

    def fits(self, operation: Operation, request: Request) -> bool:
        """Whether the request is one for Flask, and none of the middlewares left out would act."""
        return operation.rule in self._rules and request.header(_WORKSPACE) is None


def build(fastapi_app: FastAPI, flask_app: flask.Flask) -> FastPath | None:
    """The short way, or None where the installed MLflow is not built as it is known to be."""
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.routing import Mount

    if _has_workspaces():
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


def _has_workspaces() -> bool:
    try:
        from mlflow.environment_variables import MLFLOW_ENABLE_WORKSPACES
    except ImportError:  # MLflow before workspaces
        return False
    return bool(MLFLOW_ENABLE_WORKSPACES.get())

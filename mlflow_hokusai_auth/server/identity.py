"""The verified principal of the request in hand, for code behind the gate."""

from __future__ import annotations

from contextvars import ContextVar

import flask

from mlflow_hokusai_auth.core.types import Principal

#: Set by both adapters before they call MLflow; a thread pool that MLflow hands the request to
#: copies it along with the context.
current: ContextVar[Principal | None] = ContextVar("hokusai_principal", default=None)


def install(app: flask.Flask) -> None:
    """Tell MLflow's handlers who the user is, in the place where its own auth app does."""

    @app.before_request
    def _set_user() -> None:
        principal = current.get()
        if principal is not None:
            flask.g.mlflow_authenticated_user = principal.owner

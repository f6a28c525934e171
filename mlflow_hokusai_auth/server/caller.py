"""Who sent the request in hand, for code behind the gate."""

from __future__ import annotations

from contextvars import ContextVar
from typing import NamedTuple

import flask

from mlflow_hokusai_auth.core import denials
from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.core.types import Access, Deny, Principal
from mlflow_hokusai_auth.store.database import Actor


class Caller(NamedTuple):
    """The verified principal, or None on a public route; the client's address; the request's id."""

    principal: Principal | None
    address: str
    request_id: str
    #: Headers that the answer gets as well; code behind the gate may add some before it answers.
    answer: list[tuple[str, str]] | None = None
    #: What the decision log says of the request beyond its route; code behind the gate may add to it.
    named: dict[str, str] | None = None


#: The caller outside of any request.
NOBODY = Caller(None, "", "")
#: Set by both adapters before they call MLflow; a thread pool that MLflow hands the request to
#: copies it along with the context. ASGI servers have a context for each request. WSGI servers use a
#: thread, with its context, for one request after the other, so there the adapter resets it.
current: ContextVar[Caller] = ContextVar("hokusai_caller", default=NOBODY)


def install(app: flask.Flask) -> None:
    """Tell MLflow's handlers who the user is, in the place where its own auth app does."""

    @app.before_request
    def _set_user() -> None:
        principal = current.get().principal
        if principal is not None:
            flask.g.mlflow_authenticated_user = principal.owner


def required() -> flask.Response | None:
    """The refusal of a request for one of our own routes that takes a key and has none.

    The gate has refused it before. But with mode observe or off it lets pass what it takes for routes
    of MLflow's, and who knows in how many spellings a router understands ours.
    """
    operation = classify(flask.request.method, flask.request.path)
    known = current.get().principal is not None or operation.access is Access.PUBLIC
    if known or flask.request.method == "OPTIONS":  # which only tells of methods
        return None
    refusal = denials.render(Deny("KEY_MISSING", "Send a key that this server knows."))
    return flask.Response(refusal.body, refusal.status, list(refusal.headers))


def principal() -> Principal:
    """Whom the key of this request belongs to, on routes that take a key."""
    found = current.get().principal
    assert found is not None, "the gate lets nobody through here without a key"
    return found


def actor() -> Actor:
    """The caller as the audit log names it."""
    caller = current.get()
    if caller.principal is None:
        return Actor("", "", caller.address, caller.request_id)
    return Actor(caller.principal.owner, caller.principal.key_id, caller.address, caller.request_id)

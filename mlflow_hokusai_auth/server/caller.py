"""The caller of the current request, for code behind the gate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import flask

from mlflow_hokusai_auth.core import denials
from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.core.types import Access, Deny, Principal
from mlflow_hokusai_auth.store.database import Actor


class Caller(NamedTuple):
    """The principal (None on a public route), the client's address, and the request's id."""

    principal: Principal | None
    address: str
    request_id: str
    #: Further headers for the response; code behind the gate may add some.
    answer: list[tuple[str, str]] | None = None
    #: Further fields for the request's line in the decision log; code behind the gate may add some.
    named: dict[str, str] | None = None
    #: The refusals that this request was spared, by code and kind: each counts once.
    spared: set[tuple[str, str]] | None = None
    #: The reason why the server itself acts, one of `INTERNAL`; "" for a request, and outside of any.
    internal: str = ""


#: The reasons for which the server changes MLflow's data by itself, without a key. Nothing else may
#: change experiments, runs, models and versions without a key: a thread that lost its caller looks the
#: same. Webhooks' delivery only sends requests, and MLflow's jobs, their scheduler and
#: `mlflow db upgrade` run in processes of their own, without this check.
INTERNAL = {
    "store": "MLflow opens a store, and makes its tables and its Default experiment if it has none. It "
    "does so at a worker's first request, and again while it registers a version of a logged model.",
}

#: The caller outside of any request.
NOBODY = Caller(None, "", "")
#: Both adapters set it before they call MLflow; if MLflow hands the request to a thread pool, the
#: context is copied. An ASGI server has a context for each request. A WSGI server uses a thread, with
#: its context, for several requests in turn, so the WSGI adapter resets it.
current: ContextVar[Caller] = ContextVar("hokusai_caller", default=NOBODY)

#: The reason why the code that runs now sees all of MLflow's data, whoever the caller is; "" if it
#: does not see all.
_sees_all: ContextVar[str] = ContextVar("hokusai_sees_all", default="")


@contextmanager
def seeing_all(reason: str) -> Iterator[None]:
    """Let code see all of MLflow's data, whoever the caller is: a decision about others' needs it."""
    token = _sees_all.set(reason)
    try:
        yield
    finally:
        _sees_all.reset(token)


def sees_all() -> bool:
    """Return whether the code that runs now sees all of MLflow's data."""
    return bool(_sees_all.get())


def install(app: flask.Flask) -> None:
    """Set the user for MLflow's handlers, in the same attribute as MLflow's basic-auth app."""

    @app.before_request
    def _set_user() -> None:
        principal = current.get().principal
        if principal is not None:
            flask.g.mlflow_authenticated_user = principal.owner


@contextmanager
def acting(reason: str) -> Iterator[None]:
    """Let the server itself act, and not its caller, for the reason `reason` of `INTERNAL`."""
    assert reason in INTERNAL
    token = current.set(Caller(None, "", "", internal=reason))
    try:
        yield
    finally:
        current.reset(token)


def refuse_without_key() -> flask.Response | None:
    """Refuse a request that has no key, if its route is one of ours and needs a key.

    The gate refuses it in every mode. But with mode observe or off it lets requests for MLflow's routes
    pass, and the router may accept a spelling of one of our routes that the gate took for a route of
    MLflow's.
    """
    operation = classify(flask.request.method, flask.request.path)
    known = current.get().principal is not None or operation.access is Access.PUBLIC
    if known or flask.request.method == "OPTIONS":  # The answer only lists methods.
        return None
    refusal = denials.render(Deny("KEY_MISSING", "Send a key that this server knows."))
    return flask.Response(refusal.body, refusal.status, list(refusal.headers))


def principal() -> Principal:
    """Return the owner of this request's key, on routes that take a key."""
    owner = current.get().principal
    assert owner is not None, "the gate refuses requests without a key here"
    return owner


def owner_id() -> str:
    """Return the owner of what this request's key makes, on routes that take a key."""
    return principal().owner_id


def actor() -> Actor:
    """Return the caller in the form of the audit log."""
    caller = current.get()
    if caller.principal is None:
        return Actor("", "", caller.address, caller.request_id)
    return Actor(caller.principal.owner, caller.principal.key_id, caller.address, caller.request_id)

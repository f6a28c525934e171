"""`/hokusai/trusts`: the CI jobs and other workloads that get keys for their identity tokens.

`trust_api` decides who may see and change what, as for REST. The gate decides, by `core.routes` and the
policy, who may send which form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

import flask

from mlflow_hokusai_auth.core import policy
from mlflow_hokusai_auth.core.errors import InvalidRequest
from mlflow_hokusai_auth.core.supplier_trust import covers
from mlflow_hokusai_auth.core.trust import MAX_TTL, MIN_TTL, TTL
from mlflow_hokusai_auth.core.trust_words import words
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.web import trust_schemas
from mlflow_hokusai_auth.store.owners import Found

from . import forms, shared
from .page_of_caller import page_of_caller

if TYPE_CHECKING:
    from werkzeug.datastructures import MultiDict
    from werkzeug.wrappers import Response

    from mlflow_hokusai_auth.server.web.trust_api import TrustActions
    from mlflow_hokusai_auth.store.trusts import TrustRecord

#: Rows of the list on one page.
_ROWS = 50
#: Owners that an operator's field suggests, at most.
_SUGGESTED = 500
_MINUTE = 60
#: The parts of the address that say what the page shows.
_STATE = ("owner", "page")
#: The scopes that the form offers, if the caller may give them.
_SCOPES = {
    "model:read": "see models, versions, runs and artifacts",
    "model:write": "register models: runs, artifacts and versions",
    "mlflow:read": "see everything in MLflow",
    "mlflow:write": "see and change everything in MLflow",
}
#: The words at the beginning of a refusal -> the field that it is about.
_FIELDS = {
    "github": "project",
    "gitlab": "project",
    "project": "project",
    "workflow": "workflow",
    "owner": "owner",
    "scopes": "scopes",
    "models": "models",
    "ttl": "minutes",
    "minutes": "minutes",
}

State = dict[str, str]
#: The action of a form. It returns the message about what was done.
Act = Callable[[], str]


def add(routes: flask.Blueprint, actions: TrustActions) -> None:
    """Add this page to `routes`."""
    store, gate = actions.store, actions.gate

    def show(state: State, problem: InvalidRequest | None = None) -> Response:
        caller = callers.principal()
        operator = policy.is_admin(caller, gate.policy)
        found, status = Found([], 0, 0), 200
        records = actions.trusts_of_caller().each()
        try:
            found = _found(records, state)
        except InvalidRequest as error:
            problem = problem or error
        if problem is not None:
            status = shared.status_of(problem)
        return page_of_caller(
            store,
            gate,
            "trusts.html",
            status,
            here="trusts",
            operator=operator,
            state=state,
            found=found,
            rows_on_a_page=_ROWS,
            problem=_problem(problem),
            sent=flask.request.form,
            may_add=shared.may(gate, "POST", "/hokusai/trusts/add"),
            may_remove=not caller.no_delete and shared.may(gate, "POST", "/hokusai/trusts/remove"),
            owners=_owners(store.owners(), records) if operator else (),
            scopes={
                scope: text
                for scope, text in _SCOPES.items()
                if operator or covers(caller.scopes, scope)
            },
            narrowed=caller,
            minutes={"least": int(MIN_TTL), "usual": int(TTL), "most": int(MAX_TTL)},
        )

    def submit(act: Act) -> Response:
        state = _state(dict(parse_qsl(flask.request.form.get("back", ""))))
        try:
            text = act()
        except InvalidRequest as error:
            return show(state, error)
        return forms.done(f"../trusts?{urlencode(state)}" if state else "../trusts", text)

    @routes.get("/trusts")
    def trusts() -> Response:
        return show(_state(flask.request.args))

    @routes.post("/trusts/add")
    def add_trust() -> Response:
        def act() -> str:
            trust = actions.add(_body(flask.request.form)).trust
            return f"Trusted: {words(trust)}. Its jobs get keys of {trust.owner}."

        return submit(act)

    @routes.post("/trusts/remove")
    def remove_trust() -> Response:
        def act() -> str:
            trust = actions.remove(flask.request.form.get("trust_id", "")).trust
            return f"Not trusted any more: {words(trust)}. Its keys end within a second."

        return submit(act)


# The values on the page


def _found(records: list[TrustRecord], state: State) -> Found:
    """Return the rows of the list. Raises InvalidRequest."""
    first = shared.first_row(state.get("page", ""), _ROWS)
    if owner := (state.get("owner") or "").strip():
        records = [record for record in records if record.trust.owner == owner]
    rows = [
        {**trust_schemas.describe(record), "words": words(record.trust)}
        for record in records[first : first + _ROWS]
    ]
    return Found(rows, first, len(records))


def _owners(of_keys: list[str], records: list[TrustRecord]) -> list[str]:
    return sorted({*of_keys, *(record.trust.owner for record in records)})[:_SUGGESTED]


def _problem(error: InvalidRequest | None) -> dict[str, str] | None:
    """Return the message of a refusal, and the name of the field that it is about, or ""."""
    if error is None:
        return None
    text = str(error)
    field = ""
    if flask.request.path.endswith("/add"):
        field = _FIELDS.get(next(iter(error.fields), text.partition(" ")[0].rstrip(":")), "")
        named, colon, rest = text.partition(": ")
        if colon and named in _FIELDS:
            text = rest[:1].upper() + rest[1:]
    return {"field": field, "text": text}


def _state(fields: Mapping[str, str]) -> State:
    return {name: fields[name] for name in _STATE if fields.get(name)}


def _body(form: MultiDict[str, str]) -> dict[str, Any]:
    """Return the fields of the form as a body of the REST API. Raises InvalidRequest."""
    kind = form.get("service", "github")
    if kind not in ("github", "gitlab"):
        raise InvalidRequest("service must be github or gitlab.")
    forms.require(form, "project", *(("workflow",) if kind == "github" else ()))
    minutes = form.get("minutes", "").strip()
    if not (minutes.isascii() and minutes.isdigit()) or len(minutes) > 4:
        raise InvalidRequest("minutes: Must be a whole number of minutes.")
    scopes = form.getlist("scopes")
    if not scopes:
        raise InvalidRequest("scopes: Choose at least one.")
    given = {name: form.get(name, "").strip() for name in ("owner", "workflow", "environment")}
    return {
        **{name: value for name, value in given.items() if value},
        kind: form["project"].strip(),
        "scopes": scopes,
        "models": [line.strip() for line in form.get("models", "").splitlines() if line.strip()],
        "no_delete": "no_delete" in form,
        "ttl": float(minutes) * _MINUTE,
    }

"""`/hokusai/trusts`: the CI jobs and other workloads that get keys for their identity tokens.

`trust_api` decides who may see and change what, as for REST. The gate decides, by `core.routes` and the
policy, who may send which form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

import flask

from mlflow_hokusai_auth.core import policy
from mlflow_hokusai_auth.core.counts import whole_number
from mlflow_hokusai_auth.core.errors import Conflict, InvalidRequest
from mlflow_hokusai_auth.core.supplier_trust import covers
from mlflow_hokusai_auth.core.trust import MAX_TTL, MIN_TTL, TTL
from mlflow_hokusai_auth.core.trust_words import warning, words
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.web import trust_schemas
from mlflow_hokusai_auth.store.owners import Found
from mlflow_hokusai_auth.store.trusts import edition

from . import forms, shared
from .page_of_caller import page_of_caller

if TYPE_CHECKING:
    from werkzeug.datastructures import MultiDict
    from werkzeug.wrappers import Response

    from mlflow_hokusai_auth.core.trust import Trust
    from mlflow_hokusai_auth.core.types import Principal
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


def add(routes: flask.Blueprint, actions: TrustActions, *, exchanges: bool) -> None:
    """Add these pages to `routes`. `exchanges` says if this server knows which tokens are for it."""
    store, gate = actions.store, actions.gate
    minutes = {
        "least": int(MIN_TTL) // _MINUTE,
        "usual": int(actions.lifetimes.within(TTL)) // _MINUTE,
        "most": int(actions.lifetimes.within(MAX_TTL)) // _MINUTE,
    }

    def offered(caller: Principal, more: Iterable[str] = ()) -> dict[str, str]:
        """Return the scopes that a form offers to `caller`, and their meaning; `more` are there."""
        operator = policy.is_admin(caller, gate.policy)
        given = {
            scope: text
            for scope, text in _SCOPES.items()
            if operator or covers(caller.scopes, scope)
        }
        return {**{scope: _SCOPES.get(scope, "") for scope in more}, **given}

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
            may_edit=shared.may(gate, "POST", "/hokusai/trusts/any/edit"),
            may_remove=not caller.no_delete and shared.may(gate, "POST", "/hokusai/trusts/remove"),
            owners=_owners(store.owners(), records) if operator else (),
            scopes=offered(caller),
            narrowed=caller,
            minutes=minutes,
            exchanges=exchanges,
        )

    def show_one(trust_id: str, state: State, problem: InvalidRequest | None = None) -> Response:
        """Return the form of a trust, with what was typed unless that is out of date."""
        typed = {} if isinstance(problem, Conflict) else flask.request.form
        record = actions.trusts_of_caller().get(trust_id)
        return page_of_caller(
            store,
            gate,
            "trust.html",
            200 if problem is None else shared.status_of(problem),
            here="trusts",
            state=state,
            row={**trust_schemas.describe(record), "words": words(record.trust)},
            lives=_minutes(record.trust.ttl),
            problem=_problem(problem),
            # A form that was filled in belongs to the values that it showed, and not to those of now.
            seen=typed.get("seen", "") if typed else edition(record.trust),
            sent=typed,
            scopes=offered(callers.principal(), record.trust.scopes),
            minutes=minutes,
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
            text = f"Trusted: {words(trust)}. Its jobs get keys of {trust.owner}."
            # The page shows a second line as a warning.
            return f"{text}\n{warning(trust.kind, dict(trust.claims))}".strip()

        return submit(act)

    @routes.get("/trusts/<trust_id>/edit")
    def edit_trust_form(trust_id: str) -> Response:
        return show_one(trust_id, _state(flask.request.args))

    @routes.post("/trusts/<trust_id>/edit")
    def edit_trust(trust_id: str) -> Response:
        state = _state(dict(parse_qsl(flask.request.form.get("back", ""))))
        before = actions.trusts_of_caller().get(trust_id).trust
        try:
            changed = _changes(flask.request.form, before)
            if changed:
                actions.edit(trust_id, changed, seen=flask.request.form.get("seen", ""))
        except InvalidRequest as error:
            return show_one(trust_id, state, error)
        if not changed:
            text = f"Nothing was changed: {words(before)}."
        elif changed.keys() == {"ttl"}:
            text = f"Changed: {words(before)}. The keys of its jobs stay as they are."
        else:
            text = f"Changed: {words(before)}. The keys that its jobs had end within a second."
        return forms.done(f"../../trusts?{urlencode(state)}" if state else "../../trusts", text)

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
        {
            **trust_schemas.describe(record),
            "words": words(record.trust),
            "minutes": _minutes(record.trust.ttl),
        }
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
    if flask.request.path.endswith(("/add", "/edit")):
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
    given = {name: form.get(name, "").strip() for name in ("owner", "workflow", "environment")}
    return {
        **{name: value for name, value in given.items() if value},
        kind: form["project"].strip(),
        "ttl": _seconds(form),
        **_rights(form),
    }


def _changes(form: MultiDict[str, str], trust: Trust) -> dict[str, Any]:
    """Return what a form changes in `trust`, as a body of the REST API. Raises InvalidRequest."""
    given = _rights(form)
    if set(given["scopes"]) == set(trust.scopes):
        del given["scopes"]
    if given["models"] == list(trust.models):
        del given["models"]
    if given["no_delete"] == trust.no_delete:
        del given["no_delete"]
    # A lifetime that is no whole number of minutes stays as it is unless another one is typed.
    if form.get("minutes", "").strip() != _minutes(trust.ttl):
        given["ttl"] = _seconds(form)
    if "forget_ids" in form:
        given["forget_ids"] = True
    return given


def _rights(form: MultiDict[str, str]) -> dict[str, Any]:
    """Return what keys of the trust in a form may do. Raises InvalidRequest."""
    scopes = form.getlist("scopes")
    if not scopes:
        raise InvalidRequest("scopes: Choose at least one.")
    return {
        "scopes": scopes,
        "models": [line.strip() for line in form.get("models", "").splitlines() if line.strip()],
        "no_delete": "no_delete" in form,
    }


def _seconds(form: Mapping[str, str]) -> float:
    """Return the lifetime in a form, in seconds. Raises InvalidRequest."""
    if (minutes := whole_number(form.get("minutes", "").strip())) is None:
        raise InvalidRequest("minutes: Must be a whole number of minutes.")
    return float(minutes * _MINUTE)


def _minutes(seconds: float) -> str:
    """Return a lifetime in minutes, as the page shows it."""
    return f"{seconds / _MINUTE:.1f}".removesuffix(".0")

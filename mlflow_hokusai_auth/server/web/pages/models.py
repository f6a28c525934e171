"""`/hokusai/models`: whose models are, whom they are shared with, and which names are reserved.

Who may see and change what is decided by `ownership_api` and `store.owners`, as for REST, and by the
gate, which knows from `core.routes` who may send which form.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

import flask

from mlflow_hokusai_auth.core import policy
from mlflow_hokusai_auth.core.counts import counted, whole_number
from mlflow_hokusai_auth.core.errors import Conflict, InvalidRequest
from mlflow_hokusai_auth.core.ownership import KINDS, LEVELS
from mlflow_hokusai_auth.core.types import ISOLATING
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.web import ownership_api, schemas
from mlflow_hokusai_auth.server.web import ownership_schemas as owned
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.owners import Found, Ownership

from . import forms, shared
from .page_of_caller import page_of_caller

if TYPE_CHECKING:
    from werkzeug.wrappers import Response

    from mlflow_hokusai_auth.server.gate.gate import Gate

#: Rows of a list on one page.
_ROWS = 50
#: Rows of each list on the page that asks whether to assign.
_SHOWN = 100
#: Owners that an operator's fields suggest, at most.
_SUGGESTED = 500
_DAY = 86400
#: The parts of the address that say what the page shows.
_STATE = ("view", "show", "query", "owner", "page")
#: The views for operators, and for owners; the first is the default.
_VIEWS = {True: ("models", "shares", "reserved"), False: ("models", "shares")}
#: The choices of models in the list, for operators and for owners; the first is the default.
_SHOWS = {True: ("all", "unowned"), False: ("mine", "shared", "all")}
#: The fields of forms that a refusal may be about, by its beginning.
_FIELDS = ("pattern", "grantee", "days", "owner", "prefix")
_MAY = {"read": "may read", "contribute": "may contribute to"}

State = dict[str, str]
Fields = Mapping[str, str]
#: The action of a form. It returns the state of the next page, and the message about what was done.
Act = Callable[[Ownership, Fields], tuple[State, str]]


def add(routes: flask.Blueprint, store: LocalStore, gate: Gate) -> None:
    """Add these pages to `routes`."""

    def show(state: State, problem: InvalidRequest | None = None) -> Response:
        operator = policy.is_admin(callers.principal(), gate.policy)
        view = _choice(state, "view", _VIEWS[operator])
        listed = _choice(state, "show", _SHOWS[operator])
        found, status, obstacle = Found([], 0, 0), 200, ""
        try:
            ownership = ownership_api.ownership_of(store, gate)
        except Conflict as error:
            obstacle, problem = str(error), None
        else:
            try:
                found = _found(ownership, view, listed, state)
            except InvalidRequest as error:
                problem = problem or error
        if problem is not None:
            status = shared.status_of(problem)
        return page_of_caller(
            store,
            gate,
            "models.html",
            status,
            here="models",
            my_id=callers.owner_id(),
            now=time.time(),
            operator=operator,
            view=view,
            views=_VIEWS[operator],
            show=listed,
            shows=_SHOWS[operator],
            state={name: value for name, value in state.items() if value},
            found=found,
            rows_on_a_page=_ROWS,
            problem=_problem(problem),
            sent=flask.request.form or flask.request.args,
            may_share=shared.may(gate, "POST", "/hokusai/models/share"),
            may_unshare=not callers.principal().no_delete,
            owners=sorted(store.owners())[:_SUGGESTED] if operator else (),
            obstacle=obstacle,
            isolation=gate.isolation,
            is_kept=gate.isolation.in_effect in ISOLATING,
            mode=gate.mode.now,
            levels=LEVELS,
            kinds=KINDS,
        )

    def submit(view: str, act: Act) -> Response:
        try:
            state, text = act(ownership_api.ownership_of(store, gate), flask.request.form)
        except InvalidRequest as error:
            return show(_back() | {"view": view}, error)
        return forms.done(f"../models?{urlencode(state)}", text)

    @routes.get("/models")
    def models() -> Response:
        return show(_state(flask.request.args))

    @routes.post("/models/share")
    def share() -> Response:
        return submit("shares", _share)

    @routes.post("/models/unshare")
    def unshare() -> Response:
        return submit("shares", _unshare)

    @routes.post("/models/reserve")
    def reserve() -> Response:
        return submit("reserved", _reserve)

    @routes.post("/models/unreserve")
    def unreserve() -> Response:
        return submit("reserved", _unreserve)

    @routes.post("/models/assign")
    def assign() -> Response:
        """Ask whether to assign, with what would change, or do it if that was asked."""
        if "apply" in flask.request.form:
            return submit("models", _assign)
        try:
            wanted = _assignment(flask.request.form)
            answer = ownership_api.ownership_of(store, gate).assign_owner(**wanted)
        except InvalidRequest as error:
            return show(_back() | {"view": "models"}, error)
        return page_of_caller(
            store,
            gate,
            "assign.html",
            here="models",
            back=_back(),
            wanted=wanted,
            answer=answer,
            most=_SHOWN,
            has_keys=wanted["owner"] in store.owners(),
        )


# The values on the page


def _found(ownership: Ownership, view: str, listed: str, state: State) -> Found:
    """Return the rows of the list. Raises InvalidRequest."""
    text = (state.get("query") or "").strip()
    first = shared.first_row(state.get("page", ""), _ROWS)
    if view == "shares":
        return ownership.find_grants(text=text, first=first, most=_ROWS)
    if view == "reserved":
        return ownership.find_prefixes(text=text, first=first, most=_ROWS)
    owner = (state.get("owner") or "").strip() or None
    if listed == "mine" and not (owner := callers.owner_id()):
        return Found([], 0, 0)
    return ownership.find_models(
        text=text,
        owner=owner,
        unowned=listed == "unowned",
        shared=listed == "shared",
        first=first,
        most=_ROWS,
    )


def _problem(error: InvalidRequest | None) -> dict[str, str] | None:
    """Return the message of a refusal, and the name of the field that it is about, or ""."""
    if error is None:
        return None
    field, _, text = str(error).partition(": ")
    # The fields of a search are in no form that could have been lost.
    if field not in _FIELDS or flask.request.method != "POST":
        return {"field": "", "text": str(error)}
    return {"field": field, "text": text[:1].upper() + text[1:]}


def _choice(state: State, name: str, known: tuple[str, ...]) -> str:
    value = state.get(name) or known[0]
    if value not in known:
        raise InvalidRequest(f"{name} must be one of {', '.join(known)}.")
    return value


def _state(fields: Fields) -> State:
    return {name: fields[name] for name in _STATE if fields.get(name)}


def _back() -> State:
    """Return what the page showed that the form was sent from."""
    return _state(dict(parse_qsl(flask.request.form.get("back", ""))))


# The actions of the forms


def _share(ownership: Ownership, form: Fields) -> tuple[State, str]:
    forms.require(form, "pattern", "grantee")
    written = form.get("days", "").strip()
    days = whole_number(written)
    if written and (days is None or not 0 < days <= 7300):
        raise InvalidRequest("days: must be a whole number from 1 to 7300, or nothing.")
    names = ("grantee", "pattern", "level")
    body: dict[str, Any] = {name: form[name].strip() for name in names if name in form}
    body["expires_in"] = float(days * _DAY) if days else None
    grant = ownership_api.share(ownership, body)
    covered = f"That is {counted(grant['models'], 'model')} now."
    text = f"{grant['grantee']} {_MAY[grant['level']]} {grant['pattern']}. {covered}"
    return {"view": "shares"}, text


def _unshare(ownership: Ownership, form: Fields) -> tuple[State, str]:
    grant = ownership_api.unshare(ownership, form.get("grant_id", ""))
    text = f"Taken back from {grant['grantee']}: {grant['level']} for {grant['pattern']}."
    return _back() | {"view": "shares"}, text


def _reserve(ownership: Ownership, form: Fields) -> tuple[State, str]:
    forms.require(form, "prefix", "owner")
    names = ("prefix", "owner", "kind")
    body = {name: form[name].strip() for name in names if name in form}
    row = ownership.add_prefix(**schemas.parse(owned.NewPrefix, body).model_dump())
    text = f"New {row['kind']}s called {row['prefix']}… are reserved for {row['owner']}."
    return {"view": "reserved"}, text


def _unreserve(ownership: Ownership, form: Fields) -> tuple[State, str]:
    prefix, kind = form.get("prefix", ""), form.get("kind", KINDS[0])
    row = ownership.remove_prefix(prefix=prefix, kind=kind)
    text = f"New {row['kind']}s called {row['prefix']}… are no longer reserved for {row['owner']}."
    return _back() | {"view": "reserved"}, text


def _assign(ownership: Ownership, form: Fields) -> tuple[State, str]:
    wanted = _assignment(form)
    number = ownership.assign_owner(**wanted, apply=True)["changed"]
    text = f"{wanted['owner']} owns {counted(number, 'more model')} now."
    return _back() | {"view": "models"}, text


def _assignment(form: Fields) -> dict[str, Any]:
    """Return the arguments of `Ownership.assign_owner` that the form has. Raises InvalidRequest."""
    forms.require(form, "owner")
    names = flask.request.form.getlist("name")
    pattern = form.get("pattern", "").strip() or None
    if not names and not pattern:
        raise InvalidRequest("pattern: Tick models in the list, or name them here.")
    if names and pattern:
        raise InvalidRequest("pattern: Leave this empty, or tick no model in the list.")
    body = {
        "owner": form.get("owner", "").strip(),
        "models": pattern,
        "names": [{"name": name} for name in names],
        "keep_grants": "keep_grants" in form,
    }
    wanted = schemas.parse(owned.Assignment, body).model_dump(exclude={"apply", "experiments"})
    for row in wanted["names"]:
        del row["owner"]
    return wanted

"""`/hokusai/keys/…`: forms that make and change keys without a script, or several at once."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flask

from mlflow_hokusai_auth.core.counts import counted, whole_number
from mlflow_hokusai_auth.core.errors import (
    Conflict,
    Forbidden,
    InvalidRequest,
    KeyConflict,
    NotFound,
)
from mlflow_hokusai_auth.core.keys import ENVIRONMENTS
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.web import keys_api, links_api, ownership_api, schemas
from mlflow_hokusai_auth.store.links import Links

from . import forms, shared
from .page_of_caller import of_caller, page_of_caller

if TYPE_CHECKING:
    from werkzeug.datastructures import MultiDict
    from werkzeug.wrappers import Response

    from mlflow_hokusai_auth.core.lifetimes import Lifetimes
    from mlflow_hokusai_auth.server.gate.gate import Gate
    from mlflow_hokusai_auth.server.web.links_api import LinkMaker
    from mlflow_hokusai_auth.store.keys import LocalStore
    from mlflow_hokusai_auth.store.records import KeyRecord

_log = logging.getLogger(__name__)

#: Actions on several keys -> the states of the keys that each applies to.
_ACTIONS = {"revoke": ("active", "deprecated", "expired"), "rotate": ("active",)}


def add(
    routes: flask.Blueprint,
    store: LocalStore,
    gate: Gate,
    lifetimes: Lifetimes,
    maker: LinkMaker | None,
) -> None:
    """Add these pages to `routes`. New keys live as `lifetimes` says; `maker` makes links to them."""
    actions = keys_api.KeyActions(store, gate, lifetimes)

    def form(kind: str, error: InvalidRequest | None = None, **values: object) -> Response:
        """Return the page of a form, which says what was wrong with the one that was sent."""
        values |= {"kind": kind, "problem": error and str(error), "environments": ENVIRONMENTS}
        # The page of links asks for a form that has the link chosen.
        values["sent"] = flask.request.form or flask.request.args
        status = 200 if error is None else shared.status_of(error)
        return page_of_caller(store, gate, "key_form.html", status, **values)

    def shown(
        make: Callable[[], tuple[Sequence[tuple[KeyRecord, str]], Sequence[object]]],
    ) -> Response:
        """Make keys, and return the page that shows them, once, and what `make` says of others.

        All that the page needs is read before, because keys that it could not show would be lost.
        """
        caller = of_caller(store, gate)
        made, failed = make()
        keys = [{**schemas.describe(record), "key": key} for record, key in made]
        return shared.page("made.html", keys=keys, failed=failed, **caller)

    def chosen_maker() -> LinkMaker | None:
        """Return the maker if the form that was sent asks for a link, which the caller may make."""
        if flask.request.form.get("give") != "link":
            return None
        if maker is None:
            raise NotFound(links_api.ABSENT)
        if not shared.may(gate, "POST", "/api/2.0/hokusai/links"):
            raise Forbidden("Only a key with mlflow:admin makes one-time links.")
        return maker

    def linked(links: LinkMaker, body: Mapping[str, object], called: str) -> Response:
        """Make the link that `body` describes, and return the page that shows it, once."""
        caller = of_caller(store, gate)
        link, url = links.make(body, callers.actor())
        return shared.page("made_link.html", link=link, url=url, called=called, **caller)

    @routes.get("/keys/new")
    def new_form() -> Response:
        return form("new", values={})

    @routes.post("/keys/new")
    def new() -> Response:
        body, links = _body(flask.request.form), chosen_maker()
        try:
            if links is not None:
                if "key" in body:
                    raise InvalidRequest("A link makes a new key: leave the existing key out.")
                new_key = schemas.parse(schemas.NewKey, body)
                return linked(links, {"key": body}, new_key.name or new_key.owner)
            if "key" not in body:
                return shown(lambda: ([actions.create(body)], ()))
            record = actions.import_key(body)
        except InvalidRequest as error:
            return form("new", error, values=body)
        return forms.done(record.key_id, f"{record.name or record.owner} imported.")

    @routes.get("/keys/<key_id>/edit")
    def edit_form(key_id: str) -> Response:
        key = schemas.describe(store.get(key_id))
        return form("edit", key=key, values=key)

    @routes.post("/keys/<key_id>/edit")
    def edit(key_id: str) -> Response:
        before = schemas.describe(store.get(key_id))
        sent = _body(flask.request.form)
        changed = {name: value for name, value in sent.items() if value != before.get(name)}
        try:
            if changed:
                actions.edit(key_id, changed)
        except InvalidRequest as error:
            return form("edit", error, key=before, values={**before, **sent})
        return forms.done(f"../{key_id}", f"{sent['name'] or sent['owner']} saved.")

    @routes.get("/keys/<key_id>/rotate")
    def rotate_form(key_id: str) -> Response:
        actions.check_rotation(key_id)
        return form("rotate", key=schemas.describe(store.get(key_id)))

    @routes.post("/keys/<key_id>/rotate")
    def rotate(key_id: str) -> Response:
        links = chosen_maker()
        try:
            sent = _overlap(flask.request.form)
            if links is not None:
                old = store.get(key_id)
                return linked(links, {"replaces": key_id, **sent}, old.name or old.owner)
            return shown(lambda: ([actions.rotate(key_id, sent)[:2]], ()))
        except KeyConflict as error:
            return form("rotate", error, key=schemas.describe(store.get(key_id)))

    @routes.get("/keys/<key_id>/revoke")
    def revoke_form(key_id: str) -> Response:
        return form("revoke", key=schemas.describe(store.get(key_id)))

    @routes.post("/keys/<key_id>/revoke")
    def revoke(key_id: str) -> Response:
        try:
            record = store.revoke(key_id, callers.actor(), force="force" in flask.request.form)
        except KeyConflict as error:
            return form("revoke", error, key=schemas.describe(store.get(key_id)))
        time.sleep(keys_api.REVOKED_EVERYWHERE)
        return forms.done(
            f"../{key_id}", f"{record.name or record.owner} revoked and refused everywhere."
        )

    @routes.post("/keys/selected")
    def selected() -> Response:
        """Ask for, and then do, one thing to several keys, or end all that gives keys to one owner."""
        sent = flask.request.form
        action, owner = sent.get("action", ""), sent.get("owner", "")
        if action not in _ACTIONS:
            raise InvalidRequest("Choose what to do with the keys: revoke or rotate.")
        if owner:
            chosen = store.valid_of(owner)
        else:
            chosen = [store.get(key_id) for key_id in dict.fromkeys(sent.getlist("key_id"))]
        now, mine = time.time(), callers.principal().key_id
        able = [one for one in chosen if one.state(now) in _ACTIONS[action]]
        # The caller's own key is last, because nothing more can be done with it afterwards.
        able.sort(key=lambda one: one.key_id == mine)
        back = sent.get("back", "")
        links = trusts = 0
        grants: list[dict[str, Any]] | None = None
        if action == "revoke" and owner:
            # They would make other keys.
            links = len(Links(store.database).waiting_of(owner))
            trusts = len(keys_api.trusts_of(store, owner))
            grants = _grants_to(owner, store, gate)
        if not (able or links or trusts) or "confirmed" not in sent:
            return page_of_caller(
                store,
                gate,
                "selected.html",
                action=action,
                owner=owner,
                keys=keys_api.described(able),
                left_out=len(chosen) - len(able),
                links=links,
                trusts=trusts,
                grants=grants,
                mine=any(one.key_id == mine for one in able),
                back=back,
            )
        if action == "rotate":
            ids = [one.key_id for one in able]
            return shown(lambda: actions.rotate_several(ids, _overlap(sent)))
        done = _revoke_all(store, owner) if owner else _revoke_each(store, able)
        time.sleep(keys_api.REVOKED_EVERYWHERE)
        return forms.done(f"../keys?{back}", done)


def _revoke_all(store: LocalStore, owner: str) -> str:
    """End all that gives keys to `owner`, and return what was done, in words."""
    ended, failed, links, trusts = store.revoke_owner(owner, callers.actor())
    more = [f"{counted(len(links), 'one-time link')} revoked."] if links else []
    more += [f"{counted(len(trusts), 'trust')} removed."] if trusts else []
    return _revoked(len(ended), [*more, *map(str, failed[:3])])


def _revoke_each(store: LocalStore, records: Sequence[KeyRecord]) -> str:
    """Revoke these keys, and return what was done, in words."""
    failed: list[str] = []
    for record in records:
        try:
            store.revoke(record.key_id, callers.actor())
        except KeyConflict as error:
            failed.append(str(error))
    return _revoked(len(records) - len(failed), failed[:3])


def _revoked(number: int, more: Sequence[str]) -> str:
    return " ".join([f"{counted(number, 'key')} revoked and refused everywhere.", *more])


def _grants_to(owner: str, store: LocalStore, gate: Gate) -> list[dict[str, Any]] | None:
    """Return what is shared with `owner`, or None if this server can't say: keys end all the same."""
    try:
        return ownership_api.ownership_of(store, gate).grants_to(owner)
    except Conflict:
        return None
    except Exception:  # MLflow has its own, if its database can't be opened
        _log.warning("The grants of an owner can't be read", exc_info=True)
        return None


def _overlap(form: Mapping[str, str]) -> dict[str, Any]:
    """Return the body of a rotation as the REST API has it; a wrong overlap stays as it is."""
    overlap = form.get("overlap", "")
    return {"overlap": _number(overlap)} if overlap else {}


def _body(form: MultiDict[str, str]) -> dict[str, Any]:
    """Return the fields of a key in a form as the REST API has them; wrong ones stay as they are."""
    rate, expiry, key = form.get("rate_limit_per_hour", ""), form.get("expiry"), form.get("key", "")
    days = form.get("days", "") if expiry == "custom" else expiry or "keep"
    body: dict[str, Any] = {
        **{name: form.get(name, "").strip() for name in ("owner", "name")},
        "note": form.get("note", "").replace("\r\n", "\n").strip(),
        "scopes": sorted(form.getlist("scopes")),
        "networks": form.get("networks", "").replace(",", " ").split(),
        "rate_limit_per_hour": _number(rate) if rate else None,
        "models": [line.strip() for line in form.get("models", "").splitlines() if line.strip()],
        "no_delete": "no_delete" in form,
    }
    if days != "keep":
        body["expires_in"] = None if days == "never" else _seconds(days)
    if key:
        body["key"] = key
    elif "environment" in form:
        body["environment"] = form["environment"]
    return body


def _seconds(days: str) -> float | str:
    """Return the seconds in so many days, or the text itself if it is no number."""
    # The choices of the form are fractions, such as 0.5, if the operator's lifetime is one.
    return float(days) * 86400 if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,20})?", days) else days


def _number(text: str) -> int | str:
    number = whole_number(text)
    return text if number is None else number

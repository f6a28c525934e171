"""`/hokusai/links`: the one-time links, for administrators, who revoke those that wait here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlencode

import flask

from mlflow_hokusai_auth.core.errors import InvalidRequest, NotFound
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.web import link_schemas, links_api
from mlflow_hokusai_auth.store.owners import Found

from . import forms, shared
from .page_of_caller import page_of_caller

if TYPE_CHECKING:
    from typing import Any

    from werkzeug.wrappers import Response

    from mlflow_hokusai_auth.server.gate.gate import Gate
    from mlflow_hokusai_auth.server.web.links_api import LinkMaker
    from mlflow_hokusai_auth.store.keys import LocalStore

#: Rows of the list on one page.
_ROWS = 50
#: The parts of the address that say what the page shows.
_STATE = ("show", "page")
#: The tabs of the page -> whether a link, as the REST API has it, is on it.
_TABS: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "all": lambda link: True,
    "waiting": lambda link: link["state"] == "waiting",
    "opened": lambda link: link["state"] == "opened",
    "refused": lambda link: link["refused"] > 0,
}


def add(routes: flask.Blueprint, store: LocalStore, gate: Gate, maker: LinkMaker | None) -> None:
    """Add this page to `routes`. Without a `maker` (no key store is in use) it answers 404."""

    def show(
        links: LinkMaker, state: dict[str, str], problem: InvalidRequest | None = None
    ) -> Response:
        found = Found([], 0, 0)
        all_links = [link_schemas.describe(link) for link in links.links.each()]
        tabs = {name: list(filter(on_it, all_links)) for name, on_it in _TABS.items()}
        try:
            found = _found(tabs, state)
        except InvalidRequest as error:
            problem = problem or error
        return page_of_caller(
            store,
            gate,
            "links.html",
            200 if problem is None else shared.status_of(problem),
            here="links",
            state=state,
            found=found,
            rows_on_a_page=_ROWS,
            tabs={name: len(rows) for name, rows in tabs.items()},
            problem=problem and str(problem),
        )

    @routes.get("/links")
    def list_links() -> Response:
        return show(_existing(maker), _state(flask.request.args))

    @routes.post("/links/revoke")
    def revoke_link() -> Response:
        links, sent = _existing(maker), flask.request.form
        state = _state(dict(parse_qsl(sent.get("back", ""))))
        try:
            link = links.links.revoke(sent.get("link_id", ""), callers.actor())
        except InvalidRequest as error:
            return show(links, state, error)
        back = f"../links?{urlencode(state)}" if state else "../links"
        return forms.done(back, f"Revoked: {link.link_id}, for {link.owner}.")


def _existing(maker: LinkMaker | None) -> LinkMaker:
    if maker is None:
        raise NotFound(links_api.ABSENT)
    return maker


def _found(tabs: Mapping[str, list[dict[str, Any]]], state: Mapping[str, str]) -> Found:
    """Return the rows of the list. Raises InvalidRequest."""
    tab = state.get("show", "all")
    if tab not in tabs:
        raise InvalidRequest(f"show must be one of {', '.join(tabs)}.")
    first = shared.first_row(state.get("page", ""), _ROWS)
    return Found(tabs[tab][first : first + _ROWS], first, len(tabs[tab]))


def _state(fields: Mapping[str, str]) -> dict[str, str]:
    return {name: fields[name] for name in _STATE if fields.get(name)}

"""`/hokusai/keys`: the list of keys for those who manage them, and for others their own key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flask

from mlflow_hokusai_auth.core import policy
from mlflow_hokusai_auth.core.errors import KeyNotFound
from mlflow_hokusai_auth.core.keys import ENVIRONMENTS, EPHEMERAL
from mlflow_hokusai_auth.core.scopes import KNOWN
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.web import keys_api
from mlflow_hokusai_auth.store import key_pages
from mlflow_hokusai_auth.store.records import STATE_FILTERS

from . import shared
from .page_of_caller import page_of_caller

if TYPE_CHECKING:
    from werkzeug.wrappers import Response

    from mlflow_hokusai_auth.server.gate.gate import Gate
    from mlflow_hokusai_auth.store.keys import LocalStore

#: Keys on a page, unless the URL says otherwise.
ROWS = 50
#: Owners that the filter suggests, at most.
MAX_OWNERS = 500
#: Seconds of the filters by time.
SOON, LONG_UNUSED = 30 * 86400, 90 * 86400
#: The columns of the list by their fields, in `key_pages.FIELDS`.
COLUMNS = {
    "name": "Key",
    "owner": "Owner",
    "scopes": "Scopes",
    "state": "State",
    "created_at": "Created",
    "expires_at": "Ends",
    "last_used_at": "Last use",
}
#: The columns that one first wants to see from their largest value on.
_LARGEST_FIRST = ("created_at", "last_used_at")


def add(routes: flask.Blueprint, store: LocalStore, gate: Gate) -> None:
    """Add this page to `routes`."""

    @routes.get("")
    @routes.get("/")
    def front() -> Response:
        return shared.redirect("keys" if flask.request.path.endswith("/") else "hokusai/keys")

    @routes.get("/keys")
    def key_page() -> Response:
        query = {
            name: value for name, value in flask.request.args.items() if value and name != "said"
        }
        caller = callers.principal()
        if not policy.is_admin(caller, gate.policy):
            own = _own(store, caller)
            confined = policy.is_confined(caller, gate.policy) and not gate.isolation.closes
            return page_of_caller(
                store,
                gate,
                "keys.html",
                may_manage=False,
                query=query,
                own=own,
                isolation=gate.isolation.in_effect if confined else "off",
            )
        found = keys_api.page(store, _asked(query))
        order = key_pages.order(query.get("order_by", str(key_pages.NEWEST_FIRST)))
        kept = {name: query[name] for name in query if name != "page_token"}
        owners = sorted(store.owners(), key=str.casefold)
        tokens = (found.previous_page_token, found.next_page_token)
        return page_of_caller(
            store,
            gate,
            "keys.html",
            may_manage=True,
            rows=keys_api.with_uses(store, found.records),
            page=found,
            query=query,
            order=order,
            columns=COLUMNS,
            sorted_by={name: {**kept, "order_by": _next_order(name, order)} for name in COLUMNS},
            first_page=kept,
            beside=[token and {**kept, "page_token": token} for token in tokens],
            filtered=kept.keys() - {"order_by", "max_results"},
            orders=[str(key_pages.Order(name, name in _LARGEST_FIRST)) for name in COLUMNS],
            owners=owners if len(owners) <= MAX_OWNERS else (),
            states=STATE_FILTERS,
            scopes=sorted(KNOWN),
            environments=ENVIRONMENTS,
            shown_environments=(*ENVIRONMENTS, EPHEMERAL),
            soon=SOON,
            long_unused=LONG_UNUSED,
        )


def _own(store: LocalStore, caller: Principal) -> dict[str, Any] | None:
    """Return the caller's key as the list shows keys, or None if another authority has it."""
    try:
        return keys_api.with_uses(store, [store.get(caller.key_id)])[0]
    except KeyNotFound:
        return None


def _asked(query: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters of the REST API for the page's. Ended keys are hidden unless asked for."""
    asked = {"max_results": str(ROWS), "state": "valid", **query}
    if asked["state"] == "any":
        del asked["state"]
    return asked


def _next_order(field: str, now: key_pages.Order) -> str:
    """Return the order that a click on the column `field` leads to."""
    if field == now.field:
        return str(key_pages.Order(field, not now.descending))
    return str(key_pages.Order(field, field in _LARGEST_FIRST))

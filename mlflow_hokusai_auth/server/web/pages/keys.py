"""`/hokusai/keys`: the list of keys for those who manage them, and for others their own key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flask

from mlflow_hokusai_auth.core import browser, policy
from mlflow_hokusai_auth.core.keys import ENVIRONMENTS
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.web import keys_api
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.records import STATES

from . import shared

if TYPE_CHECKING:
    from werkzeug.wrappers import Response

    from mlflow_hokusai_auth.server.gate.gate import Gate


def add(routes: flask.Blueprint, store: LocalStore, gate: Gate) -> None:
    """Add these pages to `routes`."""

    @routes.get("/keys")
    def key_page() -> Response:
        caller = callers.principal()
        tokens = browser.session_tokens(shared.request())
        may_manage = policy.is_admin(caller, gate.policy)
        query = flask.request.args.to_dict()
        rows: list[dict[str, Any]] = []
        token = None
        if may_manage:
            found = keys_api.page(store, query)
            token = found.next_page_token
            rows = keys_api.with_uses(store, found.records)
        return shared.page(
            "keys.html",
            me=keys_api.whoami_of(store, gate),
            csrf=browser.csrf_token(tokens[0]) if tokens else "",
            may_manage=may_manage,
            rows=rows,
            query=query,
            first_page={name: query[name] for name in query if name != "page_token"},
            next_page={**query, "page_token": token} if token else None,
            states=STATES,
            environments=ENVIRONMENTS,
        )

"""`/hokusai/keys/KEY_ID`: all that the store knows about one key; and `/hokusai/keys/find`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import flask

from mlflow_hokusai_auth.core.errors import InvalidRequest
from mlflow_hokusai_auth.core.keys import ENVIRONMENTS
from mlflow_hokusai_auth.server.web import keys_api
from mlflow_hokusai_auth.store import key_history, usage
from mlflow_hokusai_auth.store.records import KeyFilter

from .page_of_caller import page_of_caller

if TYPE_CHECKING:
    from werkzeug.wrappers import Response

    from mlflow_hokusai_auth.server.gate.gate import Gate
    from mlflow_hokusai_auth.store.keys import LocalStore

#: Rows of the audit log, and other keys of the owner, that are shown at most.
EVENTS, OTHERS = 20, 10


def add(routes: flask.Blueprint, store: LocalStore, gate: Gate) -> None:
    """Add these pages to `routes`."""

    @routes.get("/keys/<key_id>")
    def one_key(key_id: str) -> Response:
        record = store.get(key_id)
        (row,) = keys_api.with_uses(store, [record])
        same_owner = store.page(KeyFilter(owner=record.owner), max_results=OTHERS + 1)
        events = store.database.audited(key_id=key_id, limit=EVENTS + 1)[::-1]
        return page_of_caller(
            store,
            gate,
            "key.html",
            may_manage=True,
            key=row,
            history=key_history.of(store.database, key_id),
            uses=usage.by_day(store.database, key_id),
            others=[
                one for one in keys_api.described(same_owner.records) if one["key_id"] != key_id
            ][:OTHERS],
            number_of_others=same_owner.total - 1,
            events=events[:EVENTS],
            more_events=len(events) > EVENTS,
            environments=ENVIRONMENTS,
        )

    @routes.get("/keys/find")
    def find_form() -> Response:
        return page_of_caller(store, gate, "find.html")

    @routes.post("/keys/find")
    def find() -> Response:
        text = flask.request.form.get("key", "")
        try:
            found = keys_api.find(store, text)
        except InvalidRequest as error:
            return page_of_caller(store, gate, "find.html", status=400, problem=str(error))
        return page_of_caller(store, gate, "find.html", found=keys_api.described(found))

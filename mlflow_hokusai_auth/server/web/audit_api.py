"""`/api/2.0/hokusai/audit`: the audit log, for administrators."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import flask

from mlflow_hokusai_auth.core.counts import whole_number
from mlflow_hokusai_auth.core.errors import InvalidRequest
from mlflow_hokusai_auth.store.keys import MAX_RESULTS

from . import api, schemas

if TYPE_CHECKING:
    from mlflow_hokusai_auth.store.database import Database


def blueprint(database: Database) -> flask.Blueprint:
    """Return the route, on the store's `database`."""
    routes = api.blueprint("hokusai_audit")

    @routes.get("/audit")
    def list_audit() -> flask.Response:
        query = flask.request.args
        results = api.max_results(query)
        if not 1 <= results <= MAX_RESULTS:
            raise InvalidRequest(f"max_results must be from 1 to {MAX_RESULTS}.")
        after = _id("after")
        events = database.audited(
            since=_since(),
            event=_text("event"),
            key_id=_text("key_id"),
            actor=_text("actor"),
            after=after,
            before=_id("page_token"),
            # One more than asked for tells if there are more.
            limit=results + (after is None),
        )
        older = events[-results - 1 : -results]
        events = events[-results:]
        token = str(events[0]["id"]) if older else None
        page = schemas.AuditPage(
            events=[schemas.AuditEvent(**event) for event in events], next_page_token=token
        )
        return flask.jsonify(page.model_dump())

    return routes


def _text(name: str) -> str | None:
    value = flask.request.args.get(name) or None
    if value is not None and (not value.isprintable() or len(value) > 255):
        raise InvalidRequest(f"{name} must be printable text of at most 255 characters.")
    return value


def _since() -> float | None:
    text = flask.request.args.get("since") or None
    try:
        since = None if text is None else float(text)
    except ValueError:
        since = math.nan
    if since is not None and not math.isfinite(since):
        raise InvalidRequest("since must be a time in seconds since the epoch.")
    return since


def _id(name: str) -> int | None:
    text = flask.request.args.get(name) or None
    if text is None:
        return None
    if (number := whole_number(text, 18)) is None:
        raise InvalidRequest(f"{name} is not one of this list.")
    return number

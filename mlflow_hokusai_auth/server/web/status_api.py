"""`/api/2.0/hokusai/status`: the server's mode, isolation, keys and health, for administrators."""

from __future__ import annotations

from typing import Any

import flask

from mlflow_hokusai_auth import __version__
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.server.live_settings import Isolation, Mode
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.links import Links
from mlflow_hokusai_auth.store.records import KeyFilter

from . import api, schemas
from .health import Health

#: Seconds: keys that end earlier are counted as ending soon.
SOON = 14 * 86400.0


def blueprint(
    store: LocalStore, mode: Mode, isolation: Isolation, health: Health
) -> flask.Blueprint:
    """Return the route, for these parts of the server."""
    routes = api.blueprint("hokusai_status")

    @routes.get("/status")
    def status() -> flask.Response:
        return flask.jsonify(status_of(store, mode, isolation, health))

    return routes


def status_of(
    store: LocalStore, mode: Mode, isolation: Isolation, health: Health
) -> dict[str, Any]:
    """Return the status as `schemas.Status` describes it. A store that is down is a part of it."""
    keys: dict[str, int] | None = None
    ending: int | None = None
    links: tuple[int, int, int] | tuple[None, None, None] = (None, None, None)
    current = False
    try:
        current = store.is_current()
        if current:
            keys = store.counts()
            soon = KeyFilter(state="active", expires_within=SOON)
            ending = store.page(soon, max_results=1).total
            links = Links(store.database).counts()
    except AuthorityUnavailable:
        pass  # its health says why
    return schemas.Status(
        version=__version__,
        mode=mode.now,
        mode_by=mode.by,
        isolation=isolation.level,
        isolation_by=isolation.by,
        isolation_in_effect=isolation.in_effect,
        keys=keys,
        keys_ending_soon=ending,
        links_waiting=links[0],
        links_refused=links[1],
        links_tried_again=links[2],
        migrations_current=current,
        health=schemas.HealthNow(**health.result()),
    ).model_dump()

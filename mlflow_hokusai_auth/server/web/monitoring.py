"""`/hokusai/metrics`: what the server measures, in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import flask

from mlflow_hokusai_auth.server import metrics

if TYPE_CHECKING:
    from mlflow_hokusai_auth.store.keys import LocalStore


def blueprint(store: LocalStore, flush: Callable[[], object]) -> flask.Blueprint:
    """Return the route. `flush` writes the counts of this process first."""
    routes = flask.Blueprint("hokusai_monitoring", __name__)

    @routes.get("/hokusai/metrics")
    def scrape() -> flask.Response:
        flush()
        return flask.Response(metrics.text(store), content_type=metrics.CONTENT_TYPE)

    return routes

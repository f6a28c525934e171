"""The pages share this: how they read a request, and how they answer."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

import flask

from mlflow_hokusai_auth.core.types import Request

if TYPE_CHECKING:
    from werkzeug.wrappers import Response


def request() -> Request:
    """Return the current request without its query, which nothing here reads."""
    headers = flask.request.headers
    return Request(
        flask.request.method,
        flask.request.path,
        b"",
        tuple((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers),
    )


def page(template: str, status: int = 200, **values: object) -> Response:
    """Return a page. In its template, `root` is the relative way to `/hokusai/`."""
    values["root"] = "../" * (flask.request.path.count("/") - 2)
    response = flask.make_response(flask.render_template(f"hokusai/{template}", **values))
    response.status_code = HTTPStatus(status)
    return response


def redirect(location: str) -> Response:
    """Redirect (303) to `location`, which stays relative: a proxy's prefix is not known here."""
    response = flask.Response(status=303)
    response.headers["Location"] = location
    response.autocorrect_location_header = False
    return response

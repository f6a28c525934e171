"""The pages share this: how they read a request, and how they answer."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

import flask
from werkzeug.http import dump_cookie

from mlflow_hokusai_auth.core import browser, denials, policy
from mlflow_hokusai_auth.core.counts import whole_number
from mlflow_hokusai_auth.core.errors import Conflict, Forbidden, InvalidRequest, NotFound
from mlflow_hokusai_auth.core.types import Request
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.store.sessions import Sessions

if TYPE_CHECKING:
    from werkzeug.wrappers import Response

    from mlflow_hokusai_auth.server.gate.gate import Gate

#: The value of `browser.LOGOUT_COOKIE`.
_SIGNED_IN = "signed-in"
#: Seconds for which that cookie outlives its session, so that the sign-in page can say why one has to
#: sign in again: the session's own cookie goes at the moment when the session ends.
_REMEMBERED = 7 * 86400

#: The statuses of refusals, the more special ones first.
_STATUS = ((Forbidden, 403), (NotFound, 404), (Conflict, 409), (InvalidRequest, 400))


def request() -> Request:
    """Return the current request without its query, which nothing here reads."""
    headers = flask.request.headers
    return Request(
        flask.request.method,
        flask.request.path,
        b"",
        tuple((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers),
    )


def page(
    template: str, status: int = 200, *, wait: float | None = None, **values: object
) -> Response:
    """Return a page. In its template, `root` is the relative way to `/hokusai/`.

    A page with 429 or 503 asks to wait for `wait` seconds (None: nobody knows how long).
    """
    values["root"] = "../" * (flask.request.path.count("/") - 2)
    response = flask.make_response(flask.render_template(f"hokusai/{template}", **values))
    response.status_code = HTTPStatus(status)
    if status in (429, 503):
        response.headers["Retry-After"] = denials.retry_after(wait)
    return response


def status_of(error: InvalidRequest) -> int:
    """Return the status of the page that shows `error`."""
    return next(status for kind, status in _STATUS if isinstance(error, kind))


def may(gate: Gate, method: str, path: str) -> bool:
    """Return whether the gate lets the caller send this request."""
    operation = policy.operation_of(method, path, gate.policy)
    return policy.access(callers.principal(), operation, gate.policy) >= operation.access


def first_row(page: str, rows: int) -> int:
    """Return the number, from 0, of the first row on a page of so many rows; "" is the first page.

    Raises InvalidRequest.
    """
    if (number := whole_number(page or "1")) is None:
        raise InvalidRequest("page must be a whole number.")
    return max(0, number - 1) * rows


def redirect(location: str) -> Response:
    """Redirect (303) to `location`, which stays relative: a proxy's prefix is not known here."""
    response = flask.Response(status=303)
    response.headers["Location"] = location
    response.autocorrect_location_header = False
    return response


def is_secure(request: Request) -> bool:
    """Return whether browsers keep this server's session over https only."""
    return browser.cookie_name(request.text(b"host")) == browser.SECURE_COOKIE


def set_cookies(response: Response, request: Request, token: str, lifetime: float) -> None:
    """Set the cookies of the session `token`; a `lifetime` (seconds) of 0 deletes them."""
    secure = is_secure(request)
    response.set_cookie(
        browser.cookie_name(request.text(b"host")),
        token,
        max_age=int(lifetime),
        path="/",
        secure=secure,
        httponly=True,
        samesite="Strict",
    )
    beside = dump_cookie(
        browser.LOGOUT_COOKIE,
        _SIGNED_IN if token else "",
        max_age=int(lifetime) + _REMEMBERED if token else 0,
        path="/",
        secure=secure,
        samesite="Strict",
    )
    # The gate adds this one, because a middleware of MLflow keeps one Set-Cookie only.
    added = callers.current.get().answer
    if added is not None:
        added.append(("Set-Cookie", beside))


def was_signed_in(request: Request) -> bool:
    """Return whether the browser's session has reached its lifetime, and nobody signed out."""
    kept = flask.request.cookies.get(browser.LOGOUT_COOKIE) == _SIGNED_IN
    return kept and not browser.session_tokens(request)


def sign_out(response: Response, request: Request, sessions: Sessions) -> None:
    """End the sessions of `request`, and delete their cookies."""
    caller = callers.current.get()
    for token in browser.session_tokens(request):
        sessions.end(token, address=caller.address, request_id=caller.request_id)
    set_cookies(response, request, "", 0)

"""`/hokusai/…`: the pages for signing in with a key and for managing keys, in a browser.

Pages hold no inline script or style, so that their Content-Security-Policy can forbid both. Links are
relative, so that the pages work under any prefix. Keys are changed by the page's script, through the
REST API.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flask

from mlflow_hokusai_auth.core import browser, denials, keys, policy
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable, InvalidRequest
from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.core.types import Allow, Credential, Deny, NeedKey, Request
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server import metrics
from mlflow_hokusai_auth.server.gate.flow import decide
from mlflow_hokusai_auth.store.database import Actor
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.records import STATES
from mlflow_hokusai_auth.store.sessions import Sessions

from . import keys_api

if TYPE_CHECKING:
    from werkzeug.wrappers import Response

    from mlflow_hokusai_auth.server.gate.gate import Gate

_WHOAMI = classify("GET", "/api/2.0/hokusai/whoami")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_REFUSED = (
    "This key does not open this server. It may be mistyped, expired, revoked, or not allowed from "
    "your address. Copy the whole key again, or ask the server's operator."
)
_CROSS_SITE = "The form was not sent from this page. Open the page again and try once more."
_NEEDS_HTTPS = (
    "Browsers keep you signed in over https only. Open this server over https, or as localhost on its "
    "own machine (through ssh -L, for example)."
)


def blueprint(
    store: LocalStore, sessions: Sessions, gate: Gate, lifetime: float
) -> flask.Blueprint:
    """Return the pages. A browser session lives for `lifetime` seconds."""
    folder = Path(__file__).parent
    routes = flask.Blueprint(
        "hokusai_pages",
        __name__,
        url_prefix="/hokusai",
        template_folder=str(folder / "templates"),
        static_folder=str(folder / "static"),
    )

    @routes.get("/login")
    def login() -> Response:
        return _login_page()

    @routes.post("/login")
    def sign_in() -> Response:
        request, address = _request(), callers.current.get().address
        if browser.cross_site(request):
            return _login_page(403, _CROSS_SITE)
        if flask.request.headers.get("Origin", "").startswith("http:") and _is_secure(request):
            return _login_page(400, _NEEDS_HTTPS)
        if (wait := gate.limits.sign_in(address)) is not None:
            page = _login_page(429, "Too many attempts. Wait a minute, then try again.")
            page.headers["Retry-After"] = str(int(wait) + 1)
            return page
        key = flask.request.form.get("key", "").strip()
        verdict = _check_key(gate, key, address)
        if isinstance(verdict, Deny):
            status = denials.CODES[verdict.code].status
            if status in (429, 503):
                return _login_page(status, verdict.message)
            sessions.count_failed_sign_in(address, verdict.code)
            return _login_page(401, _REFUSED)
        assert verdict.principal is not None
        by = Actor(
            verdict.principal.owner,
            verdict.principal.key_id,
            address,
            callers.current.get().request_id,
        )
        for token in browser.session_tokens(request):
            sessions.end(token, address=address, request_id=callers.current.get().request_id)
        # The target is relative to /hokusai/, and `local_path` keeps it on this server.
        response = _redirect("../" + browser.local_path(flask.request.args.get("next", "/"))[1:])
        token = sessions.begin(key, lifetime, by)
        gate.recent.add(token)
        _set_cookie(response, request, token, lifetime)
        return response

    @routes.post("/logout")
    def sign_out() -> Response:
        request = _request()
        if browser.cross_site(request):
            return _login_page(403, _CROSS_SITE)
        address = callers.current.get().address
        for token in browser.session_tokens(request):
            sessions.end(token, address=address, request_id=callers.current.get().request_id)
        response = _redirect("login")
        _set_cookie(response, request, "", 0)
        return response

    @routes.get("/keys")
    def key_page() -> Response:
        caller = callers.principal()
        tokens = browser.session_tokens(_request())
        may_manage = policy.is_admin(caller, gate.policy)
        query = flask.request.args.to_dict()
        rows: list[dict[str, Any]] = []
        token = None
        if may_manage:
            records, token = keys_api.page(store, query)
            rows = keys_api.with_uses(store, records)
        return _page(
            "keys.html",
            me=keys_api.whoami_of(store, gate),
            csrf=browser.csrf_token(tokens[0]) if tokens else "",
            may_manage=may_manage,
            rows=rows,
            query=query,
            first_page={name: query[name] for name in query if name != "page_token"},
            next_page={**query, "page_token": token} if token else None,
            states=STATES,
            environments=keys.ENVIRONMENTS,
        )

    @routes.app_template_filter("hokusai_date")
    def date(seconds: float | None) -> str:
        return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))

    @routes.after_request
    def protect(response: Response) -> Response:
        response.headers.update(_HEADERS)
        return response

    @routes.errorhandler(InvalidRequest)
    def wrong(error: InvalidRequest) -> Response:
        return _page("error.html", status=400, message=str(error))

    @routes.errorhandler(AuthorityUnavailable)
    def unavailable(error: AuthorityUnavailable) -> Response:
        return _page(
            "error.html",
            status=503,
            message="Keys can't be looked up at the moment. Try again in a minute.",
        )

    return routes


def account(gate: Gate) -> flask.Blueprint:
    """Return the routes from which MLflow's pages learn who is signed in and which actions to offer."""
    routes = flask.Blueprint("hokusai_account", __name__)

    @routes.get("/api/2.0/mlflow/users/current")
    @routes.get("/ajax-api/2.0/mlflow/users/current")
    def current() -> flask.Response:
        caller = callers.principal()
        # Nobody is an administrator in MLflow's sense: its pages for users and roles would be empty.
        user = {"id": caller.key_id, "username": caller.owner, "is_admin": False}
        return flask.jsonify(user=user, is_basic_auth=False)

    @routes.get("/api/3.0/mlflow/users/current/permissions")
    @routes.get("/ajax-api/3.0/mlflow/users/current/permissions")
    def permissions() -> flask.Response:
        # This only hides actions on MLflow's pages. The gate decides what is allowed.
        writes = "write" in policy.abilities(callers.principal(), gate.policy)
        grant = {
            "resource_type": "experiment",
            "resource_pattern": "*",
            "permission": "MANAGE" if writes else "READ",
            "workspace": "default",
        }
        return flask.jsonify(is_admin=False, permissions=[grant])

    @routes.get("/api/3.0/mlflow/users/roles/list")
    @routes.get("/ajax-api/3.0/mlflow/users/roles/list")
    def roles() -> flask.Response:
        return flask.jsonify(roles=[])

    return routes


def monitoring(store: LocalStore, flush: Callable[[], object]) -> flask.Blueprint:
    """Return the route `/hokusai/metrics`, in Prometheus's text format. `flush` writes counts first."""
    routes = flask.Blueprint("hokusai_monitoring", __name__)

    @routes.get("/hokusai/metrics")
    def scrape() -> flask.Response:
        flush()
        return flask.Response(metrics.text(store), content_type=metrics.CONTENT_TYPE)

    return routes


def _check_key(gate: Gate, key: str, address: str) -> Allow | Deny:
    if keys.problem(key) is not None or keys.is_session_token(key):
        return Deny("KEY_MALFORMED", "")
    return decide(gate, NeedKey(Credential(key, ("the form",)), _WHOAMI, address))


def _request() -> Request:
    """Return the current request without its query, which nothing here reads."""
    headers = flask.request.headers
    return Request(
        flask.request.method,
        flask.request.path,
        b"",
        tuple((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers),
    )


def _login_page(status: int = 200, problem: str = "") -> Response:
    request = _request()
    target = browser.local_path(flask.request.args.get("next", "/"))
    # Browsers send no SameSite=Strict cookie on a link from another site, so login.js tries again.
    elsewhere = request.method == "GET" and browser.cross_site(request)
    return _page("login.html", status, problem=problem, target=target, elsewhere=elsewhere)


def _page(template: str, status: int = 200, **values: object) -> Response:
    response = flask.make_response(flask.render_template(f"hokusai/{template}", **values))
    response.status_code = HTTPStatus(status)
    return response


def _redirect(location: str) -> Response:
    """Redirect (303) to `location`, which stays relative: a proxy's prefix is not known here."""
    response = flask.Response(status=303)
    response.headers["Location"] = location
    response.autocorrect_location_header = False
    return response


def _is_secure(request: Request) -> bool:
    host = request.text(b"host")
    return browser.cookie_name(host) == browser.SECURE_COOKIE


def _set_cookie(response: Response, request: Request, token: str, lifetime: float) -> None:
    secure = _is_secure(request)
    response.set_cookie(
        browser.SECURE_COOKIE if secure else browser.LOOPBACK_COOKIE,
        token,
        max_age=int(lifetime),
        path="/",
        secure=secure,
        httponly=True,
        samesite="Strict",
    )

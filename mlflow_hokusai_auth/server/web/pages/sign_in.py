"""`/hokusai/login` and `/hokusai/logout`: the pages for signing in with a key, and out."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

import flask

from mlflow_hokusai_auth.core import browser, denials, keys
from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.core.types import (
    Allow,
    Credential,
    Deny,
    NeedKey,
    Principal,
    Request,
)
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.gate.flow import decide
from mlflow_hokusai_auth.store.database import Actor
from mlflow_hokusai_auth.store.sessions import Sessions

from . import shared

if TYPE_CHECKING:
    from werkzeug.wrappers import Response

    from mlflow_hokusai_auth.server.gate.gate import Gate

_WHOAMI = classify("GET", "/api/2.0/hokusai/whoami")
_CROSS_SITE = "The form was not sent from this page. Open the page again and try once more."
_SIGNED_IN_STILL = (
    "The form was not sent from a page of this server, so nobody was signed out. To sign out, use the "
    "button on a page of this server."
)
_NEEDS_HTTPS = (
    "Browsers keep you signed in over https only. Open this server over https, or as localhost on its "
    "own machine (through ssh -L, for example)."
)


def add(routes: flask.Blueprint, sessions: Sessions, gate: Gate, lifetime: float) -> None:
    """Add these pages to `routes`. A browser session lives for `lifetime` seconds."""

    @routes.get("/login")
    def login() -> Response:
        request = shared.request()
        verdict = _verdict_on_session(gate, request)
        if isinstance(verdict, Allow):
            return _login_page(me=verdict.principal)
        revoked = verdict is not None and verdict.code == "SESSION_ENDED"
        return _login_page(ended=revoked or shared.was_signed_in(request))

    @routes.post("/login")
    def sign_in() -> Response:
        request, address = shared.request(), callers.current.get().address
        if browser.cross_site(request):
            return _login_page(403, _CROSS_SITE)
        if flask.request.headers.get("Origin", "").startswith("http:") and shared.is_secure(
            request
        ):
            return _login_page(400, _NEEDS_HTTPS)
        if (wait := gate.limits.sign_in(address)) is not None:
            return _refused(Deny("RATE_LIMITED", "Too many attempts.", retry_after=wait))
        key = flask.request.form.get("key", "").strip()
        verdict = _check_key(gate, key, address)
        if isinstance(verdict, Deny):
            if denials.CODES[verdict.code].status not in (429, 503):
                sessions.count_failed_sign_in(address, verdict.code)
            return _refused(verdict)
        assert verdict.principal is not None
        by = Actor(
            verdict.principal.owner,
            verdict.principal.key_id,
            address,
            callers.current.get().request_id,
        )
        for token in browser.session_tokens(request):
            sessions.end(token, address=address, request_id=callers.current.get().request_id)
        # The target is relative to /hokusai/.
        response = shared.redirect(f"../{_target()[1:]}")
        token = sessions.begin(key, lifetime, by)
        gate.recent.add(token)
        shared.set_cookies(response, request, token, lifetime)
        return response

    @routes.post("/logout")
    def sign_out() -> Response:
        request = shared.request()
        if browser.cross_site(request):
            return shared.page("error.html", 403, message=_SIGNED_IN_STILL, back="keys")
        target = _target()
        response = shared.redirect("login" if target == "/" else f"login?next={quote(target)}")
        shared.sign_out(response, request, sessions)
        return response


def _check_key(gate: Gate, key: str, address: str) -> Allow | Deny:
    if keys.is_session_token(key):
        return Deny("KEY_MALFORMED", "This is the token of a browser's session, and not a key.")
    if problem := keys.problem(key):
        return Deny("KEY_MALFORMED", f"This can't be right: {problem}. Copy the key again, whole.")
    return decide(gate, NeedKey(Credential(key, ("the form",)), _WHOAMI, address))


def _verdict_on_session(gate: Gate, request: Request) -> Allow | Deny | None:
    """Return the verdict on the session of `request`, or None if it has none to be trusted.

    It is for a page that needs nobody to be signed in. Blocks as `decide` does.
    """
    tokens = browser.session_tokens(request)
    if browser.cross_site(request) or len(tokens) != 1 or not keys.is_session_token(tokens[0]):
        return None
    address = callers.current.get().address
    credential = Credential(tokens[0], (browser.PLACE,), session=True)
    verdict = decide(gate, NeedKey(credential, _WHOAMI, address))
    if isinstance(verdict, Deny) and denials.CODES[verdict.code].status == 401:
        # As on every route that takes a session: wrong ones count, and too many aren't looked up.
        gate.limits.failed(address)
    return verdict


def _refused(deny: Deny) -> Response:
    status = denials.CODES[deny.code].status
    return _login_page(status, denials.advice(deny), wait=deny.retry_after)


def _login_page(
    status: int = 200,
    problem: str = "",
    *,
    wait: float | None = None,
    me: Principal | None = None,
    ended: bool = False,
) -> Response:
    request = shared.request()
    # Browsers send no SameSite=Strict cookie on a link from another site, so login.js tries again.
    elsewhere = request.method == "GET" and browser.cross_site(request)
    return shared.page(
        "login.html",
        status,
        wait=wait,
        problem=problem,
        target=_target(),
        elsewhere=elsewhere,
        me=me,
        ended=ended,
    )


def _target() -> str:
    """Return the place on this server to which `next` in the request's query leads."""
    return browser.local_path(flask.request.args.get("next", "/"))

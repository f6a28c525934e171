"""Forms of the pages that work without a script: where they come from, and what the next page says.

A form is answered with a redirect (303), so that a page that is loaded again sends nothing again. What
was done stands in the location, signed for the session, so that no other page's link can say it.
"""

from __future__ import annotations

from collections.abc import Mapping

import flask
from itsdangerous import BadSignature, URLSafeTimedSerializer
from werkzeug.wrappers import Response

from mlflow_hokusai_auth.core import browser
from mlflow_hokusai_auth.core.errors import InvalidRequest
from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.core.types import Access

from . import shared

#: Seconds for which a page says what was done.
_LASTS = 60


def csrf() -> str:
    """Return the token for the forms of a page; "" if the caller sent a key and no session."""
    tokens = browser.session_tokens(shared.request())
    return browser.csrf_token(tokens[0]) if tokens else ""


def check() -> None:
    """Refuse a form that no page of this session has made. Raises InvalidRequest.

    The gate leaves this to the pages: see `browser.forged`. Public forms check for themselves.
    """
    request = flask.request
    if request.method != "POST" or classify(request.method, request.path).access is Access.PUBLIC:
        return
    sessions = browser.session_tokens(shared.request())
    if not sessions:
        raise InvalidRequest(
            "This form is for people who are signed in. Programs use /api/2.0/hokusai/ instead."
        )
    if not browser.is_csrf_token(sessions[0], request.form.get("csrf", "")):
        raise InvalidRequest(
            "This form is from an earlier session. Open the page again, and send the form from there."
        )


def done(location: str, message: str) -> Response:
    """Redirect to `location`, whose page says `message`: see `said`."""
    mark = "&" if "?" in location else "?"
    signed = _signer(csrf()).dumps(message)
    return shared.redirect(f"{location}{mark}said={signed!s}")


def said() -> str:
    """Return the message of a redirect of the last minute; "" without one."""
    signed, token = flask.request.args.get("said", ""), csrf()
    if not signed or not token:
        return ""
    try:
        return str(_signer(token).loads(signed, max_age=_LASTS))
    except BadSignature:
        return ""


def require(form: Mapping[str, str], *names: str) -> None:
    """Raise InvalidRequest for the first of these fields that is empty."""
    for name in names:
        if not form.get(name, "").strip():
            raise InvalidRequest(f"{name}: Fill this in.")


def _signer(token: str) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(token, salt="hokusai-auth said")

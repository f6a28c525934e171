"""Sessions in browsers: the cookie, its defence against forged requests, and the way to the sign-in.

A browser sends the cookie with a request of any site's page. So a request with a cookie counts only if
the browser says that one of our own pages sent it (Fetch Metadata, or Origin in older browsers:
https://www.w3.org/TR/fetch-metadata/, RFC 6454). Requests that manage keys must also carry a token that
no other page can know. API clients send no cookie, so these rules don't concern them.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from urllib.parse import quote, urlsplit

from .keys import redact
from .operations import classify
from .types import Operation, Request

#: The name of the cookie in messages.
PLACE = "the session cookie"
#: The cookie over https: `__Host-` makes browsers insist on Secure, Path=/ and no Domain (RFC 6265bis,
#: 4.1.3.2).
SECURE_COOKIE = "__Host-hokusai_session"
#: The cookie over http on the same machine, where browsers drop `SECURE_COOKIE`.
LOOPBACK_COOKIE = "hokusai_session"
#: A cookie that scripts see, beside the session's. It says nothing, but MLflow's "Logout" deletes it
#: (seen in 3.17) and asks for the current user: a session without it has been signed out.
LOGOUT_COOKIE = "mlflow_user"
#: The header that carries `csrf_token` in requests that manage keys.
CSRF_HEADER = b"x-csrf-token"
#: At most this many sessions of a request are read. Browsers send one; two are refused already.
MAX_SESSIONS = 8
#: The path of the sign-in page, below the prefix.
LOGIN = "/hokusai/login"

#: The headers of each of our pages, which hold no inline script or style.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}

_LOOPBACK = re.compile(r"(?:localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::\d{1,5})?", re.ASCII)
_SAFE = ("GET", "HEAD", "OPTIONS")
#: The beginning of the rules of our pages' forms. A form can't send a header, so it carries the token
#: in its body, which the gate doesn't read: the pages check it (`server/web/pages/forms.py`).
_FORMS = "POST /hokusai/"
# A path that stays on this origin as a relative reference: it is printable and begins with neither "//"
# nor "/\". `_DOTS` finds those that leave the prefix: browsers read %2e as a dot, and some other
# programs ignore the part of a segment behind a ";".
_LOCAL_PATH = re.compile(r"/(?:[!-.0-\[\]-~][!-\[\]-~]*)?", re.ASCII)
_DOTS = re.compile(r"[^?#]*/(?:\.|%2e){1,2}(?:[/?#;]|\Z)", re.ASCII | re.IGNORECASE)


def cookie_name(host: str) -> str:
    """Return the name of the session's cookie on a server; `host` is the request's Host header."""
    return LOOPBACK_COOKIE if _LOOPBACK.fullmatch(host.lower()) else SECURE_COOKIE


def session_tokens(request: Request) -> list[str]:
    """Return the session cookie's values, at most `MAX_SESSIONS`: another site may have added some."""
    tokens: list[str] = []
    cookies = [v for n, v in request.headers if n == b"cookie" and b"hokusai_session" in v]
    if not cookies:
        return tokens
    wanted = cookie_name(request.text(b"host"))
    for pair in b";".join(cookies).decode("latin-1").split(";"):
        key, _, token = pair.strip(" \t").partition("=")
        if key == wanted and token and token not in tokens:
            tokens.append(token)
            if len(tokens) >= MAX_SESSIONS:
                break
    return tokens


def csrf_token(session: str) -> str:
    """Return the token that proves that a page of `session` sent a request.

    The token doesn't reveal the session.
    """
    return hmac.digest(session.encode(), b"hokusai-auth csrf", hashlib.sha256).hex()


def is_csrf_token(session: str, text: str) -> bool:
    """Return whether `text` is the token of `session`."""
    return hmac.compare_digest(text.encode("latin-1", "replace"), csrf_token(session).encode())


def forged(request: Request, operation: Operation, session: str) -> bool:
    """Return whether another site's page may have sent `request`, which has the cookie of `session`."""
    if cross_site(request):
        # A link on another site may lead here: the other site doesn't see the page that opens.
        return not (request.method == "GET" and _navigates(request))
    if request.method in _SAFE or operation.kind != "hokusai":
        return False
    if operation.rule.startswith(_FORMS):
        return False
    return not is_csrf_token(session, request.text(CSRF_HEADER))


def cross_site(request: Request) -> bool:
    """Return whether `request` comes from a browser's page of another origin.

    A request with neither Sec-Fetch-Site nor Origin is trusted only if its method is safe.
    """
    site = request.text(b"sec-fetch-site")
    if site:
        return site not in ("same-origin", "none")
    origin = request.text(b"origin")
    if origin:
        # Only host and port are compared: the scheme in front of a proxy is unknown here. An opaque
        # origin ("null") has no host.
        host = origin.partition("://")[2].lower()
        return not host or host != request.text(b"host").lower()
    return request.method not in _SAFE


def origin_of(url: str) -> str:
    """Return the origin of `url` as browsers send it: in lower case, and without a default port."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    default = {"http": 80, "https": 443}.get(parts.scheme)
    port = "" if parts.port in (None, default) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}"


def of_our_page(request: Request) -> bool:
    """Return whether Sec-Fetch-Site says that a page of this origin sent `request`.

    Any program can send that header, so only the text of a refusal may depend on it.
    """
    return request.text(b"sec-fetch-site") == "same-origin"


def wants_page(request: Request) -> bool:
    """Return whether a browser asks for a page to show, or sends a form, rather than a program."""
    asks = request.method in ("GET", "HEAD") or _is_form(request)
    return asks and "text/html" in request.text(b"accept")


def login_location(request: Request) -> str:
    """Return the sign-in page's location, relative to the request's path; its `next` leads back."""
    return f"{_up(request)}{LOGIN[1:]}?next={quote(_page_of(request), safe='/')}"


def page_location(request: Request) -> str:
    """Return the location of the page that a browser asks for, relative to the request's path.

    After a form it is the page that shows the form.
    """
    # Without "./" a browser would read "/javascript:x" as a scheme and not as a path.
    return (_up(request) or "./") + local_path(_page_of(request))[1:]


def root_location(request: Request) -> str:
    """Return the location of `/hokusai/`, relative to the request's path."""
    return f"{_up(request)}hokusai/"


def local_path(text: str) -> str:
    """Return `text` if it is safe to redirect to, below this server's prefix, and "/" if not."""
    kept = len(text) <= 2048 and _LOCAL_PATH.fullmatch(text) and not _DOTS.match(text)
    return text if kept else "/"


def _up(request: Request) -> str:
    """Return the relative way from the request's path to the root below the prefix."""
    return "../" * (request.path.count("/") - 1)


def _page_of(request: Request) -> str:
    """Return the path, percent-encoded, and the query of the page that `request` asks for.

    A form can't be sent again, so the page is the one above the form, or at the form's own path if
    there is none above.
    """
    path, form = request.path, _is_form(request)
    above = path.rpartition("/")[0]
    if form and above != "/hokusai" and classify("GET", above).rule:
        path = above
    target = quote(path, safe="/:@!$&'()*+,;=~-._")
    if request.query and not form:
        target += "?" + request.query.decode("latin-1")
    # A key in the path or the query must not be copied into one more address.
    return redact(target)


def _is_form(request: Request) -> bool:
    """Return whether `request` has the route of a form of our pages."""
    begins = f"{request.method} {request.path}".startswith(_FORMS)
    return begins and classify(request.method, request.path).rule != ""


def _navigates(request: Request) -> bool:
    return (
        request.text(b"sec-fetch-mode") == "navigate"
        and request.text(b"sec-fetch-dest") == "document"
    )

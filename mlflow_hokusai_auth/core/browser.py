"""What browsers need beyond a key: a session's cookie, its defence, and the way to the sign-in page.

A cookie is sent along by the browser, whoever's page asked for the request. So one that comes with a
cookie counts only if the browser says that it is from our own pages (Fetch Metadata, or else Origin:
https://www.w3.org/TR/fetch-metadata/, RFC 6454), and what manages keys also carries a token that no
other page can know. API clients send no cookie, so nothing of this touches them.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from urllib.parse import quote

from .keys import redact
from .types import Operation, Request

#: The place of a session's token, as messages name it.
PLACE = "the session cookie"
#: With https: the prefix has browsers insist on Secure, Path=/ and no Domain (RFC 6265bis, 4.1.3.2).
SECURE_COOKIE = "__Host-hokusai_session"
#: For http on the same machine, where browsers would not keep the other one.
LOOPBACK_COOKIE = "hokusai_session"
#: Carries `csrf_token` with what manages keys.
CSRF_HEADER = b"x-csrf-token"
#: Sessions of one request that are looked at. One is what browsers send; two are refused already.
MAX_SESSIONS = 8
#: Where a browser signs in, below the prefix.
LOGIN = "/hokusai/login"

_LOOPBACK = re.compile(r"(?:localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::\d{1,5})?", re.ASCII)
_SAFE = ("GET", "HEAD", "OPTIONS")
# What a relative reference can't turn into another origin: printable, and neither "//" nor "/\". Nor
# does it leave the prefix: browsers take %2e for a dot, and some others what follows a ; for no part of
# the segment.
_LOCAL_PATH = re.compile(r"/(?:[!-.0-\[\]-~][!-\[\]-~]*)?", re.ASCII)
_DOTS = re.compile(r"[^?#]*/(?:\.|%2e){1,2}(?:[/?#;]|\Z)", re.ASCII | re.IGNORECASE)


def cookie_name(host: str) -> str:
    """The name of the session's cookie for a server that is called as `host`, a Host header."""
    return LOOPBACK_COOKIE if _LOOPBACK.fullmatch(host.lower()) else SECURE_COOKIE


def session_tokens(request: Request) -> list[str]:
    """The values of the session's cookie, `MAX_SESSIONS` at most: another page may have added some."""
    found: list[str] = []
    cookies = [v for n, v in request.headers if n == b"cookie" and b"hokusai_session" in v]
    if not cookies:
        return found
    wanted = cookie_name(request.text(b"host"))
    for pair in b";".join(cookies).decode("latin-1").split(";"):
        key, _, token = pair.strip(" \t").partition("=")
        if key == wanted and token and token not in found:
            found.append(token)
            if len(found) >= MAX_SESSIONS:
                break
    return found


def csrf_token(session: str) -> str:
    """What proves that a page of this session sent a request; tells nothing of the session."""
    return hmac.digest(session.encode(), b"hokusai-auth csrf", hashlib.sha256).hex()


def forged(request: Request, operation: Operation, session: str) -> bool:
    """Whether a request with the cookie of `session` may be from another site's page."""
    if cross_site(request):
        # To follow a link to a page is fine; it shows the page to the one who follows, only.
        return not (request.method == "GET" and _navigates(request))
    if request.method in _SAFE or operation.kind != "hokusai":
        return False
    token = request.text(CSRF_HEADER)
    return not hmac.compare_digest(token.encode("latin-1", "replace"), csrf_token(session).encode())


def cross_site(request: Request) -> bool:
    """Whether a browser did not send `request` from a page of this very origin.

    What tells nothing is believed if it only reads.
    """
    site = request.text(b"sec-fetch-site")
    if site:
        return site not in ("same-origin", "none")
    origin = request.text(b"origin")
    if origin:
        # By host and port only: which scheme a proxy in front has used is not known here. An opaque
        # origin ("null") has neither.
        host = origin.partition("://")[2].lower()
        return not host or host != request.text(b"host").lower()
    return request.method not in _SAFE


def wants_page(request: Request) -> bool:
    """Whether a person waits for a page, rather than a program for an answer."""
    return request.method in ("GET", "HEAD") and "text/html" in request.text(b"accept")


def login_location(request: Request) -> str:
    """Where to sign in and come back from, relative to the path that was asked for."""
    up = "../" * (request.path.count("/") - 1)
    target = quote(request.path, safe="/:@!$&'()*+,;=~-._")
    if request.query:
        target += "?" + request.query.decode("latin-1")
    # Whoever put a key there should not find it in another address as well.
    return f"{up}{LOGIN[1:]}?next={quote(redact(target), safe='/')}"


def local_path(text: str) -> str:
    """`text` if it is a path on this server, below the prefix, and safe to be sent to; else "/"."""
    kept = len(text) <= 2048 and _LOCAL_PATH.fullmatch(text) and not _DOTS.match(text)
    return text if kept else "/"


def _navigates(request: Request) -> bool:
    return (
        request.text(b"sec-fetch-mode") == "navigate"
        and request.text(b"sec-fetch-dest") == "document"
    )

"""Refusals as a person with a browser sees them: a page with the reason, and where to go from here.

The page looks like those of `server/web`. Their templates are behind the gate and some need the key
store, so this page is made here, from nothing but the refusal.
"""

from __future__ import annotations

from html import escape
from typing import NamedTuple

from . import contact as contacts
from .browser import PAGE_HEADERS
from .denials import CODES, NOBODY_HELPS, Response, advice, render
from .types import Deny

_PAGE = """<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <meta name="color-scheme" content="light dark">
  <meta name="robots" content="noindex">
  <title>{heading} · MLflow</title>
  <link rel="icon" href="{root}static/hokusai.svg" type="image/svg+xml">
  <link rel="stylesheet" href="{root}static/hokusai.css">
</head>
<body>
<main class="alone">
  <img src="{root}static/hokusai.svg" alt="" width="40" height="40">
  <h1>{heading}</h1>
  <p>{said}</p>
  <div class="card">
    {links}
  </div>
  {notes}
</main>
</body>
</html>
"""

_HEADINGS = {
    "KEY_MALFORMED": "This key can’t be right",
    "KEY_UNKNOWN": "This server doesn’t know the key",
    "KEY_EXPIRED": "The key has expired",
    "KEY_REVOKED": "The key was revoked",
    "KEY_CONFLICT": "More than one key",
    "SCOPE_MISSING": "Not open to your key",
    "ISOLATED": "Not open to suppliers",
    "ADDRESS_REFUSED": "Not open from your address",
    "CROSS_SITE": "Another site sent this request",
    "INTERCEPTED": "Refused by a rule of this server",
    "INTERCEPTOR_FAILED": "A rule of this server failed",
    "HEADER_MALFORMED": "This request can’t be read",
    "HEADERS_TOO_LARGE": "This request is too large",
    "BODY_TOO_LARGE": "This request is too large",
    "BODY_TIMEOUT": "This request did not arrive whole",
    "AUTHORITY_UNAVAILABLE": "Not available at the moment",
    "RATE_LIMITED": "Too many requests",
    "MISCONFIGURED": "This server is set up wrongly",
}

_SIGN_IN = ("{sign_in}", "Sign in")
_OTHER_KEY = ("{sign_in}", "Sign in with another key")
_OWN_KEY = ("{root}keys", "See your key")
_AGAIN = ("{again}", "Try again")
_OPEN = ("{root}../", "Open MLflow")
#: The links on the page of a code, the most useful one first. All other pages offer to try again.
_LINKS = {
    "KEY_MALFORMED": (_SIGN_IN,),
    "KEY_UNKNOWN": (_SIGN_IN,),
    "KEY_EXPIRED": (_SIGN_IN,),
    "KEY_REVOKED": (_SIGN_IN,),
    "SCOPE_MISSING": (_OTHER_KEY, _OWN_KEY),
    "ISOLATED": (_OTHER_KEY, _OWN_KEY),
    # The page of one's key is refused from this address as well.
    "ADDRESS_REFUSED": (_OTHER_KEY,),
    "INTERCEPTED": (_OTHER_KEY,),
    # The request came from elsewhere, and must not be sent again from here.
    "CROSS_SITE": (_OPEN,),
}


class Places(NamedTuple):
    """The places that a refusal's page links to, all relative to the refused request's path."""

    #: The location of `/hokusai/`.
    root: str
    #: The sign-in page, which leads back afterwards.
    sign_in: str
    #: The page that was asked for, without a key in its query.
    again: str


def heading(code: str) -> str:
    """Return the heading of the page for a refusal with `code`."""
    return _HEADINGS.get(code, CODES[code].detail)


def render_page(deny: Deny, contact: str, places: Places) -> Response:
    """Return the response of `denials.render` as a page. `contact` is whom to ask, or "".

    The status and all headers but those of the body stay the same.
    """
    answer = render(deny, contact)
    title, said, ways = heading(deny.code), advice(deny), _LINKS.get(deny.code, (_AGAIN,))
    if _is_no_page(deny):
        title, said, ways = "There is no such page", "Check the address.", (_OWN_KEY, _OPEN)
    links = [
        f'<a class="button{"" if number else " primary"}" '
        f'href="{escape(place.format(**places._asdict()))}">{text}</a>'
        for number, (place, text) in enumerate(ways)
    ]
    body = _PAGE.format(
        heading=title,
        root=escape(places.root),
        said=escape(said),
        links="\n    ".join(links),
        notes="\n  ".join(f'<p class="quiet">{note}</p>' for note in _notes(deny.code, contact)),
    ).encode()
    own = {"Content-Type": "text/html; charset=utf-8", "Content-Length": str(len(body))}
    own |= PAGE_HEADERS
    others = [item for item in answer.headers if item[0] not in own]
    return Response(answer.status, (*own.items(), *others), body)


def _is_no_page(deny: Deny) -> bool:
    """Return whether a key is too weak for a path below `/hokusai/` that no route has.

    The message is for programs then: it asks if the path of MLFLOW_TRACKING_URI is right.
    """
    asked = deny.operation
    weak = deny.code in ("SCOPE_MISSING", "ISOLATED")
    return weak and asked is not None and asked.kind == "hokusai" and not asked.rule


def _notes(code: str, contact: str) -> list[str]:
    """Return whom to ask, and then the status and the code, which somebody who helps asks for."""
    notes = [f"{CODES[code].status} {code}"]
    if contact and code not in NOBODY_HELPS:
        text, link = escape(contact), contacts.link(contact)
        notes.insert(
            0, f'Contact: <a href="{escape(link)}">{text}</a>' if link else f"Contact: {text}"
        )
    return notes

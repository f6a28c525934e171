"""`/hokusai/link`: the page that opens a one-time link, for somebody who has no key yet.

The code stands in the fragment, which browsers send to nobody. A GET does nothing, so that a scanner of
mails does not spend the link: the page posts the code when somebody presses the button.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import flask

from mlflow_hokusai_auth.core import browser, times
from mlflow_hokusai_auth.core.errors import Misconfigured
from mlflow_hokusai_auth.core.keys import link_code_in, problem
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.web import links_api, schemas
from mlflow_hokusai_auth.store.database import Actor
from mlflow_hokusai_auth.store.links import Opened, Refused

from . import shared

if TYPE_CHECKING:
    from werkzeug.wrappers import Response

    from mlflow_hokusai_auth.server.gate.gate import Gate
    from mlflow_hokusai_auth.server.web.links_api import LinkMaker

_CROSS_SITE = "The form was not sent from this page. Open the link again and try once more."
_UNREADABLE = (
    "This is not a whole link. Copy it again, to its end, from the message that it came in."
)
_IS_KEY = "This is a key already, and not a link: set it as HOKUSAI_API_KEY."
_UNKNOWN = (
    "This server knows no such link. Copy it again, whole, or ask for a new one: it may be for another "
    "server, and links are forgotten 30 days after they have expired."
)


def add(routes: flask.Blueprint, maker: LinkMaker | None, gate: Gate) -> None:
    """Add the page to `routes`. Without a `maker` (no key store is in use) it answers 404."""

    @routes.get("/link")
    def explain() -> Response:
        return _unusable(maker) or shared.page("link.html")

    @routes.post("/link")
    def show_key() -> Response:
        unusable = _unusable(maker)
        if unusable or maker is None:
            return unusable or _problem(404, links_api.ABSENT)
        request = shared.request()
        if browser.cross_site(request):
            return _problem(403, _CROSS_SITE)
        origin = request.text(b"origin")
        if origin and origin not in {browser.origin_of(url) for url in maker.public_urls}:
            where = " or ".join(maker.public_urls)
            return _problem(
                403,
                f"This link is for {where}, not for {origin}. Nothing has happened: open it as it was "
                "sent.",
            )
        caller = callers.current.get()
        if (wait := gate.limits.open_link(caller.address)) is not None:
            return _problem(429, f"Too many attempts. Try again in {times.wait(wait)}.", wait=wait)
        sent = flask.request.form.get("code", "").strip()
        code = link_code_in(sent)
        if code is None:
            is_key = sent.startswith("hk_") and problem(sent) is None
            return _problem(400, _IS_KEY if is_key else _UNREADABLE, again=True)
        by = Actor("", "", caller.address, caller.request_id)
        answer = maker.links.open(code, lifetimes=maker.lifetimes, by=by)
        if answer is None:
            return _problem(404, _UNKNOWN, again=True)
        if isinstance(answer, Refused):
            return _problem(409 if answer.state == "waiting" else 410, _reason(answer))
        return _made(answer, maker)


def _unusable(maker: LinkMaker | None) -> Response | None:
    """Return the page for a server that opens no links."""
    if maker is None:
        return _problem(404, links_api.ABSENT)
    try:
        maker.check()
    except Misconfigured as error:
        return _problem(503, str(error))
    return None


def _made(opened: Opened, maker: LinkMaker) -> Response:
    key = schemas.describe(opened.record)
    replaced = opened.replaced and schemas.describe(opened.replaced)
    lines = (
        f"export HOKUSAI_API_KEY={opened.key}\nexport MLFLOW_TRACKING_URI={maker.public_urls[0]}"
    )
    return shared.page("link.html", made={**key, "key": opened.key}, replaced=replaced, lines=lines)


def _problem(status: int, text: str, *, again: bool = False, wait: float | None = None) -> Response:
    """Return the page with a problem; with `again` it has the form, to paste another code."""
    return shared.page("link.html", status, wait=wait, problem=text, again=again)


def _reason(refused: Refused) -> str:
    """Return why a link can't be opened, for the person who tried."""
    link = refused.link
    if refused.state == "opened":
        assert link.opened_at is not None
        return (
            f"This link was opened on {times.moment(link.opened_at)}, and it makes one key only. If "
            f"that was not you, somebody else has the key {link.key_id}: tell whoever sent the link, "
            "who can revoke the key. If it was you and you did not save the key, ask for a new link."
        )
    if refused.state == "revoked":
        return "The server’s operator has revoked this link. Ask for a new one."
    if refused.state == "expired":
        return (
            f"This link could be opened until {times.moment(link.expires_at)}. Ask for a new one."
        )
    return f"{refused.conflict} Ask for a new link."

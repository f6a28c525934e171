"""`/hokusai/…`: the pages for signing in with a key, and for keys, models, trusts and links.

Pages hold no inline script or style, so that their Content-Security-Policy can forbid both. Links are
relative, so that the pages work under any prefix. The script of the pages changes keys in dialogs,
through the REST API; without it, or for several keys, there are forms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flask

from mlflow_hokusai_auth.core import browser, contact
from mlflow_hokusai_auth.core.errors import (
    AuthorityUnavailable,
    Conflict,
    Forbidden,
    InvalidRequest,
    Misconfigured,
    NotFound,
    StoreError,
)
from mlflow_hokusai_auth.core.lifetimes import UNLIMITED, Lifetimes
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.web import keys_api
from mlflow_hokusai_auth.server.web.links_api import LinkMaker
from mlflow_hokusai_auth.server.web.trust_api import TrustActions
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.links import Links
from mlflow_hokusai_auth.store.sessions import Sessions

from . import forms, key_forms, keys, link, links, models, one_key, shared, sign_in, trusts

if TYPE_CHECKING:
    from werkzeug.exceptions import HTTPException
    from werkzeug.wrappers import Response

    from mlflow_hokusai_auth.server.gate.gate import Gate


#: The pages with lists, besides that of the keys.
_LISTS = ("models", "trusts", "links")


def blueprint(
    store: LocalStore,
    sessions: Sessions,
    gate: Gate,
    lifetime: float,
    lifetimes: Lifetimes = UNLIMITED,
    *,
    has_store: bool = True,
    public_urls: Sequence[str] = (),
) -> flask.Blueprint:
    """Return the pages. A session lives for `lifetime` seconds, and a new key as `lifetimes` says.

    Without a key store in use (`has_store`) there are no trusts and no one-time links; links lead to
    one of the `public_urls`, and tokens are exchanged if there is one.
    """
    folder = Path(__file__).parents[1]
    routes = flask.Blueprint(
        "hokusai_pages",
        __name__,
        url_prefix="/hokusai",
        template_folder=str(folder / "templates"),
        static_folder=str(folder / "static"),
    )
    sign_in.add(routes, sessions, gate, lifetime)
    keys.add(routes, store, gate)
    models.add(routes, store, gate)
    one_key.add(routes, store, gate)
    trust_actions = TrustActions(store, gate, has_store, lifetimes)
    trusts.add(routes, trust_actions, exchanges=bool(public_urls))
    maker = LinkMaker(Links(store.database), public_urls, lifetimes) if has_store else None
    key_forms.add(routes, store, gate, lifetimes, maker)
    link.add(routes, maker, gate)
    links.add(routes, store, gate, maker)
    routes.before_request(forms.check)

    @routes.context_processor
    def whom_to_ask() -> dict[str, str]:
        return {"contact": gate.contact, "contact_link": contact.link(gate.contact)}

    @routes.context_processor
    def whether_to_link() -> dict[str, Callable[[], bool]]:
        """Say which lists the bar leads to. Only pages for somebody who is signed in have the bar."""
        return {
            "has_trusts": lambda: (
                shared.may(gate, "GET", "/hokusai/trusts") and trust_actions.may_list()
            ),
            "has_links": lambda: maker is not None and shared.may(gate, "GET", "/hokusai/links"),
        }

    @routes.context_processor
    def whether_to_offer_links() -> dict[str, Callable[[], str]]:
        """Say if forms for new keys offer links: "offered", "unset" (no public URL), or "" for none."""

        def link_choice() -> str:
            if maker is None or not shared.may(gate, "POST", "/api/2.0/hokusai/links"):
                return ""
            return "offered" if maker.public_urls else "unset"

        return {"link_choice": link_choice}

    @routes.app_template_filter("hokusai_date")
    def date(seconds: float | None) -> str:
        return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))

    @routes.app_template_global("hokusai_expiry")
    def expiry() -> dict[str, Any]:
        return keys_api.expiry_choices(lifetimes)

    @routes.app_template_global("hokusai_links_lead_to")
    def links_lead_to() -> dict[str, str]:
        """Return the URL below which links are made, and all origins at which they open."""
        return {"url": public_urls[0], "origins": " ".join(map(browser.origin_of, public_urls))}

    @routes.after_request
    def protect(response: Response) -> Response:
        response.headers.update(browser.PAGE_HEADERS)
        return response

    for kind, status in (
        (Conflict, 409),
        (InvalidRequest, 400),
        (NotFound, 404),
        (Forbidden, 403),
        (Misconfigured, 503),
        (StoreError, 503),
    ):
        routes.register_error_handler(kind, partial(_failed, status))

    @routes.errorhandler(AuthorityUnavailable)
    def unavailable(_: AuthorityUnavailable) -> Response:
        return _failed(
            503,
            "A database of this server can't be used at the moment. Try again in a minute.",
            wait=60.0,
        )

    @routes.app_errorhandler(404)
    def no_page(error: HTTPException) -> HTTPException | Response:
        # This sees MLflow's own 404s, too, which stay as they are.
        if not flask.request.path.startswith("/hokusai/"):
            return error
        values: dict[str, Any] = {"message": "There is no such page.", "back": "keys"}
        return protect(shared.page("error.html", 404, **(values | whom_to_ask())))

    return routes


def _failed(status: int, message: object, wait: float | None = None) -> Response:
    """Return the page that says what went wrong, with a way back for somebody who is signed in.

    `wait` is that of `shared.page`.
    """
    list_of = flask.request.path.split("/")[2]
    # A list that this server does not have is nothing to go back to.
    back = list_of if list_of in _LISTS and status != 404 else "keys"
    if callers.current.get().principal is None:
        back = ""
    return shared.page("error.html", status, wait=wait, message=str(message), back=back)

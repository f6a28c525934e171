"""One-time links on an operator's pages, in process: the forms for keys that make one."""

from __future__ import annotations

import re
import time
from html import unescape
from pathlib import Path
from typing import Any

import flask
import pytest
from werkzeug.test import TestResponse

from mlflow_hokusai_auth.core import browser, keys
from mlflow_hokusai_auth.core.lifetimes import Lifetimes
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server.web import pages as web_pages
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.links import Links, Opened
from mlflow_hokusai_auth.store.sessions import Sessions
from tests.server.sentinel import make_gate
from tests.server.web.test_pages import Pages

HERE = "https://registry.example.com/mlflow"
TOKEN = keys.session_token()
COOKIE = {"Cookie": f"{browser.LOOPBACK_COOKIE}={TOKEN}"}
ADMIN = Principal("key_admin", "operator", frozenset({"mlflow:admin"}))
FORM = {"owner": "ACME", "name": "training", "scopes": "model:write", "expiry": "never"}
CHOICE = "Give me a one-time link to send"


class Site:
    """The pages, and their store."""

    def __init__(
        self, folder: Path, public_urls: tuple[str, ...] = (HERE,), *, has_store: bool = True
    ) -> None:
        self.store = LocalStore(f"sqlite:///{folder}/keys.db")
        self.store.migrate()
        self.links = Links(self.store.database)
        sessions = Sessions(self.store.database)
        app = flask.Flask("mlflow")
        app.register_blueprint(
            web_pages.blueprint(
                self.store,
                sessions,
                make_gate(),
                60.0,
                Lifetimes(default=3600.0),
                has_store=has_store,
                public_urls=public_urls,
            )
        )
        self._pages = Pages(self.store, app, sessions)

    def key(self, **fields: Any) -> Principal:
        given = {"owner": "ACME", "scopes": ["model:write"], **fields}
        found = self.store.lookup(self.store.create(**given)[1])
        assert isinstance(found, Principal)
        return found

    def ask(
        self, line: str, fields: dict[str, Any] | None = None, caller: Principal = ADMIN
    ) -> TestResponse:
        """Return the answer to a request, such as "GET keys", with `fields` of a form."""
        method, path = line.split()
        data = {"csrf": browser.csrf_token(TOKEN), **fields} if fields is not None else None
        return self._pages.ask(method, f"/hokusai/{path}", caller, headers=COOKIE, data=data)

    def page(self, line: str, fields: dict[str, Any] | None = None, **more: Any) -> str:
        answer = self.ask(line, fields, **more)
        assert answer.status_code == 200, answer.text
        return unescape(answer.text)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def link_on(page: str) -> str:
    found = re.findall(r'value="([^"]*/hokusai/link#[^"]*)"', page)
    assert len(found) == 1, page
    return str(found[0])


def opened(site: Site, url: str) -> Opened:
    answer = site.links.open(url.partition("#")[2])
    assert isinstance(answer, Opened)
    return answer


def test_form_makes_a_link_and_no_key(site: Site) -> None:
    page = site.page("POST keys/new", {**FORM, "give": "link", "no_delete": "on"})
    url = link_on(page)
    assert url.startswith(f"{HERE}/hokusai/link#")
    assert list(site.store.each()) == [] and "hk_live_" not in page
    (link,) = site.links.each()
    assert link.expires_at == link.created_at + 86400 and link.created_by == "operator"
    assert "Nobody has seen the key, you included" in page and "for training" in page
    assert time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(link.expires_at)) in page
    made = opened(site, url)
    assert made.record.owner == "ACME" and made.record.no_delete
    assert made.record.expires_at is None


def test_form_replaces_a_key_once_the_link_is_opened(site: Site) -> None:
    old = site.key(name="nightly")
    page = site.page(f"POST keys/{old.key_id}/rotate", {"overlap": "0", "give": "link"})
    assert "One-time link for nightly" in page and old.key_id in page
    assert site.store.get(old.key_id).deprecated_at is None
    made = opened(site, link_on(page))
    assert made.replaced is not None and made.replaced.key_id == old.key_id
    assert made.replaced.state(made.record.created_at + 1) == "expired"


def test_key_is_shown_unless_the_link_is_chosen(site: Site) -> None:
    old = site.key()
    for line, fields in (("keys/new", FORM), (f"keys/{old.key_id}/rotate", {"overlap": "0"})):
        form = site.page(f"GET {line}")
        assert re.search(r'name="give" value="key" checked', form), form
        for give in ({}, {"give": "key"}):
            if "rotate" in line:
                line = f"keys/{site.key().key_id}/rotate"
            assert "hk_live_" in site.page(f"POST {line}", {**fields, **give})
    assert site.links.each() == []


def test_form_keeps_the_choice_and_names_what_is_wrong(site: Site) -> None:
    for fields, words in (
        ({"owner": " "}, "owner: String should"),
        ({"scopes": []}, "scopes: "),
        ({"key": "hk_live_" + "a1B2" * 8}, "A link makes a new key"),
    ):
        answer = site.ask("POST keys/new", {**FORM, **fields, "give": "link"})
        page = unescape(answer.text)
        assert answer.status_code == 400 and words in page, (fields, page)
        assert "key.owner" not in page and re.search(r'value="link"[^>]* checked', page)
    ended = site.key()
    site.store.revoke(ended.key_id)
    answer = site.ask(f"POST keys/{ended.key_id}/rotate", {"overlap": "0", "give": "link"})
    assert answer.status_code == 400 and "is revoked" in answer.text
    assert site.links.each() == [] and [one.key_id for one in site.store.each()] == [ended.key_id]


def test_supplier_makes_no_link_to_its_own_key(site: Site) -> None:
    supplier = site.key()
    path = f"keys/{supplier.key_id}/rotate"
    for page in ("keys", path):
        assert 'name="give"' not in site.page(f"GET {page}", caller=supplier)
    answer = site.ask(f"POST {path}", {"overlap": "0", "give": "link"}, supplier)
    assert answer.status_code == 403 and "mlflow:admin" in answer.text
    assert site.links.each() == []
    assert "hk_live_" in site.page(f"POST {path}", {"overlap": "0"}, caller=supplier)


@pytest.mark.parametrize("path", ["keys", "keys/new", "keys/{key_id}", "keys/{key_id}/rotate"])
def test_choice_says_why_it_cannot_be_made(path: str, tmp_path: Path) -> None:
    offered, unset = Site(tmp_path), Site(tmp_path, ())
    absent = Site(tmp_path, has_store=False)
    path = path.format(key_id=offered.key().key_id)
    for site, disabled in ((offered, 0), (unset, 1)):
        page = site.page(f"GET {path}")
        choices = re.findall(f"<label><input([^>]*)> {CHOICE}", page)
        assert choices and all(("disabled" in one) == disabled for one in choices), page
        assert ("HOKUSAI_AUTH_PUBLIC_URLS" in page) == disabled
    assert CHOICE not in absent.page(f"GET {path}")


def test_link_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    for site, status, words in (
        (Site(tmp_path, ()), 503, "HOKUSAI_AUTH_PUBLIC_URLS"),
        (Site(tmp_path, has_store=False), 404, "HOKUSAI_AUTH_BACKEND"),
    ):
        answer = site.ask("POST keys/new", {**FORM, "give": "link"})
        assert answer.status_code == status and words in answer.text
        assert list(site.store.each()) == [] and site.links.each() == []

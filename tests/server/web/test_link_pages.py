"""One-time links on an operator's pages, in process: the forms that make one, and their list."""

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
from mlflow_hokusai_auth.server.web import keys_api
from mlflow_hokusai_auth.server.web import pages as web_pages
from mlflow_hokusai_auth.store.database import Actor
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.links import Links, Opened, Refused
from mlflow_hokusai_auth.store.sessions import Sessions
from tests.e2e.parts import renamed
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
    found = re.findall(r">([^<>]*/hokusai/link#[^<>]*)<", page)
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


def test_list_leads_to_the_form_with_the_link_chosen(site: Site) -> None:
    (query,) = re.findall(r'href="keys/new(\?[^"]*)"', site.page("GET links"))
    form = site.page(f"GET keys/new{query}")
    assert re.search(r'name="give" value="link"[^>]* checked', form), form


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
    assert answer.status_code == 409 and "is revoked" in answer.text
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
        assert ("makes links once <code>HOKUSAI_AUTH_PUBLIC_URLS" in page) == disabled
        # A link that leads elsewhere is noticed before it is made.
        assert (f"The link leads to <code>{HERE}</code>." in page) != disabled
    assert CHOICE not in absent.page(f"GET {path}")


def test_link_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    for site, status, words in (
        (Site(tmp_path, ()), 503, "HOKUSAI_AUTH_PUBLIC_URLS"),
        (Site(tmp_path, has_store=False), 404, "HOKUSAI_AUTH_BACKEND"),
    ):
        answer = site.ask("POST keys/new", {**FORM, "give": "link"})
        assert answer.status_code == status and words in answer.text
        assert list(site.store.each()) == [] and site.links.each() == []


# The list


def row_of(page: str, link_id: str) -> str:
    """Return the text of the row of a link; "" if the page has none."""
    rows = [one for one in page.split('<tr role="row">') if link_id in one]
    assert len(rows) < 2
    return " ".join(re.sub("<[^>]*>", " ", rows[0].partition("</tr>")[0]).split()) if rows else ""


@pytest.fixture
def listed(site: Site) -> dict[str, str]:
    """The ids of a link of each kind, whose owners are named after it; one was refused twice."""
    ids = {}
    for kind in ("waiting", "opened", "refused", "revoked", "expired"):
        lasts = 1e-6 if kind == "expired" else 60
        by = Actor("operator", "key_admin")
        link, code = site.links.create(owner=kind, scopes=["model:write"], expires_in=lasts, by=by)
        ids[kind] = link.link_id
        if kind in ("opened", "refused"):
            assert isinstance(site.links.open(code, by=Actor("", "", "192.0.2.7")), Opened)
        if kind == "refused":
            assert all(isinstance(site.links.open(code), Refused) for _ in range(2))
    site.links.revoke(ids["revoked"])
    return ids


def test_list_says_what_became_of_each_link(site: Site, listed: dict[str, str]) -> None:
    page = site.page("GET links")
    keys_made = {link.link_id: link.key_id for link in site.links.each()}
    for kind, words in (
        ("waiting", "waiting until 20"),
        ("opened", "UTC from 192.0.2.7"),
        ("refused", "tried 2 times after it was opened; last on 20"),
        ("revoked", "revoked on 20"),
        ("expired", "expired on 20"),
    ):
        row = row_of(page, listed[kind])
        assert words in row and "by operator" in row and "model:write" in row, row
        assert ("tried" in row) == (kind == "refused")
        assert ("Revoke" in row) == (kind == "waiting")
        assert (keys_made[listed[kind]] or "?") in row or kind not in ("opened", "refused")
    for tab, kinds in {
        "waiting": {"waiting"},
        "opened": {"opened", "refused"},
        "refused": {"refused"},
    }.items():
        page = site.page(f"GET links?show={tab}")
        assert {kind for kind in listed if row_of(page, listed[kind])} == kinds, tab
    for query in ("show=x", "page=x", "page=-1"):
        assert site.ask(f"GET links?{query}").status_code == 400


def test_list_says_why_a_void_link_makes_no_key(site: Site) -> None:
    old = site.key()
    link, code = site.links.create_rotation(old.key_id)
    # A replica of a version before links revokes a key without its link.
    with site.store.database.changing() as change:
        change.connection.exec_driver_sql("UPDATE hokusai_auth_keys SET revoked_at = 1")
    assert isinstance(site.links.open(code), Refused)
    row = row_of(site.page("GET links"), link.link_id)
    assert "void it makes no key: the one" in row and "tried once and refused" in row, row
    assert row_of(site.page("GET links?show=waiting"), link.link_id) == ""
    assert site.ask("POST links/revoke", {"link_id": link.link_id}).status_code == 303
    assert "revoked on" in row_of(site.page("GET links"), link.link_id)


def test_page_marks_links_that_were_refused(site: Site, listed: dict[str, str]) -> None:
    assert "One link was refused" in site.page("GET links")
    with site.store.database.changing() as change:
        change.connection.exec_driver_sql("UPDATE hokusai_auth_links SET refused = 0")
    assert "tried" not in site.page("GET links") and "notice" not in site.page("GET links")


def test_waiting_link_is_revoked_and_no_other(site: Site, listed: dict[str, str]) -> None:
    fields = {"link_id": listed["waiting"], "back": "show=waiting"}
    answer = site.ask("POST links/revoke", {**fields, "csrf": "of another session"})
    assert answer.status_code == 400 and site.links.counts()[0] == 1
    answer = site.ask("POST links/revoke", fields)
    location = answer.headers["Location"]
    assert answer.status_code == 303 and location.startswith("../links?show=waiting&said=")
    assert f"Revoked: {listed['waiting']}" in site.page(f"GET {location[3:]}")
    assert site.links.counts()[0] == 0
    for link_id, status, words in (
        (listed["opened"], 409, "revoke that key"),
        (listed["expired"], 409, "expired already"),
        ("link_0", 404, "There is no link"),
        ("\0", 404, "There is no link"),
    ):
        answer = site.ask("POST links/revoke", {"link_id": link_id})
        assert answer.status_code == status and words in unescape(answer.text), link_id


def test_page_that_fails_leads_back_to_the_list(site: Site) -> None:
    """The pages look their callers up in the store, so its table of links alone is away."""
    with site.store.database.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE hokusai_auth_links RENAME TO away")
    for line in ("GET links", "GET links?show=waiting", "POST links/revoke"):
        answer = site.ask(line, {"link_id": "link_0"} if "POST" in line else None)
        root = "../" * line.count("/")
        assert answer.status_code == 503, line
        assert f'<a href="{root}links">Back to the links</a>' in answer.text, line
    answer = site.ask("POST keys/new", {**FORM, "give": "link"})
    assert answer.status_code == 503
    assert '<a href="../keys">Back to the keys</a>' in answer.text


def test_links_of_a_leaver_are_revoked_with_the_keys(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_api, "REVOKED_EVERYWHERE", 0)
    site.links.create(owner="ACME", scopes=["model:write"])
    leaver = {"action": "revoke", "owner": "ACME"}
    page = site.page("POST keys/selected", leaver)
    assert "1 one-time link that nobody has opened yet will be revoked." in page
    answer = site.ask("POST keys/selected", {**leaver, "confirmed": "yes"})
    page = site.page(f"GET {answer.headers['Location'][3:]}")
    assert "0 keys revoked and refused everywhere. 1 one-time link revoked." in page


def test_bar_leads_administrators_to_the_links(site: Site, tmp_path: Path) -> None:
    assert '<a href="links">Links</a>' in site.page("GET keys")
    assert 'href="links"' not in site.page("GET keys", caller=site.key())
    absent = Site(tmp_path, has_store=False)
    assert ">Links</a>" not in absent.page("GET keys")
    for line in ("GET links", "POST links/revoke"):
        answer = absent.ask(line, {"link_id": "link_0"} if "POST" in line else None)
        assert answer.status_code == 404 and "HOKUSAI_AUTH_BACKEND" in answer.text
        # There is no list to go back to.
        assert "Back to the keys" in answer.text


def test_list_has_pages(site: Site) -> None:
    for number in range(51):
        site.links.create(owner=f"owner{number}", scopes=["model:read"])
    first, second = site.page("GET links?show=waiting"), site.page("GET links?show=waiting&page=2")
    assert "1–50 of 51" in first and "51–51 of 51" in second
    assert first.count("Revoke now") == 50 and second.count("Revoke now") == 1
    assert "links?show=waiting&page=2" in first


def test_failing_store_sends_only_those_who_are_signed_in_to_the_keys(
    site: Site, tmp_path: Path
) -> None:
    url = link_on(site.page("POST keys/new", {**FORM, "give": "link"}))
    for caller in (None, ADMIN):
        with renamed(tmp_path / "keys.db", "hokusai_auth_links"):
            sent = {"data": {"code": url}, "headers": {"Sec-Fetch-Site": "same-origin"}}
            answer = site._pages.ask("POST", "/hokusai/link", caller, **sent)
        assert answer.status_code == 503 and "Questions? Ask" in answer.text
        assert ("Back to the keys" in answer.text) == (caller is not None)
    assert opened(site, url).key

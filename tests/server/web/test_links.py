"""One-time links in process: their REST API, and the page that opens them."""

from __future__ import annotations

import html
import logging
from pathlib import Path
from typing import Any

import flask
import pytest
from werkzeug.test import TestResponse

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.lifetimes import Lifetimes
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.gate.limits import LINKS_PER_MINUTE, Limits
from mlflow_hokusai_auth.server.web import links_api
from mlflow_hokusai_auth.server.web import pages as web_pages
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.links import Links
from mlflow_hokusai_auth.store.sessions import Sessions
from tests.server.sentinel import make_gate

HERE = "https://registry.example.com"
ADMIN = Principal("key_admin", "operator", frozenset({"mlflow:admin"}))
LIFETIMES = Lifetimes(default=3600.0, longest=7200.0)
KEY = {"owner": "ACME", "scopes": ["model:write"], "name": "training"}


class Site:
    """The app with the API and the pages, and its store."""

    def __init__(
        self,
        folder: Path,
        public_urls: tuple[str, ...] = (f"{HERE}/mlflow", "http://localhost:5000"),
        *,
        has_store: bool = True,
    ) -> None:
        self.store = LocalStore(f"sqlite:///{folder}/keys.db")
        self.store.migrate()
        gate = make_gate()
        object.__setattr__(gate, "limits", Limits())
        self.maker = links_api.LinkMaker(Links(self.store.database), public_urls, LIFETIMES)
        self.app = flask.Flask("mlflow")
        self.app.register_blueprint(links_api.blueprint(self.maker, has_store=has_store))
        pages = web_pages.blueprint(
            self.store,
            Sessions(self.store.database),
            gate,
            60.0,
            LIFETIMES,
            has_store=has_store,
            public_urls=public_urls,
        )
        self.app.register_blueprint(pages)

    def ask(
        self, line: str, caller: Principal | None = ADMIN, address: str = "192.0.2.7", **more: Any
    ) -> TestResponse:
        method, path = line.split()
        token = callers.current.set(callers.Caller(caller, address, "request-1"))
        try:
            path = path if path.startswith("/hokusai/") else f"/api/2.0/hokusai{path}"
            return self.app.test_client().open(path, method=method, **more)
        finally:
            callers.current.reset(token)

    def make(self, **body: Any) -> dict[str, Any]:
        answer = self.ask("POST /links", json=body or {"key": KEY})
        assert answer.status_code == 201, answer.text
        assert answer.json is not None
        return dict(answer.json)

    def open(self, code: str, origin: str | None = HERE, **more: Any) -> tuple[int, str]:
        headers = {"Sec-Fetch-Site": "same-origin"} | ({"Origin": origin} if origin else {})
        headers |= more.pop("headers", {})
        answer = self.ask("POST /hokusai/link", None, data={"code": code}, headers=headers, **more)
        assert answer.headers["Cache-Control"] == "no-store"
        return answer.status_code, html.unescape(answer.text)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_link_is_shown_once_and_leads_to_the_public_url(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    made = site.make()
    base, _, code = made["url"].partition("#")
    assert base == f"{HERE}/mlflow/hokusai/link"
    assert keys.link_code_in(code) == code == keys.link_code_in(f" {made['url']}\n")
    assert (made["state"], made["owner"], made["name"], made["scopes"]) == (
        "waiting",
        "ACME",
        "training",
        ["model:write"],
    )
    assert made["expires_at"] - made["created_at"] == 86400
    listed = site.ask("GET /links").text
    assert made["link_id"] in listed and code not in listed
    # A scanner of mails that follows the link spends nothing.
    for _ in range(2):
        assert site.ask("GET /hokusai/link", None).status_code == 200
    status, page = site.open(made["url"])
    assert status == 200 and f"MLFLOW_TRACKING_URI={HERE}/mlflow" in page
    (record,) = site.store.each()
    key = page.partition(">hk_live_")[2].partition("<")[0]
    assert site.store.find(f"hk_live_{key}") == record
    assert record.expires_at == pytest.approx(record.created_at + 3600)
    assert code not in page and code not in caplog.text and key not in caplog.text
    status, page = site.open(code)
    assert status == 410 and "was opened on" in page and "somebody else has the key" in page
    assert "hk_live_" not in page


def test_page_says_why_a_link_shows_no_key(site: Site) -> None:
    revoked, late = site.make(), site.make(key=KEY, expires_in=1e-6)
    site.ask(f"DELETE /links/{revoked['link_id']}")
    old = site.store.create(owner="ACME", scopes=["model:read"])[0]
    void = site.make(replaces=old.key_id)
    site.store.rotate(old.key_id)
    for sent, status, words in (
        (revoked["url"], 410, "has revoked this link"),
        (late["url"], 410, "could be opened until"),
        (void["url"], 409, f"Key {old.key_id} was replaced by"),
        (keys.generate(), 400, "a key already, and not a link"),
        (keys.link_code(), 404, "knows no such link"),
        (revoked["url"][:-1], 400, "not a whole link"),
        ("", 400, "not a whole link"),
        ("\0", 400, "not a whole link"),
    ):
        answer = site.open(sent, address=f"192.0.2.{len(words)}")
        assert answer[0] == status and words in answer[1], (sent, answer)
    assert len(list(site.store.each())) == 2


def test_link_opens_only_at_the_public_origins(site: Site) -> None:
    code = site.make()["url"]
    for origin, headers in (
        ("https://evil.example.com", {}),
        ("http://registry.example.com", {}),
        ("https://registry.example.com:8443", {}),
        ("null", {}),
        (HERE, {"Sec-Fetch-Site": "cross-site"}),
        (HERE, {"Sec-Fetch-Site": "same-site"}),
        # An old browser sends Origin alone, and a page of another site sends its own.
        ("https://evil.example.com", {"Sec-Fetch-Site": ""}),
    ):
        status, page = site.open(code, origin, headers={**headers, "Host": "registry.example.com"})
        assert status == 403 and "hk_live_" not in page, (origin, headers)
    assert list(site.store.each()) == []
    assert site.open(code, "http://localhost:5000")[0] == 200


@pytest.mark.usefixtures("one_minute")
def test_guesses_of_an_address_are_limited(site: Site) -> None:
    link = site.make()["url"]
    statuses = [site.open(keys.link_code())[0] for _ in range(LINKS_PER_MINUTE + 1)]
    assert statuses == [404] * LINKS_PER_MINUTE + [429]
    sent = {"Origin": HERE, "Sec-Fetch-Site": "same-origin"}
    answer = site.ask("POST /hokusai/link", None, headers=sent)
    assert answer.status_code == 429 and 1 <= int(answer.headers["Retry-After"]) <= 61
    # Another address, and the link itself, are not affected.
    assert site.open(link, address="198.51.100.1")[0] == 200


def test_link_to_a_replacement_says_until_when_the_old_key_works(site: Site) -> None:
    old = site.store.create(owner="ACME", scopes=["model:read"], name="nightly")[0]
    for overlap, words in ((0, "has ended"), (60, "works until")):
        link = site.make(replaces=old.key_id, overlap=overlap)
        assert (link["replaces"], link["owner"], link["scopes"]) == (old.key_id, "ACME", [])
        status, page = site.open(link["url"])
        assert status == 200 and words in page and old.key_id in page
        old = next(one for one in site.store.each() if one.deprecated_at is None)


def test_body_of_a_link_is_checked(site: Site) -> None:
    old = site.store.create(owner="ACME", scopes=["model:read"])[0]
    for body, status, words in (
        ({}, 400, "key or replaces"),
        ({"key": KEY, "replaces": old.key_id}, 400, "key or replaces"),
        ({"key": {**KEY, "scopes": ["x"]}}, 400, "unknown scope"),
        ({"key": {**KEY, "expires_in": 7201}}, 400, "HOKUSAI_AUTH_KEY_LIFETIME_MAX"),
        ({"key": {**KEY, "expires_in": None}}, 400, "a key must end"),
        ({"key": KEY, "overlap": 5}, 400, "overlap is for"),
        ({"key": KEY, "expires_in": 7 * 86400 + 1}, 400, "expires_in"),
        ({"key": KEY, "expires_in": 0}, 400, "expires_in"),
        ({"key": KEY, "code": "x"}, 400, "code: unknown; known: key, replaces, "),
        ({"key": {**KEY, "code": "x"}}, 400, "key.code: unknown; known: owner, scopes, "),
        ({"replaces": "key_0"}, 404, "There is no key"),
        ({"replaces": "\0"}, 404, "There is no key"),
    ):
        answer = site.ask("POST /links", json=body)
        assert answer.status_code == status and words in answer.text, (body, answer.text)
    wrong = site.ask("POST /links", json={"key": {**KEY, "owner": " ", "scopes": ["x", "y"]}}).json
    assert wrong is not None and wrong["fields"].keys() == {"key.owner", "key.scopes"}
    assert site.ask("DELETE /links/link_0").status_code == 404
    link = site.make()
    site.open(link["url"])
    answer = site.ask(f"DELETE /links/{link['link_id']}")
    assert answer.status_code == 409 and "revoke that key" in answer.text


def test_server_without_public_urls_or_a_key_store_makes_no_links(tmp_path: Path) -> None:
    unset, absent = Site(tmp_path, ()), Site(tmp_path, has_store=False)
    for site, status, words in (
        (unset, 503, "HOKUSAI_AUTH_PUBLIC_URLS"),
        (absent, 404, "HOKUSAI_AUTH_BACKEND"),
    ):
        for line in ("POST /links", "GET /hokusai/link", "POST /hokusai/link"):
            answer = site.ask(line, json={"key": KEY}, headers={"Host": "registry.example.com"})
            assert answer.status_code == status and words in answer.text, (line, answer.text)

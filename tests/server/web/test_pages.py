"""The pages in process: signing in, and the contents of the page of keys for each kind of key."""

from __future__ import annotations

import contextvars
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flask
import pytest
from werkzeug.test import TestResponse

from mlflow_hokusai_auth.core import browser, keys
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.core.types import Principal, Rejected
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.gate.lookup_pool import LookupPool
from mlflow_hokusai_auth.server.web import account, keys_api
from mlflow_hokusai_auth.server.web import pages as web_pages
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.sessions import Sessions
from tests.server.gate.test_gate import Stuck
from tests.server.sentinel import KEYS, PRINCIPALS, Memory, make_gate

ADDRESS = "192.0.2.7"


@dataclass
class Pages:
    """The app with the pages, and its store."""

    store: LocalStore
    app: flask.Flask
    sessions: Sessions

    def ask(
        self, method: str, path: str, caller: Principal | None = None, **options: Any
    ) -> TestResponse:
        def open_page() -> TestResponse:
            callers.current.set(callers.Caller(caller, ADDRESS, "request-1"))
            return self.app.test_client(use_cookies=False).open(path, method=method, **options)

        return contextvars.copy_context().run(open_page)

    def sign_in(self, key: str) -> TestResponse:
        headers = {"Origin": "http://localhost"}
        return self.ask("POST", "/hokusai/login", headers=headers, data={"key": key})


def pages(folder: Path, backend: Memory | None = None, **parts: Any) -> Pages:
    store = LocalStore(f"sqlite:///{folder}/keys.db")
    store.migrate()
    gate = make_gate(backend, **parts)
    sessions = Sessions(store.database)
    app = flask.Flask("mlflow")
    # The forms offer what the API allows.
    app.register_blueprint(keys_api.blueprint(store, gate, {}))
    app.register_blueprint(web_pages.blueprint(store, sessions, gate, 60.0))
    app.register_blueprint(account.blueprint(gate))
    return Pages(store, app, sessions)


@pytest.fixture
def here(tmp_path: Path) -> Pages:
    return pages(tmp_path)


class Down(Memory):
    """An authority that is down."""

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        raise AuthorityUnavailable("down")


def test_sign_in_during_an_outage_does_not_say_that_the_key_is_wrong(tmp_path: Path) -> None:
    answer = pages(tmp_path, Down()).sign_in(KEYS["read"])
    assert answer.status_code == 503 and "Set-Cookie" not in answer.headers
    assert "does not open" not in answer.text


def test_sign_in_does_not_wait_for_an_authority_that_hangs(tmp_path: Path) -> None:
    authority = Stuck()
    answer = pages(tmp_path, authority=authority, lookups=LookupPool(0.1)).sign_in(KEYS["read"])
    assert not authority.free.is_set()
    authority.free.set()
    assert answer.status_code == 503 and "Set-Cookie" not in answer.headers


def test_sign_in_with_a_rate_limited_key_is_refused_for_its_limit(tmp_path: Path) -> None:
    once = replace(PRINCIPALS["read"], rate_limit_per_hour=1)
    there = pages(tmp_path, Memory({"read": once}))
    assert there.sign_in(KEYS["read"]).status_code == 303
    answer = there.sign_in(KEYS["read"])
    assert answer.status_code == 429 and "Set-Cookie" not in answer.headers
    assert "does not open" not in answer.text


def test_wrong_keys_are_audited_by_address(here: Pages) -> None:
    for key in (KEYS["unknown"], KEYS["unknown"], "hk live"):
        assert here.sign_in(key).status_code == 401
    assert here.store.database.audited() == []
    here.sessions.write()
    (event,) = here.store.database.audited()
    assert (event["event"], event["address"]) == ("session.refused", ADDRESS)
    assert event["detail"] == {"count": 3, "reason": "KEY_MALFORMED, KEY_UNKNOWN"}


def test_administrator_pages_through_all_keys_and_others_see_none(here: Pages) -> None:
    made = [here.store.create(owner=f"owner {n}", scopes=["mlflow:read"])[0] for n in range(3)]
    newest = here.ask("GET", "/hokusai/keys?max_results=2", PRINCIPALS["admin"]).text
    assert made[2].key_id in newest and made[1].key_id in newest
    assert made[0].key_id not in newest
    assert "page_token=" in newest and "Newest" not in newest
    token = here.store.page(max_results=2).next_page_token
    path = f"/hokusai/keys?max_results=2&page_token={token}"
    older = here.ask("GET", path, PRINCIPALS["admin"]).text
    assert made[0].key_id in older and "Older keys" not in older
    # The link to the first page keeps the other parameters.
    assert 'href="keys?max_results=2"' in older
    others = here.ask("GET", "/hokusai/keys", PRINCIPALS["write"]).text
    assert not any(record.key_id in others for record in made) and "New key" not in others


def test_page_of_keys_has_the_csrf_token_of_the_session(here: Pages) -> None:
    token = keys.session_token()
    cookie = {"Cookie": f"{browser.LOOPBACK_COOKIE}={token}"}
    page = here.ask("GET", "/hokusai/keys", PRINCIPALS["admin"], headers=cookie).text
    assert f'content="{browser.csrf_token(token)}"' in page and token not in page
    without = here.ask("GET", "/hokusai/keys", PRINCIPALS["admin"]).text
    assert 'name="csrf-token" content=""' in without


def test_missing_time_is_shown_as_nothing(here: Pages) -> None:
    date = here.app.jinja_env.filters["hokusai_date"]
    assert (date(None), date(86400.0)) == ("", "1970-01-02 00:00")


def test_mlflow_is_told_the_permissions_of_the_key(here: Pages) -> None:
    path = "/ajax-api/3.0/mlflow/users/current/permissions"
    for kind, permission in (("read", "READ"), ("write", "MANAGE")):
        answer = here.ask("GET", path, PRINCIPALS[kind]).json
        assert answer is not None and answer["is_admin"] is False
        assert [one["permission"] for one in answer["permissions"]] == [permission]


def test_failing_page_of_keys_says_why(here: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise AuthorityUnavailable("postgresql://canary")

    for error, status in (("page_token=x", 400), ("max_results=x", 400), ("", 503)):
        if status == 503:
            monkeypatch.setattr(here.store, "page", fail)
        answer = here.ask("GET", f"/hokusai/keys?{error}", PRINCIPALS["admin"])
        assert answer.status_code == status and "text/html" in answer.content_type, error
        assert "canary" not in answer.text

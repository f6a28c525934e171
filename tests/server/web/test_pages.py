"""The pages in process: signing in, and the contents of the page of keys for each kind of key."""

from __future__ import annotations

import contextvars
import html
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import flask
import pytest
from werkzeug.test import TestResponse

from mlflow_hokusai_auth.core import browser, keys
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.core.trust import workload
from mlflow_hokusai_auth.core.types import Principal, Rejected
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.gate.limits import Limits
from mlflow_hokusai_auth.server.gate.lookup_pool import LookupPool
from mlflow_hokusai_auth.server.live_settings import Isolation, Mode
from mlflow_hokusai_auth.server.upstream import stores
from mlflow_hokusai_auth.server.web import account, keys_api
from mlflow_hokusai_auth.server.web import pages as web_pages
from mlflow_hokusai_auth.store import usage
from mlflow_hokusai_auth.store.database import Actor
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.links import Links
from mlflow_hokusai_auth.store.sessions import Sessions
from mlflow_hokusai_auth.store.trusts import Trusts
from tests.server.gate.test_gate import Stuck
from tests.server.sentinel import KEYS, PRINCIPALS, Memory, make_gate

ADDRESS = "192.0.2.7"


@dataclass
class Pages:
    """The app with the pages, and its store."""

    store: LocalStore
    app: flask.Flask
    sessions: Sessions
    #: Headers that the gate adds to answers.
    added: list[tuple[str, str]] = field(default_factory=list)

    def ask(
        self, method: str, path: str, caller: Principal | None = None, **options: Any
    ) -> TestResponse:
        def open_page() -> TestResponse:
            callers.current.set(callers.Caller(caller, ADDRESS, "request-1", self.added))
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
    app.register_blueprint(account.blueprint(gate, sessions))
    return Pages(store, app, sessions)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pages:
    monkeypatch.setattr(stores, "shared_engine", lambda: None)
    return pages(tmp_path)


class Down(Memory):
    """An authority that is down."""

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        raise AuthorityUnavailable("down")


def test_sign_in_during_an_outage_does_not_say_that_the_key_is_wrong(tmp_path: Path) -> None:
    answer = pages(tmp_path, Down()).sign_in(KEYS["read"])
    assert answer.status_code == 503 and "Set-Cookie" not in answer.headers
    assert "does not open" not in answer.text
    assert answer.headers["Retry-After"] and "Try again in" in answer.text


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


def test_sign_in_says_why_a_key_is_refused_as_the_api_does(tmp_path: Path) -> None:
    bad = replace(PRINCIPALS["read"], networks=("198.51.100.0/24",))
    ended = replace(PRINCIPALS["expired"], expires_at=1.0)
    known = {"read": bad, "expired": ended, "revoked": PRINCIPALS["revoked"]}
    there = pages(tmp_path, Memory(known))
    checked = keys.generate()
    wrong = f"{checked[:-1]}{'a' if checked[-1] != 'a' else 'b'}"
    for key, status, says in (
        (KEYS["expired"], 401, f"Key {PRINCIPALS['expired'].key_id} has expired."),
        (KEYS["revoked"], 401, f"Key {PRINCIPALS['revoked'].key_id} was revoked."),
        (KEYS["read"], 403, f"Key {bad.key_id} may not be used from {ADDRESS}."),
        (KEYS["unknown"], 401, "is not known here"),
        (wrong, 401, "checksum is wrong"),
        (keys.session_token(), 401, "session, and not a key"),
    ):
        answer = there.sign_in(key)
        assert answer.status_code == status and says in html.unescape(answer.text), (
            says,
            answer.text,
        )
        assert "Set-Cookie" not in answer.headers and key not in answer.text, says
    # A stranger's key is not told from one that never was.
    other = there.sign_in(keys.generate()).text
    assert other == there.sign_in(KEYS["unknown"]).text


def test_sign_in_page_says_who_is_signed_in(tmp_path: Path) -> None:
    token, stale = keys.session_token(), keys.session_token()
    authority = Memory({})
    authority.known[token] = PRINCIPALS["read"]
    here = pages(tmp_path, authority, limits=Limits(failures_per_minute=5))

    def login(*tokens: str, **headers: str) -> str:
        cookies = "; ".join(f"{browser.LOOPBACK_COOKIE}={one}" for one in tokens)
        return here.ask("GET", "/hokusai/login", headers={"Cookie": cookies, **headers}).text

    page = login(token)
    assert "You are signed in" in page and PRINCIPALS["read"].key_id in page
    assert 'href="keys"' in page and 'href="../"' in page and 'action="logout?next=/"' in page
    assert 'name="key"' in page  # another key takes the place of this one
    for other in (login(), login(stale), login(token, stale), login(KEYS["read"])):
        assert 'name="key"' in other and PRINCIPALS["read"].key_id not in other
    before = len(authority.addresses)
    for _ in range(20):
        login(keys.session_token())
    assert len(authority.addresses) - before < 10  # wrong ones count, as elsewhere
    # login.js tries again from this origin, and then the browser sends the cookie.
    assert 'name="key"' in login(token, **{"Sec-Fetch-Site": "cross-site"})


def test_sign_in_page_says_that_a_session_has_ended(tmp_path: Path) -> None:
    revoked, expired, over, good, slow = (keys.session_token() for _ in range(5))
    authority = Memory({})
    authority.known[revoked] = PRINCIPALS["revoked"]
    authority.known[expired] = replace(PRINCIPALS["expired"], expires_at=1.0)
    authority.known[good] = PRINCIPALS["read"]

    def said(there: Pages, *tokens: str) -> bool:
        cookies = "; ".join(f"{browser.LOOPBACK_COOKIE}={one}" for one in tokens)
        return (
            "session has ended"
            in there.ask("GET", "/hokusai/login?next=/&ended=1", headers={"Cookie": cookies}).text
        )

    here = pages(tmp_path, authority)
    for tokens in ((revoked,), (expired,), (over,)):
        assert said(here, *tokens)
    for tokens in ((), (good,), (over, slow), (KEYS["read"],)):
        assert not said(here, *tokens)
    # Nobody knows while the authority is down.
    assert not said(pages(tmp_path, Down()), over)


def test_sign_in_page_says_that_a_session_has_reached_its_lifetime(here: Pages) -> None:
    def said(*cookies: str) -> bool:
        headers = {"Cookie": "; ".join(cookies)}
        return "its time was up" in here.ask("GET", "/hokusai/login", headers=headers).text

    signed_in = here.sign_in(KEYS["read"])
    own, beside = signed_in.headers["Set-Cookie"], dict(here.added)["Set-Cookie"]
    lives = [int(re.findall(r"Max-Age=(\d+)", line)[0]) for line in (own, beside)]
    # The browser drops the session's cookie when the session ends, and keeps the other one.
    assert lives[0] == 60 and lives[1] > 86400
    kept = beside.partition(";")[0]
    assert kept.startswith(f"{browser.LOGOUT_COOKIE}=") and said(kept)
    # Whoever signs out loses it.
    here.added.clear()
    origin = {"Origin": "http://localhost"}
    here.ask("POST", "/hokusai/logout", headers=origin | {"Cookie": kept})
    assert "Max-Age=0" in dict(here.added)["Set-Cookie"]
    # MLflow's own server sets a cookie of this name as well.
    for cookies in ((), (f"{browser.LOGOUT_COOKIE}=ada",)):
        assert not said(*cookies)


def test_signing_out_keeps_the_way_back(here: Pages) -> None:
    headers = {"Origin": "http://localhost"}
    for target, location in (
        ("", "login"),
        ("?next=/", "login"),
        ("?next=/a%3Fb%3Dc%26d", "login?next=/a%3Fb%3Dc%26d"),
        ("?next=//evil.example/", "login"),
        ("?next=https://evil.example/", "login"),
    ):
        answer = here.ask("POST", f"/hokusai/logout{target}", headers=headers)
        assert (answer.status_code, answer.headers["Location"]) == (303, location), target


def test_other_site_s_sign_out_does_nothing_and_offers_no_field_for_a_key(here: Pages) -> None:
    cookie = f"{browser.LOOPBACK_COOKIE}={keys.session_token()}"
    for origin in ("https://evil.example", "null"):
        headers = {"Origin": origin, "Cookie": cookie}
        answer = here.ask("POST", "/hokusai/logout?next=/a", headers=headers)
        assert answer.status_code == 403 and "Set-Cookie" not in answer.headers
        assert "nobody was signed out" in answer.text and 'href="keys"' in answer.text
        assert "<input" not in answer.text


@pytest.mark.parametrize("path", ["/hokusai", "/hokusai/", "/hokusai/?a=b"])
def test_address_without_a_page_leads_to_the_keys(here: Pages, path: str) -> None:
    answer = here.ask("GET", path, PRINCIPALS["read"])
    assert answer.status_code == 303
    there = urljoin(f"http://x/mlflow{path}", answer.headers["Location"])
    assert there == "http://x/mlflow/hokusai/keys"


def test_path_that_is_no_page_has_a_page_and_mlflow_s_do_not(tmp_path: Path) -> None:
    here = pages(tmp_path, contact="ops@example.com")
    for path in ("/hokusai/nothing/", "/hokusai/nothing/here"):
        answer = here.ask("GET", path, PRINCIPALS["admin"])
        assert answer.status_code == 404 and "There is no such page." in answer.text
        assert "ops@example.com" in answer.text
        assert dict(answer.headers).items() >= browser.PAGE_HEADERS.items()
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", "/nothing/hokusai/", 404),
        ("POST", "/hokusai/nothing", 404),
        ("GET", "/hokusai/logout", 405),
    ):
        answer = here.ask(method, path, PRINCIPALS["admin"])
        assert answer.status_code == status
        assert ("no such page" in answer.text) == (method == "POST"), path


def test_own_page_says_since_when_and_how_often_the_key_is_used(here: Pages) -> None:
    record, _ = here.store.create(owner="Brush", scopes=["model:read"], rate_limit_per_hour=1000)
    me = replace(PRINCIPALS["read"], key_id=record.key_id, rate_limit_per_hour=1000)
    page = here.ask("GET", "/hokusai/keys", me).text
    found = dict(re.findall(r"<dt>(.*?)</dt><dd.*?>(.*?)</dd>", page, re.DOTALL))
    assert "UTC" in found["Created"] and found["Last use"] == "never"
    assert found["Uses"].startswith("0 in 24 hours") and found["Questions"] == (
        "Ask the server’s operator"
    )
    assert "1,000 of 1,000 requests left" in found["Rate limit"]
    # The store has no record of another authority's key.
    other = here.ask("GET", "/hokusai/keys", PRINCIPALS["read"]).text
    assert "<dt>Created" not in other and "<dt>Questions" in other


@pytest.mark.parametrize(
    ("level", "scope", "words"),
    [
        ("full", "model:write", "register; only your own models, and those shared with you"),
        ("writes", "model:write", "register; it changes only your own models, and those shared"),
        ("writes", "model:read", "read<"),
        ("observe", "model:write", "register<"),
        ("full", "mlflow:write", "write<"),
    ],
)
def test_own_page_says_whose_models_the_key_may_use(
    level: str, scope: str, words: str, tmp_path: Path
) -> None:
    here = pages(tmp_path, isolation=Isolation(Mode(), level))
    me = replace(PRINCIPALS["read"], scopes=frozenset({scope}))
    assert words in here.ask("GET", "/hokusai/keys", me).text.partition("<dt>May")[2]


def test_wrong_keys_are_audited_by_address(here: Pages) -> None:
    for key in (KEYS["unknown"], KEYS["unknown"], "hk live"):
        assert here.sign_in(key).status_code == 401
    assert here.store.database.audited() == []
    here.sessions.write()
    (event,) = here.store.database.audited()
    assert (event["event"], event["address"]) == ("session.refused", ADDRESS)
    assert event["detail"] == {"count": 3, "reason": "KEY_MALFORMED, KEY_UNKNOWN"}


def links(text: str) -> dict[str, str]:
    """Return the links of a page by their text, as a browser follows them from /hokusai/keys."""
    found = re.findall(r'<a [^>]*?href="([^"]*)"[^>]*>([^<]+)</a>', text)
    return {words: f"/hokusai/{html.unescape(target)}" for target, words in found}


def shown(text: str) -> list[str]:
    return re.findall(r'<tr role="row" id="(key_[0-9a-f]+)"', text)


def test_administrator_pages_through_all_keys_and_others_see_none(here: Pages) -> None:
    made = [here.store.create(owner=f"owner {n}", scopes=["mlflow:read"])[0] for n in range(5)]
    newest_first = [record.key_id for record in reversed(made)]
    page = here.ask("GET", "/hokusai/keys?max_results=2&query=owner", PRINCIPALS["admin"]).text
    seen, ranges = [], []
    while True:
        seen += shown(page)
        ranges.append(re.sub("<[^>]+>", "", page.split('class="count">')[1].split("</p>")[0]))
        if "Next" not in links(page):
            break
        # The links keep the other parameters.
        assert "query=owner" in links(page)["Next"]
        page = here.ask("GET", links(page)["Next"], PRINCIPALS["admin"]).text
    assert seen == newest_first
    assert ranges == ["1–2 of 5", "3–4 of 5", "5–5 of 5"]
    back = here.ask("GET", links(page)["Previous"], PRINCIPALS["admin"]).text
    assert shown(back) == newest_first[2:4]
    assert shown(here.ask("GET", links(back)["First"], PRINCIPALS["admin"]).text) == seen[:2]
    others = here.ask("GET", "/hokusai/keys", PRINCIPALS["write"]).text
    assert not any(record.key_id in others for record in made) and "New key" not in others


def test_list_is_ordered_by_each_column_and_hides_ended_keys(here: Pages) -> None:
    first = here.store.create(owner="a", name="z", scopes=["model:read"])[0]
    second = here.store.create(owner="B", name="y", scopes=["mlflow:read"], expires_at=2e9)[0]
    ended = here.store.create(owner="c", name="x", scopes=["model:read"], expires_at=1.0)[0]
    here.store.revoke(gone := here.store.create(owner="d", scopes=["model:read"])[0].key_id)
    page = here.ask("GET", "/hokusai/keys", PRINCIPALS["admin"]).text
    assert shown(page) == [second.key_id, first.key_id]
    assert 'aria-sort="descending"><a' in page
    for title, order in (
        ("Owner", [first, second]),
        ("Key", [second, first]),
        ("Scopes", [second, first]),
        ("Ends", [second, first]),
        ("Created", [first, second]),
    ):
        sorted_page = here.ask("GET", links(page)[title], PRINCIPALS["admin"]).text
        assert shown(sorted_page) == [one.key_id for one in order], title
        again = here.ask("GET", links(sorted_page)[title], PRINCIPALS["admin"]).text
        assert shown(again) == [one.key_id for one in reversed(order)], title
    for query, expected in (
        ("state=ended", {ended.key_id, gone}),
        ("state=revoked", {gone}),
        ("state=any", {first.key_id, second.key_id, ended.key_id, gone}),
        ("scope=mlflow:read", {second.key_id}),
        ("owner=a", {first.key_id}),
        ("unused_for=7776000", set()),
        ("expires_within=2592000", set()),
    ):
        page = here.ask("GET", f"/hokusai/keys?{query}", PRINCIPALS["admin"]).text
        assert set(shown(page)) == expected, query


def test_page_of_a_key_tells_its_history(here: Pages) -> None:
    by = Actor("Operator", "key_op", "192.0.2.9", "r")
    old = here.store.create(owner="ACME", name="one", scopes=["model:read"], by=by)[0]
    new, key, _ = here.store.rotate(old.key_id, by=Actor("Rotator", "key_r", "192.0.2.9", "r"))
    other = here.store.create(owner="ACME", name="other", scopes=["model:read"])[0]
    here.sessions.begin(key, 60.0, Actor("ACME", new.key_id, "198.51.100.7", "r"))
    uses = usage.UseCounter(here.store.database)
    for _ in range(3):
        uses.add(new.key_id)
    uses.write()
    page = here.ask("GET", f"/hokusai/keys/{new.key_id}", PRINCIPALS["admin"]).text
    for part in (
        "<b>Rotator</b>",
        f'<dt>Replaces</dt><dd><a href="../keys/{old.key_id}">',
        "3 uses in 31 days; at most 3 on one day",
        '<td class="number">3</td>',
        "<code>198.51.100.7</code>",
        f"the key ends in <code>…{key[-4:]}</code>",
        f'href="../keys/{other.key_id}"',
        "<code>session.begun</code>",
        'href="../static/hokusai.css"',
    ):
        assert part in page, part
    here.store.revoke(old.key_id, Actor("Revoker"))
    page = here.ask("GET", f"/hokusai/keys/{old.key_id}", PRINCIPALS["admin"]).text
    assert "<b>Revoker</b>" in page and f'by <a href="../keys/{new.key_id}">' in page
    assert "<b>Operator</b>" in page and "None in the audit log." in page
    missing = here.ask("GET", "/hokusai/keys/key_none", PRINCIPALS["admin"])
    assert missing.status_code == 404 and "There is no key" in missing.text


class TestForms:
    TOKEN = keys.session_token()

    def send(self, here: Pages, path: str, kind: str = "admin", **fields: Any) -> TestResponse:
        fields = {"csrf": browser.csrf_token(self.TOKEN), **fields}
        cookie = {"Cookie": f"{browser.LOOPBACK_COOKIE}={self.TOKEN}"}
        path = f"/hokusai/keys/{path}"
        return here.ask("POST", path, PRINCIPALS[kind], data=fields, headers=cookie)

    @pytest.fixture(autouse=True)
    def at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(keys_api, "REVOKED_EVERYWHERE", 0)

    def test_key_is_made_edited_rotated_and_revoked(self, here: Pages) -> None:
        cookie = {"Cookie": f"{browser.LOOPBACK_COOKIE}={self.TOKEN}"}
        fields: dict[str, Any] = {
            "owner": "ACME",
            "name": "form",
            "note": "a\r\nb",
            "scopes": ["model:write", "model:read"],
            "networks": "192.0.2.0/24\r\n2001:db8::/32",
            "rate_limit_per_hour": "5",
            "models": "acme-*\r\n",
            "no_delete": "on",
            "expiry": "custom",
            "days": "3",
            "environment": "test",
        }
        for name, wrong, says in (
            ("owner", "", "owner: "),
            ("scopes", [], "scopes: "),
            ("days", "x", "expires_in: "),
            ("rate_limit_per_hour", "-1", "rate_limit_per_hour: "),
        ):
            answer = self.send(here, "new", **{**fields, name: wrong})
            assert answer.status_code == 400 and says in html.unescape(answer.text), name
            # The form keeps what was typed.
            assert 'value="form"' in answer.text and "acme-*</textarea>" in answer.text, name
        assert here.store.page().total == 0
        page = self.send(here, "new", **fields).text
        (record,) = here.store.each()
        (key,) = re.findall(r">(hk_test_[0-9A-Za-z]+)<", page)
        assert here.store.find(key) == record
        assert record.expires_at is not None
        assert abs(record.expires_at - record.created_at - 3 * 86400) < 60
        assert (record.note, record.networks) == ("a\nb", ("192.0.2.0/24", "2001:db8::/32"))
        assert (record.rate_limit_per_hour, record.models, record.no_delete) == (
            5,
            ("acme-*",),
            True,
        )
        assert record.scopes == ("model:read", "model:write")

        # The form of a key holds what it is, and changes only what is changed in it.
        path = f"{record.key_id}/edit"
        form = here.ask("GET", f"/hokusai/keys/{path}", PRINCIPALS["admin"], headers=cookie).text
        assert 'value="ACME"' in form and "192.0.2.0/24\n2001:db8::/32</textarea>" in form
        assert form.count(" checked>") == 3 and 'value="5"' in form
        fields |= {"name": "changed", "expiry": "keep", "rate_limit_per_hour": ""}
        assert self.send(here, path, **fields).status_code == 303
        changed = here.store.get(record.key_id)
        assert changed == replace(record, name="changed", rate_limit_per_hour=None)
        detail = here.store.database.audited(limit=1)[0]["detail"]
        assert detail == {"name": "changed", "rate_limit_per_hour": None}
        refused = self.send(here, path, **{**fields, "scopes": "mlflow:write"})
        assert refused.status_code == 400 and "never narrowed" in refused.text

        for wrong in ("soon", "-1", "9" * 5000):
            refused = self.send(here, f"{record.key_id}/rotate", overlap=wrong)
            assert refused.status_code == 400 and "overlap" in refused.text, wrong[:9]
        page = self.send(here, f"{record.key_id}/rotate", overlap="0").text
        (key,) = re.findall(r">(hk_test_[0-9A-Za-z]+)<", page)
        new = here.store.find(key)
        assert new is not None and here.store.get(record.key_id).replaced_by == new.key_id
        again = self.send(here, f"{record.key_id}/rotate", overlap="0")
        assert again.status_code == 409 and "create a new one" in again.text
        answer = self.send(here, f"{new.key_id}/revoke")
        assert (answer.status_code, answer.headers["Location"][:23]) == (
            303,
            f"../{new.key_id}"[:23],
        )
        assert here.store.get(new.key_id).revoked_at is not None

    def test_expiry_that_the_form_offers_first_is_taken(self, here: Pages) -> None:
        form = here.ask("GET", "/hokusai/keys/new", PRINCIPALS["admin"]).text
        (usual,) = re.findall(r'<option value="([^"]+)" selected>', form)
        offered = re.findall(r'<option value="([0-9.]+)">', form)
        assert offered
        for expiry in (usual, *offered):
            fields = {"owner": "ACME", "scopes": "model:read", "expiry": expiry}
            assert self.send(here, "new", **fields).status_code == 200, expiry
            record = here.store.page().records[0]
            days = None if expiry == "never" else float(expiry)
            lived = record.expires_at and (record.expires_at - record.created_at) / 86400
            assert lived == (days and pytest.approx(days, abs=0.01)), expiry

    def test_key_is_imported(self, here: Pages) -> None:
        old = "hk_live_" + "a1B2" * 8
        fields = {"owner": "ACME", "scopes": "model:read", "expiry": "never", "key": old}
        answer = self.send(here, "new", **fields, environment="test")
        assert answer.status_code == 303 and here.store.find(old) is not None
        assert self.send(here, "new", **fields).status_code == 409

    def test_last_administrator_is_revoked_only_by_force(self, here: Pages) -> None:
        record = here.store.create(owner="root", scopes=["mlflow:admin"])[0]
        answer = self.send(here, f"{record.key_id}/revoke")
        assert answer.status_code == 409 and "last key that may manage" in answer.text
        assert 'name="force"' in answer.text
        assert self.send(here, f"{record.key_id}/revoke", force="true").status_code == 303

    def test_key_rotates_itself_and_no_other(self, here: Pages) -> None:
        other = here.store.create(owner="ACME", scopes=["model:read"])[0]
        path = f"{other.key_id}/rotate"
        assert self.send(here, path, "write", overlap="0").status_code == 403
        assert here.ask("GET", f"/hokusai/keys/{path}", PRINCIPALS["write"]).status_code == 403
        assert here.store.get(other.key_id).replaced_by is None

    def test_several_keys_are_rotated_and_revoked_after_a_question(self, here: Pages) -> None:
        made = [here.store.create(owner="ACME", scopes=["model:read"])[0] for _ in range(3)]
        ended = here.store.revoke(made[2].key_id)
        ids = [one.key_id for one in made]
        asked = self.send(here, "selected", action="rotate", key_id=ids)
        assert "Rotate 2 keys?" in asked.text and "1 of the selected keys" in asked.text
        assert here.store.page().total == 3
        page = self.send(
            here, "selected", action="rotate", key_id=ids, confirmed="yes", overlap="3600"
        )
        assert len(re.findall(r">hk_live_", page.text)) == 2 and here.store.page().total == 5
        asked = self.send(here, "selected", action="revoke", key_id=ids, back="query=a%26b")
        assert "Revoke 2 keys?" in asked.text and 'href="../keys?query=a%26b"' in asked.text
        answer = self.send(here, "selected", action="revoke", key_id=ids, confirmed="yes")
        assert answer.status_code == 303
        assert all(here.store.get(one).revoked_at for one in ids)
        assert here.store.get(ids[2]) == ended
        for wrong in ({"action": "burn", "key_id": ids}, {"key_id": ids}):
            assert self.send(here, "selected", **wrong).status_code == 400
        assert "No key is selected" in self.send(here, "selected", action="revoke").text
        unknown = self.send(here, "selected", action="revoke", key_id="key_none")
        assert unknown.status_code == 404

    @pytest.mark.parametrize("form", ["selected", "rotate", "new"])
    def test_no_key_is_made_that_is_not_shown(self, here: Pages, form: str) -> None:
        """Both failures are the database's: at the second new key, and at what the page reads."""
        made = [here.store.create(owner="ACME", scopes=["model:read"])[0] for _ in range(3)]
        before, fields = list(here.store.each()), {"key_id": [one.key_id for one in made[:2]]}
        paths = {"selected": "selected", "rotate": f"{made[0].key_id}/rotate", "new": "new"}
        own = {
            "selected": {**fields, "action": "rotate", "confirmed": "yes"},
            "new": {"owner": "ACME", "scopes": "model:read", "expiry": "never"},
        }.get(form, {})

        def sent() -> TestResponse:
            cookie = {"Cookie": f"{browser.LOOPBACK_COOKIE}={self.TOKEN}"}
            data = {"csrf": browser.csrf_token(self.TOKEN), **own}
            me = replace(PRINCIPALS["admin"], key_id=made[2].key_id)
            return here.ask("POST", f"/hokusai/keys/{paths[form]}", me, data=data, headers=cookie)

        for trigger in (
            "BEFORE INSERT ON hokusai_auth_keys BEGIN SELECT CASE WHEN (SELECT count(*) FROM "
            f"hokusai_auth_keys) > {3 if form == 'selected' else 2} THEN json('{{') END",
            # The store can't read the caller's own key any more, for which each page looks.
            "AFTER INSERT ON hokusai_auth_keys BEGIN UPDATE hokusai_auth_keys SET networks = '{' "
            f"WHERE key_id = '{made[2].key_id}'",
        ):
            with here.store.database.engine.begin() as connection:
                connection.exec_driver_sql(f"CREATE TRIGGER failing {trigger}; END")
            answer = sent()
            shown = re.findall(r">(hk_live_[0-9A-Za-z]+)<", answer.text)
            with here.store.database.engine.begin() as connection:
                connection.exec_driver_sql("DROP TRIGGER failing")
                connection.exec_driver_sql("UPDATE hokusai_auth_keys SET networks = '[]'")
            now = {one.key_id for one in here.store.each()}
            found = [here.store.find(key) for key in shown]
            new = {one.key_id for one in found if one is not None}
            assert now - {one.key_id for one in before} == new, trigger
            if answer.status_code != 200:
                assert answer.status_code == 503 and list(here.store.each()) == before, trigger
        assert len(new) == (2 if form == "selected" else 1)

    def test_all_keys_of_a_leaver_are_revoked(self, here: Pages) -> None:
        theirs = [here.store.create(owner="ACME", scopes=["model:read"])[0] for _ in range(3)]
        theirs.append(
            here.store.create(
                owner="ACME", scopes=["model:read"], environment="ci", trust_id="trust_1"
            )[0]
        )
        other = here.store.create(owner="ACME Ltd", scopes=["model:read"])[0]
        admin = here.store.create(owner="ACME", scopes=["mlflow:admin"])[0]
        fields = {"action": "revoke", "owner": "ACME"}
        assert "Revoke all 5 keys of ACME?" in self.send(here, "selected", **fields).text
        answer = self.send(here, "selected", **fields, confirmed="yes")
        assert answer.status_code == 303
        assert all(here.store.get(one.key_id).revoked_at for one in theirs)
        # The last key that may manage others stays, and the answer says so.
        assert here.store.get(other.key_id).revoked_at is None
        assert here.store.get(admin.key_id).revoked_at is None
        cookie = {"Cookie": f"{browser.LOOPBACK_COOKIE}={self.TOKEN}"}
        path = "/hokusai/" + answer.headers["Location"].removeprefix("../")
        page = here.ask("GET", path, PRINCIPALS["admin"], headers=cookie).text
        assert "4 keys revoked" in page and "the last key that may manage keys" in page

    def test_links_of_a_leaver_are_taken_back_even_if_no_key_is_left(self, here: Pages) -> None:
        links = Links(here.store.database)
        links.create(owner="ACME", scopes=["model:read"])
        fields = {"action": "revoke", "owner": "ACME"}
        asked = self.send(here, "selected", **fields).text
        assert "Revoke all 1 link of ACME?" in asked and len(links.each()) == 1
        answer = self.send(here, "selected", **fields, confirmed="yes")
        assert answer.status_code == 303 and links.waiting_of("ACME") == []
        assert "ACME has no valid key." in self.send(here, "selected", **fields).text

    def test_trusts_of_a_leaver_are_removed_even_if_no_key_is_left(self, here: Pages) -> None:
        trusts = Trusts(here.store.database)
        for owner in ("ACME", "GLOBEX"):
            job = workload(gitlab=f"{owner}/models")
            trusts.add(job, owner=owner, scopes=("model:write",), ttl=900.0)
        fields = {"action": "revoke", "owner": "ACME"}
        asked = self.send(here, "selected", **fields).text
        assert "Revoke all 1 trust of ACME?" in asked and len(trusts.each()) == 2
        here.store.create(owner="ACME", scopes=["model:read"])
        Links(here.store.database).create(owner="ACME", scopes=["model:read"])
        asked = self.send(here, "selected", **fields).text
        assert "Revoke all 1 key, 1 link and 1 trust of ACME?" in asked
        answer = self.send(here, "selected", **fields, confirmed="yes")
        assert answer.status_code == 303
        assert [one.trust.owner for one in trusts.each()] == ["GLOBEX"]
        cookie = {"Cookie": f"{browser.LOOPBACK_COOKIE}={self.TOKEN}"}
        path = "/hokusai/" + answer.headers["Location"].removeprefix("../")
        page = here.ask("GET", path, PRINCIPALS["admin"], headers=cookie).text
        assert "1 trust removed." in page

    def test_which_key_is_this(self, here: Pages) -> None:
        record, key = here.store.create(owner="ACME", name="mine", scopes=["model:read"])
        for text in (key, f" {key}\n", key[-4:], f"…{key[-4:]}"):
            answer = self.send(here, "find", key=text)
            assert f'href="../keys/{record.key_id}"' in answer.text, text
            assert key not in answer.text
        retyped = key[:-1] + ("0" if key[-1] != "0" else "1")
        other = "hk_live_" + "a1B2" * 8
        for text, status, says in (
            (other, 200, "Not found."),
            ("zzzz" if key[-4:] != "zzzz" else "yyyy", 200, "Not found."),
            (retyped, 400, "its checksum is wrong"),
            ("", 400, "can't be a key"),
            ("two words", 400, "can't be a key"),
        ):
            answer = self.send(here, "find", key=text)
            assert answer.status_code == status, text
            assert says in html.unescape(answer.text), text
            assert not text or text not in answer.text.replace("words", ""), text

    def test_forms_without_the_token_of_the_session_do_nothing(self, here: Pages) -> None:
        record = here.store.create(owner="ACME", scopes=["model:read"])[0]
        forms = (
            "new",
            "find",
            "selected",
            *(f"{record.key_id}/{x}" for x in ("edit", "rotate", "revoke")),
        )
        for path in forms:
            for token in ("", browser.csrf_token(keys.session_token())):
                answer = self.send(here, path, csrf=token, action="revoke", confirmed="yes")
                assert answer.status_code == 400, path
        assert list(here.store.each()) == [record]


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


def test_logout_of_mlflow_s_menu_ends_the_session(here: Pages) -> None:
    """Its script can't delete the session's cookie, but it deletes one that stands beside it."""
    path = "/ajax-api/2.0/mlflow/users/current"
    record, key = here.store.create(owner="Brush", scopes=["model:read"])
    caller = replace(PRINCIPALS["read"], key_id=record.key_id)
    token = here.sessions.begin(key, 3600, Actor("Brush", record.key_id))
    cookies = [f"{browser.LOOPBACK_COOKIE}={token}", f"{browser.LOGOUT_COOKIE}=signed-in"]

    def ask(*kept: str) -> TestResponse:
        return here.ask("GET", path, caller, headers={"Cookie": "; ".join(kept)})

    assert (ask().json or {})["is_basic_auth"] is False  # a program has nothing to sign out of
    assert (ask(*cookies).json or {})["is_basic_auth"] is True
    assert here.sessions.find(token) is not None
    answer = ask(cookies[0])
    assert answer.status_code == 401 and (answer.json or {})["error"] == "SESSION_ENDED"
    gone = [answer.headers["Set-Cookie"], dict(here.added)["Set-Cookie"]]
    for line, name in zip(gone, (browser.LOOPBACK_COOKIE, browser.LOGOUT_COOKIE), strict=True):
        assert line.startswith(f"{name}=;") and "Max-Age=0" in line
    assert here.sessions.find(token) is None


def test_mlflow_s_account_page_leads_to_the_keys(here: Pages) -> None:
    roles = here.ask("GET", "/ajax-api/3.0/mlflow/users/roles/list", PRINCIPALS["read"]).json
    assert roles is not None
    names = [role["name"] for role in roles["roles"]]
    assert names[0] == "mlflow:read" and "hokusai/keys" in names[1]
    assert all(not role["permissions"] for role in roles["roles"])
    path = "/ajax-api/2.0/mlflow/users/update-password"
    answer = here.ask("PATCH", path, PRINCIPALS["read"], json={"password": "canary"})
    assert answer.status_code == 400 and "hokusai/keys" in answer.text
    assert "canary" not in answer.text


def test_failing_page_of_keys_says_why(here: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise AuthorityUnavailable("postgresql://canary")

    for error, status in (("page_token=x", 400), ("max_results=x", 400), ("", 503)):
        if status == 503:
            monkeypatch.setattr(here.store, "page", fail)
        answer = here.ask("GET", f"/hokusai/keys?{error}", PRINCIPALS["admin"])
        assert answer.status_code == status and "text/html" in answer.content_type, error
        assert answer.headers.get("Retry-After") == ("60" if status == 503 else None), error
        assert "canary" not in answer.text

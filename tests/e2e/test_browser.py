"""What a person does, in a real Chromium: signs in, looks around in MLflow, manages keys.

And what other people's pages do to that person's browser.
"""

from __future__ import annotations

import http.server
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa
from mlflow import MlflowClient
from mlflow.exceptions import RestException

from mlflow_hokusai_auth.authorities.cache import MAX_UNCONFIRMED
from mlflow_hokusai_auth.core.browser import LOGOUT_COOKIE, LOOPBACK_COOKIE
from mlflow_hokusai_auth.store.database import Actor
from mlflow_hokusai_auth.store.records import KeyFilter
from mlflow_hokusai_auth.store.sessions import Sessions
from mlflow_hokusai_auth.store.tables import KEYS
from tests.e2e.axe import findings
from tests.e2e.conftest import needs_chromium
from tests.e2e.parts import post
from tests.harness import Server, serve, wait_until

playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (it is in the extra `test`)"
)
Browser, BrowserContext, Page = (
    playwright_api.Browser,
    playwright_api.BrowserContext,
    playwright_api.Page,
)
expect = playwright_api.expect
# Of pages that load megabytes of script, on a machine that may do other things.
expect.set_options(timeout=60_000)

PREFIXES = ("", "/api/mlflow")

pytestmark = [pytest.mark.servers, needs_chromium]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One of its own: the tests revoke every key that manages keys."""
    with serve(tmp_path_factory.mktemp("browser")) as running:
        yield running


class Person:
    """Somebody with a browser of their own, and what went wrong in it."""

    def __init__(self, context: BrowserContext, server: Server) -> None:
        self.context = context
        self.server = server
        self.wrong: list[str] = []
        self.dialogs: list[str] = []
        context.add_init_script(
            "addEventListener('securitypolicyviolation', e =>"
            " console.error('CSP', e.violatedDirective, e.blockedURI))"
        )
        self.page: Page = context.new_page()
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.wrong.append(f"page error: {error}"))
        self.page.on("requestfailed", self._failed)
        self.page.on("response", self._response)
        self.page.on("dialog", self._dialog)

    def _console(self, message: Any) -> None:
        if message.type == "error" and not _by_the_way(message.location["url"]):
            self.wrong.append(f"console: {message.text}")

    def _failed(self, request: Any) -> None:
        # What a page was still asking for when it was left.
        if "ERR_ABORTED" not in (request.failure or ""):
            self.wrong.append(f"failed: {request.url} {request.failure}")

    def _response(self, response: Any) -> None:
        if response.status >= 400 and not _by_the_way(response.url):
            self.wrong.append(f"{response.status} {response.request.method} {response.url}")

    def _dialog(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def open(self, path: str) -> Page:
        self.page.goto(self.server.origin + path)
        return self.page

    @property
    def dialog(self) -> Any:
        """The one that is open."""
        return self.page.locator("dialog[open]")

    def dismiss_new_key(self) -> None:
        """Close the dialog that shows a new key without copying the key: it asks once."""
        done = self.dialog.get_by_role("button", name="Done")
        done.click()
        expect(self.dialog.get_by_role("status")).to_contain_text("Not copied yet.")
        done.click()
        expect(self.dialog).to_have_count(0)

    def sign_in(self, key: str) -> None:
        """With the form that is shown."""
        self.page.get_by_label("API key").fill(key)
        self.page.keyboard.press("Enter")

    def hold(self, key: str) -> None:
        """Be signed in with `key` without the form, which only takes ten attempts a minute."""
        store = self.server.store
        record = store.find(key)
        assert record is not None
        by = Actor(record.owner, record.key_id)
        token = Sessions(store.database).begin(key, 3600, by)
        cookie = {"url": self.server.origin, "sameSite": "Strict"}
        self.context.add_cookies(
            [
                {**cookie, "name": LOGOUT_COOKIE, "value": "signed-in"},
                {**cookie, "name": LOOPBACK_COOKIE, "value": token, "httpOnly": True},
            ]
        )


def _by_the_way(url: str) -> bool:
    """MLflow's pages always ask for its assistant, which is off unless the operator switches it on."""
    return "/ajax-api/3.0/mlflow/assistant/" in url


NewPerson = Callable[..., Person]


@pytest.fixture
def person(browser: Browser, server: Server) -> Iterator[NewPerson]:
    contexts: list[BrowserContext] = []

    def new(key: str | None = None, **options: Any) -> Person:
        given = {"viewport": {"width": 1280, "height": 900}, "locale": "en-GB"}
        contexts.append(browser.new_context(**given | options, reduced_motion="reduce"))
        contexts[-1].set_default_timeout(60_000)
        one = Person(contexts[-1], server)
        if key is not None:
            one.hold(key)
        return one

    yield new
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def seen(server: Server) -> dict[str, str]:
    """What there is to see in MLflow: an experiment's id, and names."""
    admin = server.key("mlflow:admin")

    made = post(server, "/api/2.0/mlflow/experiments/create", admin, {"name": "wave-heights"})
    post(server, "/api/2.0/mlflow/registered-models/create", admin, {"name": "great-wave"})
    return {"id": made["experiment_id"], "experiment": "wave-heights", "model": "great-wave"}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_whole_way(
    prefix: str,
    person: NewPerson,
    server: Server,
    seen: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sign in, look at MLflow, make a key, hand it over, see it used, revoke it."""
    admin = person()
    admin.context.grant_permissions(["clipboard-read", "clipboard-write"])
    there = f"{prefix}/#/experiments/{seen['id']}"
    page = admin.open(there)
    expect(page).to_have_title("Sign in · MLflow")
    admin.sign_in(server.key("mlflow:admin"))
    page.wait_for_url(f"{server.origin}{there}**")
    expect(page.get_by_text(seen["experiment"]).first).to_be_visible()
    # Not by its role: MLflow shows newcomers a hint, which hides all else from assistive technology.
    expect(page.get_by_label("Account menu for test")).to_be_visible()
    admin.open(f"{prefix}/#/models/{seen['model']}")
    expect(page.get_by_text(seen["model"]).first).to_be_visible()

    admin.open(f"{prefix}/hokusai/keys")
    name = f"by hand {prefix or '/'}"
    page.get_by_role("button", name="New key").click()
    admin.dialog.get_by_label("Owner").fill("Kanagawa")
    admin.dialog.get_by_role("textbox", name="Name").fill(name)
    admin.dialog.get_by_label("model:write").check()
    admin.dialog.get_by_role("button", name="Create key").click()
    made = page.get_by_role("dialog", name="Copy the key now")
    made.get_by_role("button", name="Copy", exact=True).click()
    expect(made.get_by_text("Copied.")).to_be_visible()
    key = page.evaluate("navigator.clipboard.readText()")
    assert server.store.find(key) is not None
    made.get_by_role("button", name="Copy both lines").click()
    expect(made.get_by_role("status")).to_have_text("Copied.")
    lines = page.evaluate("navigator.clipboard.readText()").splitlines()
    assert lines == [
        f"export HOKUSAI_API_KEY={key}",
        f"export MLFLOW_TRACKING_URI={server.origin}{prefix}",
    ]
    made.get_by_role("button", name="Done").click()
    assert key not in page.content()
    row = page.get_by_role("row").filter(has_text=name)
    expect(row.get_by_text("never")).to_have_count(1)  # no last use
    expect(page.get_by_role("button", name="New key")).to_be_focused()

    for line in lines:
        monkeypatch.setenv(*line.removeprefix("export ").split("=", 1))
    # Another test of this process may have set MLflow's tracking URI, which then goes first.
    monkeypatch.setenv("HOKUSAI_ALLOWED_ORIGINS", server.origin)
    client = MlflowClient(tracking_uri=f"{server.origin}{prefix}")
    assert [model.name for model in client.search_registered_models()] == [seen["model"]]
    wait_until(
        lambda: bool(admin.open(f"{prefix}/hokusai/keys")) and row.get_by_role("img").count()
    )
    expect(row.get_by_role("img", name="use")).to_be_visible()

    supplier = person()
    supplier.open(f"{prefix}/#/models/{seen['model']}")
    supplier.sign_in(key)
    expect(supplier.page.get_by_text(seen["model"]).first).to_be_visible()

    row.get_by_role("button", name=f"Revoke {name}").click()
    admin.dialog.get_by_role("button", name="Revoke key").click()
    expect(page.locator("#status")).to_have_text(f"{name} revoked and refused everywhere.")
    expect(row).to_have_count(0)
    page.locator("select[name=state]").select_option("Revoked")
    page.get_by_role("button", name="Filter").click()
    expect(row).to_contain_text("revoked")
    supplier.page.reload()
    expect(supplier.page).to_have_title("Sign in · MLflow")
    with pytest.raises(RestException, match="revoked"):
        client.search_registered_models()

    page.get_by_role("button", name="Sign out").click()
    expect(page).to_have_title("Sign in · MLflow")
    admin.open(f"{prefix}/hokusai/keys")
    expect(page).to_have_title("Sign in · MLflow")
    assert admin.wrong == supplier.wrong == []


@pytest.mark.parametrize("prefix", PREFIXES)
def test_from_mlflow_and_back(prefix: str, person: NewPerson, server: Server) -> None:
    """MLflow's account menu leads to the address of the keys, and out."""
    record, key = server.store.create(owner="Hiroshige", scopes=["model:read"])
    one = person()
    page = one.open(f"{prefix}/")
    one.sign_in(key)
    menu = page.get_by_label("Account menu for Hiroshige")
    menu.click()
    page.get_by_role("menuitem", name="Account").click()
    expect(page.get_by_text("model:read")).to_be_visible()
    expect(page.get_by_text("Your key: hokusai/keys on this server")).to_be_visible()
    one.open(f"{prefix}/hokusai/login")
    expect(page.get_by_role("main")).to_contain_text(record.key_id)
    page.get_by_role("link", name="API keys").click()
    expect(page.get_by_role("heading", name="Your API key")).to_be_visible()
    page.get_by_role("link", name="Open MLflow").click()
    (cookie,) = [one for one in one.context.cookies() if one["name"] == LOOPBACK_COOKIE]
    sessions = Sessions(server.store.database)
    assert sessions.find(cookie["value"]) is not None
    assert one.wrong == []
    menu.click()
    page.get_by_role("menuitem", name="Logout").click()
    expect(page).to_have_title("Sign in · MLflow")
    assert sessions.find(cookie["value"]) is None
    assert not one.context.cookies()
    assert all("401" in line for line in one.wrong), one.wrong
    one.open(f"{prefix}/hokusai/keys")
    expect(page).to_have_title("Sign in · MLflow")


@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing_while_signing_in(width: int, person: NewPerson, server: Server) -> None:
    record, gone = server.store.create(owner="Gone", scopes=["model:read"])
    server.store.revoke(record.key_id)
    one = person(viewport={"width": width, "height": 800}, color_scheme="dark", bypass_csp=True)
    page = one.open("/hokusai/login")

    assert findings(page) == []
    one.sign_in(gone)
    expect(page.get_by_role("alert")).to_contain_text(f"Key {record.key_id} was revoked.")
    assert findings(page) == []
    one.hold(server.key("model:read"))
    one.open("/hokusai/login")
    expect(page.get_by_role("heading", name="You are signed in")).to_be_visible()
    assert findings(page) == []
    page.get_by_role("link", name="API keys").click()
    expect(page.get_by_role("heading", name="Your API key")).to_be_visible()
    assert findings(page) == []


def test_another_key_opens_a_page_that_was_refused(person: NewPerson, server: Server) -> None:
    one = person(server.key("model:read"))
    page = one.open("/hokusai/keys/new")
    page.get_by_role("link", name="Sign in with another key").click()
    expect(page.get_by_role("heading", name="You are signed in")).to_be_visible()
    expect(page.get_by_role("link", name="Open MLflow")).to_have_js_property(
        "href", f"{server.origin}/"
    )
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in to MLflow")).to_be_visible()
    one.hold(server.key("model:read"))
    page.reload()
    expect(page.get_by_role("heading", name="You are signed in")).to_be_visible()
    one.sign_in(server.key("mlflow:admin"))
    page.wait_for_url(f"{server.origin}/hokusai/keys/new")
    expect(page.get_by_role("heading", name="New key")).to_be_visible()


def test_the_keyboard_is_enough(person: NewPerson, server: Server) -> None:
    admin = person(server.key("mlflow:admin"))
    page = admin.open("/hokusai/keys")
    press = page.keyboard.press
    new_key = page.get_by_role("button", name="New key")

    def tab_to(name: str) -> None:
        for _ in range(30):
            press("Tab")
            focus = page.evaluate(
                "(e => e.ariaLabel || e.labels?.[0]?.textContent || e.textContent)"
                "(document.activeElement)"
            )
            if focus.strip().startswith(name):
                return
        raise AssertionError(f"Tab does not lead to {name!r}")

    tab_to("New key")
    press("Enter")
    expect(admin.dialog.get_by_label("Owner")).to_be_focused()
    press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(new_key).to_be_focused()
    press("Enter")
    page.keyboard.type("Keyboard only")
    press("Enter")
    expect(admin.dialog.get_by_label("model:read")).to_be_focused()
    expect(admin.dialog.get_by_label("model:read")).to_have_accessible_description(
        "Choose at least one scope."
    )
    tab_to("mlflow:read")
    press("Space")
    press("Enter")
    made = page.get_by_role("dialog", name="Copy the key now")
    expect(made).to_be_visible()
    press("Escape")
    expect(made.get_by_role("status")).to_contain_text("Not copied yet.")
    expect(made.get_by_role("status")).to_have_class("status warns")
    # Without permission to write to the clipboard, so the page has to copy in the older way.
    tab_to("Copy")
    press("Enter")
    expect(made.get_by_role("status")).to_have_text("Copied.")
    press("Escape")
    expect(made).to_be_hidden()
    expect(new_key).to_be_focused()
    row = page.get_by_role("row").filter(has_text="Keyboard only")
    edit = row.get_by_role("button", name="Edit")
    edit.focus()
    press("Enter")
    page.keyboard.press("Control+A")
    page.keyboard.type("Keyboard still")
    press("Enter")
    row = page.get_by_role("row").filter(has_text="Keyboard still")
    expect(row.get_by_role("button", name="Edit")).to_be_focused()
    assert admin.wrong == []


def test_what_can_be_done_to_a_key(person: NewPerson, server: Server) -> None:
    """Take in, edit, rotate; mistakes are said in the dialog; the list can be filtered and paged."""
    admin = person(server.key("mlflow:admin"))
    page = admin.open("/hokusai/keys")
    old = "hk_live_" + "a1B2" * 8
    page.get_by_role("button", name="New key").click()
    admin.dialog.get_by_label("Owner").fill("Fuji")
    admin.dialog.get_by_label("model:read").check()
    admin.dialog.get_by_label("Networks").fill("192.0.2.999")
    admin.dialog.get_by_label("Ends", exact=True).select_option("in … days")
    admin.dialog.get_by_label("Days until it ends").fill("5")
    page.get_by_text("Import an existing key").click()
    admin.dialog.get_by_label("Existing key").fill(old)
    admin.dialog.get_by_role("button", name="Create key").click()
    networks = admin.dialog.get_by_label("Networks")
    expect(networks).to_have_accessible_description(re.compile("^192.0.2.999 is no network: "))
    expect(networks).to_be_focused()
    expect(networks).to_have_attribute("aria-invalid", "true")
    expect(admin.dialog.get_by_role("alert")).to_have_count(0)
    admin.dialog.get_by_label("Networks").fill("192.0.2.0/24\n2001:db8::/32")
    began = time.time()
    admin.dialog.get_by_role("button", name="Create key").click()
    expect(page.locator("#status")).to_have_text("Fuji imported.")
    record = server.store.find(old)
    assert record is not None and record.expires_at is not None
    assert record.networks == ("192.0.2.0/24", "2001:db8::/32")
    assert began <= record.expires_at - 5 * 86400 <= time.time()

    row = page.locator(f"#{record.key_id}")
    row.get_by_role("button", name="Edit").click()
    admin.dialog.get_by_label("Requests per hour").fill("7")
    admin.dialog.get_by_label("Only these models").fill("fuji-*\n\n scorer ")
    admin.dialog.get_by_label("May not delete anything").check()
    admin.dialog.get_by_label("Ends", exact=True).select_option("never")
    admin.dialog.get_by_role("button", name="Save").click()
    expect(row.locator(".tag")).to_have_attribute(
        "title", "7 / hour, from 2 networks, only 2 model patterns, no deletion"
    )
    edited = server.store.get(record.key_id)
    assert (edited.rate_limit_per_hour, edited.expires_at) == (7, None)
    assert (edited.models, edited.no_delete) == (("fuji-*", "scorer"), True)
    # A dialog shows what is set, and changes only what is changed in it.
    row.get_by_role("button", name="Edit").click()
    expect(admin.dialog.get_by_label("Only these models")).to_have_value("fuji-*\nscorer")
    expect(admin.dialog.get_by_label("May not delete anything")).to_be_checked()
    admin.dialog.get_by_label("model:read").uncheck()
    admin.dialog.get_by_label("mlflow:write").check()
    admin.dialog.get_by_role("button", name="Save").click()
    expect(admin.dialog.get_by_label("Only these models")).to_have_accessible_description(
        re.compile("staff's keys are never narrowed")
    )
    admin.dialog.get_by_role("button", name="Cancel").click()
    assert (edited.owner, edited.networks, edited.scopes) == (
        "Fuji",
        record.networks,
        record.scopes,
    )

    row.get_by_role("button", name="Rotate").click()
    admin.dialog.get_by_label("1 hour").check()
    began = time.time()
    admin.dialog.get_by_role("button", name="Rotate key").click()
    admin.dismiss_new_key()
    expect(row).to_contain_text("replaced")
    rotated = server.store.get(record.key_id)
    assert rotated.expires_at is not None
    assert began <= rotated.expires_at - 3600 <= time.time()

    assert (
        admin.wrong == [f"400 POST {server.origin}/api/2.0/hokusai/keys/import"]
        or [line for line in admin.wrong if "400" not in line] == []
    )
    admin.wrong.clear()
    page.get_by_role("searchbox").fill("fuji")
    page.locator("select[name=state]").select_option("Replaced")
    page.get_by_role("button", name="Filter").click()
    expect(page.locator("tbody tr")).to_have_count(1)
    admin.open("/hokusai/keys?query=fuji&max_results=1")
    expect(page.locator(".count")).to_have_text("1–1 of 2")
    page.get_by_role("link", name="Next").click()
    expect(page.locator(f"#{record.key_id}")).to_be_visible()
    page.get_by_role("link", name="Previous").click()
    expect(page.locator(f"#{rotated.replaced_by}")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="Export").click()
    assert record.key_id in Path(download.value.path()).read_text()
    admin.open("/hokusai/keys?query=nobody-is-called-that")
    expect(page.get_by_text("No key matches")).to_be_visible()
    assert admin.wrong == []


@pytest.mark.parametrize("width", [390, 1280])
def test_feedback_is_in_view_and_the_focus_stays(
    width: int, person: NewPerson, server: Server
) -> None:
    store = server.store
    made = [store.create(owner=f"Far {n}", scopes=["model:read"])[0] for n in range(25)]
    admin = person(server.key("mlflow:admin"), viewport={"width": width, "height": 700})
    page = admin.open("/hokusai/keys?query=Far&state=any")
    first, second = (page.locator(f"#{record.key_id}") for record in made[:2])  # the last rows
    status = page.locator("#status")

    first.get_by_role("button", name="Edit").click()
    admin.dialog.get_by_label("Networks").fill("10.0.0.0/33")
    admin.dialog.get_by_role("button", name="Save").click()
    problem = admin.dialog.get_by_text("10.0.0.0/33 is no network")
    expect(problem).to_be_in_viewport(ratio=1)
    # Nothing lies over it.
    assert problem.evaluate(
        "e => { const {left, bottom} = e.getBoundingClientRect();"
        " return document.elementFromPoint(left + 9, bottom - 9) === e }"
    )
    admin.dialog.get_by_role("button", name="Cancel").click()
    first.get_by_role("button", name="Edit").click()
    expect(problem).to_have_count(0)
    admin.dialog.get_by_role("button", name="Cancel").click()

    first.get_by_role("button", name="Rotate").click()
    admin.dialog.get_by_role("button", name="Rotate key").click()
    admin.dismiss_new_key()
    expect(status).to_have_text("Far 0 rotated.")
    expect(status).to_be_in_viewport(ratio=1)
    expect(first).to_be_focused()
    expect(first).to_be_in_viewport()
    second.get_by_role("button", name="Revoke").click()
    expect(status).to_be_empty()
    admin.dialog.get_by_role("button", name="Revoke key").click()
    expect(status).to_have_text("Far 1 revoked and refused everywhere.")
    expect(status).to_be_in_viewport(ratio=1)
    expect(second).to_be_focused()
    expect(second).to_be_in_viewport()
    # A row that is listed no more leaves the focus to its neighbour.
    page = admin.open("/hokusai/keys?query=Far&state=active")
    page.locator(f"#{made[3].key_id}").get_by_role("button", name="Revoke").click()
    admin.dialog.get_by_role("button", name="Revoke key").click()
    expect(page.locator(f"#{made[2].key_id}").get_by_role("button", name="Revoke")).to_be_focused()
    assert len(admin.wrong) == 2 and all("400" in line for line in admin.wrong), admin.wrong


def overflows(page: Any) -> bool:
    return bool(
        page.evaluate(
            "document.scrollingElement.scrollWidth > document.scrollingElement.clientWidth"
        )
    )


def test_a_long_list_with_the_keyboard_alone(person: NewPerson, server: Server) -> None:
    """Order and pages are links; several keys are ticked and revoked; ids are copied."""
    store = server.store
    made = [
        store.create(owner="Many", name=f"key {n:02}", scopes=["model:read"])[0] for n in range(60)
    ]
    admin = person(server.key("mlflow:admin"))
    page = admin.open("/hokusai/keys?owner=Many")
    press = page.keyboard.press
    expect(page.locator(".count")).to_have_text("1–50 of 60")
    inside = "rows => rows.filter(row => row.getBoundingClientRect().bottom <= innerHeight).length"
    assert page.locator("tbody tr").evaluate_all(inside) >= 20
    page.get_by_role("columnheader", name="Key").get_by_role("link").focus()
    press("Enter")
    expect(page.get_by_role("columnheader", name="Key")).to_have_attribute("aria-sort", "ascending")
    expect(page.locator("tbody .name").first).to_have_text("key 00")
    page.get_by_role("link", name="Next").focus()
    press("Enter")
    expect(page.locator(".count")).to_have_text("51–60 of 60")
    page.go_back()
    expect(page.locator(".count")).to_have_text("1–50 of 60")
    time_shown = page.locator("tbody time").first
    assert re.search(r"\d\d:\d\d (GMT|UTC)", time_shown.get_attribute("title") or "")

    page.locator(f"#{made[0].key_id} .id").focus()
    press("Enter")
    expect(page.locator("main > .status")).to_have_text(f"{made[0].key_id} copied.")
    several = page.get_by_role("group", name="Selected keys")
    expect(several.get_by_role("button", name="Revoke…")).to_be_disabled()
    for record in made[:2]:
        page.get_by_role("checkbox", name=f"Select {record.name}").focus()
        press("Space")
    expect(several).to_contain_text("2 selected")
    several.get_by_role("button", name="Revoke…").focus()
    press("Enter")
    expect(page.get_by_role("heading", name="Revoke 2 keys?")).to_be_visible()
    page.get_by_role("button", name="Revoke 2 keys").focus()
    press("Enter")
    expect(page.locator("main > .status")).to_contain_text("2 keys revoked")
    # The list is as it was, without them.
    expect(page.locator(".count")).to_have_text("1–50 of 58")
    expect(page.locator("tbody .name").first).to_have_text("key 02")
    assert all(store.get(one.key_id).revoked_at for one in made[:2])

    page.get_by_label("Select all on this page").check()
    several.get_by_role("button", name="Rotate…").click()
    page.get_by_label("no time").check()
    page.get_by_role("button", name="Rotate 50 keys").click()
    expect(page.get_by_role("textbox", name="Key of key 02")).to_have_value(re.compile("hk_live_"))
    assert page.locator("textarea[readonly]").count() == 50
    page.get_by_role("link", name="Back to the keys").click()
    admin.open("/hokusai/keys?owner=Many")
    page.get_by_role("button", name="Revoke all of Many…").click()
    page.get_by_role("button", name="Revoke 58 keys").click()
    expect(page.locator("main > .status")).to_contain_text("58 keys revoked")
    assert not list(store.each(KeyFilter(owner="Many", state="valid")))
    assert admin.wrong == []


def test_page_of_one_key_in_a_browser(person: NewPerson, server: Server) -> None:
    record, key = server.store.create(owner="Page", name="shown", scopes=["model:read"])
    for width in (390, 1280):
        admin = person(server.key("mlflow:admin"), viewport={"width": width, "height": 800})
        page = admin.open("/hokusai/keys/find")
        page.get_by_label("A key, or its last four characters").fill(key)
        page.keyboard.press("Enter")
        page.get_by_role("link", name="shown").click()
        exact = page.locator("time[data-style=exact]").first
        expect(exact).to_have_text(re.compile(r"\d\d:\d\d (GMT|UTC)"))
        assert (
            page.url == f"{server.origin}/hokusai/keys/{record.key_id}" and key[8:] not in page.url
        )
        expect(page.get_by_role("img", name="0 uses in 31 days")).to_be_visible()
        page.get_by_text("As a table").click()
        expect(page.get_by_role("group", name="Uses by day").get_by_role("row")).to_have_count(32)
        assert not overflows(page), width
        page.get_by_role("button", name="Edit").click()
        admin.dialog.get_by_label("Note").fill(f"at {width}")
        admin.dialog.get_by_role("button", name="Save").click()
        expect(page.locator("dd.note")).to_have_text(f"at {width}")
        assert admin.wrong == []


def test_without_a_script_the_buttons_lead_to_forms(person: NewPerson, server: Server) -> None:
    store = server.store
    admin = person(
        server.key("mlflow:admin"),
        java_script_enabled=False,
        viewport={"width": 390, "height": 800},
    )
    page = admin.open("/hokusai/keys")
    page.get_by_role("button", name="New key").click()
    page.get_by_label("Owner").fill("Plain")
    page.get_by_label("model:read").check()
    page.get_by_label("Networks").fill("10.0.0.0/33")
    page.get_by_role("button", name="Create key").click()
    expect(page.get_by_role("alert")).to_contain_text("10.0.0.0/33")
    page.get_by_label("Networks").fill("192.0.2.0/24")
    page.get_by_role("button", name="Create key").click()
    record = store.find(page.get_by_role("textbox", name="Key of Plain").input_value())
    assert record is not None and record.networks == ("192.0.2.0/24",)
    row = page.locator(f"#{record.key_id}")
    for action in ("Edit", "Rotate"):
        admin.open("/hokusai/keys?owner=Plain")
        row.get_by_role("button", name=action).click()
        if action == "Edit":
            page.get_by_label("Note").fill("by form")
            page.get_by_role("button", name="Save").click()
            expect(page.get_by_role("status")).to_have_text("Plain saved.")
            expect(page.locator("dd.note")).to_have_text("by form")
        else:
            page.get_by_role("button", name="Rotate key").click()
            new = store.find(page.get_by_role("textbox", name="Key of Plain").input_value())
    assert new is not None and store.get(record.key_id).replaced_by == new.key_id
    admin.open("/hokusai/keys?owner=Plain")
    page.get_by_role("checkbox", name="Select Plain").first.check()
    page.get_by_role("group", name="Selected keys").get_by_role("button", name="Revoke…").click()
    page.get_by_role("button", name="Revoke 1 key").click()
    expect(page.get_by_role("status")).to_contain_text("1 key revoked")
    assert store.get(new.key_id).revoked_at is not None
    row.get_by_role("button", name="Revoke").click()
    page.get_by_role("button", name="Revoke key").click()
    expect(page.get_by_role("status")).to_contain_text("revoked and refused everywhere")
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        for path in ("", "?state=any", "/new", "/find", f"/{new.key_id}"):
            admin.open(f"/hokusai/keys{path}")
            assert not overflows(page), (width, path)
    # The one mistake.
    assert len(admin.wrong) == 2 and all("400" in line for line in admin.wrong), admin.wrong


def test_axe_finds_nothing(person: NewPerson, server: Server) -> None:
    record, _ = server.store.create(owner="Axe", scopes=["model:read"], rate_limit_per_hour=5)
    old = server.store.rotate(record.key_id)[2]
    wrong = []
    for width, scheme in ((1280, "light"), (390, "dark")):
        look: dict[str, Any] = {
            "viewport": {"width": width, "height": 800},
            "color_scheme": scheme,
            "bypass_csp": True,  # axe is a script of its own
        }
        admin = person(server.key("mlflow:admin"), **look)
        reader = person(server.key("model:read"), **look).open("/api/mlflow/hokusai/keys/new")
        expect(reader.get_by_role("heading")).to_have_text("Not open to your key")
        wrong += findings(reader)
        reader.get_by_role("link", name="Sign in with another key").click()
        expect(reader.get_by_role("heading")).to_have_text("You are signed in")
        paths = ("keys", "keys?owner=Axe&state=any", f"keys/{old.key_id}", "keys/find", "keys/new")
        for path in (*paths, f"keys/{old.key_id}/edit", f"keys/{old.key_id}/revoke"):
            wrong += findings(admin.open(f"/hokusai/{path}"))
        nowhere = "/api/mlflow/hokusai/nothing"
        expect(admin.open(nowhere).get_by_text("There is no such page.")).to_be_visible()
        wrong += findings(admin.page)
        expect(admin.page.get_by_role("link", name="Back to the keys")).to_have_js_property(
            "href", f"{server.origin}/api/mlflow/hokusai/keys"
        )
        reader.goto(f"{server.origin}{nowhere}")
        expect(reader.get_by_role("heading")).to_have_text("There is no such page")
        expect(reader.get_by_role("link", name="Open MLflow")).to_have_js_property(
            "href", f"{server.origin}/api/mlflow/"
        )
    assert not wrong, "\n".join(wrong)


def test_last_key_that_may_manage_needs_a_second_confirmation(
    person: NewPerson, server: Server
) -> None:
    store = server.store
    admins = [one for one in store.each(KeyFilter(state="active")) if "mlflow:admin" in one.scopes]
    record, key = store.create(owner="Last", scopes=["mlflow:admin"])
    admin = person(key)
    page = admin.open("/hokusai/keys")
    for one in admins:
        store.revoke(one.key_id)
    try:
        page.get_by_role("button", name="Revoke Last").click()
        force = admin.dialog.get_by_label("Revoke it anyway")
        expect(force).to_be_hidden()
        admin.dialog.get_by_role("button", name="Revoke key").click()
        expect(admin.dialog.get_by_role("alert")).to_contain_text(
            "the last key that may manage keys"
        )
        force.check()
        admin.dialog.get_by_role("button", name="Revoke key").click()
        # It was the key of this very session.
        expect(page).to_have_title("Sign in · MLflow")
        assert page.url == f"{server.origin}/hokusai/login?next=%2Fhokusai%2Fkeys"
        expect(page.get_by_role("status")).to_contain_text("Your session has ended")
        assert store.get(record.key_id).revoked_at is not None
    finally:
        server._keys.clear()


def test_one_who_may_not_manage_sees_their_own_key(person: NewPerson, server: Server) -> None:
    others = server.store.create(owner="Somebody else", scopes=["mlflow:read"])[0]
    record, key = server.store.create(
        owner="Oi",
        name="Brush",
        scopes=["model:read"],
        rate_limit_per_hour=1000,
        models=("oi-*",),
        no_delete=True,
    )
    # With a limit it may replace itself once it is an hour old.
    with server.store.database.changing() as change:
        older = sa.update(KEYS).where(KEYS.c.key_id == record.key_id)
        change.connection.execute(older.values(created_at=record.created_at - 3601))
    one = person(key)
    page = one.open("/hokusai/keys")
    expect(page.get_by_role("heading", name="Your API key")).to_be_visible()
    expect(page.get_by_text("999 of 1,000 requests left")).to_be_visible()
    expect(page.get_by_text("only oi-*")).to_be_visible()
    expect(page.get_by_text("may not delete anything")).to_be_visible()
    assert others.key_id not in page.content() and "Somebody else" not in page.content()
    assert page.get_by_role("button").all_inner_texts() == ["Sign out", "Rotate"]
    page.get_by_role("button", name="Rotate").click()
    one.dialog.get_by_role("button", name="Rotate key").click()
    new = one.dialog.get_by_label("Key of Brush").input_value()
    found = server.store.find(new)
    assert found is not None and found.key_id == server.store.get(record.key_id).replaced_by
    page.wait_for_timeout(MAX_UNCONFIRMED * 1000 + 100)
    one.dismiss_new_key()
    expect(page.get_by_text("use the new key")).to_be_visible()
    assert one.wrong == []


PAYLOADS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "javascript:alert(1)",
    "{{7*7}}${7*7}<%= 7*7 %>",
    "</title></textarea></dialog><iframe srcdoc='<script>parent.alert(1)</script>'>",
    "\\u003cimg src=x onerror=alert(1)\\u003e &lt;b&gt;",
)


def test_what_a_key_is_called_is_text(person: NewPerson, server: Server) -> None:
    made = [
        server.store.create(owner=f"{text} owner", name=f"{text} name", note=f"{text} note",
                            scopes=["model:read"])[0]
        for text in PAYLOADS
    ]  # fmt: skip
    admin = person(server.key("mlflow:admin"))
    page = admin.open("/hokusai/keys")
    for record in made:
        row = page.locator(f"#{record.key_id}")
        expect(row.locator(".name")).to_have_text(record.name)
        expect(row.locator(".owner")).to_have_text(record.owner)
        row.get_by_role("button", name="Revoke").click()
        expect(page.locator("#revoke h2")).to_have_text(f"Revoke {record.name}?")
        page.keyboard.press("Escape")
        row.get_by_role("button", name="Edit").click()
        assert admin.dialog.get_by_role("textbox", name="Owner").input_value() == record.owner
        assert admin.dialog.get_by_label("Note").input_value() == record.note
        admin.dialog.get_by_role("button", name="Save").click()
        row.get_by_role("button", name="Rotate").click()
        admin.dialog.get_by_role("button", name="Rotate key").click()
        expect(page.locator("#made label").first).to_have_text(f"Key of {record.name}")
        admin.dismiss_new_key()
        expect(page.locator("#status")).to_have_text(f"{record.name} rotated.")
        admin.open(f"/hokusai/keys/{record.key_id}")
        expect(page.locator("h1")).to_have_text(record.name)
        expect(page.locator(".note")).to_have_text(record.note)
        expect(page.locator("dd").first).to_have_text(record.owner)
        admin.open("/hokusai/keys")
    assert (
        page.locator("img:not(.brand img), svg:not(.spark), iframe, script:not([src])").count() == 0
    )
    page = admin.open("/hokusai/keys?query=" + quote(PAYLOADS[1]))
    assert page.get_by_role("searchbox").input_value() == PAYLOADS[1]
    victim = person(server.store.create(owner=PAYLOADS[1], scopes=["model:read"])[1])
    expect(victim.open("/hokusai/keys").locator(".who b")).to_have_text(PAYLOADS[1])
    victim.open("/")  # MLflow's own page shows the owner, too
    expect(victim.page.get_by_label("Account menu for")).to_be_visible()
    assert admin.wrong == victim.wrong == []
    assert admin.dialogs == victim.dialogs == []


class Elsewhere:
    """Another origin, whose pages are what `pages` has for a path."""

    def __init__(self) -> None:
        self.pages: dict[str, str] = {}
        pages = self.pages

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = pages.get(self.path, "").encode()
                self.send_response(200 if body else 404)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.end_headers()
                self.wfile.write(b"<!doctype html><link rel=icon href=data:,>" + body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def url(self, host: str, body: str) -> str:
        """Where a page with this `body` is: on `host`, which is this machine in any case."""
        path = f"/{len(self.pages)}"
        self.pages[path] = body
        return f"http://{host}:{self.http.server_port}{path}"


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    other = Elsewhere()
    yield other
    other.http.shutdown()
    other.http.server_close()


@pytest.fixture
def proxy(server: Server) -> Iterator[str]:
    """A proxy that has the server below a path of its own, which it does not tell the server."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name: value for name, value in self.headers.items() if name != "Connection"}
            path = self.path.removeprefix("/outer")
            status, answer, content = server.request(
                self.command, path, headers=headers, body=body or None
            )
            self.send_response(status)
            for name, value in answer.items():
                if name not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = pass_on

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as front:
        threading.Thread(target=front.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{front.server_port}/outer"
        front.shutdown()


def test_behind_a_proxy_with_a_prefix_of_its_own(
    person: NewPerson, server: Server, proxy: str
) -> None:
    admin = person()
    page = admin.page
    page.goto(f"{proxy}/hokusai/keys?query=Outer")
    expect(page).to_have_title("Sign in · MLflow")
    admin.sign_in(server.key("mlflow:admin"))
    page.wait_for_url(f"{proxy}/hokusai/keys?query=Outer")
    page.get_by_role("button", name="New key").click()
    admin.dialog.get_by_label("Owner").fill("Outer")
    admin.dialog.get_by_label("mlflow:read").check()
    admin.dialog.get_by_role("button", name="Create key").click()
    lines = page.get_by_label("Settings to hand over")
    expect(lines).to_have_value(re.compile(f"MLFLOW_TRACKING_URI={re.escape(proxy)}$"))
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Revoke Outer").click()
    admin.dialog.get_by_role("button", name="Revoke key").click()
    expect(page.locator("#status")).to_have_text("Outer revoked and refused everywhere.")
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url(f"{proxy}/hokusai/login")
    assert admin.wrong == []


#: From the first, another port of the server's host, browsers send the session's cookie along.
HOSTS = ("127.0.0.1", "localhost")


def test_no_page_is_shown_in_a_frame(
    person: NewPerson, server: Server, elsewhere: Elsewhere
) -> None:
    for host, path in itertools.product(
        HOSTS, ("/hokusai/login", "/hokusai/keys", "/hokusai/models")
    ):
        victim = person(server.key("mlflow:admin"))
        victim.page.goto(elsewhere.url(host, f'<iframe src="{server.origin}{path}"></iframe>'))
        frame = victim.page.frames[1]
        frame.wait_for_load_state()
        # A browser does not show the page, or is not even sent it.
        hidden = frame.url.startswith("chrome-error:") or "CROSS_SITE" in frame.content()
        assert hidden, (host, path)
        assert frame.locator("form, table, button").count() == 0, (host, path)


ATTACK = """async (server) => {
  const said = [];
  const ask = async (method, path, options = {}) => {
    try {
      const answer = await fetch(server + path, {method, credentials: "include", ...options});
      said.push([method, path, answer.status, await answer.text()]);
    } catch (error) { said.push([method, path, 0, ""]); }
  };
  const key = JSON.stringify({owner: "forged", scopes: ["mlflow:admin"]});
  const types = ["application/json", "text/plain", "application/x-www-form-urlencoded"];
  await ask("GET", "/hokusai/keys");
  await ask("GET", "/hokusai/keys", {mode: "no-cors"});
  await ask("GET", "/api/2.0/hokusai/keys");
  await ask("GET", "/api/2.0/hokusai/keys/export");
  await ask("GET", "/api/2.0/hokusai/whoami");
  await ask("GET", "/ajax-api/2.0/mlflow/users/current");
  for (const type of types) {
    await ask("POST", "/api/2.0/hokusai/keys", {body: key, headers: {"Content-Type": type}});
    await ask("POST", "/api/2.0/mlflow/experiments/create",
      {body: '{"name": "forged"}', headers: {"Content-Type": type}});
  }
  await ask("POST", "/api/2.0/hokusai/keys", {body: key, mode: "no-cors"});
  await ask("POST", "/hokusai/logout", {mode: "no-cors"});
  await ask("GET", "/hokusai/models");
  const form = new URLSearchParams({grantee: "forged", pattern: "*", owner: "forged", apply: "true"});
  for (const what of ["share", "assign"]) {
    await ask("POST", "/hokusai/models/" + what, {body: form, mode: "no-cors"});
  }
  await new Promise((done) => {
    const image = new Image();
    image.onload = image.onerror = done;
    image.src = server + "/api/2.0/hokusai/keys";
  });
  return said;
}"""


@pytest.mark.parametrize("host", HOSTS, ids=["same-site", "cross-site"])
def test_another_site_gets_nothing_done(
    host: str, person: NewPerson, server: Server, elsewhere: Elsewhere
) -> None:
    admin = server.key("mlflow:admin")
    victim = person(admin)
    victim.page.goto(elsewhere.url(host, "<p>Look here"))
    for method, path, status, text in victim.page.evaluate(ATTACK, server.origin):
        assert status in (0, 401, 403), (method, path)
        assert "key_" not in text and '"owner"' not in text, (method, path)

    forged = '{"owner":"forged","scopes":["mlflow:admin"],"note":"'
    theirs = server.store.create(owner="thief", scopes=["mlflow:read"])[1]
    for action, encoding, name, value in (
        ("/api/2.0/hokusai/keys", "text/plain", forged, '"}'),
        ("/hokusai/logout", "application/x-www-form-urlencoded", "x", ""),
        ("/hokusai/login", "application/x-www-form-urlencoded", "key", theirs),
        ("/hokusai/models/share", "application/x-www-form-urlencoded", "pattern", "*"),
    ):
        form = (
            f'<form method=post enctype="{encoding}" action="{server.origin}{action}">'
            f"<input name='{name}' value='{value}'><button>Win</button></form>"
        )
        victim.page.goto(elsewhere.url(host, form))
        with victim.page.expect_navigation():
            victim.page.get_by_role("button").click()
        assert victim.page.url.startswith(server.origin)

    assert not list(server.store.each(KeyFilter(owner="forged")))
    by_name = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=forged"
    assert server.request("GET", by_name, key=admin)[0] == 404
    # Still signed in, and still as the same.
    expect(victim.open("/hokusai/keys").locator(".who b")).to_have_text("test")


def test_a_link_from_elsewhere_needs_no_second_sign_in(
    person: NewPerson, server: Server, elsewhere: Elsewhere, seen: dict[str, str]
) -> None:
    for prefix in PREFIXES:
        one = person(server.key("mlflow:read"))
        there = f"{server.origin}{prefix}/?from=chat#/models/{seen['model']}"
        one.page.goto(elsewhere.url("localhost", f'<a href="{there}">See</a>'))
        one.wrong.clear()
        one.page.get_by_role("link").click()
        expect(one.page.get_by_text(seen["model"]).first).to_be_visible()
        assert one.page.url == there
        assert one.wrong == []
    stranger = person()
    stranger.page.goto(elsewhere.url("localhost", f'<a href="{there}">See</a>'))
    stranger.wrong.clear()
    stranger.page.get_by_role("link").click()
    expect(stranger.page.get_by_role("button", name="Sign in")).to_be_visible()
    stranger.page.wait_for_timeout(300)
    assert stranger.page.url.endswith(f"#/models/{seen['model']}")
    assert stranger.wrong == []


TARGETS = (
    "//127.0.0.2/",
    "/\\127.0.0.2/",
    "/\t/127.0.0.2/",
    "http://127.0.0.2/",
    "javascript:alert(1)",
    "/javascript:alert(1)",
    "/../../..//127.0.0.2/",
    '"><img src=x onerror=alert(1)>',
)


def test_signing_in_leads_nowhere_else(
    person: NewPerson, server: Server, elsewhere: Elsewhere
) -> None:
    """However one was sent to the sign-in page: `next` names a place on this server."""
    one = person(server.key("mlflow:read"))
    page = one.page
    page.route("**/static-files/**", lambda route: route.abort())  # it matters where, not what
    for target in TARGETS:
        login = f"/hokusai/login?next={quote(target)}"
        page.goto(elsewhere.url("localhost", f'<a href="{server.origin}{login}">See</a>'))
        page.get_by_role("link").click()
        page.wait_for_url(lambda url: "/hokusai/login" not in url and "localhost" not in url)
        assert page.url.startswith(f"{server.origin}/"), target
        one.open(login)
        expect(page.get_by_role("heading", name="You are signed in")).to_be_visible()
        # The mark, and the links to MLflow and the keys.
        assert page.locator("img, a, script:not([src]), [onerror]").count() == 3, target
        assert page.get_by_role("link", name="Open MLflow").evaluate("e => e.origin") == (
            server.origin
        )
    one.context.clear_cookies()
    for target in TARGETS[:2]:
        one.context.clear_cookies()
        one.open(f"/hokusai/login?next={quote(target)}")
        one.sign_in(server.key("mlflow:read"))
        page.wait_for_url(f"{server.origin}/")
    assert one.dialogs == []


@pytest.mark.parametrize("width", [390, 1280])
def test_long_texts_fit_the_page(width: int, person: NewPerson, server: Server) -> None:
    store = server.store
    store.create(owner="o" * 255, name="n" * 255, note="w" * 500, scopes=["mlflow:write"])
    long = [f"2001:db8:{n:x}:ffff:ffff:ffff:ffff:0/112" for n in range(1, 65)]
    store.create(owner="Wide", scopes=["model:read", "model:write", "mlflow:read", "mlflow:write"],
                 networks=tuple(long), rate_limit_per_hour=10**9, no_delete=True,
                 models=tuple(f"{n}{'m' * 250}*" for n in range(3)))  # fmt: skip
    admin = person(
        server.key("mlflow:admin"),
        viewport={"width": width, "height": 800},
        color_scheme="dark",
    )
    page = admin.open("/hokusai/keys")
    for summary in page.locator("td summary").all():
        summary.click()

    def fits() -> bool:
        return bool(
            page.evaluate(
                "[document.scrollingElement, ...document.querySelectorAll('dialog[open]')]"
                ".every(e => e.scrollWidth <= e.clientWidth)"
            )
        )

    assert fits()
    assert page.evaluate(
        "['Created', 'Ends', 'Last use'].every(name =>"
        "[...document.querySelectorAll(`.compact [data-label='${name}']`)]"
        ".every(e => e.scrollWidth <= e.clientWidth))"
    ), "a date is cut"
    for name in ("rotate", "edit", "revoke"):
        page.locator(f"[data-open={name}]").first.click()
        assert fits(), name
        page.keyboard.press("Escape")
    page.get_by_role("button", name="New key").click()
    assert fits()
    admin.dialog.get_by_label("Owner").fill("W" * 255)
    admin.dialog.get_by_label("model:read").check()
    admin.dialog.get_by_role("button", name="Create key").click()
    expect(page.get_by_role("dialog", name="Copy the key now")).to_be_visible()
    assert fits()
    for path in ("/hokusai/login", "/hokusai/keys?state=wrong"):
        admin.open(path)
        assert fits(), path

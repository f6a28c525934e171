"""An operator makes one-time links in a real Chromium, and somebody else opens them on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mlflow_hokusai_auth.store.database import Actor
from mlflow_hokusai_auth.store.links import Links
from tests import harness
from tests.e2e.axe import findings
from tests.e2e.conftest import needs_chromium
from tests.harness import Server, serve, wait_until

playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (it is in the extra `test`)"
)
# Below the other imports, as the module imports playwright when it is imported.
from tests.e2e.test_browser import NewPerson, person  # noqa: E402, F401

expect = playwright_api.expect
expect.set_options(timeout=60_000)

pytestmark = [pytest.mark.servers, needs_chromium]
PHONE = {"viewport": {"width": 390, "height": 844}}
SEARCH = "/api/2.0/mlflow/registered-models/search"
CHOICE = "Give me a one-time link to send"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that knows its public URL."""
    port = harness.free_port()
    url = f"http://127.0.0.1:{port}/mlflow"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "free_port", lambda: port)
        with serve(tmp_path_factory.mktemp("links"), HOKUSAI_AUTH_PUBLIC_URLS=url) as running:
            yield running


def start_new_key(page: Any, owner: str) -> Any:
    """Open the dialog for a new key, and fill it in. Return the dialog."""
    page.get_by_role("button", name="New key").click()
    dialog = page.get_by_role("dialog", name="New key")
    dialog.get_by_label("Owner").fill(owner)
    dialog.get_by_label("model:write").check()
    return dialog


def take_link(page: Any) -> str:
    """Copy the link that a dialog shows, and close the dialog. Return the link."""
    shown = page.get_by_role("dialog", name="Copy the link now")
    expect(shown).to_contain_text("Nobody has seen the key, you included")
    shown.get_by_role("button", name="Copy", exact=True).click()
    expect(shown.get_by_role("status")).to_have_text("Copied.")
    link = str(page.evaluate("navigator.clipboard.readText()"))
    assert link == shown.get_by_label("One-time link for").input_value()
    shown.get_by_role("button", name="Done").click()
    expect(shown).to_have_count(0)
    # The event of closing comes after it.
    page.wait_for_function(
        "link => !document.documentElement.outerHTML.includes(link)"
        " && !document.querySelector('#linked-url').value",
        arg=link,
    )
    return link


def test_link_leads_from_the_dialog_to_a_key_on_a_phone(
    person: NewPerson,  # noqa: F811
    server: Server,
) -> None:
    admin = person(server.key("mlflow:admin"))
    admin.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = admin.open("/hokusai/keys")
    dialog = start_new_key(page, "Kanagawa")
    expect(dialog.get_by_label("Show me the key")).to_be_checked()
    dialog.get_by_label(CHOICE).check()
    dialog.get_by_role("button", name="Make the link").click()
    link = take_link(page)
    assert link.startswith(f"{server.origin}/mlflow/hokusai/link#")
    expect(page.locator("#status")).to_have_text("Kanagawa gets the new key by the link.")
    assert server.store.valid_of("Kanagawa") == []

    receiver = person(**PHONE)
    phone = receiver.page
    phone.goto(link)
    phone.get_by_role("button", name="Show the key").click()
    key = phone.get_by_label("Your key, for Kanagawa").input_value()
    assert server.request("GET", SEARCH, key=key)[0] == 200
    second = person(**PHONE).page
    second.goto(link)
    second.get_by_role("button", name="Show the key").click()
    expect(second.get_by_role("alert")).to_contain_text("This link was opened on")
    assert "hk_live_" not in second.content()

    # The same for a key that is replaced: it stays as it is until the link is opened.
    admin.open("/hokusai/keys")
    page.get_by_role("button", name="Rotate Kanagawa").click()
    dialog = page.get_by_role("dialog", name="Rotate Kanagawa")
    dialog.get_by_label("no time").check()
    dialog.get_by_label(CHOICE).check()
    dialog.get_by_role("button", name="Make the link").click()
    link = take_link(page)
    assert server.request("GET", SEARCH, key=key)[0] == 200
    phone.goto(link)
    phone.get_by_role("button", name="Show the key").click()
    new = phone.get_by_label("Your key, for Kanagawa").input_value()
    assert server.request("GET", SEARCH, key=new)[0] == 200
    # Each worker notices within a second.
    wait_until(lambda: server.request("GET", SEARCH, key=key)[0] == 401)
    assert admin.wrong == receiver.wrong == []


def test_page_warns_at_an_address_at_which_links_do_not_open(
    person: NewPerson,  # noqa: F811
    server: Server,
) -> None:
    admin = person(server.key("mlflow:admin"))
    dialog = start_new_key(admin.open("/hokusai/keys"), "Okitsu")
    expect(dialog.get_by_text(f"The link leads to {server.origin}/mlflow.")).to_be_visible()
    expect(dialog.get_by_text("You are at another address.")).to_be_hidden()
    elsewhere = person()
    elsewhere.page.goto(server.origin.replace("127.0.0.1", "localhost") + "/hokusai/keys")
    elsewhere.sign_in(server.key("mlflow:admin"))
    dialog = start_new_key(elsewhere.page, "Okitsu")
    expect(dialog.get_by_text("You are at another address.")).to_be_visible()
    assert findings(elsewhere.page) == []


def test_dialog_says_what_is_wrong_beside_the_field(
    person: NewPerson,  # noqa: F811
    server: Server,
) -> None:
    page = person(server.key("mlflow:admin")).open("/hokusai/keys")
    dialog = start_new_key(page, "x\u200b")
    dialog.get_by_label(CHOICE).check()
    make = dialog.get_by_role("button", name="Make the link")
    make.click()
    expect(dialog.get_by_label("Owner")).to_have_attribute("aria-invalid", "true")
    assert not dialog.locator("details").get_attribute("open")
    dialog.get_by_label("Owner").fill("Kajikazawa")
    dialog.get_by_text("Import an existing key").click()
    dialog.get_by_label("Existing key").fill("hk_live_" + "a1B2" * 8)
    make.click()
    expect(dialog.get_by_text("A link makes a new key.")).to_be_visible()
    expect(dialog.get_by_label("Existing key")).to_be_focused()
    dialog.get_by_label("Existing key").fill("")
    make.click()
    # Who closes the dialog with the link uncopied is asked once.
    shown = page.get_by_role("dialog", name="Copy the link now")
    expect(shown).to_be_visible()
    page.keyboard.press("Escape")
    expect(shown.get_by_role("status")).to_contain_text("Not copied yet.")
    page.keyboard.press("Escape")
    expect(shown).to_have_count(0)
    assert [one.owner for one in Links(server.store.database).each()].count("Kajikazawa") == 1


def test_waiting_link_is_revoked_without_a_script(
    person: NewPerson,  # noqa: F811
    server: Server,
) -> None:
    made, code = Links(server.store.database).create(owner="Ejiri", scopes=["model:read"])
    options = {**PHONE, "java_script_enabled": False}
    page = person(server.key("mlflow:admin"), **options).open("/hokusai/keys")
    page.get_by_role("link", name="Links", exact=True).click()
    page.get_by_role("link", name="Waiting").click()
    row = page.get_by_role("row").filter(has_text=made.link_id)
    row.locator("summary").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(row.get_by_role("button", name="Revoke now")).to_be_focused()
    page.keyboard.press("Enter")
    said = page.get_by_role("status")
    expect(said).to_have_text(f"Revoked: {made.link_id}, for Ejiri.")
    expect(said).to_be_focused()
    expect(row).to_have_count(0)
    assert "show=waiting" in page.url
    receiver = person(**options).page
    receiver.goto(f"{server.origin}/hokusai/link")
    receiver.get_by_label("The link that you were sent").fill(code)
    receiver.get_by_role("button", name="Show the key").click()
    expect(receiver.get_by_role("alert")).to_contain_text("has revoked this link")
    # The operator sees that somebody tried.
    tabs = page.get_by_role("navigation", name="Kinds of links")
    tabs.get_by_role("link", name="All").click()
    expect(row).to_contain_text("tried once after it was revoked; last on")
    expect(page.get_by_role("heading", name="refused")).to_be_visible()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_pages_are_accessible_and_fit(
    width: int,
    scheme: str,
    person: NewPerson,  # noqa: F811
    server: Server,
) -> None:
    owner = f"{width}{'o' * 250}"
    old = server.store.create(owner=owner, scopes=["model:read"])[0]
    given = {"viewport": {"width": width, "height": 844}, "color_scheme": scheme}
    page = person(server.key("mlflow:admin"), **given).open("/hokusai/keys")
    dialog = start_new_key(page, owner)
    dialog.get_by_label(CHOICE).check()
    wrong = findings(page)
    dialog.get_by_role("button", name="Make the link").click()
    expect(page.get_by_role("dialog", name="Copy the link now")).to_be_visible()
    wrong += findings(page)
    for path in ("keys/new", f"keys/{old.key_id}/rotate"):
        page.goto(f"{server.origin}/hokusai/{path}")
        page.get_by_label(CHOICE).check()
        wrong += findings(page)
    page.get_by_role("button", name="Make the link").click()
    expect(page.get_by_role("heading", name="Copy the link now")).to_be_visible()
    wrong += findings(page)
    # The list: a link of each kind, with the longest names.
    links = Links(server.store.database)
    for _ in range(2):
        _, code = links.create(
            owner=owner, scopes=["model:read", "model:write"], name="n" * 255, by=Actor(owner)
        )
        for number in range(3):
            links.open(code, by=Actor("", "", f"2001:db8:1111:2222:3333:4444:5555:{number}666"))
    page.goto(f"{server.origin}/hokusai/links")
    wrong += findings(page)
    page.locator("summary").first.click()
    wrong += findings(page)
    page.get_by_role("link", name="Refused", exact=False).last.click()
    wrong += findings(page)
    assert not wrong, "\n".join(wrong)

"""The page of models in a real Chromium, with isolation full: an operator and suppliers at work.

They have no JavaScript; only axe, which checks the pages, needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest

from mlflow_hokusai_auth.store.database import Actor
from mlflow_hokusai_auth.store.sessions import Sessions
from tests.e2e.axe import findings
from tests.e2e.conftest import needs_chromium
from tests.e2e.parts import post
from tests.harness import Server, serve

playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (it is in the extra `test`)"
)
expect = playwright_api.expect
expect.set_options(timeout=60_000)

pytestmark = [pytest.mark.servers, needs_chromium]
MODELS = "/hokusai/models"
MAKE = "/api/2.0/mlflow/registered-models/create"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("models"), HOKUSAI_AUTH_ISOLATION="full") as running:
        yield running


Opened = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, server: Server) -> Iterator[Opened]:
    contexts: list[Any] = []

    def new(key: str, **options: Any) -> Any:
        """Return a page of somebody who is signed in with `key`."""
        record = server.store.find(key)
        assert record is not None
        given = {"viewport": {"width": 1280, "height": 900}, "locale": "en-GB"}
        context = browser.new_context(**given | options)
        contexts.append(context)
        context.set_default_timeout(60_000)
        token = Sessions(server.store.database).begin(key, 3600, Actor(record.owner, record.key_id))
        cookie = {"name": "hokusai_session", "value": token, "url": server.origin}
        context.add_cookies([{**cookie, "httpOnly": True, "sameSite": "Strict"}])
        return context.new_page()

    yield new
    for context in contexts:
        context.close()


def key_of(server: Server, owner: str, scope: str = "model:write") -> str:
    return server.store.create(owner=owner, scopes=[scope])[1]


@pytest.mark.parametrize("prefix", ["", "/api/mlflow"])
def test_operator_gives_models_away_and_reserves_a_beginning(
    prefix: str, opened: Opened, server: Server
) -> None:
    owner = f"Fuji{prefix.replace('/', ' ')}"
    supplier = key_of(server, owner)
    name = f"wave {len(prefix)}"
    post(server, MAKE, server.key("mlflow:admin"), {"name": name})
    mlflow = f"/api/2.0/mlflow/registered-models/get?name={quote(name, safe='')}"
    assert server.request("GET", mlflow, key=supplier)[0] == 404
    page = opened(server.key("mlflow:admin"), java_script_enabled=False)
    page.goto(f"{server.origin}{prefix}/hokusai/keys")
    page.get_by_role("link", name="Models").click()
    page.wait_for_url(f"{server.origin}{prefix}{MODELS}")
    page.get_by_role("searchbox").fill("WAVE")
    page.get_by_role("button", name="Filter").click()
    page.get_by_label(f"Select {name}", exact=True).check()
    page.get_by_label("New owner").fill(owner)
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_role("heading", name=f"Give 1 model to {owner}?")).to_be_visible()
    assert server.request("GET", mlflow, key=supplier)[0] == 404
    page.get_by_role("button", name=f"Give to {owner}").click()
    expect(page.get_by_role("status")).to_have_text(f"{owner} owns 1 more model now.")
    assert "query=WAVE" in page.url and page.get_by_role("searchbox").input_value() == "WAVE"
    expect(page.get_by_role("row").filter(has_text=name)).to_contain_text(owner)
    assert server.request("GET", mlflow, key=supplier)[0] == 200

    page.get_by_role("link", name="Reserved names").click()
    page.get_by_label("Beginning").fill(f"{owner}-")
    page.get_by_label("Owner").fill(owner)
    page.get_by_role("button", name="Reserve").click()
    expect(page.get_by_role("status")).to_contain_text(f"are reserved for {owner}.")
    taken = post_status(server, key_of(server, "Thief"), f"{owner}-x")
    assert taken == 403
    row = page.get_by_role("row").filter(has_text=f"{owner}-")
    row.locator("summary").click()
    row.get_by_role("button", name="Remove now").click()
    expect(page.get_by_role("status")).to_contain_text("no longer reserved")
    page.get_by_role("link", name="Keys").click()
    page.wait_for_url(f"{server.origin}{prefix}/hokusai/keys")


def post_status(server: Server, key: str, name: str) -> int:
    headers = {"Content-Type": "application/json"}
    body = f'{{"name": "{name}"}}'.encode()
    return server.request("POST", MAKE, key=key, headers=headers, body=body)[0]


def test_supplier_shares_and_takes_back(opened: Opened, server: Server) -> None:
    acme, globex = key_of(server, "ACME"), key_of(server, "GLOBEX")
    assert post_status(server, acme, "acme-lead") == post_status(server, acme, "acme-churn") == 200
    mlflow = "/api/2.0/mlflow/registered-models/get?name=acme-lead"
    page = opened(acme, java_script_enabled=False)
    page.goto(server.origin + MODELS)
    page.get_by_role("link", name="Share acme-lead").click()
    page.get_by_label("With", exact=True).fill("GLOBEX")
    page.get_by_label("contribute").check()
    page.get_by_label("Ends after").fill("soon")
    page.get_by_role("button", name="Share", exact=True).click()
    # The form keeps what was typed, and marks the field that is wrong.
    days = page.get_by_label("Ends after")
    expect(page.get_by_role("alert")).to_contain_text("whole number")
    assert days.get_attribute("aria-invalid") == "true" and days.input_value() == "soon"
    assert page.get_by_label("Models", exact=True).input_value() == "acme-lead"
    assert page.get_by_label("contribute").is_checked()
    days.fill("90")
    page.get_by_role("button", name="Share", exact=True).click()
    said = page.get_by_role("status")
    expect(said).to_have_text("GLOBEX may contribute to acme-lead. That is 1 model now.")
    expect(said).to_be_in_viewport()
    expect(said).to_be_focused()
    assert server.request("GET", mlflow, key=globex)[0] == 200

    other = opened(globex, java_script_enabled=False)
    other.goto(server.origin + MODELS)
    expect(other.get_by_role("heading", name="No models yet")).to_be_visible()
    other.get_by_label("Which models").select_option("Shared with you")
    other.get_by_role("button", name="Filter").click()
    expect(other.get_by_role("row").filter(has_text="acme-lead")).to_contain_text("contribute")
    assert "acme-churn" not in other.content()

    row = page.get_by_role("row").filter(has_text="GLOBEX")
    row.get_by_text("Take back").first.click()
    row.get_by_role("button", name="Take back now").click()
    expect(page.get_by_role("status")).to_contain_text("Taken back from GLOBEX")
    assert server.request("GET", mlflow, key=globex)[0] == 404
    other.reload()
    assert "acme-lead" not in other.content()

    # Whose session ends in between signs in, and is back.
    page.get_by_label("Models", exact=True).fill("acme-lead")
    page.get_by_label("With", exact=True).fill("GLOBEX")
    page.context.clear_cookies()
    page.get_by_role("button", name="Share", exact=True).click()
    expect(page).to_have_title("Sign in · MLflow")
    page.get_by_label("API key").fill(acme)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(server.origin + MODELS)


def test_foreign_and_missing_models_read_the_same(opened: Opened, server: Server) -> None:
    umbrella, globex = key_of(server, "UMBRELLA"), key_of(server, "GLOBEX")
    assert post_status(server, umbrella, "hidden-1") == 200
    page = opened(globex, java_script_enabled=False)

    def seen(name: str, owner: str) -> list[str]:
        found = []
        for query in (
            f"query={name}&show=all",
            f"owner={owner}&show=all",
            f"view=shares&query={name}",
            "show=all",
        ):
            page.goto(f"{server.origin}{MODELS}?{query}")
            found.append(page.inner_text("main"))
        page.goto(f"{server.origin}{MODELS}?view=shares&pattern={name}")
        page.get_by_label("With", exact=True).fill("NOBODY")
        page.get_by_role("button", name="Share", exact=True).click()
        found.append(page.get_by_role("status").inner_text())
        page.get_by_text("Take back").first.click()
        page.get_by_role("button", name="Take back now").first.click()
        return [text.replace(name, "?") for text in found]

    foreign = seen("hidden-1", "UMBRELLA")
    assert foreign == seen("hidden-2", "UMBRELLB")
    assert "hidden" not in "".join(foreign)


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_pages_are_accessible_and_fit(
    width: int, scheme: str, opened: Opened, server: Server
) -> None:
    """Also with the longest names, and when something is wrong or was done."""
    long = f"{'w' * 200}{width}{scheme}"
    supplier, admin = key_of(server, "o" * 255), server.key("mlflow:admin")
    assert post_status(server, supplier, long) == 200
    post(server, MAKE, admin, {"name": f"operator-{width}-{scheme}"})
    wrong = []
    for key, views in (
        (admin, ("", "?show=unowned", "?view=shares", "?view=reserved", "?query=nothing")),
        (supplier, ("", "?show=shared", "?view=shares")),
    ):
        page = opened(key, viewport={"width": width, "height": 844}, color_scheme=scheme)
        for view in views:
            page.goto(f"{server.origin}{MODELS}{view}")
            wrong += findings(page)
        page.goto(f"{server.origin}{MODELS}?view=shares")
        for pattern in ("a*b", long):
            page.get_by_label("Models", exact=True).fill(pattern)
            page.get_by_label("With", exact=True).fill("g" * 255)
            page.get_by_role("button", name="Share", exact=True).click()
            expect(page.get_by_role("alert").or_(page.get_by_role("status"))).to_be_visible()
            wrong += findings(page)
        page.locator("summary").first.click()
        wrong += findings(page)
        if key == admin:
            page.goto(server.origin + MODELS)
            page.get_by_role("checkbox").first.check()
            page.get_by_label("New owner").fill(f"{width}{scheme}{'n' * 200}")
            page.get_by_role("button", name="Continue").click()
            expect(page.get_by_role("heading", name="Give 1 model")).to_be_visible()
            wrong += findings(page)
    assert not wrong, "\n".join(wrong)

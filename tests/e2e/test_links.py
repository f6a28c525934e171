"""One-time links in a real Chromium, by people who have no key yet, and in the logs of the server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.store.links import Links
from tests import harness
from tests.e2e.axe import findings
from tests.e2e.conftest import needs_chromium
from tests.harness import SERVERS, Server, serve

playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (it is in the extra `test`)"
)
expect = playwright_api.expect

pytestmark = pytest.mark.servers
PHONE = {"viewport": {"width": 390, "height": 844}}
SHOW = "Show the key"


@contextmanager
def public(folder: Path, options: Sequence[str], prefix: str = "") -> Iterator[Server]:
    """A server that knows its public URL, which is below `prefix`."""
    port = harness.free_port()
    url = f"http://127.0.0.1:{port}{prefix}"
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(harness, "free_port", lambda: port)
            running = serve(folder, options, HOKUSAI_AUTH_PUBLIC_URLS=url)
            server = stack.enter_context(running)
        yield server


@pytest.fixture(scope="module", params=["uvicorn", "gunicorn"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("links")
    with public(folder, SERVERS[request.param], "/mlflow") as running:
        yield running


@pytest.fixture
def person(browser: Any) -> Iterator[Callable[..., Any]]:
    """Return a page of somebody new."""
    contexts: list[Any] = []

    def new(**options: Any) -> Any:
        contexts.append(browser.new_context(**PHONE, locale="en-GB", **options))
        contexts[-1].set_default_timeout(60_000)
        return contexts[-1].new_page()

    yield new
    for context in contexts:
        context.close()


def make(server: Server, **more: Any) -> dict[str, Any]:
    body = more or {"key": {"owner": "ACME", "scopes": ["model:write"], "name": "training"}}
    status, _, answer = server.request(
        "POST",
        "/api/mlflow/api/2.0/hokusai/links",
        key=server.key("mlflow:admin"),
        headers={"Content-Type": "application/json"},
        body=json.dumps(body).encode(),
    )
    assert status == 201, answer
    made: dict[str, Any] = json.loads(answer)
    return made


def whoami(server: Server, key: str) -> dict[str, Any]:
    status, _, answer = server.request("GET", "/api/2.0/hokusai/whoami", key=key)
    assert status == 200, answer
    identity: dict[str, Any] = json.loads(answer)
    return identity


@needs_chromium
def test_link_on_a_phone_shows_the_key_once(person: Callable[..., Any], server: Server) -> None:
    link = make(server)
    page = person(color_scheme="dark")
    sent: list[str] = []
    page.on("request", lambda request: sent.append(f"{request.url} {request.headers}"))
    page.goto(link["url"])
    expect(page.get_by_role("heading", name="Get your API key")).to_be_visible()
    # Nothing to paste, and nothing has happened: a second look is free.
    expect(page.get_by_label("The link that you were sent")).to_be_hidden()
    page.reload()
    assert findings(page) == []
    page.get_by_role("button", name=SHOW).focus()
    page.keyboard.press("Enter")
    field = page.get_by_label("Your key, for ACME")
    expect(field).to_be_visible()
    key = field.input_value()
    assert whoami(server, key)["name"] == "training"
    lines = page.get_by_label("Set these two variables").input_value().splitlines()
    assert lines == [
        f"export HOKUSAI_API_KEY={key}",
        f"export MLFLOW_TRACKING_URI={server.origin}/mlflow",
    ]
    assert findings(page) == []
    assert not page.evaluate("document.scrollingElement.scrollWidth > innerWidth")
    # The boxes show their text whole.
    boxes = "[...document.querySelectorAll('.copy textarea')]"
    assert page.evaluate(f"{boxes}.map(one => one.scrollHeight - one.clientHeight)") == [0, 0]
    page.get_by_role("button", name="Copy the key").click()
    expect(page.get_by_role("status")).to_have_text("Copied.")
    code = keys.link_code_in(link["url"])
    assert code is not None and code not in page.url
    # The code went into the body of one POST, and nowhere else.
    assert not [one for one in sent if code in one]
    assert code not in server.log and key not in server.log
    # To load the page again sends nothing again: it would be one more refused attempt.
    page.reload()
    expect(page.get_by_role("heading", name="Get your API key")).to_be_visible()
    known = {one.link_id: one for one in Links(server.store.database).each()}
    assert known[link["link_id"]].refused == 0
    # Back in the history there is nothing to press again.
    page.go_back()
    assert code not in page.url


@needs_chromium
def test_of_two_people_who_open_a_link_one_gets_the_key_and_the_other_is_told(
    person: Callable[..., Any], server: Server
) -> None:
    link = make(server)
    first, second = person(), person()
    for page in (first, second):
        page.goto(link["url"])
    first.get_by_role("button", name=SHOW).click()
    expect(first.get_by_label("Your key, for ACME")).to_be_visible()
    second.get_by_role("button", name=SHOW).click()
    expect(second.get_by_role("alert")).to_contain_text("was opened on")
    assert findings(second) == []
    # To load the page again is no further attempt.
    second.reload()
    expect(second.get_by_role("heading", name="Get your API key")).to_be_visible()
    (known,) = [
        one for one in Links(server.store.database).each() if one.link_id == link["link_id"]
    ]
    assert (known.opened_from, known.refused) == ("127.0.0.1", 1)
    # The page of a key is not taken for that of another link.
    other = make(server)
    first.evaluate(f"location.href = '{other['url']}'")
    expect(first.get_by_role("button", name=SHOW)).to_be_visible()
    first.get_by_role("button", name=SHOW).click()
    expect(first.get_by_label("Your key, for ACME")).to_be_visible()


@needs_chromium
def test_without_a_script_the_link_is_pasted(person: Callable[..., Any], server: Server) -> None:
    link = make(server)
    page = person(java_script_enabled=False)
    page.goto(link["url"])
    field = page.get_by_label("The link that you were sent")
    field.fill(link["url"][:-3])
    page.get_by_role("button", name=SHOW).click()
    expect(page.get_by_role("alert")).to_contain_text("not a whole link")
    field.fill(link["url"])
    page.get_by_role("button", name=SHOW).click()
    assert whoami(server, page.get_by_label("Your key, for ACME").input_value())["owner"] == "ACME"


def test_workers_that_open_a_link_at_once_make_one_key(tmp_path: Path) -> None:
    with public(tmp_path, (*SERVERS["gunicorn"], "--workers", "4")) as server:
        link = make(server)
        body = urlencode({"code": link["url"]}).encode()
        sent = {
            "Content-Type": "application/x-www-form-urlencoded",
            "Origin": server.origin,
            "Sec-Fetch-Site": "same-origin",
        }

        def post(_: int) -> int:
            return server.request("POST", "/hokusai/link", headers=sent, body=body)[0]

        with ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(post, range(8))) == [200] + [410] * 7
        assert [one.owner for one in server.store.each()].count("ACME") == 1

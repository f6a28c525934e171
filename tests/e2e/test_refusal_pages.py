"""Pages that a person with a browser sees if the gate refuses, at two widths, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from mlflow_hokusai_auth.core import keys
from tests.e2e.axe import findings
from tests.e2e.conftest import needs_chromium
from tests.e2e.parts import interceptor, renamed
from tests.harness import Server, serve

playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (it is in the extra `test`)"
)
expect = playwright_api.expect

pytestmark = [pytest.mark.servers, needs_chromium]

RULE = """
from mlflow_hokusai_auth.server.interceptors import Refusal
def on_request(request):
    if request.owner == "Ruled":
        return Refusal("The registry is closed until Monday, while its disks are replaced.")
"""
FIND = "/api/mlflow/hokusai/keys/find"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("refusals")
    with serve(
        folder,
        PYTHONPATH=interceptor(folder / "plugins", RULE),
        HOKUSAI_AUTH_CONTACT="registry@example.com",
    ) as running:
        yield running


def refusals(server: Server) -> list[tuple[str, str, AbstractContextManager[Any]]]:
    """Return the heading of each refusal, the key that gets it, and what has to be so meanwhile."""
    create = server.store.create
    usual: dict[str, Any] = {"owner": "Refused", "scopes": ["mlflow:admin"]}
    often = create(**usual, rate_limit_per_hour=1)[1]
    server.request("GET", "/version", key=often)
    down = renamed(server.folder / "hokusai_auth.db", "hokusai_auth_keys")
    return [
        ("Not open to your key", create(owner="Refused", scopes=["model:read"])[1], nullcontext()),
        (
            "Not open from your address",
            create(**usual, networks=["192.0.2.0/24"])[1],
            nullcontext(),
        ),
        (
            "Refused by a rule of this server",
            create(**{**usual, "owner": "Ruled"})[1],
            nullcontext(),
        ),
        ("This server doesn’t know the key", keys.generate(), nullcontext()),
        ("Too many requests", often, nullcontext()),
        # None of the page, its style and its picture needs the store.
        ("Not available at the moment", create(**usual)[1], down),
    ]


@pytest.mark.parametrize("width", [390, 1280])
def test_refusals_are_pages(browser: Any, server: Server, width: int) -> None:
    wrong = []
    for title, key, meanwhile in refusals(server):
        context = browser.new_context(
            viewport={"width": width, "height": 800},
            extra_http_headers={"X-API-Key": key},
            bypass_csp=True,  # axe is a script of its own
            reduced_motion="reduce",
        )
        page = context.new_page()
        lost: list[str] = []
        page.on("response", lambda one, lost=lost: one.ok or lost.append(one.url))
        with meanwhile:
            answer = page.goto(server.origin + FIND)
            assert answer is not None and answer.status in (401, 403, 429, 503), title
            expect(page.get_by_role("heading")).to_have_text(title)
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                wrong += findings(page)
        assert lost == [answer.url], title
        assert key[8:] not in page.content()
        if "retry-after" in answer.headers:
            expect(page.get_by_text("Try again in")).to_be_visible()
        if answer.status == 503:
            page.get_by_role("link", name="Try again").click()
            expect(page).to_have_title("Which key is this? · MLflow")
        context.close()
    assert not wrong, "\n".join(wrong)

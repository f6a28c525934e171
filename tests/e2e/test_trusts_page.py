"""The page of trusts in a real Chromium, where suppliers manage their own.

Nobody has JavaScript; only axe, which checks the pages, needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mlflow_hokusai_auth.core.trust import workload
from mlflow_hokusai_auth.store.trusts import Trusts
from tests.core.test_trust import GITHUB
from tests.e2e.axe import findings
from tests.e2e.conftest import needs_chromium
from tests.harness import Server, serve

playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (it is in the extra `test`)"
)
# Below the other imports, as the module imports playwright when it is imported.
from tests.e2e.test_models_page import Opened, opened  # noqa: E402, F401

expect = playwright_api.expect

pytestmark = [pytest.mark.servers, needs_chromium]
TRUSTS = "/hokusai/trusts"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("trusts"), HOKUSAI_AUTH_SUPPLIER_TRUST="true") as running:
        yield running


def key_of(server: Server, owner: str, scope: str = "model:write", **more: Any) -> str:
    return server.store.create(owner=owner, scopes=[scope], **more)[1]


@pytest.mark.parametrize("prefix", ["", "/api/mlflow"])
def test_supplier_trusts_its_workflow_and_ends_it(
    prefix: str,
    opened: Opened,  # noqa: F811
    server: Server,
) -> None:
    owner = f"ACME{len(prefix)}"
    page = opened(key_of(server, owner), java_script_enabled=False)
    page.goto(f"{server.origin}{prefix}/hokusai/keys")
    page.get_by_role("link", name="Trusts").click()
    page.wait_for_url(f"{server.origin}{prefix}{TRUSTS}")
    expect(page.get_by_role("heading", name="No trusts yet")).to_be_visible()
    page.get_by_label("Repository or project").fill(f"acme{len(prefix)}")
    page.get_by_label("Workflow’s file").fill("release.yml")
    page.get_by_label("Environment").fill("prod")
    page.get_by_role("button", name="Trust it").click()
    # The form keeps what was typed, and marks the field that is wrong.
    project = page.get_by_label("Repository or project")
    expect(page.get_by_role("alert")).to_contain_text("org/repo")
    assert project.get_attribute("aria-invalid") == "true"
    expect(project).to_be_focused()
    assert page.get_by_label("Environment").input_value() == "prod"
    project.fill(f"acme/{owner}")
    page.get_by_role("button", name="Trust it").click()
    page.wait_for_url(f"{server.origin}{prefix}{TRUSTS}?*")
    said = page.get_by_role("status")
    expect(said).to_contain_text(f"release.yml of acme/{owner} on GitHub, environment prod")
    expect(said).to_be_focused()
    trusts = Trusts(server.store.database)
    (made,) = [one.trust for one in trusts.each() if one.trust.owner == owner]
    # Loaded again, the page sends nothing again.
    page.reload()
    assert [one.trust.owner for one in trusts.each()].count(owner) == 1
    row = page.get_by_role("row").filter(has_text=made.trust_id)
    row.get_by_role("link", name="Edit").click()
    expect(page.get_by_text("Saving ends the keys")).to_be_visible()
    page.get_by_label("May not delete anything").check()
    page.get_by_role("button", name="Save").click()
    page.wait_for_url(f"{server.origin}{prefix}{TRUSTS}?*")
    expect(page.get_by_role("status")).to_contain_text("end within a second")
    expect(row).to_contain_text("no deletion")
    row.locator("summary").focus()
    page.keyboard.press("Enter")
    button = row.get_by_role("button", name="Remove now")
    expect(button).to_be_visible()
    page.keyboard.press("Tab")
    expect(button).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Not trusted any more")
    assert owner not in [one.trust.owner for one in trusts.each()]


def test_operator_sees_all_and_a_supplier_its_own(
    opened: Opened,  # noqa: F811
    server: Server,
) -> None:
    trusts = Trusts(server.store.database)
    globex = trusts.add(
        workload(issuer="https://i.example", claims={"sub": "globex"}),
        owner="Globex",
        scopes=("model:write",),
        ttl=900.0,
    ).trust.trust_id
    page = opened(server.key("mlflow:admin"), java_script_enabled=False)
    page.goto(server.origin + TRUSTS)
    page.get_by_role("radio", name="GitLab").check()
    page.get_by_label("Owner of the keys").fill("Initech")
    page.get_by_label("Repository or project").fill("initech/models")
    page.get_by_label("A key lives for").fill("30")
    page.get_by_role("button", name="Trust it").click()
    expect(page.get_by_role("row").filter(has_text="Initech")).to_contain_text("for 30 min")
    expect(page.get_by_role("row").filter(has_text=globex)).to_contain_text("i.example")
    page.get_by_label("Owner", exact=True).fill("Globex")
    page.get_by_role("button", name="Filter").click()
    expect(page.get_by_role("row").filter(has_text=globex)).to_be_visible()
    assert "initech/models" not in page.content()

    supplier = opened(key_of(server, "Initech"), java_script_enabled=False)
    supplier.goto(server.origin + TRUSTS)
    expect(supplier.get_by_role("row").filter(has_text="initech/models")).to_be_visible()
    assert "globex" not in supplier.content().lower()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_page_is_accessible_and_fits(
    width: int,
    scheme: str,
    opened: Opened,  # noqa: F811
    server: Server,
) -> None:
    """The page stays so with the longest names, and when something is wrong or was done."""
    trusts = Trusts(server.store.database)
    owner = f"{width}{'o' * 250}"
    long = f"{'w' * 200}{width}"
    made = trusts.add(
        workload(github=f"{width}/{'r' * 200}", workflow="r.yml", claims={"ref": f"{long}*"}),
        owner=owner,
        scopes=("model:read", "model:write"),
        models=(f"{long}*", "lead"),
        no_delete=True,
        ttl=90.0,
    ).trust
    claims = {
        **GITHUB,
        "repository": f"{width}/{'r' * 200}",
        "job_workflow_ref": f"{width}/{'r' * 200}/.github/workflows/r.yml@refs/heads/x",
        "ref": long,
    }
    found = trusts.exchange(
        made.trust_id, claims, digest="0" * 64, token_id=long, ends_at=2e9, jwks=None
    )
    assert isinstance(found, tuple)
    wrong: list[str] = []
    for key in (server.key("mlflow:admin"), key_of(server, owner), key_of(server, f"n{width}")):
        page = opened(key, viewport={"width": width, "height": 844}, color_scheme=scheme)
        page.goto(server.origin + TRUSTS)
        wrong += findings(page)
        if page.get_by_label("Owner of the keys").count():
            page.get_by_label("Owner of the keys").fill(owner)
        page.get_by_label("Workflow’s file").fill("release.yml")
        for project in ("acme", f"{'p' * 30}/{'x' * 100}{len(wrong)}{key[-6:]}"):
            page.get_by_label("Repository or project").fill(project)
            page.get_by_role("button", name="Trust it").click()
            expect(page.get_by_role("alert").or_(page.get_by_role("status"))).to_be_visible()
            page.wait_for_load_state()
            wrong += findings(page)
        bar = page.locator(".bar").bounding_box()
        assert bar and bar["height"] < (150 if width == 390 else 60), "a long name is shortened"
        row = page.locator("td.actions").first
        tops = [row.locator(one).bounding_box()["y"] for one in ("a", "summary")]
        assert tops[0] == tops[1], "Edit and Remove stand in one row"
        page.locator("summary").first.click()
        wrong += findings(page)
        page.get_by_role("link", name="Edit").first.click()
        page.get_by_label("Only these models").fill("a*b")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("alert")).to_contain_text("only at its end")
        page.wait_for_load_state()
        wrong += findings(page)
    page = opened(server.key("mlflow:admin"), viewport={"width": width, "height": 844})
    page.goto(f"{server.origin}{TRUSTS}?owner=nobody")
    wrong += findings(page)
    assert not wrong, "\n".join(wrong)

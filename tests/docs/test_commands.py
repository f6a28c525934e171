"""The commands on the pages work: each is run against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_hokusai_auth.store.keys import LocalStore
from tests.docs.pages import ADDRESS, DOCS, KEY, ROOT, blocks, run
from tests.harness import Server, free_port, serve

#: Pages whose commands run in tests/docker/test_rollback.py, or need a real incident.
ELSEWHERE = {"rollback.md", "runbooks.md"}
#: Pages about a server in use: its key store is in the folder.
IN_USE = {"databases.md", "isolation.md", "links.md", "upgrade.md"}
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    if page.name not in ELSEWHERE
    and any(block.language in ("bash", "python") for block in blocks(page))
]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for the pages only: their commands make models that other tests don't expect."""
    with serve(
        tmp_path_factory.mktemp("registry"),
        HOKUSAI_AUTH_ISOLATION="",
        HOKUSAI_AUTH_PUBLIC_URLS=ADDRESS,
    ) as running:
        yield running


@pytest.mark.servers
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_work(page: Path, registry: Server, tmp_path: Path) -> None:
    if page.name in IN_USE:
        LocalStore(f"sqlite:///{tmp_path}/hokusai_auth.db").migrate()
    # Each page gets its own key, as pages show how to replace it.
    scope = "mlflow:admin" if "api" in page.parts else "model:write"
    replaced = {
        ADDRESS: registry.origin,
        KEY: registry.store.create(owner="ACME", scopes=[scope])[1],
        "5000": str(free_port()),
    }
    # The programs themselves, which a reader starts, are those of the first page.
    run(page, tmp_path, replaced, forked=page.name != "README.md")

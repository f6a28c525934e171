"""What stands on the pages works: each command of them is run, against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import ADDRESS, DOCS, KEY, ROOT, blocks, run
from tests.harness import Server, free_port, serve

#: Whose commands others run: tests/docker/test_rollback.py; nobody, as they need a real incident.
ELSEWHERE = {"rollback.md", "runbooks.md"}
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    if page.name not in ELSEWHERE
    and any(block.language in ("bash", "python") for block in blocks(page))
]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the pages' own, whose commands make models that other tests don't expect."""
    with serve(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.mark.servers
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_work(page: Path, registry: Server, tmp_path: Path) -> None:
    # A key of its own: pages say how to replace it.
    scope = "mlflow:admin" if "api" in page.parts else "model:write"
    replaced = {
        ADDRESS: registry.origin,
        KEY: registry.store.create(owner="ACME", scopes=[scope])[1],
        "5000": str(free_port()),
    }
    run(page, tmp_path, replaced)

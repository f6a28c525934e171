from __future__ import annotations

from typing import Any

import pytest


def findings(page: Any) -> list[str]:
    """Return what axe finds on `page`, and whether it is wider than its window.

    The page is looked at when it is at rest: one that a click leads to is there before its style,
    and colours that are still changing have a contrast of their own.
    """
    axe_api = pytest.importorskip(
        "axe_playwright_python.sync_playwright",
        reason="axe-playwright-python is not installed (it is in the extra `test`)",
    )
    page.wait_for_load_state("load")
    page.evaluate(
        "Promise.allSettled(document.getAnimations().map(one => one.finished)).then(() => 0)"
    )
    wrong = [
        f"{page.url}: {found['id']} {[node['html'][:200] for node in found['nodes']]}"
        for found in axe_api.Axe().run(page).response["violations"]
    ]
    if page.evaluate("document.scrollingElement.scrollWidth > innerWidth"):
        wrong.append(f"{page.url} is too wide")
    return wrong

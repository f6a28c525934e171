"""Links of the files beside the site; those within it are checked by `make docs`."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT

_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]+)?\)")


def slugs(text: str) -> set[str]:
    """Headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("*.md")))
def test_each_link_leads_somewhere(name: str) -> None:
    for target, anchor in _LINK.findall((ROOT / name).read_text()):
        path = ROOT / (target or name)
        assert path.exists(), target
        assert not anchor or anchor[1:] in slugs(path.read_text()), (target, anchor)

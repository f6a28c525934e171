"""The pages that docs/generate.py makes match the code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.docs.pages import DOCS


def test_generated_pages_are_current(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DOCS / "generate.py", tmp_path], check=True)
    made = {page.relative_to(tmp_path) for page in tmp_path.rglob("*.md")}
    assert made
    stale = [
        str(page)
        for page in sorted(made)
        if not (DOCS / page).is_file()
        or (DOCS / page).read_bytes() != (tmp_path / page).read_bytes()
    ]
    assert not stale, "Run `python docs/generate.py`, and look at what it changed."

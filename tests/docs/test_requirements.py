"""docs/requirements.md has every line of the task list, and what it names exists."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import lru_cache

import pytest

from tests.docs.pages import DOCS, ROOT

#: The task list itself is not part of the repository: its groups, and how many lines each has.
LINES = [4, 3, 3, 4, 5, 5, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4]
PACKAGE = ROOT / "mlflow_hokusai_auth"
PAGE = (DOCS / "requirements.md").read_text("utf-8")
#: Number -> its cells: the line in its words, where it is built, what proves it.
ROWS = re.findall(r"^\| (\d+[a-z]) \| (.+) \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)


def proofs(cell: str) -> list[str]:
    """The tests that are named in a cell."""
    return [span for span in re.findall(r"`([^`]+)`", cell) if "::" in span]


TESTS = sorted({test for *_, proof in ROWS for test in proofs(proof)})


@lru_cache
def defined(path: str) -> frozenset[str]:
    """The tests in a file, those of a class with its name in front."""
    found = set()
    for node in ast.parse((ROOT / path).read_text("utf-8")).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + one.name for one in inside if isinstance(one, ast.FunctionDef)}
    return frozenset(found)


def headings(text: str) -> set[str]:
    """The names that links to the headings of a page have."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_line_stands_there_once() -> None:
    due = [f"{group}{'abcde'[i]}" for group, count in enumerate(LINES, 1) for i in range(count)]
    assert Counter(number for number, *_ in ROWS) == Counter(due)


def test_every_line_has_a_proof() -> None:
    assert [number for number, *_, proof in ROWS if not proofs(proof)] == []


@pytest.mark.parametrize("test", TESTS)
def test_every_test_exists(test: str) -> None:
    path, _, name = test.partition("::")
    assert name.rpartition("::")[2].startswith("test_") and name in defined(path)


@pytest.mark.parametrize("built", [row[2] for row in ROWS], ids=[row[0] for row in ROWS])
def test_every_place_exists(built: str) -> None:
    for place in re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.md)`", built):
        assert (ROOT / place).exists() or (PACKAGE / place).exists(), place
    for page, heading in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", built):
        assert (DOCS / page).is_file(), page
        if heading:
            assert heading in headings((DOCS / page).read_text("utf-8")), heading

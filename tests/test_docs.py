"""docs/threat-model.md has each of the 50 vectors once, and every test that it names exists."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import DOCS
from tests.docs.test_requirements import PACKAGE, defined

PAGE = (DOCS / "threat-model.md").read_text("utf-8")
#: A row of the table of vectors: its number, the attack, what stops it, the tests.
ROWS = re.findall(r"^\| (\d+) \| (.+) \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", PAGE)))


def test_the_50_vectors_stand_there_in_order_with_a_test_each() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, 51))
    assert [number for number, *_, tests in ROWS if "::test_" not in tests] == []


@pytest.mark.parametrize(("path", "name"), TESTS, ids=lambda text: text)
def test_every_test_exists(path: str, name: str) -> None:
    assert name.rpartition("::")[2].startswith("test_") and name in defined(path)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_part_exists(row: tuple[str, ...]) -> None:
    for part in re.findall(r"`(\w+/\w+\.py)`", row[2]):
        assert (PACKAGE / part).is_file()

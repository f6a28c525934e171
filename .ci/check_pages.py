"""Pages, tests and settings name each other: `file:line: what` for each that does not, and status 1.

The tests that pages name exist, and so do the files and headings that they link to. The requirements
and the threat model have every line, with a proof each; the page of errors has every code; the test of
the rollback runs every command of its page. Looks at the current folder, or at the one that is named.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import zip_longest
from pathlib import Path

from mlflow_hokusai_auth.core.denials import CODES
from mlflow_hokusai_auth.server.settings import PREFIX, Settings

#: The task list itself is not part of the repository: its groups, and how many lines each has.
LINES = [4, 3, 3, 4, 5, 5, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4]
REQUIREMENTS = [
    f"{group}{'abcde'[i]}" for group, count in enumerate(LINES, 1) for i in range(count)
]
VECTORS = [str(number) for number in range(1, 51)]
#: A row of either table: its number, its words, where it is built, what proves it.
ROW = re.compile(r"^\| (\d+[a-z]?) \| (.+) \| (.+) \| (.+) \|$", re.MULTILINE)
TEST = re.compile(r"`([^`\s:]+)::([^`\s]+)`")
PLACE = re.compile(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.md)`")
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)#?([^)\s]*)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
SETTING = re.compile(rf"{PREFIX}([A-Z_]+)")
#: A page shows what is said of a misspelt one.
MISSPELT = {"POLCY"}
FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)


class Page:
    """A file of the repository, and where in it something is."""

    def __init__(self, root: Path, name: str) -> None:
        self.name, self.path = name, root / name
        self.text = self.path.read_text("utf-8")

    def at(self, position: int, what: str) -> str:
        """A finding, as it is printed."""
        line = self.text.count("\n", 0, position) + 1
        return f"{self.name}:{line}: {what}"


def mismatches(root: Path) -> Iterator[str]:
    """What pages of the repository at `root` name and what does not exist, or the other way round."""
    names = [*root.glob("*.md"), *(root / "docs").rglob("*.md")]
    for name in sorted(str(path.relative_to(root)) for path in names if "_build" not in path.parts):
        page = Page(root, name)
        yield from tests(root, page)
        yield from links(page)
        for found in SETTING.finditer(page.text):
            if found[1].lower() not in Settings.model_fields and found[1] not in MISSPELT:
                yield page.at(found.start(), f"there is no setting {found[0]}")
    yield from table(root, Page(root, "docs/requirements.md"), REQUIREMENTS)
    yield from table(root, Page(root, "docs/threat-model.md"), VECTORS)
    yield from codes(Page(root, "docs/supplier/errors.md"))
    yield from rollback(root, Page(root, "docs/rollback.md"))


def tests(root: Path, page: Page) -> Iterator[str]:
    """Tests that a page names and that are none."""
    for found in TEST.finditer(page.text):
        path, test = found.groups()
        if not test.rpartition("::")[2].startswith("test_") or test not in defined(root / path):
            yield page.at(found.start(), f"there is no test {path}::{test}")


@cache
def defined(path: Path) -> frozenset[str]:
    """The tests in a file, those of a class with its name in front; none if it is no file."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body if path.is_file() else []:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + one.name for one in inside if isinstance(one, ast.FunctionDef)}
    return frozenset(found)


def links(page: Page) -> Iterator[str]:
    """Links of a page that lead to no file or no heading; blocks of code have none."""
    text = FENCED.sub(lambda block: re.sub(r"[^\n]", " ", block[0]), page.text)
    for found in LINK.finditer(text):
        target = page.path.parent / found[1] if found[1] else page.path
        if not target.exists():
            yield page.at(found.start(), f"there is no file {found[1]}")
        elif found[2] and found[2] not in headings(target):
            yield page.at(found.start(), f"there is no heading {found[2]} in {target.name}")


@cache
def headings(path: Path) -> frozenset[str]:
    """The names that links to the headings of a page have."""
    titles = HEADING.findall(path.read_text("utf-8"))
    return frozenset(re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles)


def table(root: Path, page: Page, due: list[str]) -> Iterator[str]:
    """Rows that are missing or too many; places of rows that don't exist; rows without a proof."""
    rows = list(ROW.finditer(page.text))
    for row, number in zip_longest(rows, due):
        if row is None or row[1] != number:
            where = row.start() if row else rows[-1].end() if rows else 0
            there = f"{row[1]} stands" if row else "nothing stands"
            yield page.at(where, f"{there} where {number or 'nothing'} should")
            break
    for row in rows:
        for place in PLACE.findall(row[3]):
            if not any(
                (folder / place).exists() for folder in (root, root / "mlflow_hokusai_auth")
            ):
                yield page.at(row.start(), f"there is no {place}")
        if not TEST.search(row[4]) and "`make lint`" not in row[4]:
            yield page.at(row.start(), f"nothing proves {row[1]}")


def codes(page: Page) -> Iterator[str]:
    """Codes of refusals without a section that tells their status, and sections of no code."""
    coded, _, rest = page.text.partition("\n## Messages without a code\n")
    told = re.findall(r"^## (.+)\n\nStatus (\d+)\. ", coded, re.MULTILINE)
    for name, code in CODES.items():
        if told.count((name, str(code.status))) != 1:
            yield page.at(0, f"{name} and its status {code.status} don't stand there once")
    if not rest:
        yield page.at(0, "there is no section of the messages without a code")
    for found in list(HEADING.finditer(page.text))[1:]:
        if (found[1] in CODES) != (found.start() < len(coded)):
            yield page.at(
                found.start(), f"{found[1]} stands on the wrong side of messages without a code"
            )


def rollback(root: Path, page: Page) -> Iterator[str]:
    """Commands of the page of rollbacks that its test does not run, and commands that it lacks."""
    test = (root / "tests/docker/test_rollback.py").read_text("utf-8")
    tried = {"setup", *re.findall(r'run\(stack, "([\w-]+)"', test)}
    blocks = {found[1]: found.start() for found in re.finditer(r"^```sh ?(.*)$", page.text, re.M)}
    for name in sorted(blocks.keys() - tried):
        yield page.at(
            blocks[name], f"tests/docker/test_rollback.py does not run the block {name!r}"
        )
    for name in sorted(tried - blocks.keys()):
        yield page.at(0, f"there is no block {name!r}, which tests/docker/test_rollback.py runs")


def main(folder: str = ".") -> int:
    """Print what was found, and return the exit status."""
    found = list(mismatches(Path(folder)))
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

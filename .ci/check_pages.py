"""Print a line `file:line: what` for each name on a page that nothing has; exit with status 1 if any.

The tests, settings and files that pages name exist, and so do the files and headings that they link to.
The requirements and the threat model have every row, each with its proof. The page of errors has every
code. The test of the rollback runs every command of its page. The argument is the root of the
repository, which is the current folder by default.
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
#: A row of either table: its number, its text, where it is built, what proves it.
ROW = re.compile(r"^\| (\d+[a-z]?) \| (.+) \| (.+) \| (.+) \|$", re.MULTILINE)
TEST = re.compile(r"`([^`\s:]+)::([^`\s]+)`")
#: A file or folder of the repository, as pages name it in code; the package's name may be left out.
PATH = re.compile(
    r"`((?:mlflow_hokusai_auth|core|store|authorities|server|client|cli|migrations|tests|bench|docs"
    r"|docker|\.ci|\.github)/(?:[\w.-]+/)*(?:[\w-]+\.(?:py|md|toml|txt|svg|yml|json|conf))?"
    r"|[A-Z]+\.md)`"
)
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)#?([^)\s]*)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
# Not the variable with an underscore before it, with which click completes.
SETTING = re.compile(rf"(?<!_){PREFIX}([A-Z_]+)")
#: A page shows the message for a misspelt one.
MISSPELT = {"POLCY"}
FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)


class Page:
    """A file of the repository with its text."""

    def __init__(self, root: Path, name: str) -> None:
        self.name, self.path = name, root / name
        self.text = self.path.read_text("utf-8")

    def at(self, position: int, what: str) -> str:
        """Return `what` with the file and the line of `position`, as it is printed."""
        line = self.text.count("\n", 0, position) + 1
        return f"{self.name}:{line}: {what}"


def mismatches(root: Path) -> Iterator[str]:
    """Yield a line for each name on the pages of `root` that nothing has, and for each missing row."""
    names = [*root.glob("*.md"), *(root / "docs").rglob("*.md")]
    for name in sorted(str(path.relative_to(root)) for path in names if "_build" not in path.parts):
        page = Page(root, name)
        yield from tests(root, page)
        yield from paths(root, page)
        yield from links(page)
        for found in SETTING.finditer(page.text):
            if found[1].lower() not in Settings.model_fields and found[1] not in MISSPELT:
                yield page.at(found.start(), f"there is no setting {found[0]}")
    yield from table(Page(root, "docs/requirements.md"), REQUIREMENTS)
    yield from table(Page(root, "docs/threat-model.md"), VECTORS)
    yield from codes(Page(root, "docs/supplier/errors.md"))
    yield from rollback(root, Page(root, "docs/rollback.md"))


def tests(root: Path, page: Page) -> Iterator[str]:
    """Yield a line for each test that a page names and that does not exist."""
    for found in TEST.finditer(page.text):
        path, test = found.groups()
        if not test.rpartition("::")[2].startswith("test_") or test not in defined(root / path):
            yield page.at(found.start(), f"there is no test {path}::{test}")


def paths(root: Path, page: Page) -> Iterator[str]:
    """Yield a line for each file or folder that a page names in code and that does not exist."""
    for found in PATH.finditer(page.text):
        if not any((top / found[1]).exists() for top in (root, root / "mlflow_hokusai_auth")):
            yield page.at(found.start(), f"there is no {found[1]}")


@cache
def defined(path: Path) -> frozenset[str]:
    """Return the tests in a file, as `test` or `Class::test`; none if there is no such file."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body if path.is_file() else []:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + one.name for one in inside if isinstance(one, ast.FunctionDef)}
    return frozenset(found)


def links(page: Page) -> Iterator[str]:
    """Yield a line for each link, outside blocks of code, that leads to no file or no heading."""
    text = FENCED.sub(lambda block: re.sub(r"[^\n]", " ", block[0]), page.text)
    for found in LINK.finditer(text):
        target = page.path.parent / found[1] if found[1] else page.path
        if not target.exists():
            yield page.at(found.start(), f"there is no file {found[1]}")
        elif found[2] and found[2] not in headings(target):
            yield page.at(found.start(), f"there is no heading {found[2]} in {target.name}")


@cache
def headings(path: Path) -> frozenset[str]:
    """Return the anchors of a page's headings."""
    titles = HEADING.findall(path.read_text("utf-8"))
    return frozenset(re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles)


def table(page: Page, due: list[str]) -> Iterator[str]:
    """Yield a line for the first row that is not due, and for each row without a proof."""
    rows = list(ROW.finditer(page.text))
    for row, number in zip_longest(rows, due):
        if row is None or row[1] != number:
            where = row.start() if row else rows[-1].end() if rows else 0
            there = f"{row[1]} stands" if row else "nothing stands"
            yield page.at(where, f"{there} where {number or 'nothing'} should")
            break
    for row in rows:
        if not TEST.search(row[4]) and "`make lint`" not in row[4]:
            yield page.at(row.start(), f"nothing proves {row[1]}")


def codes(page: Page) -> Iterator[str]:
    """Yield a line for each code without a section that has its status, and each section of no code."""
    coded, _, rest = page.text.partition("\n## Messages without a code\n")
    sections = re.findall(r"^## (.+)\n\nStatus (\d+)\. ", coded, re.MULTILINE)
    for name, code in CODES.items():
        if sections.count((name, str(code.status))) != 1:
            yield page.at(0, f"{name} and its status {code.status} don't stand there once")
    if not rest:
        yield page.at(0, "there is no section of the messages without a code")
    for found in list(HEADING.finditer(page.text))[1:]:
        if (found[1] in CODES) != (found.start() < len(coded)):
            yield page.at(
                found.start(), f"{found[1]} stands on the wrong side of messages without a code"
            )


def rollback(root: Path, page: Page) -> Iterator[str]:
    """Yield a line for each block that the test does not run, and for each that the page lacks."""
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
    """Print the lines for the repository in `folder`, and return the exit status."""
    found = list(mismatches(Path(folder)))
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Print the files of the long tests that a change is likely to break, for `make test-long-changed`.

These are the attacks, and the tests that import a module that has changed since the base. The base is
the commit in $CI_BASE, by default the last commit that is a day older than HEAD.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "mlflow_hokusai_auth"
ATTACKS = "tests/adversarial"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _base() -> str:
    """Return the commit to compare with, or "" if all commits are new."""
    if base := os.environ.get("CI_BASE"):
        return base
    made = int(_git("log", "-1", "--format=%ct"))
    return _git("log", "-1", "--format=%H", f"--before={made - 86400}")


def chosen(changed: list[str], texts: dict[str, str]) -> list[str]:
    """Return the files of `texts` (path: text) to run if the paths `changed` have changed."""
    modules = {
        Path(path).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for path in changed
        if path.startswith(PACKAGE) and path.endswith(".py")
    }
    found = []
    for path, text in sorted(texts.items()):
        if not re.search(r"mark\.long|marks=pytest\.mark\.long", text):
            continue
        imported = set(re.findall(rf"{PACKAGE}[\w.]*", text))
        for package, names in re.findall(rf"from ({PACKAGE}[\w.]*) import ([\w, ]+)", text):
            imported |= {f"{package}.{name.strip()}" for name in names.split(",")}
        if path.startswith(ATTACKS) or path in changed or imported & modules:
            found.append(path)
    return found


def main() -> int:
    """Print the files, the attacks first."""
    base = _base()
    changed = _git("diff", "--name-only", base, "HEAD").splitlines() if base else []
    texts = {
        str(path.relative_to(ROOT)): path.read_text()
        for path in (ROOT / "tests").rglob("test_*.py")
        if "docker" not in path.parts
    }
    files = chosen(changed, texts)
    print("\n".join(sorted(files, key=lambda path: not path.startswith(ATTACKS))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

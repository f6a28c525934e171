"""Whole API keys in the files that are named, or else in all that git has or would add: status 1.

What is looked for is what GitHub is asked to look for in public and the key store would take. Made up
ones (`hk_live_aaaa…`) have few different characters, and pass. No key is printed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.server.web.leak_reports import PATTERN

#: Fewer different characters than this has one in 10**12 of the shortest keys that are random.
DIFFERENT = 12

_PATTERN = re.compile(PATTERN, re.ASCII)


def found(text: str) -> Iterator[int]:
    """The line of each key in `text`."""
    for match in _PATTERN.finditer(text):
        if keys.importable(match[0]) and len(set(match[0].split("_")[2])) >= DIFFERENT:
            yield text.count("\n", 0, match.start()) + 1


def tree() -> list[str]:
    """What git has, and what it would add."""
    # A container's user need not own what was checked out for it.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached"]
    listed = subprocess.run(
        [*command, "--others", "--exclude-standard"], check=True, capture_output=True
    )
    return listed.stdout.decode().split("\0")[:-1]


def main(names: list[str]) -> int:
    """Look, tell on standard error, and return the exit status."""
    status = 0
    for path in map(Path, names or tree()):
        # git has names of what is deleted, and of folders that are repositories.
        if not path.is_file():
            continue
        for line in found(path.read_bytes().decode("latin-1")):
            print(f"{path}:{line}: an API key. Generate it, and revoke this one.", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

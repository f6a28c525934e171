"""Find whole API keys in the files that are named, by default in all files that git has or would add.

A key matches the pattern that GitHub's secret scanning uses, and the key store would import it. Made-up
keys (`hk_live_aaaa…`) have few different characters, and pass. The script prints the place of each key,
not the key, and exits with status 1 if it finds one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.server.web.leak_reports import PATTERN

#: Of the shortest random keys, one in 10**12 has fewer different characters than this.
DIFFERENT = 12

_PATTERN = re.compile(PATTERN, re.ASCII)


def found(text: str) -> Iterator[int]:
    """Yield the line number of each key in `text`."""
    for match in _PATTERN.finditer(text):
        exchanged = match[0].startswith("hk_ci_") and keys.problem(match[0]) is None
        if (exchanged or keys.importable(match[0])) and len(
            set(match[0].split("_")[2])
        ) >= DIFFERENT:
            yield text.count("\n", 0, match.start()) + 1


def tree() -> list[str]:
    """Return the names of the files that git has or would add."""
    # In a container, the user may not be the owner of the checkout, which git refuses otherwise.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached"]
    listed = subprocess.run(
        [*command, "--others", "--exclude-standard"], check=True, capture_output=True
    )
    return listed.stdout.decode().split("\0")[:-1]


def main(names: list[str]) -> int:
    """Print the place of each key to standard error, and return the exit status."""
    status = 0
    for path in map(Path, names or tree()):
        # git also lists deleted files, and folders that are repositories.
        if not path.is_file():
            continue
        for line in found(path.read_bytes().decode("latin-1")):
            print(f"{path}:{line}: an API key. Generate it, and revoke this one.", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

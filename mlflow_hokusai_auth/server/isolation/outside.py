"""At start, an operator is told which locations in MLflow's database lie outside the artifact roots.

Servers have experiments in buckets of their own by their administrators' will. These are not opened
until a setting names them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from mlflow_hokusai_auth.core.keys import redact
from mlflow_hokusai_auth.core.locations import Roots, outside
from mlflow_hokusai_auth.server import metrics
from mlflow_hokusai_auth.server.upstream import tables
from mlflow_hokusai_auth.server.upstream.artifact_roots import SETTING

#: Lines at most, one for each folder.
MAX_LINES = 100

_log = logging.getLogger(__name__)
#: Open, and so locked, for as long as this process lives.
_claim: IO[str] | None = None


def tell(roots: Roots, configured: Sequence[str]) -> None:
    """Log those locations, from a thread, in one of the processes that serve."""
    if _is_first():
        threading.Thread(
            target=_tell, args=(roots, configured), name="hokusai-auth-outside", daemon=True
        ).start()


def _is_first() -> bool:
    """Whether this process is the one of all workers that tells."""
    global _claim
    folder = os.environ.get(metrics.DIRECTORY)
    if not folder:
        return False
    try:
        import fcntl

        _claim = Path(folder, "hokusai-auth-outside.lock").open("w")  # noqa: SIM115
        fcntl.flock(_claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows, where MLflow has one process
        return True
    except OSError:
        return False
    return True


def _tell(roots: Roots, configured: Sequence[str]) -> None:
    try:
        lines = report(tables.stored_locations(), roots, configured)
    except Exception as error:
        _log.warning(
            "Locations outside the artifact roots were not looked for: %s", redact(str(error))
        )
        return
    for line in lines:
        _log.warning("%s", line)


def report(
    uris: Iterator[tuple[str, str]], roots: Roots, configured: Sequence[str]
) -> Iterator[str]:
    """The lines to log of `uris`, which are as `core.locations.outside` takes them."""
    folders, more = outside(uris, roots, MAX_LINES - 2)
    if not folders:
        return
    yield (
        "These folders are outside the artifact roots, so that what is in them is not opened (mode "
        "observe opens and counts it):"
    )
    for folder, count in folders:
        yield f"outside the artifact roots: {_plain(folder)} ({count} experiments or versions)"
    # A comma would divide it in two, and all of this machine is no root.
    named = [_plain(folder) for folder, _ in folders if folder != "/" and "," not in folder]
    yield (
        f"{f'There are {more} more. ' if more else ''}Clients may have chosen some of them: look at "
        "each, drop those that are not yours, and set "
        f"{SETTING}={','.join((*configured, *named))}"
    )


def _plain(folder: str) -> str:
    return ascii(redact(folder))[1:-1][:300]

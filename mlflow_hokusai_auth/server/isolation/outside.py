"""A report to the operator, at start, of locations in MLflow's database outside the artifact roots.

Administrators may have given experiments buckets of their own. The server opens a bucket only if a
setting names it.
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

#: The largest number of lines in a report, with one line for each folder.
MAX_LINES = 100

_log = logging.getLogger(__name__)
#: The lock file, which stays open and so locked as long as this process lives.
_claim: IO[str] | None = None


def log_in_thread(roots: Roots, configured: Sequence[str]) -> None:
    """Log the report from a thread, in one of the server's processes."""
    if _is_first():
        threading.Thread(
            target=_log_report, args=(roots, configured), name="hokusai-auth-outside", daemon=True
        ).start()


def _is_first() -> bool:
    """Return whether this process is the first worker that asks, which logs the report."""
    global _claim
    folder = os.environ.get(metrics.DIRECTORY)
    if not folder:
        return False
    try:
        import fcntl

        _claim = Path(folder, "hokusai-auth-outside.lock").open("w")  # noqa: SIM115
        fcntl.flock(_claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # This is Windows, where MLflow has one process.
        return True
    except OSError:
        return False
    return True


def _log_report(roots: Roots, configured: Sequence[str]) -> None:
    try:
        # The list is made here, because a database that fails halfway must be logged, too.
        lines = list(report(tables.stored_locations(), roots, configured))
    except Exception as error:
        _log.warning(
            "Locations outside the artifact roots could not be listed: %s", redact(str(error))
        )
        return
    for line in lines:
        _log.warning("%s", line)


def report(
    uris: Iterator[tuple[str, str]], roots: Roots, configured: Sequence[str]
) -> Iterator[str]:
    """Yield the lines of the report on `uris`, which `core.locations.outside` describes."""
    folders, more = outside(uris, roots, MAX_LINES - 2)
    if not folders:
        return
    yield (
        "These folders are outside the artifact roots, so the server does not open artifacts in them "
        "(mode observe opens and counts them):"
    )
    for folder, count in folders:
        yield f"outside the artifact roots: {_plain(folder)} ({count} experiments or versions)"
    # The setting can't hold a comma, and "/" would make the whole machine a root.
    named = [_plain(folder) for folder, _ in folders if folder != "/" and "," not in folder]
    yield (
        f"{f'There are {more} more. ' if more else ''}Clients may have chosen some of them: look at "
        "each, drop those that are not yours, and set "
        f"{SETTING}={','.join((*configured, *named))}"
    )


def _plain(folder: str) -> str:
    return ascii(redact(folder))[1:-1][:300]

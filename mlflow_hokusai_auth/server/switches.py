"""What can be changed while the server runs, for all its processes: the level of its logging.

`hokusai-auth log-level` writes it to the key store; each process looks there every `POLL` seconds.
"""

from __future__ import annotations

import logging
import os
import threading
import time

from mlflow_hokusai_auth.backends.database import Database

#: Seconds between two looks.
POLL = 1.0

_log = logging.getLogger(__name__)


def follow(database: Database) -> None:
    """Set the level of this package's loggers to what the store says, from now on."""

    def start() -> None:
        threading.Thread(
            target=_follow, args=(database,), name="hokusai-auth-switches", daemon=True
        ).start()

    start()
    # A thread does not come along into a process that is forked off (gunicorn --preload).
    os.register_at_fork(after_in_child=start)


def _follow(database: Database) -> None:
    root = logging.getLogger("mlflow_hokusai_auth")
    before: int | None = None
    while True:
        try:
            level = database.state("log_level")
        except Exception:
            # The store is down, which its users tell of; the level stays.
            level = before
        if level != before:
            root.setLevel(logging.NOTSET if level is None else level)
            # A warning, unless that would not be shown any more.
            told = max(logging.WARNING, root.level)
            _log.log(told, "The level of logging is %s now", logging.getLevelName(root.level))
            before = level
        time.sleep(POLL)

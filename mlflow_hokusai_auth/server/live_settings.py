"""What can be changed while the server runs, for all its processes: the mode, and the level of logging.

`hokusai-auth mode` and `hokusai-auth log-level` write it to the key store; each process looks there
when it starts and every `POLL` seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Mapping

from mlflow_hokusai_auth.core.types import MODES
from mlflow_hokusai_auth.server import metrics
from mlflow_hokusai_auth.store.database import Database

#: Seconds between two looks.
POLL = 1.0

_log = logging.getLogger(__name__)


class Mode:
    """The mode of this process, in `now`: what the store says, else what the server was started with.

    One that is `forced` stays whatever the store says.
    """

    def __init__(self, start: str = "enforce", forced: str = "") -> None:
        self._start = start
        self._forced = forced
        self.now = forced or start

    def follow(self, kept: Mapping[str, int]) -> None:
        """Take the mode that the store keeps."""
        number = kept.get("mode", -1)
        said = MODES[number] if 0 <= number < len(MODES) else self._start
        self.now = self._forced or said


class LogLevel:
    """The level of this package's loggers."""

    def __init__(self) -> None:
        self._now: int | None = None

    def follow(self, kept: Mapping[str, int]) -> None:
        """Take the level that the store keeps."""
        level = kept.get("log_level")
        if level == self._now:
            return
        root = logging.getLogger("mlflow_hokusai_auth")
        root.setLevel(logging.NOTSET if level is None else level)
        said = "the default" if level is None else logging.getLevelName(level)
        # A warning, unless that would not be shown any more.
        told = max(logging.WARNING, root.level)
        _log.log(told, "The level of logging is %s now", said)
        self._now = level


def follow(database: Database, mode: Mode) -> None:
    """Let `mode`, and the level of logging, be what the store says, from now on."""
    level = LogLevel()

    def look() -> None:
        before = mode.now
        # Else the store is down, which its users tell of; all stays as it is.
        with contextlib.suppress(Exception):
            kept = database.states()
            level.follow(kept)
            mode.follow(kept)
        if mode.now != before:
            _log.warning("The mode is %s now (before: %s)", mode.now, before)
        metrics.show_mode(mode.now)

    def poll() -> None:
        while True:
            time.sleep(POLL)
            look()

    def start() -> None:
        threading.Thread(target=poll, name="hokusai-auth-switches", daemon=True).start()

    # Before the first request is answered.
    look()
    start()
    # A thread does not come along into a process that is forked off (gunicorn --preload).
    os.register_at_fork(after_in_child=start)

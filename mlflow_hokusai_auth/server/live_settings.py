"""The settings that change while the server runs: mode, isolation and log level of all its processes.

`hokusai-auth mode`, `isolation` and `log-level` write them to the key store; each process reads them
when it begins to serve and every `POLL` seconds.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping

from mlflow_hokusai_auth.core.types import ISOLATING, ISOLATION, MODES, MOST_ISOLATION, Access
from mlflow_hokusai_auth.server import metrics
from mlflow_hokusai_auth.store.database import Database

#: Seconds between two readings.
POLL = 1.0

_log = logging.getLogger(__name__)

#: The sources of the mode and the isolation: the setting that overrides all, what was set with
#: `hokusai-auth mode` or `isolation`, the setting, or what was decided for MLflow's database.
FORCE_MODE, STORE, SETTING, DECISION = "force_mode", "store", "setting", "decision"


class Mode:
    """The mode of this process, in `now`: the store's, or `start` if the store has none.

    A `forced` mode overrides both. `by` says what decides: FORCE_MODE, STORE or SETTING.
    """

    def __init__(self, start: str = "enforce", forced: str = "") -> None:
        self._start = start
        self._forced = forced
        self.now = forced or start
        self.by = FORCE_MODE if forced else SETTING

    def follow(self, kept: Mapping[str, int]) -> None:
        """Take the mode from the store's settings."""
        number = kept.get("mode", -1)
        known = 0 <= number < len(MODES)
        self.now = self._forced or (MODES[number] if known else self._start)
        if not self._forced:
            self.by = STORE if known else SETTING


class Isolation:
    """The isolation of this process, in `level`.

    It comes from the store, or else from the `setting`, or else from the decision for MLflow's
    database. `now` has the words of a mode, for `Watch`: isolation is off unless the mode is enforce.
    """

    def __init__(self, mode: Mode, setting: str = "", decided: str = "off") -> None:
        self._mode = mode
        self._setting = setting
        self._stored = ""
        self._decided = decided
        #: The reason why owners can't be known here; None if they can.
        self.obstacle: str | None = None

    @property
    def level(self) -> str:
        """One of `ISOLATION`."""
        return self._stored or self._setting or self._decided

    @property
    def by(self) -> str:
        """STORE, SETTING or DECISION, which decides the level."""
        return STORE if self._stored else SETTING if self._setting else DECISION

    @property
    def is_decided(self) -> bool:
        """True if nobody has set an isolation."""
        return not self._stored and not self._setting

    @property
    def now(self) -> str:
        """Return "enforce", "observe" or "off"."""
        if self._mode.now != "enforce":
            return "off"
        return "enforce" if self.level in ISOLATING else self.level

    @property
    def hides(self) -> bool:
        """True if suppliers see only what is theirs and what was shared with them."""
        return self.level == "full" and self._mode.now == "enforce"

    @property
    def in_effect(self) -> str:
        """One of `ISOLATION`: "off" unless the mode is enforce."""
        return self.level if self._mode.now == "enforce" else "off"

    @property
    def closed_from(self) -> Access | None:
        """The least access that suppliers lose, as nobody's owner is known; None for none."""
        if self.obstacle is None or self.now != "enforce":
            return None
        return Access.READ if self.hides else Access.WRITE

    @property
    def closes(self) -> str:
        """The words for what suppliers can't do because of `closed_from`; "" if nothing is closed."""
        words = {None: "", Access.READ: "see or change anything", Access.WRITE: "change anything"}
        return words[self.closed_from]

    @property
    def described(self) -> str:
        """The isolation in a few words, without what suppliers should not know."""
        if self.level != "off" and self.in_effect == "off":
            return f"off while the mode is {self._mode.now} (otherwise {self.level})"
        if self.obstacle is None:
            return f"{self.level}, by default" if self.is_decided else self.level
        closed = f", so suppliers can't {self.closes}" if self.closes else ""
        return f"{self.level}; owners are not known{closed}: see the server's log"

    def decide(self, decided: str, obstacle: str | None) -> None:
        """Take what was found in MLflow's database."""
        # A later version may have decided for more than this one has.
        self._decided = decided if decided in ISOLATION else MOST_ISOLATION
        self.obstacle = obstacle

    def follow(self, kept: Mapping[str, int]) -> None:
        """Take the isolation from the store's settings."""
        number = kept.get("isolation", -1)
        if number >= len(ISOLATION):
            # As in `decide`: a later version has more levels.
            self._stored = MOST_ISOLATION
        else:
            self._stored = ISOLATION[number] if number >= 0 else ""


class LogLevel:
    """The log level of this package."""

    def __init__(self) -> None:
        self._now: int | None = None

    def follow(self, kept: Mapping[str, int]) -> None:
        """Take the log level from the store's settings, and log a change."""
        level = kept.get("log_level")
        if level == self._now:
            return
        root = logging.getLogger("mlflow_hokusai_auth")
        root.setLevel(logging.NOTSET if level is None else level)
        name = "the default" if level is None else logging.getLevelName(level)
        # A warning is hidden at the levels above it, so the line has the new level there.
        _log.log(max(logging.WARNING, root.level), "The log level is now %s", name)
        self._now = level


def follow(
    database: Database, mode: Mode, isolation: Isolation, also: Callable[[], None] = lambda: None
) -> None:
    """Keep `mode`, `isolation` and the log level equal to the store's settings from now on.

    `also` is called before each reading but the first.
    """
    level = LogLevel()

    def read() -> None:
        before, isolated = mode.now, isolation.level
        # If the store is down, keep the current values; its other users log the outage.
        with contextlib.suppress(Exception):
            kept = database.states()
            level.follow(kept)
            mode.follow(kept)
            isolation.follow(kept)
        if mode.now != before:
            _log.warning("The mode is now %s (before: %s)", mode.now, before)
        if isolation.level != isolated:
            _log.warning("The isolation is now %s (before: %s)", isolation.level, isolated)
        metrics.show_mode(mode.now)
        metrics.show_isolation(isolation.in_effect)

    def poll() -> None:
        while True:
            time.sleep(POLL)
            also()
            read()

    # The first request needs the right mode already.
    read()
    threading.Thread(target=poll, name="hokusai-auth-live-settings", daemon=True).start()

"""Every process follows the mode and the log level in the key store while the server runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.core.types import ISOLATION, MODES, MOST_ISOLATION, Access
from mlflow_hokusai_auth.server import live_settings
from mlflow_hokusai_auth.server.live_settings import Isolation, LogLevel, Mode, follow
from mlflow_hokusai_auth.store.database import Actor, Database

BY = Actor("operator", "")
LOGGER = logging.getLogger("mlflow_hokusai_auth")


@pytest.fixture(autouse=True)
def _level_stays() -> Iterator[None]:
    level = LOGGER.level
    yield
    LOGGER.setLevel(level)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    made = Database(f"sqlite:///{tmp_path}/keys.db")
    made.migrate()
    return made


def test_forced_mode_overrides_the_store_s_and_that_overrides_the_start_s() -> None:
    for forced, kept, now in (
        ("", {}, "observe"),
        ("", {"mode": MODES.index("off")}, "off"),
        ("", {"mode": len(MODES)}, "observe"),
        ("", {"mode": -2}, "observe"),
        ("enforce", {"mode": MODES.index("off")}, "enforce"),
    ):
        mode = Mode("observe", forced)
        assert mode.now == (forced or "observe")
        mode.follow(kept)
        assert mode.now == now, (forced, kept)
        mode.follow({})
        assert mode.now == (forced or "observe")


def test_isolation_is_the_store_s_and_else_the_setting_s_and_else_the_decision() -> None:
    kept = {"isolation": ISOLATION.index("observe")}
    for setting, stored, level, decided in (
        ("", {}, "writes", True),
        ("off", {}, "off", False),
        ("off", kept, "observe", False),
        ("", kept, "observe", False),
        ("", {"isolation": -1}, "writes", True),
        # A person chose more than this version has, with a later version.
        ("", {"isolation": len(ISOLATION)}, MOST_ISOLATION, False),
        ("off", {"isolation": len(ISOLATION)}, MOST_ISOLATION, False),
        ("", {"isolation": -2}, "writes", True),
    ):
        isolation = Isolation(Mode(), setting)
        isolation.decide("writes", None)
        isolation.follow(stored)
        assert (isolation.level, isolation.is_decided) == (level, decided), (setting, stored)
    isolation = Isolation(Mode())
    isolation.decide("everything", None)
    assert isolation.level == MOST_ISOLATION, "what a later version has decided is not dropped"


def test_isolation_is_nothing_unless_the_mode_is_enforce() -> None:
    for mode, level, now, in_effect, closed_from in (
        ("enforce", "full", "enforce", "full", Access.READ),
        ("enforce", "writes", "enforce", "writes", Access.WRITE),
        ("enforce", "observe", "observe", "observe", None),
        ("observe", "full", "off", "off", None),
        ("observe", "writes", "off", "off", None),
        ("off", "writes", "off", "off", None),
        ("off", "observe", "off", "off", None),
    ):
        isolation = Isolation(Mode(mode), level)
        isolation.decide("off", "nobody knows")
        assert (isolation.now, isolation.in_effect) == (now, in_effect)
        assert (isolation.closed_from, bool(isolation.closes)) == (
            closed_from,
            closed_from is not None,
        )
        isolation.decide("off", None)
        assert isolation.closed_from is None


def test_log_level_is_set_once_and_reset(caplog: pytest.LogCaptureFixture) -> None:
    level = LogLevel()
    for number in (logging.DEBUG, logging.ERROR, None):
        caplog.clear()
        for _ in range(2):
            level.follow({} if number is None else {"log_level": number})
        assert LOGGER.level == (number or logging.NOTSET)
        # The line has a level that is shown, and it is logged once.
        (said,) = caplog.records
        assert said.levelno == max(logging.WARNING, number or 0)


def test_change_is_followed_and_an_outage_changes_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks: list[threading.Event] = []
    goes_on = threading.Semaphore(0)

    class Clock:
        @staticmethod
        def sleep(_: float) -> None:
            looks[-1].set()
            goes_on.acquire()

    def look_again() -> None:
        looks.append(threading.Event())
        goes_on.release()
        assert looks[-1].wait(60)

    def shown() -> set[str]:
        name = "hokusai_auth_mode"
        return {one for one in MODES if REGISTRY.get_sample_value(name, {"mode": one})}

    def isolation_shown() -> set[str]:
        name = "hokusai_auth_isolation_level"
        return {one for one in ISOLATION if REGISTRY.get_sample_value(name, {"isolation": one})}

    def said() -> list[str]:
        return [one.getMessage() for one in caplog.records if one.name == live_settings.__name__]

    monkeypatch.setattr(live_settings, "time", Clock)
    looks.append(threading.Event())
    database.set_state("mode", MODES.index("observe"), "mode.set", BY)
    database.set_state("log_level", logging.DEBUG, "log_level.set", BY)
    mode = Mode()
    others: list[str] = []
    follow(database, mode, Isolation(mode, "writes"), lambda: others.append(mode.now))
    # The mode is set before the first request, not a second after it.
    assert (mode.now, LOGGER.level, shown()) == ("observe", logging.DEBUG, {"observe"})
    assert isolation_shown() == {"off"} and not others
    assert looks[-1].wait(60)
    caplog.clear()
    database.set_state("mode", MODES.index("off"), "mode.set", BY)
    look_again()
    assert (mode.now, shown()) == ("off", {"off"})
    assert said() == ["The mode is now off (before: observe)"]
    assert others == ["observe"]
    database.set_state("mode", MODES.index("enforce"), "mode.set", BY)
    look_again()
    assert isolation_shown() == {"writes"}
    database.set_state("mode", MODES.index("off"), "mode.set", BY)
    look_again()
    caplog.clear()

    def fail() -> dict[str, int]:
        raise AuthorityUnavailable("down")

    monkeypatch.setattr(database, "states", fail)
    look_again()
    assert (mode.now, shown(), said()) == ("off", {"off"}, [])

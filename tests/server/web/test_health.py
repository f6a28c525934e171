"""The health checks run once for many requests, in bounded time, and show no secret."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

import flask
import pytest
import requests
from werkzeug.serving import make_server

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.core.types import ISOLATION
from mlflow_hokusai_auth.server.gate.wsgi import wsgi_gate
from mlflow_hokusai_auth.server.live_settings import Isolation, Mode
from mlflow_hokusai_auth.server.web import health
from mlflow_hokusai_auth.server.web.health import (
    FRESH,
    TIMEOUT,
    Health,
    Unhealthy,
)
from mlflow_hokusai_auth.store.keys import LocalStore
from tests.server.forked import forked
from tests.server.sentinel import READ, make_gate

SECRET = "postgresql://mlflow:canary@db.example.com/mlflow"
KEY = "hk_live_" + "a" * 32


class Counted:
    """A check that counts its runs and calls `then`."""

    def __init__(self, then: Callable[[], str] = lambda: "fine") -> None:
        self.times = 0
        self._then = then

    def __call__(self) -> str:
        self.times += 1
        return self._then()


class Clock:
    """The clock of `health`, which only `shift` advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def shift(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(health, "time", clock)
    return clock


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """An event that a hanging check waits for, set at the end of the test."""
    event = threading.Event()
    yield event
    event.set()


def raising(error: Exception) -> Callable[[], str]:
    def check() -> str:
        raise error

    return check


def test_server_is_ok_if_every_part_is() -> None:
    found = Health({"one": lambda: "fine", "two": lambda: "as well"}).result()
    assert found["status"] == "ok"
    assert list(found["checks"]) == ["one", "two"]
    for part in found["checks"].values():
        assert part["ok"] and 0 <= part["latency_ms"] < 1000
    assert found["checks"]["two"]["found"] == "as well"


def test_one_failing_part_fails_the_server_and_says_why() -> None:
    for error in (Unhealthy, AuthorityUnavailable):
        found = Health({"one": lambda: "fine", "two": raising(error("it is gone"))}).result()
        assert found["status"] == "failing"
        assert found["checks"]["one"]["ok"] and not found["checks"]["two"]["ok"]
        assert found["checks"]["two"]["found"] == "it is gone"
    found = Health({"part": raising(Unhealthy("x" * 100_000))}).result()
    assert len(found["checks"]["part"]["found"]) == 300


def test_checks_run_once_in_five_seconds_for_any_number_of_requests(clock: Clock) -> None:
    check = Counted()
    watched = Health({"part": check})
    with ThreadPoolExecutor(50) as crowd:
        answers = list(crowd.map(lambda _: watched.result(), range(500)))
    assert check.times == 1
    assert all(answer["status"] == "ok" for answer in answers)
    clock.shift(FRESH - 1)
    watched.result()
    assert check.times == 1
    clock.shift(1.1)
    with ThreadPoolExecutor(50) as crowd:
        list(crowd.map(lambda _: watched.result(), range(500)))
    assert check.times == 2


def test_recovered_part_is_ok_at_the_next_run(clock: Clock) -> None:
    broken = [True]

    def check() -> str:
        if broken:
            raise Unhealthy("broken")
        return "fine"

    watched = Health({"part": check})
    assert watched.result()["status"] == "failing"
    broken.clear()
    assert watched.result()["status"] == "failing"  # the last result holds for a while
    clock.shift(FRESH + 0.1)
    assert watched.result()["status"] == "ok"


def without_waiting(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, watched: Health, *hanging: str
) -> list[float]:
    """Advance the clock instead of waiting for hanging parts. Return the timeouts of the waits."""
    waits: list[float] = []
    result = Future.result

    def waited(future: Future[Any], timeout: float) -> Any:
        waits.append(timeout)
        if future in [watched._running[name] for name in hanging] and not future.done():
            clock.shift(timeout)
            raise FutureTimeout
        return result(future, 60)

    monkeypatch.setattr(Future, "result", waited)
    return waits


def test_hanging_parts_take_no_longer_than_one(
    clock: Clock, never: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang() -> str:
        never.wait()
        return "at last"

    watched = Health({"one": hang, "two": lambda: "fine", "three": hang})
    waits = without_waiting(monkeypatch, clock, watched, "one", "three")
    found = watched.result()
    assert waits == [TIMEOUT, 0, 0]
    assert found["status"] == "failing"
    assert [part["ok"] for part in found["checks"].values()] == [False, True, False]
    assert found["checks"]["one"]["found"] == f"no answer within {TIMEOUT:g} s"
    assert found["checks"]["one"]["latency_ms"] == TIMEOUT * 1000
    # They do not keep the process from ending.
    hanging = [one for one in threading.enumerate() if one.name == "hokusai-auth-health"]
    assert len(hanging) >= 2 and all(one.daemon for one in hanging)


def test_hanging_part_is_started_once_and_does_not_block_the_others(
    clock: Clock, never: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "FRESH", 0.0)

    def hang() -> str:
        never.wait()
        return "at last"

    stuck, well = Counted(hang), Counted()
    watched = Health({"stuck": stuck, "well": well})
    without_waiting(monkeypatch, clock, watched, "stuck")
    for _ in range(10):
        parts = watched.result()["checks"]
        assert (parts["stuck"]["ok"], parts["well"]["ok"]) == (False, True)
    assert (stuck.times, well.times) == (1, 10)
    never.set()
    while not (found := watched.result())["checks"]["stuck"]["ok"]:
        pass
    assert found["status"] == "ok"


def test_result_holds_neither_password_nor_key() -> None:
    for error, says in (
        (RuntimeError(f"can't connect to {SECRET}"), "RuntimeError"),
        (Unhealthy(f"the key {KEY} is not known"), "hk_live_"),
    ):
        app = flask.Flask("test")
        app.register_blueprint(health.blueprint(Health({"part": raising(error)})))
        for path in ("/api/health/mlflow", "/api/health/mlflow/detailed"):
            answer = app.test_client().get(path)
            assert answer.status_code == 503
            assert answer.headers["Cache-Control"] == "no-store"
            assert "canary" not in answer.text and KEY not in answer.text
        assert says in answer.get_json()["checks"]["part"]["found"]


def test_unreachable_key_store_is_reported_without_its_password() -> None:
    uri = "postgresql://hokusai:canary@127.0.0.1:1/keys"
    store = LocalStore(uri)
    with pytest.raises(AuthorityUnavailable):  # to import the driver takes seconds, too
        store.generation()
    parts = health.checks(store, lambda: "answers", Isolation(Mode()))
    found = Health({name: parts[name] for name in ("key_store", "migrations")}).result()["checks"]
    for part in found.values():
        assert not part["ok"]
        assert "the key store can't be read" in part["found"]
    assert "canary" not in str(found)


def test_tables_of_another_version_are_reported(tmp_path: Path) -> None:
    store = LocalStore(f"sqlite:///{tmp_path}/keys.db")
    store.migrate()
    checks = health.checks(store, lambda: "answers", Isolation(Mode()))
    assert checks["migrations"]() == "current"
    with store.database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE hokusai_auth_alembic_version SET version_num = '0000'")
    with pytest.raises(Unhealthy, match="another version"):
        checks["migrations"]()


def test_isolation_says_if_it_is_nothing(tmp_path: Path) -> None:
    mode = Mode()
    isolation = Isolation(mode, decided="writes")
    look = health.checks(LocalStore(f"sqlite:///{tmp_path}/keys.db"), lambda: "", isolation)

    def found() -> str:
        return look["isolation"]()

    assert found() == "writes, by default"
    mode.now = "observe"
    assert found() == "off while the mode is observe (otherwise writes)"
    mode.now = "enforce"
    # The reason may hold what suppliers should not see.
    isolation.decide("off", "canary")
    assert found() == "off; owners are not known: see the server's log"
    isolation.follow({"isolation": ISOLATION.index("writes")})
    assert found() == (
        "writes; owners are not known, so suppliers can't change anything: see the server's log"
    )
    isolation.decide("off", None)
    assert found() == "writes"


class TestArtifactFolder:
    """MLflow returns an empty list for a local folder even if it can't be read."""

    def test_folder_may_exist_or_be_created(self, tmp_path: Path) -> None:
        assert health._check_folder(tmp_path) == "can be written"
        assert "will be created" in health._check_folder(tmp_path / "not" / "yet")

    def test_folder_may_not_be_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(Unhealthy, match="is not a folder"):
                health._check_folder(path)

    def test_server_must_be_able_to_read_and_write_it(self) -> None:
        folder = Path(
            tempfile.mkdtemp(prefix="hokusai-auth-")
        )  # only root may enter pytest's folder
        folder.chmod(0o755)

        def look(path: Path) -> str:
            # Root may read and write everything, so the check must run as another user.
            if os.geteuid() == 0:
                os.setgroups([]), os.setgid(65534), os.setuid(65534)
            try:
                return health._check_folder(path)
            except (Unhealthy, PermissionError) as error:
                return f"{type(error).__name__}: {error}"

        try:
            for mode in (0o000, 0o555, 0o333):
                artifacts = folder / f"{mode:o}"
                artifacts.mkdir()
                artifacts.chmod(mode)
                if os.geteuid() == 0:
                    shutil.chown(artifacts, 65534)
                unhealthy = "Unhealthy: the artifact folder can't be read"
                result = forked(functools.partial(look, artifacts))
                assert result.startswith(unhealthy), (mode, result)
                result = forked(functools.partial(look, artifacts / "below"))
                # A path below a folder that can't be entered can't even be watched up.
                assert result.startswith((unhealthy, "PermissionError")), (mode, result)
        finally:
            shutil.rmtree(folder)


def test_last_result_is_returned_while_checks_run() -> None:
    looking, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        if not first:
            looking.set()
            go_on.wait(60)
        return "answers"

    first = [True]
    watched = Health({"part": slow})
    found = watched.result()
    first.clear()
    watched._last = (watched._last[0] - FRESH - 1, found)  # type: ignore[index]
    with ThreadPoolExecutor(1) as other:
        asked = other.submit(watched.result)
        assert looking.wait(60)
        assert watched.result() is found
        assert not asked.done()
        go_on.set()
        assert asked.result(60) is not found


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The URL of another server, which has no artifacts."""
    app = flask.Flask("elsewhere")
    app.add_url_rule("/api/2.0/mlflow-artifacts/artifacts", view_func=lambda: {"files": []})
    server = make_server("127.0.0.1", 0, wsgi_gate(app, make_gate()), threaded=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    server.server_close()


def test_remote_artifact_root_is_checked_by_listing(
    elsewhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server's artifacts stand for an object store."""
    store = LocalStore(f"sqlite:///{tmp_path}/keys.db")
    look = health.checks(store, lambda: "", Isolation(Mode()))["artifact_root"]
    monkeypatch.setattr("mlflow.server.handlers._artifact_repo", None)
    there = f"{elsewhere}/api/2.0/mlflow-artifacts/artifacts"
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_DESTINATION", there)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", elsewhere)
    monkeypatch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "true")
    with pytest.raises(requests.HTTPError, match="KEY_MISSING"):
        look()
    monkeypatch.setenv("HOKUSAI_API_KEY", READ)
    assert look() == "can be listed"
    monkeypatch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "false")
    assert look() == "not served here"

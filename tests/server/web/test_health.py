"""Looking at the server's parts: once for all who ask, for a bounded time, and telling no secret."""

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
from mlflow_hokusai_auth.server.gate.wsgi import wsgi_gate
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
    """A check that counts how often it was made, and does as `then` says."""

    def __init__(self, then: Callable[[], str] = lambda: "fine") -> None:
        self.times = 0
        self._then = then

    def __call__(self) -> str:
        self.times += 1
        return self._then()


class Clock:
    """Time as `health` sees it, which goes on by `shift` alone."""

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
    """What a check that hangs waits for; set at the end."""
    event = threading.Event()
    yield event
    event.set()


def raising(error: Exception) -> Callable[[], str]:
    def check() -> str:
        raise error

    return check


def test_it_is_ok_if_every_part_is() -> None:
    found = Health({"one": lambda: "fine", "two": lambda: "as well"}).look()
    assert found["status"] == "ok"
    assert list(found["checks"]) == ["one", "two"]
    for part in found["checks"].values():
        assert part["ok"] and 0 <= part["latency_ms"] < 1000
    assert found["checks"]["two"]["found"] == "as well"


def test_one_part_that_fails_is_enough_and_says_why() -> None:
    for error in (Unhealthy, AuthorityUnavailable):
        found = Health({"one": lambda: "fine", "two": raising(error("it is gone"))}).look()
        assert found["status"] == "failing"
        assert found["checks"]["one"]["ok"] and not found["checks"]["two"]["ok"]
        assert found["checks"]["two"]["found"] == "it is gone"
    found = Health({"part": raising(Unhealthy("x" * 100_000))}).look()
    assert len(found["checks"]["part"]["found"]) == 300


def test_there_is_one_look_in_five_seconds_however_many_ask(clock: Clock) -> None:
    check = Counted()
    looked = Health({"part": check})
    with ThreadPoolExecutor(50) as crowd:
        answers = list(crowd.map(lambda _: looked.look(), range(500)))
    assert check.times == 1
    assert all(answer["status"] == "ok" for answer in answers)
    clock.shift(FRESH - 1)
    looked.look()
    assert check.times == 1
    clock.shift(1.1)
    with ThreadPoolExecutor(50) as crowd:
        list(crowd.map(lambda _: looked.look(), range(500)))
    assert check.times == 2


def test_part_that_recovers_is_ok_at_the_next_look(clock: Clock) -> None:
    broken = [True]

    def check() -> str:
        if broken:
            raise Unhealthy("broken")
        return "fine"

    looked = Health({"part": check})
    assert looked.look()["status"] == "failing"
    broken.clear()
    assert looked.look()["status"] == "failing"  # what was found is told for a while
    clock.shift(FRESH + 0.1)
    assert looked.look()["status"] == "ok"


def without_waiting(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, looked: Health, *hanging: str
) -> list[float]:
    """Let the clock go on instead of waiting for parts that hang.

    Return how long each part is waited for at most.
    """
    waits: list[float] = []
    result = Future.result

    def waited(future: Future[Any], timeout: float) -> Any:
        waits.append(timeout)
        if future in [looked._asked[name] for name in hanging] and not future.done():
            clock.shift(timeout)
            raise FutureTimeout
        return result(future, 60)

    monkeypatch.setattr(Future, "result", waited)
    return waits


def test_parts_that_hang_take_no_longer_than_one(
    clock: Clock, never: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang() -> str:
        never.wait()
        return "at last"

    looked = Health({"one": hang, "two": lambda: "fine", "three": hang})
    waits = without_waiting(monkeypatch, clock, looked, "one", "three")
    found = looked.look()
    assert waits == [TIMEOUT, 0, 0]
    assert found["status"] == "failing"
    assert [part["ok"] for part in found["checks"].values()] == [False, True, False]
    assert found["checks"]["one"]["found"] == f"no answer within {TIMEOUT:g} s"
    assert found["checks"]["one"]["latency_ms"] == TIMEOUT * 1000
    # They do not keep the process from ending.
    hanging = [one for one in threading.enumerate() if one.name == "hokusai-auth-health"]
    assert len(hanging) >= 2 and all(one.daemon for one in hanging)


def test_part_that_hangs_leaves_the_others_their_threads_and_is_asked_once(
    clock: Clock, never: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "FRESH", 0.0)

    def hang() -> str:
        never.wait()
        return "at last"

    stuck, well = Counted(hang), Counted()
    looked = Health({"stuck": stuck, "well": well})
    without_waiting(monkeypatch, clock, looked, "stuck")
    for _ in range(10):
        parts = looked.look()["checks"]
        assert (parts["stuck"]["ok"], parts["well"]["ok"]) == (False, True)
    assert (stuck.times, well.times) == (1, 10)
    never.set()
    while not (found := looked.look())["checks"]["stuck"]["ok"]:
        pass
    assert found["status"] == "ok"


def test_what_is_told_holds_neither_password_nor_key() -> None:
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


def test_key_store_that_can_t_be_reached_is_told_of_without_its_password() -> None:
    uri = "postgresql://hokusai:canary@127.0.0.1:1/keys"
    store = LocalStore(uri)
    with pytest.raises(AuthorityUnavailable):  # to import the driver takes seconds, too
        store.generation()
    parts = health.checks(store, lambda: "answers")
    found = Health({name: parts[name] for name in ("key_store", "migrations")}).look()["checks"]
    for part in found.values():
        assert not part["ok"]
        assert "the key store can't be read" in part["found"]
    assert "canary" not in str(found)


def test_tables_of_another_version_are_reported(tmp_path: Path) -> None:
    store = LocalStore(f"sqlite:///{tmp_path}/keys.db")
    store.migrate()
    checks = health.checks(store, lambda: "answers")
    assert checks["migrations"]() == "current"
    with store.database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE hokusai_auth_alembic_version SET version_num = '0000'")
    with pytest.raises(Unhealthy, match="another version"):
        checks["migrations"]()


class TestArtifactFolder:
    """Of a local folder MLflow says that it is empty, whatever is the matter with it."""

    def test_it_may_be_there_or_be_made(self, tmp_path: Path) -> None:
        assert health._look_at(tmp_path) == "can be written"
        assert "will be made" in health._look_at(tmp_path / "not" / "yet")

    def test_it_may_not_be_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(Unhealthy, match="is no folder"):
                health._look_at(path)

    def test_server_must_be_able_to_read_and_write_it(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="hokusai-auth-"))  # not pytest's, which is root's
        folder.chmod(0o755)

        def look(path: Path) -> str:
            # Root may read and write everything, and so would find nothing wrong.
            if os.geteuid() == 0:
                os.setgroups([]), os.setgid(65534), os.setuid(65534)
            try:
                return health._look_at(path)
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
                said = forked(functools.partial(look, artifacts))
                assert said.startswith(unhealthy), (mode, said)
                said = forked(functools.partial(look, artifacts / "below"))
                # What is below a folder that is not to be entered can't even be looked for.
                assert said.startswith((unhealthy, "PermissionError")), (mode, said)
        finally:
            shutil.rmtree(folder)


def test_others_are_told_what_was_found_before_while_somebody_looks() -> None:
    looking, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        if not first:
            looking.set()
            go_on.wait(60)
        return "answers"

    first = [True]
    watched = Health({"part": slow})
    found = watched.look()
    first.clear()
    watched._found = (watched._found[0] - FRESH - 1, found)  # type: ignore[index]
    with ThreadPoolExecutor(1) as other:
        asked = other.submit(watched.look)
        assert looking.wait(60)
        assert watched.look() is found
        assert not asked.done()
        go_on.set()
        assert asked.result(60) is not found


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """Where another server is, which has no artifacts."""
    app = flask.Flask("elsewhere")
    app.add_url_rule("/api/2.0/mlflow-artifacts/artifacts", view_func=lambda: {"files": []})
    server = make_server("127.0.0.1", 0, wsgi_gate(app, make_gate()), threaded=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    server.server_close()


def test_artifacts_that_are_not_in_a_folder_here_are_asked_for(
    elsewhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server's artifacts stand for an object store."""
    look = health.checks(LocalStore(f"sqlite:///{tmp_path}/keys.db"), lambda: "")["artifact_root"]
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

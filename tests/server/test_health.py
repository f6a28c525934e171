"""Looking at the server's parts: once for all who ask, for a bounded time, and telling no secret."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flask
import pytest
import requests

from mlflow_hokusai_auth.backends import BackendUnavailable
from mlflow_hokusai_auth.backends.local import LocalStore
from mlflow_hokusai_auth.server import health
from mlflow_hokusai_auth.server.health import FRESH, TIMEOUT, Health, Unhealthy
from tests.harness import Server, environment

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
    """Time as `health` sees it, which goes on by itself and by `shift`."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def shift(self, seconds: float) -> None:
        self.ahead += seconds


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


@pytest.mark.parametrize("error", [Unhealthy, BackendUnavailable])
def test_one_part_that_fails_is_enough_and_says_why(error: type[Exception]) -> None:
    found = Health({"one": lambda: "fine", "two": raising(error("it is gone"))}).look()
    assert found["status"] == "failing"
    assert found["checks"]["one"]["ok"] and not found["checks"]["two"]["ok"]
    assert found["checks"]["two"]["found"] == "it is gone"


def test_however_many_ask_there_is_one_look_in_five_seconds(clock: Clock) -> None:
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


def test_a_part_that_recovers_is_ok_at_the_next_look(clock: Clock) -> None:
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


def test_parts_that_hang_take_no_longer_than_one(never: threading.Event) -> None:
    def hang() -> str:
        never.wait()
        return "at last"

    looked = Health({"one": hang, "two": lambda: "fine", "three": hang})
    began = time.monotonic()
    found = looked.look()
    assert TIMEOUT - 0.1 < time.monotonic() - began < TIMEOUT + 1
    assert found["status"] == "failing"
    assert [part["ok"] for part in found["checks"].values()] == [False, True, False]
    assert found["checks"]["one"]["found"] == f"no answer within {TIMEOUT:g} s"
    assert found["checks"]["one"]["latency_ms"] == TIMEOUT * 1000


def test_a_part_that_hangs_leaves_the_others_their_threads_and_is_asked_once(
    never: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "TIMEOUT", 0.1)
    monkeypatch.setattr(health, "FRESH", 0.0)

    def hang() -> str:
        never.wait()
        return "at last"

    stuck, well = Counted(hang), Counted()
    looked = Health({"stuck": stuck, "well": well})
    for _ in range(10):
        parts = looked.look()["checks"]
        assert (parts["stuck"]["ok"], parts["well"]["ok"]) == (False, True)
    assert (stuck.times, well.times) == (1, 10)
    never.set()
    while not (found := looked.look())["checks"]["stuck"]["ok"]:
        pass
    assert found["status"] == "ok"


def test_a_part_that_hangs_does_not_keep_the_process_from_ending(tmp_path: Path) -> None:
    code = (
        "import threading\n"
        "from mlflow_hokusai_auth.server import health\n"
        "health.TIMEOUT = 0.1\n"
        "print(health.Health({'stuck': threading.Event().wait}).look()['status'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "failing\n"), done.stderr


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError(f"can't connect to {SECRET}"), "RuntimeError"),
        (Unhealthy(f"the key {KEY} is not known"), "hk_live_"),
    ],
)
def test_what_is_told_holds_neither_password_nor_key(error: Exception, says: str) -> None:
    app = flask.Flask("test")
    app.register_blueprint(health.blueprint(Health({"part": raising(error)})))
    for path in ("/api/health/mlflow", "/api/health/mlflow/detailed"):
        answer = app.test_client().get(path)
        assert answer.status_code == 503
        assert answer.headers["Cache-Control"] == "no-store"
        assert "canary" not in answer.text and KEY not in answer.text
    assert says in answer.get_json()["checks"]["part"]["found"]


def test_a_long_text_is_cut() -> None:
    found = Health({"part": raising(Unhealthy("x" * 100_000))}).look()
    assert len(found["checks"]["part"]["found"]) == 300


def test_a_key_store_that_can_t_be_reached_is_told_of_without_its_password() -> None:
    uri = "postgresql://hokusai:canary@127.0.0.1:1/keys"
    store = LocalStore(uri)
    with pytest.raises(BackendUnavailable):  # to import the driver takes seconds, too
        store.generation()
    parts = health.checks(store, lambda: "answers")
    found = Health({name: parts[name] for name in ("key_store", "migrations")}).look()["checks"]
    for part in found.values():
        assert not part["ok"]
        assert "the key store can't be read" in part["found"]
    assert "canary" not in str(found)


def test_tables_of_another_version_are_told_of(tmp_path: Path) -> None:
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

    # Root may read and write everything, and so would find nothing wrong. Hence another user.
    @pytest.mark.parametrize("mode", [0o000, 0o555, 0o333])
    def test_who_serves_it_may_read_and_write_it(self, mode: int) -> None:
        folder = Path(tempfile.mkdtemp(prefix="hokusai-auth-"))  # not pytest's, which is root's
        try:
            (folder / "artifacts").mkdir()
            (folder / "artifacts").chmod(mode)
            folder.chmod(0o755)
            if os.geteuid() == 0:
                shutil.chown(folder / "artifacts", 65534)
            code = (
                "import os, sys, pathlib\n"
                "from mlflow_hokusai_auth.server import health\n"
                "if os.geteuid() == 0: os.setgroups([]), os.setgid(65534), os.setuid(65534)\n"
                "try: print(health._look_at(pathlib.Path(sys.argv[1])))\n"
                "except health.Unhealthy as error: print('unhealthy:', error)\n"
            )
            for path in (folder / "artifacts", folder / "artifacts" / "below"):
                done = subprocess.run(
                    [sys.executable, "-c", code, str(path)],
                    env=environment(folder),
                    cwd="/",
                    capture_output=True,
                    text=True,
                )
                said = done.stdout + done.stderr
                assert "unhealthy: the artifact folder can't be read" in said or (
                    # What is below a folder that is not to be entered can't even be looked for.
                    done.returncode and "PermissionError" in said and path.name == "below"
                ), said
        finally:
            shutil.rmtree(folder)


def test_while_somebody_looks_the_others_are_told_what_was_found_before() -> None:
    looking, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        if not first:
            looking.set()
            go_on.wait(10)
        return "answers"

    first = [True]
    watched = Health({"part": slow})
    found = watched.look()
    first.clear()
    watched._found = (watched._found[0] - FRESH - 1, found)  # type: ignore[index]
    with ThreadPoolExecutor(1) as other:
        asked = other.submit(watched.look)
        assert looking.wait(5)
        began = time.monotonic()
        assert watched.look() is found
        assert time.monotonic() - began < 1
        go_on.set()
        assert asked.result(5) is not found


def test_artifacts_that_are_not_in_a_folder_here_are_asked_for(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server's artifacts stand for an object store."""
    look = health.checks(LocalStore(f"sqlite:///{tmp_path}/keys.db"), lambda: "")["artifact_root"]
    monkeypatch.setattr("mlflow.server.handlers._artifact_repo", None)
    there = f"{server.origin}/api/2.0/mlflow-artifacts/artifacts"
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_DESTINATION", there)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.origin)
    monkeypatch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "true")
    with pytest.raises(requests.HTTPError, match="KEY_MISSING"):
        look()
    monkeypatch.setenv("HOKUSAI_API_KEY", server.key("model:read"))
    assert look() == "can be listed"
    monkeypatch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "false")
    assert look() == "not served here"

"""The folders of experiments are read only if a refusal depends on them."""

from __future__ import annotations

import contextlib
import itertools
import json
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa
from mlflow.store.tracking.dbmodels.models import SqlExperiment

from mlflow_hokusai_auth.core.locations import Location, Roots
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server.upstream.artifact_roots import DEFAULT_ROOT
from mlflow_hokusai_auth.server.upstream.experiment_folders import TRACKING, ExperimentFolders
from tests.harness import wait_until
from tests.server.sentinel import Adapter, Memory, both, make_gate, with_key

SERVED = Location("file", "", ("srv", "artifacts"))
ROOTS = Roots((SERVED,), (), SERVED, SERVED)
RUN = "0123456789abcdef" * 2
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
SUPPLIER = {"write": Principal("key_write", "x", frozenset({"model:write"}))}


class Database:
    """MLflow's table of experiments."""

    def __init__(self, path: Path) -> None:
        self.uri = f"sqlite:///{path}"
        engine = sa.create_engine(self.uri)
        SqlExperiment.metadata.create_all(engine, [SqlExperiment.__table__])
        engine.dispose()
        self._path = path

    def add(self, *locations: str | None) -> None:
        with contextlib.closing(sqlite3.connect(self._path, timeout=30)) as database:
            for location in locations:
                statement = "INSERT INTO experiments (name, artifact_location) VALUES (?, ?)"
                database.execute(statement, (uuid4().hex, location))
            database.commit()

    def remove(self, location: str) -> None:
        with contextlib.closing(sqlite3.connect(self._path, timeout=30)) as database:
            database.execute("DELETE FROM experiments WHERE artifact_location = ?", (location,))
            database.commit()


class Counted(ExperimentFolders):
    """Counts the readings of the database."""

    reads = 0

    def read_by(self, connection):
        type(self).reads += 1
        return super().read_by(connection)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "mlflow.db")


@pytest.fixture
def folders(database: Database) -> Iterator[Counted]:
    environ = {TRACKING: database.uri, DEFAULT_ROOT: "mlflow-artifacts:/"}
    Counted.reads = 0
    return Counted(ROOTS, environ)


def places(folders: ExperimentFolders) -> set[str]:
    return {"/".join(key[4:]) for key in folders.known.exact}


def test_folders_leave_out_those_that_mlflow_made_by_number(
    database: Database, folders: Counted
) -> None:
    database.add("mlflow-artifacts:/1", "mlflow-artifacts:/2", None, "mlflow-artifacts:/team/a")
    # These have another number, or the number in another folder.
    database.add("mlflow-artifacts:/77", "mlflow-artifacts:/team/6", "/srv/artifacts/b", "s3://x/c")
    folders.read()
    assert places(folders) == {"team/a", "77", "team/6", "b", ""}
    database.remove("mlflow-artifacts:/team/a")
    database.add("mlflow-artifacts:/new")
    folders.read()
    assert places(folders) == {"77", "team/6", "b", "new", ""}
    known = folders.known
    folders.read()
    assert folders.known is known


def test_folders_are_read_when_the_app_starts(database: Database, folders: Counted) -> None:
    database.add("mlflow-artifacts:/team/a")
    folders.begin()
    wait_until(lambda: places(folders) == {"team/a"})


def test_server_without_a_database_of_experiments_reads_nothing() -> None:
    for uri in ("", "./mlruns", "file:///x"):
        folders = Counted(ROOTS, {TRACKING: uri})
        before = Counted.reads
        folders.read()
        assert Counted.reads == before


def test_waiting_threads_share_one_reading(database: Database) -> None:
    entered, go_on = threading.Event(), threading.Event()
    ticks = itertools.count()
    called = threading.Semaphore(0)

    def timer() -> float:
        called.release()
        return float(next(ticks))

    class Slow(Counted):
        def read_by(self, connection):
            entered.set()
            assert go_on.wait(60)
            return super().read_by(connection)

    Slow.reads = 0
    folders = Slow(ROOTS, {TRACKING: database.uri}, timer)
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(folders.read)
        assert entered.wait(60)
        database.add("mlflow-artifacts:/late")
        # These calls came after the first reading began, so its result may be too old for them.
        others = [pool.submit(folders.read) for _ in range(8)]
        for _ in range(2 + 8):
            assert called.acquire(timeout=60)
        go_on.set()
        for each in (first, *others):
            each.result(60)
    assert Slow.reads == 2
    assert places(folders) == {"late"}


@both
def test_new_experiment_counts_from_the_first_request_that_depends_on_it(
    adapter: Adapter, database: Database, folders: Counted
) -> None:
    gate = make_gate(Memory(SUPPLIER), folders=folders)
    name = uuid4().hex[1:]  # not the id of a run
    path = f"{ARTIFACTS}/{name}/traces/exp1/{RUN}/artifacts/model"
    wires = [with_key("write", method, path) for method in ("PUT", "DELETE", "GET")]
    before = Counted.reads
    assert [adapter(wire, gate).code for wire in wires] == ["SCOPE_MISSING"] * 3
    assert Counted.reads == before + 3
    # Another process makes the experiment.
    database.add(f"mlflow-artifacts:/{name}/traces/exp1")
    assert [adapter(wire, gate).status for wire in wires] == [200] * 3
    assert Counted.reads == before + 4


@both
def test_request_that_needs_no_folders_does_not_read_them(
    adapter: Adapter, folders: Counted
) -> None:
    gate = make_gate(Memory(SUPPLIER), folders=folders)
    rows = [
        ("PUT", f"/77/{RUN}/artifacts/traces/x", 200),
        ("DELETE", f"/77/{RUN}", 200),
        ("GET", "/new/file", 200),
        ("PUT", f"/new/{RUN}/artifacts/x", 200),
        ("GET", "/77/traces/tr-1", 403),
        ("GET", f"/{RUN}/..", 403),
        ("GET", "", 200),
    ]
    for method, path, status in rows:
        answer = adapter(with_key("write", method, f"{ARTIFACTS}{path}"), gate)
        assert answer.status == status, (method, path)
    # A reading would not change the verdict without a key, or with one that may do everything.
    staff = make_gate(folders=folders)
    for kind, status in (("write", 200), ("unknown", 401), ("admin", 200)):
        answer = adapter(with_key(kind, "DELETE", f"{ARTIFACTS}/new"), staff)
        assert answer.status == status, kind
    assert Counted.reads == 0


@both
def test_failing_database_opens_nothing(adapter: Adapter, tmp_path: Path) -> None:
    folders = Counted(ROOTS, {TRACKING: f"sqlite:///{tmp_path}/mlflow.db"})  # without tables
    gate = make_gate(Memory(SUPPLIER), folders=folders)
    answer = adapter(with_key("write", "GET", f"{ARTIFACTS}/new/traces/tr-1"), gate)
    assert (answer.status, answer.inner) == (503, None)
    assert json.loads(answer.body)["error"] == "AUTHORITY_UNAVAILABLE"
    assert adapter(with_key("write", "GET", f"{ARTIFACTS}/77/traces/tr-1"), gate).status == 403

"""A disk that is full or read-only, and a key store that is damaged, at start and while running."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.store.keys import LocalStore
from tests.e2e.parts import refused_start
from tests.harness import Server, serve, wait_until

from .watch import EXPERIMENT, KEYS, create

pytestmark = pytest.mark.long  # servers of their own

#: Bytes of the small disk: a store of some keys fits, and 64 kB for each kind of metric.
SIZE = 1_500_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own, of `SIZE` bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*options: str) -> None:
    done = subprocess.run(["mount", *options], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


@contextlib.contextmanager
def filled(disk: Path) -> Iterator[None]:
    """The disk without a free byte."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    mount("-o", "remount,ro", str(folder))
    try:
        yield
    finally:
        mount("-o", "remount,rw", str(folder))


def made(file: Path, number: int = 100) -> bytes:
    """What is in the file of a new store with that many keys."""
    store = LocalStore(f"sqlite:///{file}")
    store.migrate()
    for _ in range(number):
        store.create(owner="ACME", scopes=["mlflow:read"])
    store.database.engine.dispose()
    return file.read_bytes()


def scrambled(whole: bytes) -> bytes:
    """Random bytes from the second page on."""
    return whole[:4096] + random.Random(7).randbytes(len(whole) - 4096)


def of_something_else(folder: Path) -> bytes:
    file = folder / "else.db"
    with contextlib.closing(sqlite3.connect(file)) as other:
        other.execute("CREATE TABLE things (name TEXT)")
        other.commit()
    return file.read_bytes()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "scrambled": scrambled,
    "cut": lambda whole: whole[: len(whole) // 2 + 100],
    "text": lambda whole: b"This is a letter, and no database.\n" * (len(whole) // 35),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_at_start(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "keys.db"
    file.write_bytes(DAMAGES[damage](made(file)))
    said = refused_start(tmp_path / "server", HOKUSAI_AUTH_DATABASE_URI=f"sqlite:///{file}")
    assert f"the key store {file} can't be read" in said
    assert "restore its backup" in said and "HOKUSAI_AUTH_DATABASE_URI" in said


@pytest.mark.parametrize("there", [True, False], ids=["a store", "no store yet"])
@pytest.mark.parametrize("fault", [filled, read_only])
def test_a_disk_at_start(disk: Path, tmp_path: Path, fault: Any, there: bool) -> None:
    file = disk / "keys.db"
    if there:
        made(file, 5)
    with fault(disk):
        said = refused_start(tmp_path / "server", HOKUSAI_AUTH_DATABASE_URI=f"sqlite:///{file}")
    assert f"the key store {file} can't be" in said


def test_a_store_that_may_only_be_read_at_start(tmp_path: Path) -> None:
    file = tmp_path / "keys.db"
    made(file)
    mount("--bind", str(file), str(file))
    try:
        mount("-o", "remount,bind,ro", str(file))
        said = refused_start(tmp_path / "server", HOKUSAI_AUTH_DATABASE_URI=f"sqlite:///{file}")
    finally:
        subprocess.run(["umount", str(file)], check=True)
    assert f"the key store {file} can't be written: Read-only file system" in said


def assert_closed(server: Server, revoked: str) -> None:
    """Nobody is let in who should not be, and nothing is an error of the server's own."""
    for key in (None, keys.generate(), revoked):
        assert server.request("GET", EXPERIMENT, key=key)[0] in (401, 503)
    assert server.request("GET", "/health")[0] == 200


def test_a_disk_that_fills_while_running(disk: Path, tmp_path: Path) -> None:
    with serve(tmp_path / "s", HOKUSAI_AUTH_DATABASE_URI=f"sqlite:///{disk}/keys.db") as server:
        admin, good = server.key("mlflow:admin"), server.key("mlflow:read")
        record, revoked = server.store.create(owner="gone", scopes=["mlflow:read"])
        server.store.revoke(record.key_id)
        told = [json.loads(create(server, admin)[2])["key_id"]]
        with filled(disk):
            answers = [create(server, admin) for _ in range(30)]
            assert {status for status, _, _ in answers} <= {201, 503}
            told += [json.loads(body)["key_id"] for status, _, body in answers if status == 201]
            status, _, body = answers[-1]
            assert status == 503 and "database or disk is full" in json.loads(body)["message"]
            status, _, body = server.request("DELETE", f"{KEYS}/{told[0]}", key=admin)
            assert status == 503 and json.loads(body)["error_code"] == "TEMPORARILY_UNAVAILABLE"
            assert server.request("GET", EXPERIMENT, key=good)[0] == 200
            assert_closed(server, revoked)
        assert create(server, admin)[0] == 201
        assert {server.store.get(key_id).state(0) for key_id in told} == {"active"}
        assert server.request("DELETE", f"{KEYS}/{told[0]}", key=admin)[0] == 200


def test_a_disk_of_metrics_that_fills(disk: Path, tmp_path: Path) -> None:
    """The files are mapped into memory, where a write that finds no space ends the process."""
    # The files are made as large as they get when the metrics are imported, which a fork has done.
    environ = {"PROMETHEUS_MULTIPROC_DIR": str(disk)}
    with serve(tmp_path / "s", started=True, **environ) as server, filled(disk):
        admin = server.key("mlflow:admin")
        # Counters of their own for each kind of request, more than fit into a page.
        for path in ("runs/get", "experiments/get", "registered-models/get", "metrics/get-history"):
            for method in ("GET", "POST", "DELETE"):
                for prefix in ("", "/mlflow", "/api/mlflow"):
                    for key in (None, admin, keys.generate()):
                        path_ = f"{prefix}/api/2.0/mlflow/{path}"
                        assert server.request(method, path_, key=key)[0] < 500
        wait_until(
            lambda: (
                b"hokusai_auth_requests" in server.request("GET", "/hokusai/metrics", key=admin)[2]
            )
        )
        assert server.process.poll() is None
    with filled(disk):
        said = refused_start(tmp_path / "s", **environ)
    assert str(disk) in said and "PROMETHEUS_MULTIPROC_DIR" in said


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("damaged")) as server:
        for number in range(100):
            server.store.create(owner=f"owner {number}", scopes=["mlflow:read"])
        yield server


@contextlib.contextmanager
def damaged(file: Path, damage: Callable[[bytes], bytes]) -> Iterator[None]:
    """The store at `file` with other bytes in it, in place: who has it open has the same file."""
    changes = "UPDATE hokusai_auth_state SET value = value + 1 WHERE name = 'generation'"
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        for _ in range(2):
            # All of it into the one file.
            assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
        whole = file.read_bytes()
        other.execute("BEGIN IMMEDIATE")
        other.execute(changes)
        rewrite(file, damage(whole))
        # Whoever holds pages in memory reads them anew now.
        other.execute("COMMIT")
        try:
            yield
        finally:
            rewrite(file, whole)
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute(changes)


def rewrite(file: Path, content: bytes) -> None:
    with file.open("r+b") as opened:
        opened.write(content)
        opened.truncate()
        os.fsync(opened.fileno())


@pytest.mark.parametrize("damage", [*DAMAGES, "of something else"])
def test_a_store_that_is_damaged_while_running(server: Server, tmp_path: Path, damage: str) -> None:
    admin, good = server.key("mlflow:admin"), server.key("mlflow:read")
    record, revoked = server.store.create(owner="gone", scopes=["mlflow:read"])
    server.store.revoke(record.key_id)
    kept = json.loads(create(server, admin)[2])["key"]
    other = of_something_else(tmp_path)
    with damaged(server.folder / "hokusai_auth.db", DAMAGES.get(damage, lambda _: other)):
        wait_until(lambda: server.request("GET", EXPERIMENT, key=good)[0] == 503)
        status, headers, body = server.request("GET", EXPERIMENT, key=kept)
        assert status == 503 and int(headers["retry-after"]) >= 1
        assert "Try again" in json.loads(body)["message"]
        assert create(server, admin)[0] == 503
        assert_closed(server, revoked)
        assert "the key store can't be read" in server.log
    mended = time.monotonic()
    wait_until(lambda: server.request("GET", EXPERIMENT, key=good)[0] == 200)
    print(f"\n{damage}: good {time.monotonic() - mended:.1f} s after it was mended")
    assert server.request("GET", EXPERIMENT, key=kept)[0] == 200
    assert server.request("GET", EXPERIMENT, key=revoked)[0] == 401
    assert create(server, admin)[0] == 201


def test_a_field_that_is_damaged(server: Server) -> None:
    """SQLite does not see it: whoever reads the field does."""
    admin = server.key("mlflow:admin")
    record, key = server.store.create(owner="damaged", scopes=["mlflow:read"])
    with sqlite3.connect(server.folder / "hokusai_auth.db") as store:
        where = "WHERE key_id = ?"
        store.execute(f"UPDATE hokusai_auth_keys SET scopes = '[\"mlf' {where}", [record.key_id])
    assert server.request("GET", EXPERIMENT, key=key)[0] == 503
    for path in (KEYS, f"{KEYS}/{record.key_id}"):
        assert server.request("GET", path, key=admin)[0] == 503
    # The others go on.
    assert server.request("GET", EXPERIMENT, key=server.key("mlflow:read"))[0] == 200

"""Workers that are killed in the middle of their work, and servers that start at once on one store."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from mlflow_hokusai_auth.store.database import VERSION_TABLE
from mlflow_hokusai_auth.store.keys import LocalStore
from tests.harness import Server, serve, wait_until

from .watch import EXPERIMENT, Administrator, Asker

pytestmark = pytest.mark.long  # servers of their own

WORKERS = ("--workers", "2")
ARTIFACT = "/api/2.0/mlflow-artifacts/artifacts/killed/half.bin"
#: What a server says that came in another one's way.
MISHAPS = ("Traceback", "locked", "already exists")
#: Seconds after which a worker that was killed has been replaced.
REPLACED = 120


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("killed"), WORKERS) as server:
        yield server


def worker_of(server: Server, client: socket.socket) -> int | None:
    """The process that has accepted the connection of `client`, or None before one has."""
    here, there = (f"{port:04X}" for port in (client.getsockname()[1], server.port))
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(f":{there}") and fields[2].endswith(f":{here}"):
            for pid in server.workers():
                with contextlib.suppress(OSError):
                    held = [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]
                    if f"socket:[{fields[9]}]" in held:
                        return pid
    return None


def kill_worker_of(server: Server, client: socket.socket) -> None:
    """Kill the worker that accepts the connection of `client`."""
    found: list[int | None] = [None]

    def accepted() -> bool:
        found.append(worker_of(server, client))
        return found[-1] is not None

    wait_until(accepted, REPLACED)
    pid = found[-1]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_a_worker_is_killed_in_an_upload(server: Server) -> None:
    key = server.key("mlflow:write")
    whole = os.urandom(2_000_000)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        connection.putrequest("PUT", ARTIFACT)
        for name, value in (("X-API-Key", key), ("Content-Length", str(len(whole)))):
            connection.putheader(name, value)
        connection.endheaders()
        connection.send(whole[: len(whole) // 2])
        kill_worker_of(server, connection.sock)
        with pytest.raises((OSError, http.client.HTTPException)):
            connection.send(whole[len(whole) // 2 :])
            connection.getresponse()
    # The other one goes on, and there is no half of a file.
    killed = time.monotonic()
    assert server.request("GET", "/health")[0] == 200
    assert server.request("GET", ARTIFACT, key=key)[0] >= 400
    assert server.request("GET", EXPERIMENT)[0] == 401
    assert server.request("PUT", ARTIFACT, key=key, body=whole)[0] == 200
    print(f"\nuploaded {time.monotonic() - killed:.1f} s after the worker was killed")
    assert server.request("GET", ARTIFACT, key=key)[2] == whole


def test_workers_are_killed_while_keys_are_made(server: Server) -> None:
    managers = [Administrator(server, server.store) for _ in range(4)]
    askers = [Asker(manager, 0.01) for manager in managers]
    stranger = Asker(lambda: server.request("GET", EXPERIMENT))
    try:
        for _ in range(6):
            now = time.monotonic()
            for asker in askers:
                asker.wait_for(201, now, REPLACED)
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                kill_worker_of(server, client)
            killed = time.monotonic()
            askers[0].wait_for(201, killed, REPLACED)
        stranger.wait_for(401, time.monotonic(), REPLACED)
    finally:
        for asker in (*askers, stranger):
            asker.stop()
    for asker in askers:
        print(f"\n{asker.statuses()}, longest {asker.longest():.1f} s")
        # 0 for a connection that broke off: nobody was told anything.
        assert set(asker.statuses()) <= {0, 200, 201} and asker.longest() < REPLACED
    assert set(stranger.statuses()) <= {0, 401}
    for manager in managers:
        assert all(server.store.get(key_id) for key_id in manager.created)
        assert all(server.store.get(key_id).revoked_at for key_id in manager.revoked)
    with sqlite3.connect(server.folder / "hokusai_auth.db") as store:
        assert store.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_two_servers_start_at_once_on_an_empty_store(tmp_path: Path, database_uri: str) -> None:
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        contexts = [
            serve(tmp_path / name, WORKERS, HOKUSAI_AUTH_DATABASE_URI=database_uri)
            for name in ("one", "other")
        ]
        one, other = pool.map(stack.enter_context, contexts)
        key = one.key("mlflow:read")
        for server in (one, other):
            # It may have looked for the store's generation just before.
            wait_until(lambda s=server: s.request("GET", EXPERIMENT, key=key)[0] == 200)
            assert not [said for said in MISHAPS if said in server.log]
    store = LocalStore(database_uri)
    assert store.is_current() and store.generation() == 1
    with store.database.reading() as connection:
        assert len(connection.execute(sa.text(f"SELECT * FROM {VERSION_TABLE}")).all()) == 1

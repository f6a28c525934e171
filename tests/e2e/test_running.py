"""The server as its operator meets it: start, workers, revocation, large bodies, mistakes."""

from __future__ import annotations

import http.client
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_hokusai_auth.core import keys
from tests.e2e.parts import EXPERIMENT, refused_start
from tests.harness import Server, environment, run_command, run_forked, serve, wait_until

pytestmark = pytest.mark.servers

MB = 2**20


def test_a_revoked_key_is_refused_by_every_worker_within_a_second(
    servers: dict[str, Server],
) -> None:
    server = servers["workers"]
    record, key = server.store.create(owner="soon gone", scopes=["mlflow:read"])
    # Enough connections that each of the workers has the key in its cache.
    connections = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(24)]
    for _ in range(3):
        assert [ask(connection, key)[0] for connection in connections] == [200] * 24
    server.store.revoke(record.key_id)
    revoked = time.monotonic()
    last_served = 0.0
    while time.monotonic() - revoked < 2:
        asked = time.monotonic()
        for connection in connections:
            status, body = ask(connection, key)
            if status == 200:
                last_served = asked - revoked
            else:
                assert json.loads(body)["error"] == "KEY_REVOKED"
    assert last_served < 1
    for connection in connections:
        assert ask(connection, key)[0] == 401
        connection.close()


def ask(connection: http.client.HTTPConnection, key: str) -> tuple[int, bytes]:
    connection.request("GET", EXPERIMENT, headers={"X-API-Key": key})
    response = connection.getresponse()
    return response.status, response.read()


def test_an_expired_key_is_refused(server: Server) -> None:
    key = server.store.create(owner="x", scopes=["mlflow:read"], expires_at=time.time() - 1)[1]
    status, headers, body = server.request("GET", EXPERIMENT, key=key)
    assert (status, json.loads(body)["error"]) == (401, "KEY_EXPIRED")
    assert headers["www-authenticate"].startswith("Bearer")


def test_the_store_is_gone_and_nobody_gets_in(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        key = server.key("mlflow:read")
        assert server.request("GET", EXPERIMENT, key=key)[0] == 200
        with sqlite3.connect(tmp_path / "hokusai_auth.db") as database:
            database.execute("DROP TABLE hokusai_auth_keys")
            database.execute("DROP TABLE hokusai_auth_state")
        # A known key counts until its confirmation is out of date; then the store is asked, in vain.
        wait_until(lambda: server.request("GET", EXPERIMENT, key=key)[0] == 503)
        status, headers, body = server.request("GET", EXPERIMENT, key=keys.generate())
        assert (status, headers["retry-after"]) in [(503, str(n)) for n in range(1, 5)]
        assert json.loads(body)["error"] == "AUTHORITY_UNAVAILABLE"
        assert server.request("GET", "/health")[0] == 200


class TestLargeBodies:
    """Peak memory of the worker, by the kernel's own high-water mark."""

    SIZE = 300 * MB
    PATH = "/api/mlflow/api/2.0/mlflow-artifacts/artifacts/large.bin"

    @pytest.fixture(scope="class")
    def server(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        """One that nobody else uses meanwhile."""
        with serve(tmp_path_factory.mktemp("large"), started=True) as server:
            yield server

    def test_300_mb_with_a_key_are_streamed(self, server: Server) -> None:
        key = server.key("mlflow:write")
        server.request("PUT", self.PATH, key=key, body=b"warm up")
        with PeakMemory(server) as peak:
            assert self.upload(server, {"X-API-Key": key}) == 200
        assert (server.folder / "artifacts/large.bin").stat().st_size == self.SIZE
        assert peak.growth < 16 * MB

    def test_300_mb_without_a_key_are_not_even_sent(self, server: Server) -> None:
        server.request("PUT", self.PATH, body=b"warm up")
        with PeakMemory(server) as peak:
            answer = server.raw(
                f"PUT {self.PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                f"Content-Length: {self.SIZE}\r\nExpect: 100-continue\r\n\r\n".encode()
            )
            assert answer.startswith(b"HTTP/1.1 401 ")
            assert b"100 Continue" not in answer
            # A client that sends all the same gets the answer, and the server keeps none of it.
            assert self.upload(server, {}) == 401
        assert peak.growth < 5 * MB

    def upload(self, server: Server, headers: dict[str, str]) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        connection.putrequest("PUT", self.PATH)
        for name, value in {**headers, "Content-Length": str(self.SIZE)}.items():
            connection.putheader(name, value)
        connection.endheaders()
        block = bytes(MB)
        try:
            for _ in range(self.SIZE // MB):
                connection.send(block)
        except OSError:
            pass  # refused and closed before the end, as it should be
        return connection.getresponse().status


class PeakMemory:
    """Growth of the peak resident memory of a server's one worker, in bytes."""

    growth = 0

    def __init__(self, server: Server) -> None:
        (self._pid,) = server.workers()

    def __enter__(self) -> PeakMemory:
        Path(f"/proc/{self._pid}/clear_refs").write_text("5")
        self._before = self._peak()
        return self

    def __exit__(self, *exc: object) -> None:
        self.growth = self._peak() - self._before

    def _peak(self) -> int:
        for line in Path(f"/proc/{self._pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the kernel keeps no high-water mark")


@pytest.mark.parametrize(
    ("options", "environ", "says"),
    [
        (["--static-prefix", "/ui"], {}, "HOKUSAI_AUTH_PREFIXES=/ui"),
        ([], {"HOKUSAI_AUTH_DATABASE_URI": "mysql://u:canary@h/d"}, "must begin with"),
    ],
)
def test_a_mistake_stops_the_start_with_one_message(
    tmp_path: Path, options: list[str], environ: dict[str, str], says: str
) -> None:
    assert says in refused_start(tmp_path, *options, **environ)


def test_all_wrong_settings_are_named_at_once(tmp_path: Path) -> None:
    wrong = {"HOKUSAI_AUTH_CACHE_TTL": "-1", "HOKUSAI_AUTH_QUERY_KEY": "maybe"}
    done = run_command(tmp_path, "keys", "list", environ=environment(tmp_path, **wrong))
    assert done.returncode == 1
    assert all(name in done.stderr for name in wrong)


def test_a_worker_refuses_a_store_that_nobody_migrated(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("from mlflow_hokusai_auth.server.app import *; create_app()")
    done = run_forked(tmp_path, str(script), environ=environment(tmp_path))
    assert done.returncode == 3
    assert "mlflow server --app-name hokusai-auth" in done.stderr


def test_workers_started_at_once_on_an_empty_store(servers: dict[str, Server]) -> None:
    server = servers["workers"]
    key = server.key("mlflow:read")
    answers: list[int] = []

    def client() -> None:
        answers.append(server.request("GET", EXPERIMENT, key=key)[0])

    threads = [threading.Thread(target=client) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 32
    assert "locked" not in server.log
    assert (server.folder / "hokusai_auth.db").stat().st_mode & 0o777 == 0o600

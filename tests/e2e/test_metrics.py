"""What a running server counts, added up over its workers, and who may read it."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import RestException
from prometheus_client.mmap_dict import MmapedDict

from mlflow_hokusai_auth.core import keys
from tests.e2e.parts import EXPERIMENT, METRICS, Samples, parsed, read, refused_start, scrape
from tests.harness import PREFIXES, Server, free_port, serve, wait_until
from tests.standin import Standin

pytestmark = pytest.mark.servers

DAY = 86400.0
WORKERS = ("--workers", "2")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two workers, whose authorities are the store and a service that is down."""
    with (
        Standin() as gone,
        serve(
            tmp_path_factory.mktemp("metrics"),
            WORKERS,
            started=True,
            HOKUSAI_AUTH_BACKEND="local,service",
            HOKUSAI_AUTH_SERVICE_URL=gone.url,
            HOKUSAI_AUTH_METRICS_BIND=f"127.0.0.1:{free_port()}",
        ) as running,
    ):
        gone.go()
        yield running


def bound(server: Server) -> int:
    return int(server.environ["HOKUSAI_AUTH_METRICS_BIND"].rpartition(":")[2])


def series(samples: Samples, name: str) -> dict[frozenset[tuple[str, str]], float]:
    return {labels: value for (n, labels), value in samples.items() if n == name}


@contextlib.contextmanager
def growth(server: Server) -> Iterator[Callable[..., float]]:
    """In the context, what tells by how much a metric grew since its beginning."""
    before = scrape(server)

    def grown(name: str, **labels: str) -> float:
        return read(scrape(server), name, **labels) - read(before, name, **labels)

    yield grown


def becomes(grown: Callable[..., float], value: float, name: str, **labels: str) -> None:
    """Wait for it: a request is counted right after its response has gone out."""
    wait_until(lambda: grown(name, **labels) >= value)
    assert grown(name, **labels) == value


def folder_of(server: Server) -> Path:
    """Where the workers keep their counts; the command's own environment does not show it."""
    for pid in server.workers():
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            name, _, value = entry.partition(b"=")
            if name == b"PROMETHEUS_MULTIPROC_DIR":
                return Path(value.decode())
    raise AssertionError("no worker has PROMETHEUS_MULTIPROC_DIR")


def pid_of(file: Path) -> int:
    return int(file.stem.rpartition("_")[2])


class TestManyWorkers:
    CONNECTIONS = 32
    EACH = 15

    def test_counts_of_all_workers_add_up_whichever_is_asked(self, server: Server) -> None:
        key = server.key("mlflow:read")

        def counts() -> list[float]:
            """Return the number of requests that each worker has counted."""
            return [
                sum(
                    value
                    for name, value, *_ in MmapedDict.read_all_values_from_file(str(file))
                    if '"hokusai_auth_requests_total"' in name and '"experiments"' in name
                )
                for file in folder_of(server).glob("counter_*.db")
            ]

        crowds = 0

        def several_workers_serve() -> bool:
            nonlocal crowds
            self.crowd(server, {}, 401)
            crowds += 1
            return len([count for count in counts() if count]) > 1

        # On a busy machine one worker may take all connections of a crowd.
        wait_until(several_workers_serve)
        wait_until(lambda: sum(counts()) >= crowds * self.CONNECTIONS * self.EACH)
        with growth(server) as grown:
            self.crowd(server, {"X-API-Key": key}, 200)
            self.crowd(server, {}, 401)
            asked = self.CONNECTIONS * self.EACH
            counted = {"kind": "experiments", "access": "read", "prefix": "/mlflow"}
            for end in (
                {"status": "200", "outcome": "allowed"},
                {"status": "401", "outcome": "refused"},
            ):
                becomes(grown, asked, "hokusai_auth_requests_total", **counted, **end)
            becomes(grown, asked, "hokusai_auth_decisions_total", reason="KEY_MISSING")
            becomes(grown, asked, "hokusai_auth_mlflow_seconds_count", access="read")
        assert sum(counts()) >= 2 * asked

        # Each connection stays with one worker, and all tell the same.
        connections = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(24)]
        told = []
        for connection in connections * 2:
            connection.request("GET", METRICS, headers={"X-API-Key": server.key("metrics:read")})
            samples = parsed(connection.getresponse().read())
            told.append(
                {
                    labels: value
                    for labels, value in series(samples, "hokusai_auth_requests_total").items()
                    if ("kind", "hokusai") not in labels
                }
            )
        for connection in connections:
            connection.close()
        assert all(counts == told[0] for counts in told)

    def crowd(self, server: Server, headers: dict[str, str], status: int) -> None:
        answers: list[int] = []

        def client() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            for _ in range(self.EACH):
                connection.request("GET", f"/mlflow{EXPERIMENT}", headers=headers)
                response = connection.getresponse()
                response.read()
                answers.append(response.status)
            connection.close()

        threads = [threading.Thread(target=client) for _ in range(self.CONNECTIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [status] * self.CONNECTIONS * self.EACH


class TestWhoMayRead:
    def test_a_key_for_metrics_and_an_administrator_s(self, server: Server) -> None:
        for prefix, scope in itertools.product(PREFIXES, ("metrics:read", "mlflow:admin")):
            status, headers, body = server.request("GET", prefix + METRICS, key=server.key(scope))
            assert status == 200, (prefix, scope)
            assert headers["content-type"].startswith("text/plain; version="), prefix
            assert b"# TYPE hokusai_auth_info gauge" in body, prefix

    def test_no_other_key(self, server: Server) -> None:
        for prefix in PREFIXES:
            for scope in ("model:write", "mlflow:read", "mlflow:write", "full_access"):
                status = server.request("GET", prefix + METRICS, key=server.key(scope))[0]
                assert status == 403, (prefix, scope)

    def test_nobody_without_a_key(self, server: Server) -> None:
        for prefix in PREFIXES:
            status, _, body = server.request("GET", prefix + METRICS)
            assert (status, b"hokusai_auth" in body) == (401, False), prefix

    def test_a_key_for_metrics_opens_nothing_else(self, server: Server) -> None:
        closed = [
            ("GET", EXPERIMENT),
            ("GET", "/version"),
            ("GET", "/"),
            ("GET", "/metrics"),
            ("GET", "/api/2.0/mlflow/metrics/get-history?run_id=x&metric_key=y"),
            ("POST", "/api/2.0/mlflow/registered-models/create"),
            ("POST", "/graphql"),
            ("GET", "/api/2.0/hokusai/keys"),
            ("POST", "/api/2.0/hokusai/keys"),
            ("POST", METRICS),
            ("GET", f"{METRICS}/"),
            ("GET", f"{METRICS}/more"),
        ]
        headers = {"Content-Type": "application/json", "X-API-Key": server.key("metrics:read")}
        opened = []
        for prefix, (method, path) in itertools.product(PREFIXES, closed):
            body = b"{}" if method == "POST" else None
            answer = server.request(method, prefix + path, headers=headers, body=body)
            if answer[0] != 403:
                opened.append(f"{method} {prefix}{path}: {answer}")
        assert not opened, "\n".join(opened)

    def test_head_goes_with_get_and_tells_nothing(self, server: Server) -> None:
        status, _, body = server.request("HEAD", METRICS, key=server.key("metrics:read"))
        assert (status, body) == (200, b"")
        assert server.request("HEAD", METRICS, key=server.key("model:write"))[0] == 403

    def test_nobody_is_asked_on_the_port_of_metrics_bind(self, server: Server) -> None:
        with growth(server) as grown:
            for _ in range(5):
                assert server.request("GET", "/version", key=server.key("mlflow:read"))[0] == 200
            labels = {"kind": "server", "access": "read", "outcome": "allowed"}
            becomes(grown, 5, "hokusai_auth_requests_total", **labels)
        connection = http.client.HTTPConnection("127.0.0.1", bound(server), timeout=30)
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        assert response.status == 200
        there, here = parsed(response.read()), scrape(server)
        connection.close()
        name = "hokusai_auth_requests_total"
        assert read(there, name, **labels) == read(here, name, **labels)
        assert series(there, "hokusai_auth_keys") == series(here, "hokusai_auth_keys") != {}
        assert server.request("GET", "/metrics")[0] == 401  # but not on the server's own
        # And on that address only.
        with socket.socket() as other, pytest.raises(ConnectionRefusedError):
            other.connect(("127.0.0.2", bound(server)))

    def test_a_port_in_use_stops_the_start_with_a_message(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            environ = {"HOKUSAI_AUTH_METRICS_BIND": address, "TMPDIR": str(tmp_path)}
            said = refused_start(tmp_path, **environ)
        assert address in said and "in use" in said
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("hokusai-auth-")]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say_against_the_text(server: Server) -> None:
    text = server.request("GET", METRICS, key=server.key("metrics:read"))[2]
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


class TestWhatIsCounted:
    def test_registrations_by_step_and_end(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{server.origin}/api/mlflow")
        # An administrator may name any source.
        monkeypatch.setenv("HOKUSAI_API_KEY", server.key("mlflow:admin"))
        client = MlflowClient()
        with growth(server) as grown:
            client.create_registered_model("counted")
            version = client.create_model_version("counted", "s3://bucket/model")
            assert version.version in ("1", 1)
            with pytest.raises(RestException, match="RESOURCE_ALREADY_EXISTS"):
                client.create_registered_model("counted")
            # Neither is a step of registering.
            client.update_model_version("counted", "1", "described")
            client.search_registered_models()
            monkeypatch.setenv("HOKUSAI_API_KEY", server.key("model:read"))
            with pytest.raises(RestException, match="SCOPE_MISSING"):
                client.create_registered_model("refused")
            with pytest.raises(RestException, match="SCOPE_MISSING"):
                client.create_model_version("counted", "s3://bucket/model")
            expected = {
                "model": {"tried": 3, "succeeded": 1, "rejected": 1, "refused": 1, "failed": 0},
                "version": {"tried": 2, "succeeded": 1, "rejected": 0, "refused": 1, "failed": 0},
            }
            for step, results in expected.items():
                for result, count in results.items():
                    becomes(
                        grown, count, "hokusai_auth_registrations_total", step=step, result=result
                    )

    def test_the_time_of_the_gate_and_of_mlflow(self, server: Server) -> None:
        with growth(server) as grown:
            for _ in range(7):
                path = "/api/2.0/mlflow/experiments/create"
                answer = server.request(
                    "POST",
                    path,
                    key=server.key("mlflow:write"),
                    headers={"Content-Type": "application/json"},
                    body=b"{}",
                )
                assert answer[0] == 400
            for _ in range(3):
                assert server.request("GET", EXPERIMENT)[0] == 401  # never gets to MLflow
            name = "hokusai_auth_mlflow_seconds"
            becomes(grown, 7, f"{name}_count", access="write")
            becomes(grown, 7, f"{name}_bucket", access="write", le="+Inf")
            assert grown(f"{name}_sum", access="write") > 0
            assert grown(f"{name}_count", access="read") == 0
            assert grown("hokusai_auth_gate_seconds_sum") > 0
            assert grown("hokusai_auth_gate_seconds_count") >= 10

    def test_the_store_s_keys_by_state(self, server: Server) -> None:
        before = scrape(server)
        now = time.time()
        make = server.store.create
        scopes = ["mlflow:read"]
        make(owner="far", scopes=scopes, expires_at=now + 8 * DAY)
        make(owner="soon", scopes=scopes, expires_at=now + 6 * DAY)
        make(owner="gone", scopes=scopes, expires_at=now - 1)
        replaced = make(owner="old", scopes=scopes, expires_at=now + DAY)[0]
        server.store.rotate(replaced.key_id)  # the new one ends with it, and is not replaced
        revoked = make(owner="leaver", scopes=scopes, expires_at=now + DAY)[0]
        server.store.revoke(revoked.key_id)
        after = scrape(server)
        grown = {
            state: read(after, "hokusai_auth_keys", state=state)
            - read(before, "hokusai_auth_keys", state=state)
            for state in ("active", "deprecated", "expired", "revoked")
        }
        assert grown == {"active": 3, "deprecated": 1, "expired": 1, "revoked": 1}

    def test_keys_in_the_query(self, server: Server) -> None:
        key = server.key("mlflow:read")
        with growth(server) as grown:
            assert server.request("GET", f"/version?api_key={key}")[0] == 200
            assert server.request("GET", "/version", key=key)[0] == 200
            becomes(grown, 1, "hokusai_auth_query_keys_total")

    def test_what_is_running(self, server: Server) -> None:
        samples = scrape(server)
        ((labels, value),) = series(samples, "hokusai_auth_info").items()
        assert value == 1
        assert {"policy": "scopes", "authority": "local,service"}.items() <= dict(labels).items()
        modes = {
            dict(labels)["mode"]: n for labels, n in series(samples, "hokusai_auth_mode").items()
        }
        assert modes == {"enforce": 1, "observe": 0, "off": 0}


def test_a_worker_that_was_killed_no_longer_tells_of_its_breaker_but_its_counts_stay(
    server: Server,
) -> None:
    connections = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(24)]
    unavailable = {"kind": "server", "outcome": "unavailable"}
    so_far = read(scrape(server), "hokusai_auth_requests_total", **unavailable)
    for _ in range(8):
        for connection in connections:
            connection.request("GET", "/version", headers={"X-API-Key": keys.generate()})
            response = connection.getresponse()
            response.read()
            assert response.status == 503
    for connection in connections:
        connection.close()

    def breakers() -> list[dict[frozenset[tuple[str, str]], float]]:
        open_port = http.client.HTTPConnection("127.0.0.1", bound(server), timeout=30)
        open_port.request("GET", "/metrics")
        samples = parsed(open_port.getresponse().read())
        open_port.close()
        # Second, as it forgets the dead for the others, too.
        return [series(s, "hokusai_auth_breaker_open") for s in (samples, scrape(server))]

    is_open = {frozenset({("authority", "service")}): 1.0}
    wait_until(lambda: breakers() == [is_open, is_open])
    failed = {"authority": "service", "result": "failed"}
    wait_until(
        lambda: (
            read(scrape(server), "hokusai_auth_requests_total", **unavailable) == so_far + 8 * 24
        )
    )
    before = scrape(server)
    assert read(before, "hokusai_auth_authority_calls_total", **failed) >= 5

    folder = folder_of(server)

    def serving() -> set[int]:
        found = {pid_of(file) for file in folder.glob("gauge_*.db")}
        return {pid for pid in found if Path(f"/proc/{pid}").exists()}

    killed = serving()
    assert len(killed) == 2
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    # The supervisor starts others, which ask the service nothing and so have no breaker to tell of.
    wait_until(lambda: len(serving() - killed) == 2 and not killed & serving())
    wait_until(lambda: answers(server))
    assert breakers() == [{}, {}]
    after = scrape(server)
    for name, labels in (
        ("hokusai_auth_authority_calls_total", failed),
        ("hokusai_auth_requests_total", unavailable),
        ("hokusai_auth_registrations_total", {}),
        ("hokusai_auth_query_keys_total", {}),
    ):
        assert read(after, name, **labels) == read(before, name, **labels), name


def answers(server: Server) -> bool:
    try:
        return server.request("GET", METRICS, key=server.key("metrics:read"))[0] == 200
    except (OSError, http.client.HTTPException):
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_folder_of_counts_goes_with_the_server(tmp_path: Path, number: int) -> None:
    with serve(tmp_path, ("--workers", "1"), started=True, TMPDIR=str(tmp_path)) as server:
        folder = folder_of(server)
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o777 == 0o700
        assert list(folder.glob("*.db"))
        # As service managers do it: only the command itself is told, and passes it on.
        server.process.send_signal(number)
        server.process.wait(120)
        assert not folder.exists()

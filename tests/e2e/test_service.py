"""A server whose keys live in the auth service: how often it asks, and what an outage does."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_registration import assert_done, run_job
from tests.harness import PREFIXES, Server, serve
from tests.standin import Standin

pytestmark = pytest.mark.servers

EXPERIMENT = "/api/2.0/mlflow/experiments/get?experiment_id=0"


@pytest.fixture(scope="module")
def service() -> Iterator[Standin]:
    with Standin() as standin:
        yield standin


@pytest.fixture(scope="module")
def served(service: Standin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(
        tmp_path_factory.mktemp("service"),
        HOKUSAI_AUTH_BACKEND="local,service",
        HOKUSAI_AUTH_SERVICE_URL=service.url,
        HOKUSAI_AUTH_CACHE_TTL="2",
        HOKUSAI_AUTH_STALE_IF_ERROR="600",
        HOKUSAI_AUTH_SERVICE_TIMEOUT="2",
    ) as server:
        yield server


@pytest.fixture(autouse=True)
def strict(service: Standin) -> None:
    service.behave("strict")


def test_a_model_is_registered_with_a_key_of_the_service(served: Server, service: Standin) -> None:
    environ = {**served.environ, "HOKUSAI_API_KEY": service.add(scopes=["model:write"])}
    uris = [served.origin + prefix for prefix in PREFIXES]
    for number, result in enumerate(run_job(environ, "service", *uris)):
        assert_done(result, f"service-{number}")
    call = service.calls[-1]
    assert json.loads(call.body) == {"service_id": "platform", "client_ip": "127.0.0.1"}
    assert {call.path for call in service.calls} == {"/api/v1/keys/validate"}  # no usage debit


def test_a_crowd_with_one_key_makes_one_call(served: Server, service: Standin) -> None:
    key = service.add()
    service.behave("slow", seconds=0.5)
    before, sockets = len(service.calls), service.connections
    answers: list[int] = []

    def ask() -> None:
        answers.append(served.request("GET", EXPERIMENT, key=key)[0])

    threads = [threading.Thread(target=ask) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 200
    # The cache ends after 2 s here, which serving 200 may take.
    assert len(service.calls) - before <= 3
    assert service.connections - sockets <= 8


def test_requests_make_one_call_per_ttl(served: Server, service: Standin) -> None:
    key = service.add()
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    before, started, count = len(service.calls), time.monotonic(), 0
    while time.monotonic() - started < 5:
        connection.request("GET", "/version", headers={"X-API-Key": key})
        response = connection.getresponse()
        response.read()
        assert response.status == 200
        count += 1
    connection.close()
    assert count > 200
    assert len(service.calls) - before <= 4  # 5 s at 2 s less jitter each


def test_an_outage(served: Server, service: Standin) -> None:
    known, unknown = service.add(), service.add()
    own = served.key("mlflow:read")
    assert served.request("GET", EXPERIMENT, key=known)[0] == 200
    service.go()
    # Until the breaker is open each question fails by itself; then nobody waits.
    for _ in range(8):
        assert served.request("GET", EXPERIMENT, key=unknown)[0] == 503
    started = time.monotonic()
    status, headers, body = served.request("GET", EXPERIMENT, key=unknown)
    assert time.monotonic() - started < 0.3
    assert status == 503 and 1 <= int(headers["retry-after"]) <= 5
    assert json.loads(body)["error"] == "AUTHORITY_UNAVAILABLE"
    time.sleep(2.1)  # what is known is stale by now, and still counts
    assert served.request("GET", EXPERIMENT, key=known)[0] == 200
    assert served.request("GET", EXPERIMENT, key=own)[0] == 200
    assert served.request("GET", "/health")[0] == 200

    service.come_back()
    returned = time.monotonic()
    while served.request("GET", EXPERIMENT, key=unknown)[0] != 200:
        assert time.monotonic() - returned < 2
    assert unknown not in served.log


@pytest.mark.parametrize("kind", ["workers", "gunicorn"])
def test_one_server_is_the_authority_of_another(
    servers: dict[str, Server], kind: str, tmp_path: Path
) -> None:
    authority = servers[kind]
    with serve(
        tmp_path, HOKUSAI_AUTH_BACKEND="service", HOKUSAI_AUTH_SERVICE_URL=authority.origin
    ) as server:
        key = authority.key("mlflow:write")
        assert server.request("GET", EXPERIMENT, key=key)[0] == 200
        status, _, body = server.request("GET", EXPERIMENT, key="hk_live_" + "c" * 32)
        assert (status, json.loads(body)["error"]) == (401, "KEY_UNKNOWN")
        # Its own store is not asked.
        assert server.request("GET", EXPERIMENT, key=server.key("mlflow:read"))[0] == 401

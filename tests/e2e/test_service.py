"""A server whose keys live in the auth service: how often it asks, and what an outage does."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlflow_hokusai_auth.authorities.cache import JITTER
from tests.e2e.parts import EXPERIMENT, read, scrape
from tests.e2e.test_registration import assert_done, run_job
from tests.harness import PREFIXES, Server, serve, wait_until
from tests.standin import Standin

pytestmark = pytest.mark.servers

#: Seconds for which what the service says counts.
TTL = 2.0


@pytest.fixture(scope="module")
def served(service: Standin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(
        tmp_path_factory.mktemp("service"),
        HOKUSAI_AUTH_BACKEND="local,service",
        HOKUSAI_AUTH_SERVICE_URL=service.url,
        HOKUSAI_AUTH_CACHE_TTL=str(TTL),
        HOKUSAI_AUTH_STALE_IF_ERROR="600",
        HOKUSAI_AUTH_SERVICE_TIMEOUT="30",
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


@contextlib.contextmanager
def one_call_per_ttl(service: Standin) -> Iterator[Callable[[], int]]:
    """In the context the service is asked no more often than its answers end; tells how often."""
    before, began = len(service.calls), time.monotonic()
    yield lambda: len(service.calls) - before
    calls, took = len(service.calls) - before, time.monotonic() - began
    assert 1 <= calls <= 1 + took / (TTL * (1 - JITTER)), (calls, took)


def test_a_crowd_with_one_key_makes_one_call(served: Server, service: Standin) -> None:
    key = service.add()
    service.behave("slow", seconds=0.5)
    sockets = service.connections
    with one_call_per_ttl(service), ThreadPoolExecutor(200) as crowd:
        asked = [crowd.submit(served.request, "GET", EXPERIMENT, key=key) for _ in range(200)]
    assert [answer.result()[0] for answer in asked] == [200] * 200
    assert service.connections - sockets <= 8


def test_requests_make_one_call_per_ttl(served: Server, service: Standin) -> None:
    key = service.add()
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    with contextlib.closing(connection), one_call_per_ttl(service) as calls:
        count, deadline = 0, time.monotonic() + 120
        while count < 200 or calls() < 3:
            connection.request("GET", "/version", headers={"X-API-Key": key})
            response = connection.getresponse()
            response.read()
            assert response.status == 200
            assert time.monotonic() < deadline
            count += 1


def skipped(server: Server) -> float:
    """How often the service was left alone since the server began."""
    labels = {"authority": "service", "result": "skipped"}
    return read(scrape(server), "hokusai_auth_authority_calls_total", **labels)


def test_an_outage(served: Server, service: Standin) -> None:
    known, unknown = service.add(), service.add()
    own = served.key("mlflow:read")
    assert served.request("GET", EXPERIMENT, key=known)[0] == 200
    service.go()
    # Until the breaker is open each question fails by itself; then nobody asks, and nobody waits.
    before = skipped(served)

    def refused_at_once() -> bool:
        status, headers, body = served.request("GET", EXPERIMENT, key=unknown)
        assert status == 503 and 1 <= int(headers["retry-after"]) <= 5
        assert json.loads(body)["error"] == "AUTHORITY_UNAVAILABLE"
        return skipped(served) > before

    wait_until(refused_at_once)
    assert read(scrape(served), "hokusai_auth_breaker_open", authority="service") == 1
    time.sleep(TTL)  # what is known is stale by now, and still counts
    assert served.request("GET", EXPERIMENT, key=known)[0] == 200
    assert served.request("GET", EXPERIMENT, key=own)[0] == 200
    assert served.request("GET", "/health")[0] == 200

    service.come_back()
    wait_until(lambda: served.request("GET", EXPERIMENT, key=unknown)[0] == 200)
    assert read(scrape(served), "hokusai_auth_breaker_open", authority="service") == 0
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

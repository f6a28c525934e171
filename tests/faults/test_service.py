"""A fault between the server and the auth service, or Redis: who is served, and how long for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from mlflow_hokusai_auth.authorities.cache import JITTER
from tests.harness import Server, serve, wait_until
from tests.standin import Standin

from .proxy import FAULTS, Proxy
from .watch import Answer, Asker, crowd

pytestmark = pytest.mark.long  # servers of their own, for as long as caches last

TIMEOUT = 1.0
TTL, STALE = 2.0, 3.0
#: Bytes of an answer until it breaks off: in the middle of its headers.
AFTER = 100


@pytest.fixture(scope="module")
def service() -> Iterator[Standin]:
    with Standin() as standin:
        yield standin


@pytest.fixture(scope="module")
def proxy(service: Standin) -> Iterator[Proxy]:
    with Proxy(int(service.url.rpartition(":")[2])) as proxy:
        yield proxy


def settings(proxy: Proxy, timeout: float = TIMEOUT) -> dict[str, str]:
    return {
        "HOKUSAI_AUTH_BACKEND": "service",
        "HOKUSAI_AUTH_SERVICE_URL": f"http://127.0.0.1:{proxy.port}",
        "HOKUSAI_AUTH_SERVICE_TIMEOUT": str(timeout),
        "HOKUSAI_AUTH_CACHE_TTL": str(TTL),
    }


@pytest.fixture(scope="module")
def served(proxy: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    stale = {"HOKUSAI_AUTH_STALE_IF_ERROR": str(STALE)}
    with serve(tmp_path_factory.mktemp("served"), **settings(proxy), **stale) as server:
        yield server


def keys_of(service: Standin) -> dict[str, str | Callable[[], str]]:
    revoked = service.add(state="revoked")
    return {"revoked": revoked, "known": service.add(), "fresh": service.add}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_auth_service(served: Server, service: Standin, proxy: Proxy, fault: str) -> None:
    proxy.lift()
    keys = keys_of(service)

    def verified() -> int:
        return sum(str(keys["known"]) in call.headers["authorization"] for call in service.calls)

    with crowd(served, **keys, bound=TIMEOUT + 5) as at_work:
        before, since = verified(), time.monotonic()
        wait_until(lambda: verified() > before)
        at_work.known.wait_for(200, time.monotonic())
        proxy.fail(fault, AFTER)
        began = time.monotonic()
        at_work.fresh.wait_for(503, began)
        ended = at_work.known.wait_for(503, began)
        lifted = time.monotonic()
        proxy.lift()
        at_work.tell(f"auth service, {fault}", began, lifted)
        at_work.known.wait_for(200, lifted)
    # It counted for as long as it should: since it was verified at the earliest, at the latest.
    assert ended.over - since > TTL * (1 - JITTER) + STALE
    assert not served_after(at_work.known, began + TTL + STALE, lifted)
    # Nobody was let in who was not known before.
    assert not served_after(at_work.fresh, began, lifted)


def served_after(asker: Asker, since: float, lifted: float) -> list[Answer]:
    """What was asked for since then, and served before the fault was over."""
    return [a for a in asker.answers if a.status == 200 and since < a.sent and a.over < lifted]


def test_redis(service: Standin, proxy: Proxy, redis_url: str, tmp_path: Path) -> None:
    """All goes on: Redis only makes questions to the service rarer."""
    proxy.lift()
    port, database = redis_url.rpartition(":")[2].split("/")
    with (
        Proxy(int(port)) as way,
        redis.Redis.from_url(redis_url) as shared,
        serve(
            tmp_path,
            **settings(proxy, timeout=60),
            HOKUSAI_AUTH_REDIS_URL=f"redis://127.0.0.1:{way.port}/{database}",
            HOKUSAI_AUTH_SECRET_KEY="s" * 32,
        ) as server,
    ):
        for fault in FAULTS:
            way.lift()
            with crowd(server, **keys_of(service), bound=TIMEOUT) as at_work:
                began = time.monotonic()
                way.fail(fault, 0)
                # Longer than what is known lasts.
                while time.monotonic() < began + TTL + 1:
                    at_work.fresh.wait_for(200, time.monotonic())
                shared.flushall()
                lifted = time.monotonic()
                way.lift()
                at_work.tell(f"Redis, {fault}", began, lifted)
                wait_until(lambda: shared.dbsize() > 0)
                print(f"shared again {time.monotonic() - lifted:.1f} s after")
            for asker in (at_work.known, at_work.fresh):
                assert set(asker.statuses()) == {200}
            for stranger in at_work.strangers:
                assert set(stranger.statuses()) == {401}
        assert "Redis fails" in server.log

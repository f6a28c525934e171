"""The clock is set, forth and back, while the server runs.

What has a date goes by the clock: expiry. What has a duration does not: caches, the breaker, limits.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import Server, serve, wait_until
from tests.standin import Standin

from .watch import EXPERIMENT, KEYS

pytestmark = pytest.mark.long  # a server of its own

DAY = 86400
TTL = 5
#: What Python runs in each process of the server before anything else.
SITECUSTOMIZE = """
import os, time

def clock(real=time.time, offset=os.environ["TEST_CLOCK_OFFSET"]):
    with open(offset) as file:
        return real() + float(file.read())

time.time = clock
"""

Set = Callable[[float], None]


@pytest.fixture(scope="module")
def service() -> Iterator[Standin]:
    with Standin() as standin:
        yield standin


@pytest.fixture(scope="module")
def offset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clock")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return folder / "offset"


@pytest.fixture(scope="module")
def server(
    service: Standin, offset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    offset.write_text("0")
    with serve(
        tmp_path_factory.mktemp("server"),
        PYTHONPATH=os.pathsep.join([str(offset.parent), os.environ.get("PYTHONPATH", "")]),
        TEST_CLOCK_OFFSET=str(offset),
        HOKUSAI_AUTH_BACKEND="local,service",
        HOKUSAI_AUTH_SERVICE_URL=service.url,
        HOKUSAI_AUTH_CACHE_TTL=str(TTL),
    ) as server:
        yield server


@pytest.fixture
def clock(offset: Path) -> Iterator[Set]:
    """Sets the server's clock to that many seconds from now."""

    def to(seconds: float) -> None:
        new = offset.with_name("new")
        new.write_text(str(seconds))
        new.replace(offset)

    to(0)
    yield to
    to(0)


def ask(server: Server, key: str) -> tuple[int, str]:
    """The status, and the reason of a refusal."""
    status, _, body = server.request("GET", EXPERIMENT, key=key)
    return status, "" if status == 200 else json.loads(body)["error"]


def test_a_key_ends_when_the_clock_says_so(server: Server, clock: Set) -> None:
    ends = time.time() + 3600
    key = server.store.create(owner="x", scopes=["mlflow:read"], expires_at=ends)[1]
    for seconds, expected in (
        (0, (200, "")),
        (DAY, (401, "KEY_EXPIRED")),
        (3590, (200, "")),
        (3601, (401, "KEY_EXPIRED")),
        (-DAY, (200, "")),
        (DAY, (401, "KEY_EXPIRED")),
    ):
        clock(seconds)
        assert ask(server, key) == expected, seconds


@pytest.mark.parametrize("seconds", [DAY, -DAY])
def test_a_revocation_is_seen_as_soon(server: Server, clock: Set, seconds: int) -> None:
    record, key = server.store.create(owner="x", scopes=["mlflow:read"])
    assert ask(server, key)[0] == 200
    clock(seconds)
    assert ask(server, key)[0] == 200
    path = f"{KEYS}/{record.key_id}?wait=true"
    assert server.request("DELETE", path, key=server.key("mlflow:admin"))[0] == 200
    assert ask(server, key) == (401, "KEY_REVOKED")
    for later in (DAY, -DAY, 0):
        clock(later)
        assert ask(server, key) == (401, "KEY_REVOKED"), later


@pytest.mark.parametrize("seconds", [DAY, -DAY])
def test_an_identity_is_kept_for_as_long(
    server: Server, service: Standin, clock: Set, seconds: int
) -> None:
    key = service.add()

    def calls() -> int:
        return sum(key in call.headers["authorization"] for call in service.calls)

    verified = time.monotonic()
    assert ask(server, key) == (200, "")
    clock(seconds)
    assert ask(server, key) == (200, "")
    assert calls() == 1 or time.monotonic() - verified > TTL / 2
    wait_until(lambda: ask(server, key) == (200, "") and calls() > 1)


@pytest.mark.parametrize("seconds", [DAY, -DAY])
def test_an_outage_ends_as_soon(server: Server, service: Standin, clock: Set, seconds: int) -> None:
    service.go()
    for _ in range(8):
        assert ask(server, service.add()) == (503, "AUTHORITY_UNAVAILABLE")
    clock(seconds)
    status, headers, _ = server.request("GET", EXPERIMENT, key=service.add())
    assert status == 503 and 1 <= int(headers["retry-after"]) <= 30
    service.come_back()
    wait_until(lambda: ask(server, service.add()) == (200, ""))


def test_a_limit_lasts_an_hour_at_most(server: Server, clock: Set) -> None:
    key = server.store.create(owner="x", scopes=["mlflow:read"], rate_limit_per_hour=2)[1]

    def used_up() -> int:
        """Seconds until the next one, once the key was used as often as it may be."""
        wait_until(lambda: ask(server, key) == (429, "RATE_LIMITED"))
        return int(server.request("GET", EXPERIMENT, key=key)[1]["ratelimit-reset"])

    # Forth it is as if the time had passed; back, nothing may last until it passes a second time.
    for seconds in (0, DAY, 0, -DAY, DAY):
        clock(seconds)
        assert ask(server, key) == (200, ""), seconds
        assert used_up() <= 3600

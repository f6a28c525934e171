"""Rate limits of keys and of addresses, with Redis and without it."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import time_machine

from mlflow_hokusai_auth.authorities import redis_client
from mlflow_hokusai_auth.authorities.breaker import COOL_DOWN
from mlflow_hokusai_auth.core.denials import advice
from mlflow_hokusai_auth.core.types import Access, Allow, Deny, Operation, Principal
from mlflow_hokusai_auth.server.gate import limits as module
from mlflow_hokusai_auth.server.gate.limits import SIGN_INS_PER_MINUTE, Limits
from tests.conftest import redis_server
from tests.harness import free_port

#: After this many failures in a row no request waits for Redis.
FAILURES = 5
OPERATION = Operation(Access.READ, "runs", "GET /x")
#: The start of a minute and of an hour.
START = 1_800_000_000 - 1_800_000_000 % 3600


def allow(limit: int | None, name: str = "key_1", **fields: object) -> Allow:
    who = Principal(name, "ACME", frozenset(), rate_limit_per_hour=limit)
    return Allow(OPERATION, who, **fields)  # type: ignore[arg-type]


def admitted(limits: Limits, limit: int, times: int, name: str = "key_1") -> int:
    return sum(isinstance(limits.admit(allow(limit, name)), Allow) for _ in range(times))


def headers(verdict: Allow | Deny) -> dict[str, str]:
    return {name.removeprefix("RateLimit-"): value for name, value in verdict.headers}


@pytest.fixture
def clock() -> Iterator[time_machine.Traveller]:
    with time_machine.travel(START + 0.5, tick=False) as traveller:
        yield traveller


@pytest.fixture(params=["memory", "redis"])
def limits(request: pytest.FixtureRequest) -> Limits:
    if request.param == "memory":
        return Limits()
    return Limits(request.getfixturevalue("redis_url"))


# Keys


def test_key_is_served_as_often_as_its_limit_says(limits: Limits) -> None:
    assert admitted(limits, 3, 10) == 3
    refused = limits.admit(allow(3))
    assert isinstance(refused, Deny)
    assert refused.code == "RATE_LIMITED"
    assert "key_1" in refused.message and "limit: 3" in refused.message
    # Another key, or another limit of this one, has a count of its own.
    assert admitted(limits, 3, 10, "key_2") == 3
    assert admitted(limits, 4, 10) == 4


def test_counts_start_at_zero_when_the_clock_is_set_back(clock: time_machine.Traveller) -> None:
    limits = Limits()
    assert admitted(limits, 3, 10) == 3
    clock.shift(-30)
    assert admitted(limits, 3, 1) == 0
    # Counts in the future would hold until the clock has passed them.
    clock.shift(-3600)
    assert admitted(limits, 3, 10) == 3


def test_the_hour_moves_with_the_clock(limits: Limits, clock: time_machine.Traveller) -> None:
    assert admitted(limits, 3, 1) == 1
    clock.shift(1800)
    assert admitted(limits, 3, 3) == 2
    # Requests come back one by one, an hour after each, and not all at the full hour.
    clock.shift(1799)
    assert admitted(limits, 3, 1) == 0
    clock.shift(2)
    assert admitted(limits, 3, 3) == 1
    clock.shift(1800)
    assert admitted(limits, 3, 3) == 2


def test_answer_says_how_many_requests_are_left(
    limits: Limits, clock: time_machine.Traveller
) -> None:
    first = limits.admit(allow(2, headers=(("Sunset", "x"),)))
    assert isinstance(first, Allow)
    assert first.headers[0] == ("Sunset", "x")
    assert headers(first) == {"Sunset": "x", "Limit": "2", "Remaining": "1", "Reset": "3600"}
    clock.shift(600)
    second = limits.admit(allow(2))
    assert headers(second) == {"Limit": "2", "Remaining": "0", "Reset": "3000"}
    clock.shift(600.5)
    third = limits.admit(allow(2))
    assert isinstance(third, Deny)
    assert headers(third) == {"Limit": "2", "Remaining": "0", "Reset": "2400"}
    assert third.retry_after == 2400
    assert advice(third).endswith(" (limit: 2). Try again in about 40 minutes.")
    clock.shift(2399.9)
    assert headers(limits.admit(allow(2))) == {"Limit": "2", "Remaining": "0", "Reset": "600"}


def test_reading_the_rest_of_a_limit_counts_nothing(
    limits: Limits, clock: time_machine.Traveller
) -> None:
    for _ in range(5):
        assert limits.left("key_1", 2)[0] == 2
    limits.admit(allow(2))
    for _ in range(5):
        assert limits.left("key_1", 2) == (1, 3600)


def test_key_without_a_limit_is_not_counted() -> None:
    limits = Limits()
    for free in (allow(None), Allow(OPERATION)):
        for _ in range(100):
            assert limits.admit(free) is free
    assert not limits._keys.storage.events  # type: ignore[attr-defined]


def test_threads_share_a_count(limits: Limits) -> None:
    with ThreadPoolExecutor(8) as pool:
        counts = pool.map(lambda _: admitted(limits, 50, 20), range(8))
    assert sum(counts) == 50


# Redis


def test_counting_does_io_only_with_redis(redis_url: str) -> None:
    assert not Limits().does_io
    assert Limits(redis_url).does_io


def test_servers_that_share_a_redis_share_a_count(redis_url: str) -> None:
    one, two = Limits(redis_url), Limits(redis_url)
    assert (admitted(one, 5, 3), admitted(two, 5, 3), admitted(one, 5, 3)) == (3, 2, 0)
    assert two.left("key_1", 5)[0] == 0


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """The timeouts, in seconds, of the requests that waited for Redis."""
    found: list[float | None] = []
    result = Future.result

    def counted(future: Future[Any], timeout: float | None = None) -> Any:
        found.append(timeout)
        return result(future, timeout)

    monkeypatch.setattr(Future, "result", counted)
    return found


def test_server_without_its_redis_counts_for_itself_and_says_so_once(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    waits: list[float | None],
) -> None:
    now = [1000.0]
    monkeypatch.setattr(redis_client, "time", SimpleNamespace(monotonic=lambda: now[0]))
    # A working Redis may be as slow as the machine.
    monkeypatch.setattr(module, "BUDGET", 60.0)
    port = free_port()
    limits = Limits(f"redis://:hunter2@127.0.0.1:{port}/0")
    options = ("--port", str(port), "--requirepass", "hunter2")
    with redis_server(tmp_path, *options):
        assert admitted(limits, 100, 10) == 10
        assert limits.left("key_1", 100)[0] == 90
    waits.clear()
    assert admitted(limits, 100, 150) == 100
    breaker = limits._redis._breaker
    assert not breaker.closed and len(waits) == FAILURES
    ends = time.monotonic() + 60
    for _ in range(2):  # It is tried again now and then, and a repeated failure is not logged.
        now[0] += COOL_DOWN
        assert admitted(limits, 100, 1) == 0
        while breaker._probing and time.monotonic() < ends:
            time.sleep(0.01)
    assert len(waits) == FAILURES
    with redis_server(tmp_path, *options):
        while not breaker.closed and time.monotonic() < ends:
            now[0] += COOL_DOWN
            limits.left("key_1", 100)
            time.sleep(0.01)
        # This Redis is empty, so its counts start at zero.
        assert admitted(limits, 100, 10) == 10
        assert Limits(f"redis://:hunter2@127.0.0.1:{port}/0").left("key_1", 100)[0] == 90
    logged = [record for record in caplog.records if record.name == redis_client.__name__]
    assert [record.levelno for record in logged] == [logging.WARNING]
    assert "counts limits for itself" in caplog.text
    assert "hunter2" not in caplog.text and str(port) not in caplog.text


def test_few_requests_wait_briefly_for_a_redis_that_never_answers(
    waits: list[float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUDGET", 0.05)
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        limits = Limits(f"redis://127.0.0.1:{listener.getsockname()[1]}")
        for _ in range(100):
            limits.admit(allow(1000))
    assert waits == [0.05] * FAILURES
    assert limits.left("key_1", 1000)[0] == 900


def test_server_starts_without_its_redis() -> None:
    assert admitted(Limits(f"redis://127.0.0.1:{free_port()}"), 3, 10) == 3


# Addresses


def failures(limits: Limits, address: str, times: int) -> int:
    """Count `times` wrong keys from `address`. Return how many were within the limit."""
    return sum(limits.failed(address) is None for _ in range(times))


def test_wrong_keys_are_counted_by_address(clock: time_machine.Traveller) -> None:
    limits = Limits(failures_per_minute=5)
    assert failures(limits, "192.0.2.1", 20) == 5
    wait = limits.failed("192.0.2.1")
    assert wait is not None and 1 <= wait <= 60
    assert failures(limits, "192.0.2.2", 20) == 5
    assert failures(limits, "", 20) == 5
    # Refused requests don't count, so that a client that keeps trying is served again.
    clock.shift(120)
    assert failures(limits, "192.0.2.1", 20) == 5


def test_checking_an_address_counts_nothing(
    clock: time_machine.Traveller,
) -> None:
    limits = Limits(failures_per_minute=2)
    assert [limits.wait_for("192.0.2.1") for _ in range(9)] == [None] * 9
    assert failures(limits, "192.0.2.1", 2) == 2
    waits = []
    for _ in range(240):
        waits.append(limits.wait_for("192.0.2.1"))
        clock.shift(0.5)
    over = [wait for wait in waits if wait is not None]
    assert waits[0] is not None and waits[-1] is None
    assert all(1 <= wait <= 60 for wait in over), over
    assert limits.wait_for("192.0.2.2") is None
    assert Limits().wait_for("192.0.2.1") is None


def test_minute_of_an_address_moves_with_the_clock(clock: time_machine.Traveller) -> None:
    limits = Limits(failures_per_minute=10)
    clock.shift(58)
    assert failures(limits, "192.0.2.1", 20) == 10
    clock.shift(4)
    assert failures(limits, "192.0.2.1", 20) < 2
    clock.shift(30)
    assert 3 < failures(limits, "192.0.2.1", 20) < 7


def test_wrong_keys_are_not_counted_without_a_setting() -> None:
    limits = Limits()
    assert failures(limits, "192.0.2.1", 1000) == 1000
    assert not limits._addresses_storage.storage


def test_network_of_an_ipv6_customer_counts_as_one(clock: time_machine.Traveller) -> None:
    for one, other, together in (
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff:ffff:ffff:ffff", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("192.0.2.1", "192.0.2.2", False),
    ):
        limits = Limits(failures_per_minute=5)
        assert failures(limits, one, 5) == 5, one
        assert failures(limits, other, 5) == (0 if together else 5), (one, other)
        for _ in range(SIGN_INS_PER_MINUTE):
            limits.sign_in(one)
        assert (limits.sign_in(other) is not None) is together, (one, other)


def test_crowd_of_addresses_locks_out_nobody_else(
    clock: time_machine.Traveller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ADDRESSES", 50)
    limits = Limits(failures_per_minute=5)
    for number in range(60):
        limits.failed(f"2001:db8:0:{number:x}::1")
    # Fewer where some of the others are in the same crowd.
    assert 3 <= failures(limits, "2001:db8:1::1", 99) <= 5
    others = [f"198.18.{number // 250}.{number % 250}" for number in range(1000)]
    assert sum(limits.wait_for(one) is not None for one in others) < 20


def test_crowd_of_addresses_takes_no_more_memory_and_counts_as_one(
    clock: time_machine.Traveller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ADDRESSES", 50)
    monkeypatch.setattr(module, "CROWDS", 1)
    limits = Limits(failures_per_minute=5)
    served = sum(failures(limits, f"192.0.2.{number}", 1) for number in range(256))
    assert served == 50 + 5
    kept = limits._addresses_storage
    assert len(kept.storage) <= 51 and len(kept.locks) <= 51 and len(kept.expirations) <= 51
    clock.shift(180)
    # The next count starts the thread in which the storage forgets.
    ends = time.perf_counter() + 60
    while len(kept.storage) > 10 and time.perf_counter() < ends:
        limits.failed("198.51.100.1")
    assert failures(limits, "192.0.2.1", 9) == 5


def test_sign_ins_are_counted_by_address(clock: time_machine.Traveller) -> None:
    limits = Limits()
    waits = [limits.sign_in("192.0.2.1") for _ in range(2 * SIGN_INS_PER_MINUTE)]
    assert waits[:SIGN_INS_PER_MINUTE] == [None] * SIGN_INS_PER_MINUTE
    assert all(wait is not None and 1 <= wait <= 60 for wait in waits[SIGN_INS_PER_MINUTE:])
    assert limits.sign_in("192.0.2.2") is None
    clock.shift(120)
    assert limits.sign_in("192.0.2.1") is None


def test_regression_48_signing_in_is_counted_for_all_addresses_too(
    clock: time_machine.Traveller,
) -> None:
    limits = Limits()
    served = [limits.sign_in(f"192.0.{n % 100}.1") is None for n in range(1000)]
    assert sum(served) == 30 * SIGN_INS_PER_MINUTE
    assert limits.sign_in("198.51.100.1") is not None


def test_one_address_does_not_keep_all_others_from_signing_in(
    clock: time_machine.Traveller,
) -> None:
    limits = Limits()
    for _ in range(40 * SIGN_INS_PER_MINUTE):
        limits.sign_in("192.0.2.1")
    assert limits.sign_in("192.0.2.2") is None

"""The cache: what costs no question, what never outlives a change, and what an outage costs."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from mlflow_hokusai_auth.backends import BackendUnavailable, NoVerdict, Throttled, cache, guarded
from mlflow_hokusai_auth.backends.cache import CachedBackend
from mlflow_hokusai_auth.core.types import Principal, Rejected

ALICE = Principal("key_a", "alice", frozenset({"mlflow:read"}))
REVOKED = replace(ALICE, revoked_at=1.0)
HERE = "192.0.2.1"
SECRET = b"a secret of the servers"


class Clock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Memory:
    """A backend in memory that counts, and whose answers the tests change."""

    name = "memory"
    by_address = False
    watched = True

    def __init__(self) -> None:
        self.known = {"alice": ALICE}
        self.number = 0
        self.lookups = 0
        self.failure: Exception | None = None
        #: Released each time the generation was asked for, after its answer.
        self.polled = threading.Semaphore(0)

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        self.lookups += 1
        if self.failure is not None:
            raise self.failure
        return self.known.get(key, Rejected("unknown"))

    def generation(self) -> int:
        self.polled.release()
        if self.failure is not None:
            raise self.failure
        return self.number

    def wait(self, polls: int = 2) -> None:
        """Until answers of the generation from now on were taken in: two, as one may be under way."""
        while self.polled.acquire(blocking=False):
            pass
        for _ in range(polls):
            assert self.polled.acquire(timeout=10)


class Service(Memory):
    """One that tells nobody of changes, and whose answers hold for an address."""

    name = "service"
    by_address = True
    watched = False

    def generation(self) -> int:
        raise AssertionError("nobody may ask")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    monkeypatch.setattr(cache, "POLL", 0.005)
    return Memory()


@pytest.fixture
def cached(memory: Memory) -> CachedBackend:
    cached = CachedBackend(memory, ttl=60, secret=SECRET)
    cached.lookup("nobody", HERE)  # the first lookup starts the watcher
    memory.wait()
    return cached


@pytest.fixture
def clock() -> Clock:
    return Clock()


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def raising(call: Callable[[], object]) -> float:
    """Seconds until `call` raises BackendUnavailable."""
    began = time.perf_counter()
    with pytest.raises(BackendUnavailable):
        call()
    return time.perf_counter() - began


# A watched backend


def test_a_known_key_costs_no_question(cached: CachedBackend, memory: Memory) -> None:
    assert cached.peek("alice", HERE) is None
    assert cached.lookup("alice", HERE) == ALICE
    asked = memory.lookups
    assert [cached.peek("alice", HERE) for _ in range(100)] == [ALICE] * 100
    assert [cached.lookup("alice", HERE) for _ in range(100)] == [ALICE] * 100
    assert memory.lookups == asked


def test_an_unknown_key_is_remembered_until_a_change(cached: CachedBackend, memory: Memory) -> None:
    assert cached.lookup("bob", HERE) == Rejected("unknown")
    assert cached.peek("bob", HERE) == Rejected("unknown")
    memory.known["bob"] = ALICE
    memory.number += 1
    memory.wait()
    assert cached.peek("bob", HERE) is None
    assert cached.lookup("bob", HERE) == ALICE


def test_a_change_empties_the_cache(cached: CachedBackend, memory: Memory) -> None:
    cached.lookup("alice", HERE)
    memory.known["alice"] = REVOKED
    memory.number += 1
    memory.wait()
    assert cached.peek("alice", HERE) is None
    assert cached.lookup("alice", HERE) == REVOKED


def test_an_answer_from_before_a_change_is_not_kept(cached: CachedBackend, memory: Memory) -> None:
    slow_lookup = memory.lookup

    def overtaken(key: str, address: str) -> Principal | Rejected:
        answer = slow_lookup(key, address)
        memory.known["alice"] = REVOKED
        memory.number += 1
        memory.wait()
        return answer

    memory.lookup = overtaken  # type: ignore[method-assign]
    assert cached.lookup("alice", HERE) == ALICE
    assert cached.peek("alice", HERE) is None


def test_nobody_joins_a_question_from_before_a_change(
    cached: CachedBackend, memory: Memory
) -> None:
    asked, release = threading.Event(), threading.Event()
    answer_now = memory.lookup

    def slow(key: str, address: str) -> Principal | Rejected:
        answer = answer_now(key, address)
        asked.set()
        assert release.wait(10)
        return answer

    memory.lookup = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as threads:
        before = threads.submit(cached.lookup, "alice", HERE)
        assert asked.wait(10)
        memory.lookup = answer_now  # type: ignore[method-assign]
        memory.known["alice"] = REVOKED
        memory.number += 1
        memory.wait()
        assert cached.lookup("alice", HERE) == REVOKED
        release.set()
        assert before.result(10) == ALICE
    assert cached.peek("alice", HERE) == REVOKED


def test_entries_stop_counting_when_the_backend_can_not_be_asked(
    cached: CachedBackend, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached.lookup("alice", HERE)
    monkeypatch.setattr(cache, "MAX_UNCONFIRMED", 0.05)
    memory.failure = BackendUnavailable("down")
    for _ in range(100):
        memory.wait()
        if cached.peek("alice", HERE) is None:
            break
    assert cached.peek("alice", HERE) is None
    with pytest.raises(BackendUnavailable):
        cached.lookup("alice", HERE)
    memory.failure = None
    memory.wait()
    assert cached.peek("alice", HERE) == ALICE


def test_the_bound_on_revocation_is_below_a_second() -> None:
    assert cache.MAX_UNCONFIRMED < 1
    assert cache.POLL < cache.MAX_UNCONFIRMED / 3


def test_only_a_watched_backend_is_watched(memory: Memory) -> None:
    service = CachedBackend(Service(), ttl=60, secret=SECRET)
    service.lookup("alice", HERE)
    assert service._watcher is None
    assert service.peek("alice", HERE) == ALICE


# Bounds


def test_the_cache_is_bounded() -> None:
    service = Service()
    small = CachedBackend(service, ttl=60, secret=SECRET, size=10, negative_size=20)
    for number in range(100):
        service.known[str(number)] = ALICE
        small.lookup(str(number), HERE)
        small.lookup(f"not {number}", HERE)
    assert sum(small.peek(str(number), HERE) is not None for number in range(100)) == 10
    assert sum(small.peek(f"not {number}", HERE) is not None for number in range(100)) == 20


@pytest.mark.parametrize("total", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", [Memory, Service])
def test_regression_33_a_flood_of_made_up_keys(backend: type[Memory], total: int) -> None:
    cached = CachedBackend(backend(), ttl=3600, secret=SECRET)
    cached.lookup("nobody", HERE)
    for _ in range(1000):  # until the watcher, if any, has its first answer
        if cached.lookup("alice", HERE) and cached.peek("alice", HERE) == ALICE:
            break
        time.sleep(0.005)
    before = resident()
    for number in range(total):
        assert isinstance(cached.lookup(f"hk_live_{random.getrandbits(200):x}", HERE), Rejected)
        if number % 10_000 == 0:
            assert cached.peek("alice", HERE) == ALICE
    assert resident() - before < 20_000_000
    assert cached.peek("alice", HERE) == ALICE
    assert not cached._flights


def test_a_long_reason_is_cut(clock: Clock) -> None:
    service = Service()
    service.lookup = lambda *_: Rejected("x" * 100_000)  # type: ignore[method-assign]
    cached = CachedBackend(service, ttl=60, secret=SECRET)
    cached.lookup("bob", HERE)
    assert cached.peek("bob", HERE) == Rejected("x" * cache.MAX_REASON)


def test_an_entry_ends_with_its_ttl(clock: Clock) -> None:
    cached = CachedBackend(Service(), ttl=60, negative_ttl=5, secret=SECRET, timer=clock)
    cached.lookup("alice", HERE)
    cached.lookup("bob", HERE)
    clock.now += 4.4
    assert cached.peek("bob", HERE) == Rejected("unknown")
    clock.now += 0.6
    assert cached.peek("bob", HERE) is None
    clock.now += 48.9
    assert cached.peek("alice", HERE) == ALICE
    clock.now += 6.1
    assert cached.peek("alice", HERE) is None


def test_entries_of_one_moment_end_at_different_ones(clock: Clock) -> None:
    service = Service()
    cached = CachedBackend(service, ttl=60, secret=SECRET, timer=clock)
    for number in range(200):
        service.known[str(number)] = ALICE
        cached.lookup(str(number), HERE)
    clock.now += 57
    assert 20 < sum(cached.peek(str(number), HERE) is not None for number in range(200)) < 180


def test_one_question_for_each_ttl(clock: Clock) -> None:
    service = Service()
    cached = CachedBackend(service, ttl=60, secret=SECRET, timer=clock)
    for _ in range(10_000):
        assert cached.lookup("alice", HERE) == ALICE
        clock.now += 0.06  # 600 seconds in all
    assert 10 <= service.lookups <= 12


def test_a_slow_answer_counts_from_the_question(clock: Clock) -> None:
    service = Service()
    answer_now = service.lookup

    def slow(key: str, address: str) -> Principal | Rejected:
        clock.now += 50
        return answer_now(key, address)

    service.lookup = slow  # type: ignore[method-assign]
    cached = CachedBackend(service, ttl=60, secret=SECRET, timer=clock)
    cached.lookup("alice", HERE)
    clock.now += 10
    assert cached.peek("alice", HERE) is None


# What an entry is found by


def test_regression_28_the_cache_holds_no_key(cached: CachedBackend) -> None:
    cached.lookup("alice", HERE)
    cached.lookup("bob", HERE)
    held = {*cached._known, *cached._rejected}
    alice, bob, nobody = (
        hmac.digest(SECRET, b"memory\0" + key, "sha256") for key in (b"alice", b"bob", b"nobody")
    )
    # The first lookup, of nobody, is kept only if the watcher had its first answer by then.
    assert held - {nobody} == {alice, bob}


@pytest.mark.parametrize("secret", [b"x", b"x" * 64, b"x" * 65, b"x" * 1000])
def test_the_digest_is_an_hmac(secret: bytes) -> None:
    cached = CachedBackend(Service(), ttl=60, secret=secret, namespace="https://auth.example")
    expected = b"service\0https://auth.example\0key\0" + HERE.encode()
    assert cached._digest("key", HERE) == hmac.digest(secret, expected, hashlib.sha256)


def test_an_empty_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="secret"):
        CachedBackend(Service(), ttl=60, secret=b"")


def test_regression_29_an_answer_holds_for_its_address() -> None:
    service = Service()
    cached = CachedBackend(service, ttl=60, secret=SECRET)
    cached.lookup("alice", HERE)
    assert cached.peek("alice", "192.0.2.2") is None
    cached.lookup("alice", "192.0.2.2")
    assert service.lookups == 2


def test_where_the_address_does_not_matter_it_costs_nothing(
    cached: CachedBackend, memory: Memory
) -> None:
    cached.lookup("alice", HERE)
    assert cached.peek("alice", "192.0.2.2") == ALICE


# One question at a time


class Slow(Service):
    """One that answers when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.release = threading.Event(), threading.Event()

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        self.asked.set()
        assert self.release.wait(10)
        return super().lookup(key, address)


class SlowStore(Slow):
    """The same, and one that tells of changes."""

    watched = True


def waiting(cached: CachedBackend, service: Slow, count: int) -> list[object]:
    """The outcomes of `count` lookups of one key, all of which began before the answer."""
    started = threading.Semaphore(0)

    def lookup() -> object:
        started.release()
        try:
            return cached.lookup("alice", HERE)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as threads:
        outcomes = [threads.submit(lookup) for _ in range(count)]
        for _ in range(count):
            assert started.acquire(timeout=10)
        assert service.asked.wait(10)
        service.release.set()
        return [outcome.result(10) for outcome in outcomes]


def test_200_lookups_of_one_key_are_one_question() -> None:
    service = Slow()
    cached = CachedBackend(service, ttl=60, secret=SECRET)
    assert waiting(cached, service, 200) == [ALICE] * 200
    assert service.lookups == 1
    assert not cached._flights


@pytest.mark.parametrize("failure", [Throttled("slow down", retry_after=3), RuntimeError("a bug")])
def test_those_who_wait_share_a_failure(failure: Exception) -> None:
    service = Slow()
    service.failure = failure
    cached = CachedBackend(service, ttl=60, secret=SECRET)
    # Who begins only after the failure asks anew, so there may be more questions than one.
    outcomes = waiting(cached, service, 20)
    assert {type(outcome) for outcome in outcomes} <= {type(failure), BackendUnavailable}
    assert failure in outcomes
    assert not cached._flights


def test_errors_are_not_kept() -> None:
    service = Service()
    cached = CachedBackend(service, ttl=60, secret=SECRET)
    service.failure = BackendUnavailable("down")
    assert raising(lambda: cached.lookup("alice", HERE)) < 1
    assert cached.peek("alice", HERE) is None
    service.failure = None
    assert cached.lookup("alice", HERE) == ALICE


def test_waiting_for_another_lookup_is_bounded() -> None:
    service = Slow()
    cached = CachedBackend(service, ttl=60, secret=SECRET, timeout=-0.95)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(cached.lookup, "alice", HERE)
        assert service.asked.wait(10)
        assert 0.04 < raising(lambda: cached.lookup("alice", HERE)) < 5
        service.release.set()
        assert first.result(10) == ALICE


def test_the_end_of_one_thread_is_not_that_of_those_who_wait() -> None:
    service = Slow()
    service.failure = KeyboardInterrupt()  # type: ignore[assignment]
    cached = CachedBackend(service, ttl=60, secret=SECRET)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cached.lookup, "alice", HERE)
        assert service.asked.wait(10)
        (flight,) = cached._flights.values()
        service.release.set()
        assert isinstance(first.exception(10), KeyboardInterrupt)
        assert isinstance(flight.answer.exception(10), BackendUnavailable)


@pytest.mark.parametrize(("backend", "bound"), [(Slow, 21), (SlowStore, cache.MAX_UNCONFIRMED)])
def test_nobody_joins_a_question_that_has_taken_too_long(
    clock: Clock, backend: type[Slow], bound: float
) -> None:
    """Its answer may never come, or be from before a revocation that nobody could be told of."""
    stuck = backend()
    cached = CachedBackend(stuck, ttl=60, secret=SECRET, timeout=20, timer=clock)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cached.lookup, "alice", HERE)
        assert stuck.asked.wait(10)
        clock.now += bound + 0.1
        stuck.asked.clear()
        second = threads.submit(cached.lookup, "alice", HERE)
        assert stuck.asked.wait(10), "the second one did not ask"
        stuck.release.set()
        assert first.result(10) == second.result(10) == ALICE
    assert not cached._flights
    assert stuck.lookups == 2


# Outages

TTL, STALE = 60, 600


@pytest.mark.parametrize(
    ("stale_if_error", "age", "served"),
    [
        (0, TTL * 0.5, True),
        (0, TTL + 1, False),
        (STALE, TTL * 0.5, True),
        (STALE, TTL + 1, True),
        (STALE, (TTL + STALE) * 0.98, True),
        (STALE, TTL + STALE + 1, False),
    ],
)
def test_stale_if_error(clock: Clock, stale_if_error: float, age: float, served: bool) -> None:
    service = Service()
    cached = CachedBackend(
        service, ttl=TTL, stale_if_error=stale_if_error, secret=SECRET, timer=clock
    )
    cached.lookup("alice", HERE)
    clock.now += age
    service.failure = BackendUnavailable("down")
    for _ in range(20):  # also once the breaker is open
        if served:
            assert cached.lookup("alice", HERE) == ALICE
        else:
            with pytest.raises(BackendUnavailable):
                cached.lookup("alice", HERE)
        with pytest.raises(BackendUnavailable):
            cached.lookup("bob", HERE)
        with pytest.raises(BackendUnavailable):
            cached.lookup("alice", "192.0.2.2")
    service.failure = None
    clock.now += 1
    assert cached.lookup("alice", HERE) == ALICE
    assert cached.peek("alice", HERE) == ALICE


def test_what_was_rejected_is_not_served_stale(clock: Clock) -> None:
    service = Service()
    cached = CachedBackend(service, ttl=TTL, stale_if_error=STALE, secret=SECRET, timer=clock)
    cached.lookup("alice", HERE)
    clock.now += TTL + 1
    del service.known["alice"]
    assert cached.lookup("alice", HERE) == Rejected("unknown")
    clock.now += 6
    service.failure = BackendUnavailable("down")
    with pytest.raises(BackendUnavailable):
        cached.lookup("alice", HERE)


def test_a_bug_in_a_backend_is_not_an_outage(clock: Clock) -> None:
    service = Service()
    cached = CachedBackend(service, ttl=TTL, stale_if_error=STALE, secret=SECRET, timer=clock)
    cached.lookup("alice", HERE)
    clock.now += TTL + 1
    service.failure = RuntimeError("a bug")
    with pytest.raises(RuntimeError):
        cached.lookup("alice", HERE)


def test_a_watched_backend_may_serve_stale_too(memory: Memory) -> None:
    cached = CachedBackend(memory, ttl=60, stale_if_error=600, secret=SECRET)
    cached.lookup("nobody", HERE)
    memory.wait()
    cached.lookup("alice", HERE)
    cached._confirmed = float("-inf")
    memory.failure = BackendUnavailable("down")
    assert cached.lookup("alice", HERE) == ALICE
    memory.failure = None
    memory.number += 1
    memory.wait()
    memory.failure = BackendUnavailable("down")
    with pytest.raises(BackendUnavailable):
        cached.lookup("alice", HERE)


def test_an_outage_costs_no_wait_and_ends_within_two_seconds(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service()
    cached = CachedBackend(service, ttl=60, secret=SECRET, timer=clock)
    service.failure = BackendUnavailable("no route to host")
    with caplog.at_level(logging.WARNING):
        for number in range(100):
            with pytest.raises(BackendUnavailable):
                cached.lookup(str(number), HERE)
    assert service.lookups == 5
    # Other tests' watchers may still have something to say, in their module's name.
    logged = [record for record in caplog.records if record.name == guarded.__name__]
    assert [record.getMessage() for record in logged] == [
        "service is left alone, as it keeps failing: no route to host"
    ]
    assert min(raising(lambda: cached.lookup("alice", HERE)) for _ in range(100)) < 0.001
    clock.now += guarded.COOL_DOWN
    assert raising(lambda: cached.lookup("alice", HERE)) < 1  # the probe
    assert service.lookups == 6
    service.failure = None
    with pytest.raises(BackendUnavailable):
        cached.lookup("alice", HERE)
    clock.now += guarded.COOL_DOWN
    assert cached.lookup("alice", HERE) == ALICE
    assert guarded.COOL_DOWN <= 1


def test_while_the_probe_is_under_way_nobody_waits() -> None:
    clock = Clock()
    service = Slow()
    service.release.set()
    cached = CachedBackend(service, ttl=60, secret=SECRET, timer=clock)
    service.failure = BackendUnavailable("down")
    for number in range(5):
        with pytest.raises(BackendUnavailable):
            cached.lookup(str(number), HERE)
    clock.now += guarded.COOL_DOWN
    service.failure = None
    service.asked.clear()
    service.release.clear()
    with ThreadPoolExecutor(1) as threads:
        probe = threads.submit(cached.lookup, "alice", HERE)
        assert service.asked.wait(10)
        assert all(raising(lambda: cached.lookup("bob", HERE)) < 0.3 for _ in range(10))
        service.release.set()
        assert probe.result(10) == ALICE
    assert cached.lookup("bob", HERE) == Rejected("unknown")


@pytest.mark.parametrize("failure", [Throttled("too many"), NoVerdict("403: suspended")])
def test_a_key_that_ended_is_not_served_stale_because_it_is_answered_otherwise(
    clock: Clock, failure: BackendUnavailable
) -> None:
    service = Service()
    cached = CachedBackend(service, ttl=TTL, stale_if_error=STALE, secret=SECRET, timer=clock)
    cached.lookup("alice", HERE)
    clock.now += TTL + 1
    service.failure = failure
    with pytest.raises(type(failure)):
        cached.lookup("alice", HERE)


@pytest.mark.parametrize("failure", [Throttled("slow down", retry_after=3), NoVerdict("422")])
def test_an_authority_that_answers_is_not_left_alone(failure: BackendUnavailable) -> None:
    service = Service()
    cached = CachedBackend(service, ttl=60, secret=SECRET)
    service.failure = failure
    for number in range(20):
        with pytest.raises(type(failure)):
            cached.lookup(str(number), HERE)
    service.failure = None
    assert cached.lookup("alice", HERE) == ALICE


@pytest.mark.parametrize("first", [None, Throttled("slow down"), NoVerdict("422")])
def test_the_gauge_of_outages_falls_with_the_first_answer(
    clock: Clock, first: BackendUnavailable | None
) -> None:
    def gauge() -> float | None:
        return REGISTRY.get_sample_value("hokusai_auth_breaker_open", {"authority": "service"})

    service = Service()
    cached = CachedBackend(service, ttl=60, secret=SECRET, timer=clock)
    service.failure = BackendUnavailable("down")
    for number in range(5):
        raising(lambda number=number: cached.lookup(str(number), HERE))  # type: ignore[misc]
    assert gauge() == 1
    clock.now += guarded.COOL_DOWN
    service.failure = first
    with contextlib.suppress(BackendUnavailable):
        cached.lookup("alice", HERE)
    assert gauge() == 0


def test_a_slow_backend_s_probe_counts(clock: Clock) -> None:
    """As slow as the operator says it may be."""

    class Tired(Service):
        def lookup(self, key: str, address: str) -> Principal | Rejected:
            clock.now += 19
            return super().lookup(key, address)

    service = Tired()
    cached = CachedBackend(service, ttl=60, secret=SECRET, timeout=20, timer=clock)
    service.failure = BackendUnavailable("down")
    for number in range(5):
        raising(lambda number=number: cached.lookup(str(number), HERE))  # type: ignore[misc]
    clock.now += guarded.COOL_DOWN
    service.failure = None
    cached.lookup("alice", HERE)
    assert cached._backend._breaker.closed


def test_hits_and_misses_are_told_apart_where_nobody_peeks_first() -> None:
    """As for a limited key, of which Redis must be asked."""

    def counted(result: str) -> float:
        return (
            REGISTRY.get_sample_value(
                "hokusai_auth_cache_total", {"authority": "service", "result": result}
            )
            or 0.0
        )

    cached = CachedBackend(Service(), ttl=60, secret=SECRET)
    hits, misses = counted("hit"), counted("miss")
    for _ in range(10):
        cached.lookup("alice", HERE)
    cached.lookup("bob", HERE)
    assert (counted("hit") - hits, counted("miss") - misses) == (9, 2)

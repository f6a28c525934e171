"""The cache: which keys cost no lookup, what a change removes, and how long an outage delays."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from mlflow_hokusai_auth.authorities import breaker, cache
from mlflow_hokusai_auth.authorities.cache import CachedBackend
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable, Throttled, UnusableReply
from mlflow_hokusai_auth.core.types import Principal, Rejected
from tests.store.conftest import LONG

ALICE = Principal("key_a", "alice", frozenset({"mlflow:read"}))
REVOKED = replace(ALICE, revoked_at=1.0)
HERE = "192.0.2.1"
SECRET = b"a secret of the servers"
DOWN = AuthorityUnavailable("down")
TTL, STALE = 60, 600


class Clock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Memory:
    """A backend in memory that counts its lookups, and whose answers the tests change."""

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

    def change(self, key: str, answer: Principal) -> None:
        """Give this answer for `key` from now on, and wait until the watcher has seen the change."""
        self.known[key] = answer
        self.number += 1
        self.wait()

    def wait(self) -> None:
        """Wait until the watcher has read the generation twice, as one reading may be under way."""
        while self.polled.acquire(blocking=False):
            pass
        for _ in range(2):
            assert self.polled.acquire(timeout=LONG)


class Service(Memory):
    """A backend that is not watched, and whose answers hold for one address."""

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
def cached(memory: Memory, clock: Clock) -> CachedBackend:
    cached = CachedBackend(memory, ttl=60, secret=SECRET, timer=clock)
    cached.lookup("nobody", HERE)  # The first lookup starts the watcher.
    memory.wait()
    return cached


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def kept(service: Service, clock: Clock) -> CachedBackend:
    """A cache in front of `service`, for a minute, and for ten more in an outage."""
    return CachedBackend(service, ttl=TTL, stale_if_error=STALE, secret=SECRET, timer=clock)


def resident() -> int:
    """Return the bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def fails(
    cached: CachedBackend, *names: str, error: type[Exception] = AuthorityUnavailable
) -> None:
    """Look up these keys; each lookup must fail."""
    for name in names:
        with pytest.raises(error):
            cached.lookup(name, HERE)


#: As many lookups that fail as it takes to leave a backend alone.
ENOUGH = [str(number) for number in range(5)]


# A watched backend


def test_known_key_costs_no_lookup(cached: CachedBackend, memory: Memory) -> None:
    assert cached.peek("alice", HERE) is None
    assert cached.lookup("alice", HERE) == ALICE
    asked = memory.lookups
    assert [cached.peek("alice", HERE) for _ in range(100)] == [ALICE] * 100
    assert [cached.lookup("alice", HERE) for _ in range(100)] == [ALICE] * 100
    assert memory.lookups == asked


def test_an_unknown_key_is_remembered_until_a_change(cached: CachedBackend, memory: Memory) -> None:
    assert cached.lookup("bob", HERE) == Rejected("unknown")
    assert cached.peek("bob", HERE) == Rejected("unknown")
    memory.change("bob", ALICE)
    assert cached.peek("bob", HERE) is None
    assert cached.lookup("bob", HERE) == ALICE


def test_a_change_empties_the_cache(cached: CachedBackend, memory: Memory) -> None:
    cached.lookup("alice", HERE)
    memory.change("alice", REVOKED)
    assert cached.peek("alice", HERE) is None
    assert cached.lookup("alice", HERE) == REVOKED


def test_an_answer_from_before_a_change_is_not_kept(cached: CachedBackend, memory: Memory) -> None:
    slow_lookup = memory.lookup

    def overtaken(key: str, address: str) -> Principal | Rejected:
        answer = slow_lookup(key, address)
        memory.change("alice", REVOKED)
        return answer

    memory.lookup = overtaken  # type: ignore[method-assign]
    assert cached.lookup("alice", HERE) == ALICE
    assert cached.peek("alice", HERE) is None


def test_lookup_from_before_a_change_is_not_joined(cached: CachedBackend, memory: Memory) -> None:
    asked, release = threading.Event(), threading.Event()
    answer_now = memory.lookup

    def slow(key: str, address: str) -> Principal | Rejected:
        answer = answer_now(key, address)
        asked.set()
        assert release.wait(LONG)
        return answer

    memory.lookup = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as threads:
        before = threads.submit(cached.lookup, "alice", HERE)
        assert asked.wait(LONG)
        memory.lookup = answer_now  # type: ignore[method-assign]
        memory.change("alice", REVOKED)
        assert cached.lookup("alice", HERE) == REVOKED
        release.set()
        assert before.result(LONG) == ALICE
    assert cached.peek("alice", HERE) == REVOKED


def test_entries_are_not_used_while_the_backend_is_unavailable(
    cached: CachedBackend, memory: Memory, clock: Clock
) -> None:
    cached.lookup("alice", HERE)
    memory.failure = DOWN
    memory.wait()
    clock.now += cache.MAX_UNCONFIRMED - 0.01
    memory.wait()
    assert cached.peek("alice", HERE) == ALICE
    clock.now += 0.02
    assert cached.peek("alice", HERE) is None
    fails(cached, "alice")
    memory.failure = None
    memory.wait()
    assert cached.peek("alice", HERE) == ALICE


def test_the_bound_on_revocation_is_below_a_second() -> None:
    assert cache.MAX_UNCONFIRMED < 1
    assert cache.POLL < cache.MAX_UNCONFIRMED / 3


def test_watcher_starts_for_a_watched_backend_only(kept: CachedBackend) -> None:
    kept.lookup("alice", HERE)
    assert kept._watcher is None
    assert kept.peek("alice", HERE) == ALICE


# Bounds


def test_the_cache_is_bounded(service: Service) -> None:
    small = CachedBackend(service, ttl=60, secret=SECRET, size=10, negative_size=20)
    for number in range(100):
        service.known[str(number)] = ALICE
        small.lookup(str(number), HERE)
        small.lookup(f"not {number}", HERE)
    assert sum(small.peek(str(number), HERE) is not None for number in range(100)) == 10
    assert sum(small.peek(f"not {number}", HERE) is not None for number in range(100)) == 20


@pytest.mark.parametrize("total", [50_000, pytest.param(1_000_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("backend", [Memory, Service])
def test_regression_33_a_flood_of_made_up_keys(
    clock: Clock, backend: type[Memory], total: int
) -> None:
    told = backend()
    cached = CachedBackend(told, ttl=3600, secret=SECRET, timer=clock)
    cached.lookup("nobody", HERE)
    if told.watched:
        told.wait()
    assert cached.lookup("alice", HERE) == cached.peek("alice", HERE) == ALICE
    before = resident()
    for number in range(total):
        assert isinstance(cached.lookup(f"hk_live_{random.getrandbits(200):x}", HERE), Rejected)
        if number % 10_000 == 0:
            assert cached.peek("alice", HERE) == ALICE
    assert resident() - before < 20_000_000
    assert cached.peek("alice", HERE) == ALICE
    assert len(cached._rejected) == 10_000 and not cached._flights


def test_a_long_reason_is_cut(kept: CachedBackend, service: Service) -> None:
    service.lookup = lambda *_: Rejected("x" * 100_000)  # type: ignore[method-assign]
    kept.lookup("bob", HERE)
    assert kept.peek("bob", HERE) == Rejected("x" * cache.MAX_REASON)


def test_an_entry_ends_with_its_ttl(kept: CachedBackend, clock: Clock) -> None:
    kept.lookup("alice", HERE)
    kept.lookup("bob", HERE)
    for later, key, answer in (
        (4.4, "bob", Rejected("unknown")),
        (0.6, "bob", None),
        (48.9, "alice", ALICE),
        (6.1, "alice", None),
    ):
        clock.now += later
        assert kept.peek(key, HERE) == answer


def test_entries_made_at_one_moment_expire_at_different_ones(
    kept: CachedBackend, service: Service, clock: Clock
) -> None:
    for number in range(200):
        service.known[str(number)] = ALICE
        kept.lookup(str(number), HERE)
    clock.now += 57
    assert 20 < sum(kept.peek(str(number), HERE) is not None for number in range(200)) < 180


def test_key_is_looked_up_once_in_each_ttl(
    kept: CachedBackend, service: Service, clock: Clock
) -> None:
    for _ in range(10_000):
        assert kept.lookup("alice", HERE) == ALICE
        clock.now += 0.06  # 10,000 times: 600 seconds.
    assert 10 <= service.lookups <= 12


class Tired(Service):
    """A backend whose answers take some seconds."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        self.clock.now += self.seconds
        return super().lookup(key, address)


def test_ttl_of_a_slow_answer_starts_before_the_lookup(clock: Clock) -> None:
    cached = CachedBackend(Tired(clock, 50), ttl=60, secret=SECRET, timer=clock)
    cached.lookup("alice", HERE)
    clock.now += 10
    assert cached.peek("alice", HERE) is None


# The digest


def test_regression_28_the_cache_holds_no_key(cached: CachedBackend) -> None:
    cached.lookup("alice", HERE)
    cached.lookup("bob", HERE)
    held = {*cached._known, *cached._rejected}
    alice, bob, nobody = (
        hashlib.blake2b(b"memory\0" + key, key=SECRET, digest_size=32).digest()
        for key in (b"alice", b"bob", b"nobody")
    )
    # The first lookup, of "nobody", is kept only if the watcher has read the generation by then.
    assert held - {nobody} == {alice, bob}


def test_digest_is_a_keyed_blake2b() -> None:
    text = b"service\0https://auth.example\0key\0" + HERE.encode()
    for secret in (b"x", b"x" * 64, b"x" * 65, b"x" * 1000):
        key = secret if len(secret) <= 64 else hashlib.blake2b(secret).digest()
        cached = CachedBackend(Service(), ttl=60, secret=secret, namespace="https://auth.example")
        expected = hashlib.blake2b(text, key=key, digest_size=32).digest()
        assert cached._digest("key", HERE) == expected


def test_an_empty_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="secret"):
        CachedBackend(Service(), ttl=60, secret=b"")


def test_regression_29_an_answer_holds_for_its_address(
    kept: CachedBackend, service: Service
) -> None:
    kept.lookup("alice", HERE)
    assert kept.peek("alice", "192.0.2.2") is None
    kept.lookup("alice", "192.0.2.2")
    assert service.lookups == 2


def test_answers_without_an_address_are_shared_by_all_addresses(
    cached: CachedBackend, memory: Memory
) -> None:
    cached.lookup("alice", HERE)
    assert cached.peek("alice", "192.0.2.2") == ALICE


# One lookup at a time


class Slow(Service):
    """A backend that answers when the test permits it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.release = threading.Event(), threading.Event()

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        self.asked.set()
        assert self.release.wait(LONG)
        return super().lookup(key, address)


class SlowStore(Slow):
    """The same as a watched backend."""

    watched = True


def waiting(cached: CachedBackend, service: Slow, count: int) -> list[object]:
    """Return the outcomes of `count` lookups of one key, which all began before the answer."""
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
            assert started.acquire(timeout=LONG)
        assert service.asked.wait(LONG)
        service.release.set()
        return [outcome.result(LONG) for outcome in outcomes]


def test_200_lookups_of_one_key_reach_the_backend_once() -> None:
    service = Slow()
    cached = CachedBackend(service, ttl=60, secret=SECRET)
    assert waiting(cached, service, 200) == [ALICE] * 200
    assert service.lookups == 1
    assert not cached._flights


@pytest.mark.parametrize("failure", [Throttled("slow down", retry_after=3), RuntimeError("a bug")])
def test_waiting_lookups_share_a_failure(failure: Exception) -> None:
    service = Slow()
    service.failure = failure
    cached = CachedBackend(service, ttl=60, secret=SECRET)
    # A lookup that begins after the failure reaches the backend again.
    outcomes = waiting(cached, service, 20)
    assert {type(outcome) for outcome in outcomes} <= {type(failure), AuthorityUnavailable}
    assert failure in outcomes
    assert not cached._flights


def test_errors_are_not_kept(kept: CachedBackend, service: Service) -> None:
    service.failure = DOWN
    fails(kept, "alice")
    assert kept.peek("alice", HERE) is None
    service.failure = None
    assert kept.lookup("alice", HERE) == ALICE


def test_waiting_for_another_lookup_is_bounded() -> None:
    service = Slow()
    cached = CachedBackend(service, ttl=60, secret=SECRET, timeout=-0.95)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(cached.lookup, "alice", HERE)
        assert service.asked.wait(LONG)
        with pytest.raises(AuthorityUnavailable, match="slow to answer"):
            cached.lookup("alice", HERE)
        service.release.set()
        assert first.result(LONG) == ALICE


def test_interrupt_of_one_thread_does_not_end_those_that_wait() -> None:
    service = Slow()
    service.failure = KeyboardInterrupt()  # type: ignore[assignment]
    cached = CachedBackend(service, ttl=60, secret=SECRET)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cached.lookup, "alice", HERE)
        assert service.asked.wait(LONG)
        (flight,) = cached._flights.values()
        service.release.set()
        assert isinstance(first.exception(LONG), KeyboardInterrupt)
        assert isinstance(flight.answer.exception(LONG), AuthorityUnavailable)


@pytest.mark.parametrize(("backend", "bound"), [(Slow, 21), (SlowStore, cache.MAX_UNCONFIRMED)])
def test_lookup_that_has_taken_too_long_is_not_joined(
    clock: Clock, backend: type[Slow], bound: float
) -> None:
    """Its answer may never come, or may be older than a revocation that is not noticed."""
    stuck = backend()
    cached = CachedBackend(stuck, ttl=60, secret=SECRET, timeout=20, timer=clock)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cached.lookup, "alice", HERE)
        assert stuck.asked.wait(LONG)
        clock.now += bound + 0.1
        stuck.asked.clear()
        second = threads.submit(cached.lookup, "alice", HERE)
        assert stuck.asked.wait(LONG), "the second one did not ask"
        stuck.release.set()
        assert first.result(LONG) == second.result(LONG) == ALICE
    assert not cached._flights
    assert stuck.lookups == 2


# Outages


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
def test_stale_if_error(
    clock: Clock, service: Service, stale_if_error: float, age: float, served: bool
) -> None:
    cached = CachedBackend(
        service, ttl=TTL, stale_if_error=stale_if_error, secret=SECRET, timer=clock
    )
    cached.lookup("alice", HERE)
    clock.now += age
    service.failure = DOWN
    for _ in range(20):  # The breaker opens in between.
        if served:
            assert cached.lookup("alice", HERE) == ALICE
        else:
            fails(cached, "alice")
        fails(cached, "bob")
        with pytest.raises(AuthorityUnavailable):
            cached.lookup("alice", "192.0.2.2")
    service.failure = None
    clock.now += 1
    assert cached.lookup("alice", HERE) == ALICE
    assert cached.peek("alice", HERE) == ALICE


def test_rejected_key_is_not_served_stale(
    kept: CachedBackend, service: Service, clock: Clock
) -> None:
    kept.lookup("alice", HERE)
    clock.now += TTL + 1
    del service.known["alice"]
    assert kept.lookup("alice", HERE) == Rejected("unknown")
    clock.now += 6
    service.failure = DOWN
    fails(kept, "alice")


@pytest.mark.parametrize(
    "failure", [RuntimeError("a bug"), Throttled("too many"), UnusableReply("403: suspended")]
)
def test_key_is_not_served_stale_after_a_429_or_an_unusable_reply(
    kept: CachedBackend, service: Service, clock: Clock, failure: Exception
) -> None:
    kept.lookup("alice", HERE)
    clock.now += TTL + 1
    service.failure = failure
    fails(kept, "alice", error=type(failure))


def test_a_watched_backend_may_serve_stale_too(memory: Memory, clock: Clock) -> None:
    cached = CachedBackend(memory, ttl=60, stale_if_error=600, secret=SECRET, timer=clock)
    cached.lookup("nobody", HERE)
    memory.wait()
    cached.lookup("alice", HERE)
    memory.failure = DOWN
    memory.wait()
    clock.now += cache.MAX_UNCONFIRMED + 0.1
    assert cached.lookup("alice", HERE) == ALICE
    memory.failure = None
    memory.change("alice", ALICE)
    memory.failure = DOWN
    fails(cached, "alice")


def test_an_outage_costs_no_wait_and_ends_within_two_seconds(
    kept: CachedBackend, service: Service, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    service.failure = AuthorityUnavailable("no route to host")
    with caplog.at_level(logging.WARNING):
        fails(kept, *map(str, range(100)), *["alice"] * 100)
    # No other lookup reached the backend, so none waited.
    assert service.lookups == 5
    # Watchers of other tests may still log, under their module's logger.
    logged = [record for record in caplog.records if record.name == breaker.__name__]
    assert [record.getMessage() for record in logged] == [
        "service keeps failing and gets no lookups for a second: no route to host"
    ]
    clock.now += breaker.COOL_DOWN
    fails(kept, "alice")  # This is the probe.
    assert service.lookups == 6
    service.failure = None
    fails(kept, "alice")
    clock.now += breaker.COOL_DOWN
    assert kept.lookup("alice", HERE) == ALICE
    assert breaker.COOL_DOWN <= 1


def test_lookups_do_not_wait_for_the_probe(clock: Clock) -> None:
    service = Slow()
    service.release.set()
    cached = CachedBackend(service, ttl=60, secret=SECRET, timer=clock)
    service.failure = DOWN
    fails(cached, *ENOUGH)
    clock.now += breaker.COOL_DOWN
    service.failure = None
    service.asked.clear()
    service.release.clear()
    with ThreadPoolExecutor(1) as threads:
        probe = threads.submit(cached.lookup, "alice", HERE)
        assert service.asked.wait(LONG)
        service.asked.clear()
        fails(cached, *["bob"] * 10)
        assert not service.asked.is_set()
        service.release.set()
        assert probe.result(LONG) == ALICE
    assert cached.lookup("bob", HERE) == Rejected("unknown")


@pytest.mark.parametrize("failure", [Throttled("slow down", retry_after=3), UnusableReply("422")])
def test_errors_of_one_key_do_not_open_the_breaker(
    kept: CachedBackend, service: Service, failure: AuthorityUnavailable
) -> None:
    service.failure = failure
    fails(kept, *map(str, range(20)), error=type(failure))
    service.failure = None
    assert kept.lookup("alice", HERE) == ALICE


@pytest.mark.parametrize("first", [None, Throttled("slow down"), UnusableReply("422")])
def test_the_gauge_of_outages_falls_with_the_first_answer(
    kept: CachedBackend, service: Service, clock: Clock, first: AuthorityUnavailable | None
) -> None:
    def gauge() -> float | None:
        return REGISTRY.get_sample_value("hokusai_auth_breaker_open", {"authority": "service"})

    service.failure = DOWN
    fails(kept, *ENOUGH)
    assert gauge() == 1
    clock.now += breaker.COOL_DOWN
    service.failure = first
    with contextlib.suppress(AuthorityUnavailable):
        kept.lookup("alice", HERE)
    assert gauge() == 0


def test_a_slow_backend_s_probe_counts(clock: Clock) -> None:
    """The probe takes as long as the timeout permits."""
    service = Tired(clock, 19)
    cached = CachedBackend(service, ttl=60, secret=SECRET, timeout=20, timer=clock)
    service.failure = DOWN
    fails(cached, *ENOUGH)
    clock.now += breaker.COOL_DOWN
    service.failure = None
    cached.lookup("alice", HERE)
    assert cached._backend._breaker.closed


def test_hits_and_misses_are_counted_without_a_peek_first(kept: CachedBackend) -> None:
    """A key with a rate limit gets no peek, as its count is in Redis."""

    def counted(result: str) -> float:
        labels = {"authority": "service", "result": result}
        return REGISTRY.get_sample_value("hokusai_auth_cache_total", labels) or 0.0

    hits, misses = counted("hit"), counted("miss")
    for key in ["alice"] * 10 + ["bob"]:
        kept.lookup(key, HERE)
    assert (counted("hit") - hits, counted("miss") - misses) == (9, 2)

"""The cache: what costs no question, and what never outlives a change."""

from __future__ import annotations

import threading

import pytest

from mlflow_hokusai_auth.backends import BackendUnavailable, cache
from mlflow_hokusai_auth.backends.cache import CachedBackend
from mlflow_hokusai_auth.core.types import Principal

ALICE = Principal("key_a", "alice", frozenset({"mlflow:read"}))
REVOKED = Principal("key_a", "alice", frozenset({"mlflow:read"}), revoked_at=1.0)


class Authority:
    """A backend in memory that counts, and whose answers the tests change."""

    def __init__(self) -> None:
        self.known = {"alice": ALICE}
        self.number = 0
        self.lookups = 0
        self.down = False
        #: Released each time the generation was asked for, after its answer.
        self.polled = threading.Semaphore(0)

    def lookup(self, key: str) -> Principal | None:
        self.lookups += 1
        if self.down:
            raise BackendUnavailable("down")
        return self.known.get(key)

    def generation(self) -> int:
        self.polled.release()
        if self.down:
            raise BackendUnavailable("down")
        return self.number

    def wait(self, polls: int = 2) -> None:
        """Until answers of the generation from now on were taken in: two, as one may be under way."""
        while self.polled.acquire(blocking=False):
            pass
        for _ in range(polls):
            assert self.polled.acquire(timeout=10)


@pytest.fixture
def authority(monkeypatch: pytest.MonkeyPatch) -> Authority:
    monkeypatch.setattr(cache, "POLL", 0.005)
    return Authority()


@pytest.fixture
def cached(authority: Authority) -> CachedBackend:
    cached = CachedBackend(authority, ttl=60)
    cached.lookup("nobody")  # the first lookup starts the watcher
    authority.wait()
    return cached


def test_a_known_key_costs_no_question(cached: CachedBackend, authority: Authority) -> None:
    assert cached.peek("alice") is None
    assert cached.lookup("alice") == ALICE
    asked = authority.lookups
    assert [cached.peek("alice") for _ in range(100)] == [ALICE] * 100
    assert authority.lookups == asked


def test_an_unknown_key_is_not_remembered(cached: CachedBackend) -> None:
    assert cached.lookup("bob") is None
    assert cached.peek("bob") is None


def test_a_change_empties_the_cache(cached: CachedBackend, authority: Authority) -> None:
    cached.lookup("alice")
    authority.known["alice"] = REVOKED
    authority.number += 1
    authority.wait()
    assert cached.peek("alice") is None
    assert cached.lookup("alice") == REVOKED


def test_an_answer_from_before_a_change_is_not_kept(
    cached: CachedBackend, authority: Authority
) -> None:
    slow_lookup = authority.lookup

    def overtaken(key: str) -> Principal | None:
        answer = slow_lookup(key)
        authority.known["alice"] = REVOKED
        authority.number += 1
        authority.wait()
        return answer

    authority.lookup = overtaken  # type: ignore[method-assign]
    assert cached.lookup("alice") == ALICE
    assert cached.peek("alice") is None


def test_entries_stop_counting_when_the_authority_can_not_be_asked(
    cached: CachedBackend, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached.lookup("alice")
    monkeypatch.setattr(cache, "MAX_UNCONFIRMED", 0.05)
    authority.down = True
    for _ in range(100):
        authority.wait()
        if cached.peek("alice") is None:
            break
    assert cached.peek("alice") is None
    with pytest.raises(BackendUnavailable):
        cached.lookup("alice")
    authority.down = False
    authority.wait()
    assert cached.peek("alice") == ALICE


def test_the_bound_on_revocation_is_below_a_second() -> None:
    assert cache.MAX_UNCONFIRMED < 1
    assert cache.POLL < cache.MAX_UNCONFIRMED / 3


def test_the_cache_is_bounded(authority: Authority) -> None:
    small = CachedBackend(authority, ttl=60, size=10)
    small.lookup("alice")
    authority.wait()
    for number in range(100):
        authority.known[str(number)] = ALICE
        small.lookup(str(number))
    assert sum(small.peek(str(number)) is not None for number in range(100)) == 10


def test_an_entry_ends_with_its_ttl(authority: Authority) -> None:
    brief = CachedBackend(authority, ttl=1e-6)
    brief.lookup("alice")
    authority.wait()
    brief.lookup("alice")
    assert brief.peek("alice") is None


def test_the_cache_holds_no_key(cached: CachedBackend) -> None:
    cached.lookup("alice")
    assert "alice" not in list(cached._entries)
    assert all(len(entry) == 64 for entry in cached._entries)

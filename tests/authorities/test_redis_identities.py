"""The principals that servers share through Redis; a failing Redis changes only the hit rate."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest

redis = pytest.importorskip("redis")

from mlflow_hokusai_auth.authorities import breaker, redis_client, redis_identities  # noqa: E402
from mlflow_hokusai_auth.authorities.cache import CachedBackend  # noqa: E402
from mlflow_hokusai_auth.authorities.redis_identities import SharedCache  # noqa: E402
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable  # noqa: E402
from mlflow_hokusai_auth.core.types import Principal, Rejected  # noqa: E402
from tests.authorities.test_cache import (  # noqa: E402
    ALICE,
    HERE,
    SECRET,
    Clock,
    Memory,
    Service,
)
from tests.authorities.test_service import certificate  # noqa: E402, F401 - a fixture
from tests.conftest import redis_server  # noqa: E402
from tests.harness import free_port  # noqa: E402
from tests.store.conftest import LONG  # noqa: E402

DIGEST = bytes(range(32))
FULL = Principal(
    key_id="key_a",
    owner="älice",
    scopes=frozenset({"a", "b"}),
    expires_at=2e9,
    revoked_at=3e9,
    email="a@example.com",
    roles=frozenset({"r"}),
    is_admin=True,
    networks=("192.0.2.0/24", "::1"),
    rate_limit_per_hour=5,
    deprecated_at=1e9,
    owner_id="ü-7",
    models=("acme-*", "é"),
    no_delete=True,
    source="github:acme/models@0#1",
)
BUDGET = 0.1


@pytest.fixture
def cache(redis_url: str) -> SharedCache:
    return SharedCache(redis_url, max_age=3600, budget=LONG)


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"


def settle(cache: SharedCache) -> None:
    """Wait until all background operations have ended."""
    for _ in range(redis_client._MAX_PENDING):
        assert cache._operations._pending.acquire(timeout=LONG)
    cache._operations._pending.release(redis_client._MAX_PENDING)


def entries(url: str) -> dict[bytes, bytes]:
    with redis.Redis.from_url(url) as client:
        client_any: Any = client
        return {name: client_any.get(name) for name in client_any.scan_iter()}


def waits(cache: SharedCache) -> list[float | None]:
    """Record the longest wait for an operation of `cache` from now on, in seconds."""
    found: list[float | None] = []
    submit = cache._operations._workers.submit

    def watched(operation: Any) -> Any:
        started: Any = submit(operation)
        result = started.result
        started.result = lambda timeout=None: found.append(timeout) or result(timeout)
        return started

    cache._operations._workers.submit = watched  # type: ignore[assignment]
    return found


def served_by(service: Service, cache: SharedCache, **options: Any) -> CachedBackend:
    return CachedBackend(service, **{"ttl": 60, "secret": SECRET, "shared": cache, **options})


# With a Redis


def test_principal_comes_back_unchanged(cache: SharedCache) -> None:
    for number, principal in enumerate((ALICE, FULL, replace(ALICE, revoked_at=1.5))):
        digest = bytes([number]) + DIGEST
        assert cache.get(digest) is None
        cache.put(digest, principal, 3600)
        settle(cache)
        found = cache.get(digest)
        assert found is not None and found[0] == principal
        assert 3000 < found[1] <= 3600
        assert cache.get(digest[::-1]) is None
        cache.forget(digest)
        settle(cache)
        assert cache.get(digest) is None


def test_entry_of_another_form_is_not_read(cache: SharedCache, redis_url: str) -> None:
    # A server of the version before would leave out fields that this one needs: a new field of a
    # principal takes a new number in the prefix, and a value of its own in FULL.
    assert (redis_identities._PREFIX, len(fields(Principal))) == ("hokusai-auth:6:", 15)
    usual = {field.default for field in fields(Principal)} - {MISSING}
    assert usual.isdisjoint(getattr(FULL, field.name) for field in fields(Principal))
    name, value = (
        redis_identities._name(DIGEST),
        redis_identities._encode(DIGEST, ALICE, time.time()),
    )
    with redis.Redis.from_url(redis_url) as client:
        client.set(name.replace(":6:", ":5:"), value, ex=60)
        assert cache.get(DIGEST) is None
        client.set(name, value, ex=60)
    found = cache.get(DIGEST)
    assert found is not None and found[0] == ALICE


def test_an_entry_is_kept_for_its_ttl_only(cache: SharedCache, redis_url: str) -> None:
    for ttl in (0.0004, 0, -1):
        cache.put(DIGEST, ALICE, ttl)
        settle(cache)
        assert cache.get(DIGEST) is None
    cache.put(DIGEST, ALICE, 60)
    settle(cache)
    with redis.Redis.from_url(redis_url) as client:
        client.persist(redis_identities._name(DIGEST))  # Only another client does that.
    assert cache.get(DIGEST) is None


def test_forged_entry_is_ignored(cache: SharedCache, redis_url: str) -> None:
    cache.put(DIGEST, ALICE, 60)
    settle(cache)
    ((name, value),) = entries(redis_url).items()
    with redis.Redis.from_url(redis_url) as client:
        for forged in (
            value.replace(b"mlflow:read", b"mlflow:full"),
            value[:32],
            b"",
            redis_identities._encode(bytes(32), ALICE, time.time()),
        ):
            client.set(name, forged, px=60_000)
            assert cache.get(DIGEST) is None
        client.set(name, value, px=60_000)
        assert cache.get(DIGEST) is not None


def test_entry_that_is_written_back_is_valid_no_longer_than_before(redis_url: str) -> None:
    wall, timer, service = Clock(), Clock(), Service()

    def server(**clocks: Any) -> CachedBackend:
        shared = SharedCache(redis_url, max_age=60, budget=LONG, clock=clocks.get("clock", wall))
        return CachedBackend(service, ttl=60, secret=SECRET, shared=shared, timer=timer)

    first = server()
    first.lookup("alice", HERE)
    assert first._shared is not None
    settle(first._shared)
    ((name, value),) = entries(redis_url).items()
    # The key is revoked. One server notices and removes the entry; an attacker writes it back.
    service.known = {}
    found = {}
    with redis.Redis.from_url(redis_url) as client:
        for later, ahead in ((0, 0), (30, 0), (59, 0), (60, 0), (61, 0), (10**6, 0)) + tuple(
            (0, skew) for skew in (-3600, -11, -9, 9, 59, 3600)
        ):
            client.set(name, value, px=10**9)
            there = Clock()
            there.now = wall.now + later + ahead
            one = server(clock=there)
            found[later, ahead] = one.lookup("alice", HERE) == ALICE
            assert one._shared is not None
            settle(one._shared)  # The removal must not come after the entry is written back.
    assert found == {
        (0, 0): True,
        (30, 0): True,
        (59, 0): True,
        (60, 0): False,
        (61, 0): False,
        (10**6, 0): False,
        (0, -3600): False,  # Only clocks that differ by a few seconds are tolerated.
        (0, -11): False,
        (0, -9): True,
        (0, 9): True,
        (0, 59): True,
        (0, 3600): False,
    }


def test_entry_expires_by_its_signed_age_whatever_redis_says(
    redis_url: str,
) -> None:
    wall, timer = Clock(), Clock()
    shared_ = SharedCache(redis_url, max_age=60, budget=LONG, clock=wall)
    cached = CachedBackend(Service(), ttl=60, secret=SECRET, shared=shared_, timer=timer)
    # The lookup was 45 s ago.
    shared_.put(cached._digest("alice", HERE), ALICE, 10**6, 45)
    settle(shared_)
    assert cached.lookup("alice", HERE) == ALICE
    timer.now += 14
    assert cached.peek("alice", HERE) == ALICE
    timer.now += 2
    assert cached.peek("alice", HERE) is None


def test_age_of_a_slow_answer_starts_before_the_lookup(redis_url: str) -> None:
    timer = Clock()

    class Slow(Service):
        def lookup(self, key: str, address: str) -> Principal | Rejected:
            timer.now += 7
            return super().lookup(key, address)

    shared_ = SharedCache(redis_url, max_age=60, budget=LONG, clock=lambda: 1e9)
    cached = CachedBackend(Slow(), ttl=60, secret=SECRET, shared=shared_, timer=timer)
    cached.lookup("alice", HERE)
    settle(shared_)
    (value,) = entries(redis_url).values()
    decoded = redis_identities._decode(cached._digest("alice", HERE), value)
    assert decoded == (ALICE, 1e9 - 7)


def test_entry_with_the_fields_of_another_version_is_a_miss() -> None:
    for text in (b"{}", b"[]", b"1", b"", b'{"scopes": [], "roles": [], "new": 1}'):
        signed = redis_identities._signature(DIGEST, text) + text
        assert redis_identities._decode(DIGEST, signed) is None


def test_regression_28_redis_holds_no_key(cache: SharedCache, redis_url: str) -> None:
    service = Service()
    cached = served_by(service, cache)
    service.known = {"hk_live_canary": ALICE}
    cached.lookup("hk_live_canary", HERE)
    cached.lookup("hk_live_unknown", HERE)
    settle(cache)
    ((name, value),) = entries(redis_url).items()
    digest = cached._digest("hk_live_canary", HERE)
    for secret in (b"hk_live", b"canary", digest, digest.hex().encode(), SECRET):
        assert secret not in name + value


def test_key_that_one_server_verified_costs_the_other_no_lookup(redis_url: str) -> None:
    clock = Clock()
    first, second = Service(), Service()
    one, two = (
        served_by(service, SharedCache(redis_url, max_age=60, budget=LONG), timer=clock)
        for service in (first, second)
    )
    one.lookup("alice", HERE)
    assert one._shared is not None
    settle(one._shared)
    assert two.lookup("alice", HERE) == ALICE
    assert two.peek("alice", HERE) == ALICE
    assert (first.lookups, second.lookups) == (1, 0)
    # The time to live does not start again with the second server's lookup.
    clock.now += 60
    assert two.peek("alice", HERE) is None


def test_rejection_removes_the_entry_for_all_servers(cache: SharedCache, redis_url: str) -> None:
    class Revoking(Service):
        def lookup(self, key: str, address: str) -> Principal | Rejected:
            # Another server made its lookup a moment earlier, and stores the answer only now.
            cache.put(cached._digest(key, address), ALICE, 60)
            settle(cache)
            assert len(entries(redis_url)) == 1
            return Rejected("revoked")

    cached = served_by(Revoking(), cache)
    assert cached.lookup("alice", HERE) == Rejected("revoked")
    settle(cache)
    assert entries(redis_url) == {}


def test_servers_of_another_site_share_nothing(cache: SharedCache) -> None:
    for other in ({"secret": b"another"}, {"namespace": "https://another.example"}):
        first, second = Service(), Service()
        served_by(first, cache).lookup("alice", HERE)
        settle(cache)
        served_by(second, cache, **other).lookup("alice", HERE)
        settle(cache)
        assert second.lookups == 1


def test_a_watched_backend_shares_nothing(cache: SharedCache, redis_url: str) -> None:
    served_by(Memory(), cache).lookup("alice", HERE)
    settle(cache)
    assert entries(redis_url) == {}


def test_entry_in_redis_is_served_during_an_outage(cache: SharedCache) -> None:
    first, second = Service(), Service()
    served_by(first, cache).lookup("alice", HERE)
    settle(cache)
    second.failure = AuthorityUnavailable("down")
    other = served_by(second, cache)
    assert other.lookup("alice", HERE) == ALICE
    with pytest.raises(AuthorityUnavailable):
        other.lookup("bob", HERE)


def test_a_redis_that_comes_back_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "COOL_DOWN", 0.05)
    port = free_port()
    cache = SharedCache(f"redis://127.0.0.1:{port}", max_age=60, budget=LONG)
    for _ in range(10):
        assert cache.get(DIGEST) is None
    assert not cache._operations._breaker.closed
    with redis_server(tmp_path, "--port", str(port)):
        ends = time.monotonic() + LONG
        while not cache._operations._breaker.closed and time.monotonic() < ends:
            cache.get(DIGEST)
            time.sleep(0.01)
        cache.put(DIGEST, ALICE, 60)
        settle(cache)
        assert cache.get(DIGEST) is not None


# Without one


def test_regression_32_a_black_hole_costs_no_time(
    black_hole: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "COOL_DOWN", 0)  # Probes then follow without a pause.
    service = Service()
    cache = SharedCache(black_hole, max_age=60)
    waited = waits(cache)
    cached = served_by(service, cache)
    for number in range(500):
        service.known[str(number)] = ALICE
        cached.lookup(str(number), HERE)
        assert cached.peek(str(number), HERE) == ALICE
    assert service.lookups == 500
    assert 1 <= len(waited) <= 5 and set(waited) == {BUDGET}
    logged = [record for record in caplog.records if record.name == redis_client.__name__]
    assert [record.getMessage() for record in logged] == [
        "Redis fails (TimeoutError): verified keys are not shared between servers"
    ]


def test_requests_do_not_wait_for_the_probe_of_redis(
    black_hole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "COOL_DOWN", 0)
    cache = SharedCache(black_hole, max_age=60)
    while cache._operations._breaker.closed:
        cache.get(DIGEST)
    waited = waits(cache)
    for _ in range(5):
        cache.get(DIGEST)
        assert cache._operations._breaker._probing
        settle(cache)
    assert waited == []


def test_a_dead_redis_changes_nothing() -> None:
    service = Service()
    cache = SharedCache(f"redis://127.0.0.1:{free_port()}", max_age=60)
    cached = CachedBackend(service, ttl=60, secret=SECRET, shared=cache)
    for number in range(100):
        assert isinstance(cached.lookup(str(number), HERE), Rejected)
    assert cached.lookup("alice", HERE) == ALICE
    assert not cache._operations._breaker.closed
    settle(cache)


def test_a_server_that_drips_is_within_the_budget() -> None:
    stop = threading.Event()

    def drip(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                while not stop.wait(BUDGET / 3):
                    connection.sendall(b"$")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        dripping = threading.Thread(target=drip, args=(listener,), daemon=True)
        dripping.start()
        cache = SharedCache(
            f"redis://127.0.0.1:{listener.getsockname()[1]}", max_age=60, budget=BUDGET
        )
        waited = waits(cache)
        assert cache.get(DIGEST) is None
        assert waited == [BUDGET]
        stop.set()
        dripping.join(LONG)


def test_operations_above_the_limit_are_skipped(black_hole: str) -> None:
    cache = SharedCache(black_hole, max_age=60)
    waited = waits(cache)
    for _ in range(1000):
        cache.put(DIGEST, ALICE, 60)
    assert waited == []
    assert cache._operations._workers._work_queue.qsize() <= redis_client._MAX_PENDING


# The URL


def test_regression_32_unsafe_or_unreadable_url_is_refused() -> None:
    verified = "rediss://redis.example.com"
    for said, urls in (
        (
            "must start with redis://, rediss://",
            ("localhost:6379", "redis.example.com", "http://redis", "", "//x"),
        ),
        (
            "must not set s",
            (
                f"{verified}?ssl_cert_reqs=none",
                f"{verified}?ssl_check_hostname=no",
                f"{verified}?socket_timeout=60",
                "redis://redis.example.com?ssl_ca_certs=x",
            ),
        ),
        # The text must not quote the password.
        ("can't be read", ("redis://:hunter2@x:hunter2/0", "redis://:hunter2@x/?db=hunter2")),
    ):
        for url in urls:
            with pytest.raises(ValueError, match=said) as refusal:
                SharedCache(url, max_age=60)
            assert "hunter2" not in str(refusal.value)


def test_error_without_redis_py_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['redis'] = None\n"
        "from mlflow_hokusai_auth.authorities.redis_identities import SharedCache\n"
        "SharedCache('redis://localhost', max_age=60)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'mlflow-hokusai-auth[redis]'" in done.stderr


def test_regression_32_redis_must_have_a_verified_certificate(
    tmp_path: Path,
    certificate: Path,  # noqa: F811
) -> None:
    port = free_port()
    tls = ["--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no"]
    files = ["--tls-cert-file", str(certificate), "--tls-key-file", str(certificate)]
    with redis_server(tmp_path, *tls, *files):
        for address, trusted, expected in (
            ("127.0.0.1", True, True),
            ("127.0.0.1", False, False),
            ("localhost", True, False),  # The certificate has another name.
        ):
            query = f"?ssl_ca_certs={certificate}" if trusted else ""
            cache = SharedCache(f"rediss://{address}:{port}{query}", max_age=60, budget=LONG)
            cache.put(DIGEST, ALICE, 60)
            settle(cache)
            assert (cache.get(DIGEST) is not None) == expected

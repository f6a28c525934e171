"""The gate with an authority that does not answer."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from werkzeug.test import create_environ, run_wsgi_app

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.core.policy import Policy
from mlflow_hokusai_auth.core.prefixes import Prefixes
from mlflow_hokusai_auth.core.types import (
    Access,
    Allow,
    Credential,
    Deny,
    NeedKey,
    Operation,
    Principal,
    Rejected,
)
from mlflow_hokusai_auth.server.gate import lookup_pool as module
from mlflow_hokusai_auth.server.gate.asgi import AsgiGate
from mlflow_hokusai_auth.server.gate.cors import Cors
from mlflow_hokusai_auth.server.gate.gate import Gate
from mlflow_hokusai_auth.server.gate.lookup_pool import (
    MAX_PENDING,
    SHARE,
    THREADS,
    LookupPool,
    RecentKeys,
)
from mlflow_hokusai_auth.server.gate.outage import MAX_WAIT, Outage
from mlflow_hokusai_auth.server.gate.wsgi import wsgi_gate
from mlflow_hokusai_auth.server.observe.decision_log import DecisionLog
from tests.harness import wait_until
from tests.server.compare_fast_path import ask


class Stuck:
    """An authority that does not answer until a test lets it."""

    name = "stuck"

    def __init__(self) -> None:
        self.free = threading.Event()
        self.fails = False
        self.asked: list[str] = []
        self.answered: list[str] = []

    def peek(self, key: str, address: str) -> None:
        return None

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        self.asked.append(key)
        assert self.free.wait(60)
        self.answered.append(key)
        if self.fails:
            raise AuthorityUnavailable("down")
        return Principal("key_1", "x", frozenset({"mlflow:read"}))


def app_behind(authority: Any, **options: Any) -> AsgiGate:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"MLflow"})

    return AsgiGate(
        app, Gate(authority, Policy(), Prefixes(()), Cors((), ""), DecisionLog(), **options)
    )


def request() -> dict[str, Any]:
    return {
        "type": "http",
        "method": "GET",
        "path": "/version",
        "query_string": b"",
        "headers": [(b"x-api-key", keys.generate().encode())],
    }


def test_more_requests_than_threads_do_not_wait_for_ever() -> None:
    authority, lookups = Stuck(), LookupPool(0.3)
    gate = app_behind(authority, lookups=lookups)

    async def many() -> list[Any]:
        refused = await asyncio.gather(*(ask(gate, request(), b"") for _ in range(50)))
        assert authority.asked and not authority.answered
        assert {answer[0] for answer in refused} == {503}
        assert all(float(dict(answer[1])[b"retry-after"]) >= 1 for answer in refused)
        authority.free.set()
        lookups.timeout = 60
        return await ask(gate, request(), b"")

    assert asyncio.run(many())[0] == 200


def test_requests_do_not_wait_for_ever_under_wsgi() -> None:
    authority, lookups = Stuck(), LookupPool(0.05)
    gate = Gate(authority, Policy(), Prefixes(()), Cors((), ""), DecisionLog(), lookups=lookups)

    def mlflow(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [b"MLflow"]

    app = wsgi_gate(mlflow, gate)

    def status() -> str:
        environ = create_environ("/version", headers={"X-API-Key": keys.generate()})
        return run_wsgi_app(app, environ)[1]

    assert [status() for _ in range(THREADS + 2)] == ["503 Service Unavailable"] * 10
    assert authority.asked and not authority.answered
    authority.free.set()
    lookups.timeout = 60
    assert status() == "200 OK"


def test_queue_for_a_stuck_authority_is_bounded_and_given_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    free, done, running = threading.Event(), [], threading.Semaphore(0)
    lookups = LookupPool(timeout=0.2)

    def question() -> str:
        running.release()
        assert free.wait(60)
        done.append("asked")
        return "answer"

    begun = [
        lookups.begin(question, lambda: "otherwise", f"192.0.2.{number % SHARE}")
        for number in range(MAX_PENDING)
    ]
    for _ in range(THREADS):
        assert running.acquire(timeout=60)
    assert lookups.begin(question, lambda: "full").result(0) == "full"
    assert f"{MAX_PENDING} wait for the authority" in caplog.text
    now[0] = lookups.timeout
    free.set()
    # Lookups without a thread in time are skipped, because nobody waits for them.
    assert {one.result(60) for one in begun} == {"answer", "otherwise"}
    assert len(done) == THREADS
    assert lookups.begin(lambda: "anew", str).result(60) == "anew"


def test_an_address_has_a_quarter_of_the_threads_and_of_the_places() -> None:
    free, running = threading.Event(), threading.Semaphore(0)
    asked: list[str] = []
    lookups = LookupPool(timeout=600)

    def begin(address: str, *, recent: bool = False) -> Future[str]:
        def question() -> str:
            asked.append(address)
            running.release()
            assert free.wait(60)
            return "answer"

        return lookups.begin(
            question, lambda: "otherwise", address, crowded=lambda: "crowded", recent=recent
        )

    share = MAX_PENDING // SHARE
    begun = [begin("192.0.2.1") for _ in range(share)]
    for _ in range(THREADS // SHARE):
        assert running.acquire(timeout=60)
    assert begin("192.0.2.1").result(0) == "crowded"
    # Other addresses don't wait behind them, and keys that were good lately have their own threads.
    for number in range(2, 5):
        begun += [begin(f"192.0.2.{number}") for _ in range(THREADS // SHARE)]
    for _ in range(THREADS - THREADS // SHARE):
        assert running.acquire(timeout=60)
    assert Counter(asked) == {f"192.0.2.{n}": THREADS // SHARE for n in range(1, 5)}
    begun.append(begin("192.0.2.1", recent=True))
    assert running.acquire(timeout=60)
    # No address has a second turn before each waiting address has had one.
    begun += [begin("198.51.100.1"), begin("198.51.100.2")]
    free.set()
    assert {one.result(60) for one in begun} == {"answer"}
    turns = [asked.index(f"198.51.100.{n}") for n in (1, 2)]
    assert max(turns) < share, turns
    # The queue keeps no entry of them.
    wait_until(lambda: lookups._new._busy == 0)
    assert not lookups._new._held and not lookups._new._running and not lookups._new._waiting


def test_an_address_that_has_its_places_gets_429_and_others_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", SHARE)
    authority = Stuck()
    gate = Gate(authority, Policy(), Prefixes(()), Cors((), ""), DecisionLog())
    operation = Operation(Access.READ, "server", "GET /version")

    def begin(address: str) -> Future[Allow | Deny]:
        credential = Credential(keys.generate(), ("X-API-Key",))
        return gate.begin_lookup(NeedKey(credential, operation, address))

    first = begin("2001:db8::1")
    # All addresses of a customer's network count as one.
    refused = begin("2001:db8::2").result(0)
    assert isinstance(refused, Deny) and refused.code == "RATE_LIMITED"
    assert refused.retry_after == 5 and "wait for their keys" in refused.message
    other = begin("2001:db8:0:1::1")
    authority.free.set()
    assert isinstance(first.result(60), Allow) and isinstance(other.result(60), Allow)


def test_lookup_is_skipped_when_its_request_no_longer_waits() -> None:
    free, asked = threading.Event(), []
    lookups = LookupPool()
    first = [lookups.begin(lambda: free.wait(60), bool) for _ in range(THREADS // SHARE)]
    gone = lookups.begin(lambda: asked.append("gone") or True, bool)
    assert gone.cancel()
    last = lookups.begin(lambda: asked.append("last") or True, bool)
    free.set()
    assert all(one.result(60) for one in (*first, last))
    assert asked == ["last"]


def test_a_bounded_number_of_keys_is_remembered_for_a_day() -> None:
    now = [0.0]
    recent = RecentKeys(size=3, timer=lambda: now[0])
    for number in range(4):
        recent.add(f"key {number}")
    assert [f"key {number}" in recent for number in range(4)] == [False, True, True, True]
    now[0] = 86399.0
    assert "key 3" in recent
    recent.add("key 3")
    now[0] = 86401.0
    assert "key 3" in recent and "key 2" not in recent
    assert b"key 3" not in b"".join(recent._digests)


def test_lookup_without_a_thread_leaves_the_queue() -> None:
    lookups = LookupPool()
    lookups._new._threads.shutdown()
    for _ in range(MAX_PENDING + 1):
        with pytest.raises(RuntimeError):
            lookups.begin(str, str)


def test_clients_are_asked_to_wait_longer_in_a_longer_outage() -> None:
    now = 100.0
    outage = Outage(lambda: now)
    waits = []
    for _ in range(7):
        waits.append(outage.wait())
        now += waits[-1]
    assert 1 <= waits[0] <= 2
    # The waits cover the restart of a database, but have an end.
    assert sum(waits) > 60 and max(waits) <= MAX_WAIT
    outage.end()
    assert outage.wait() <= 2


def test_only_an_answer_ends_an_outage() -> None:
    for fails in (True, False):
        authority, now = Stuck(), [0.0]
        authority.free.set()
        authority.fails = True
        gate = app_behind(authority, outage=Outage(lambda now=now: now[0]))

        def answer(gate: AsgiGate = gate) -> tuple[int, dict[bytes, bytes]]:
            status, headers, _ = asyncio.run(ask(gate, request(), b""))
            return status, dict(headers)

        assert float(answer()[1][b"retry-after"]) <= 2
        now[0] = 60.0
        authority.fails = fails
        assert answer()[0] == (503 if fails else 200)
        authority.fails = True
        assert (float(answer()[1][b"retry-after"]) >= MAX_WAIT / 2) is fails

"""The observer gets each request once, whatever its outcome; and the rest that adapters pass on."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from wsgiref.util import FileWrapper

import pytest

from mlflow_hokusai_auth.core import browser, keys
from mlflow_hokusai_auth.server import caller
from mlflow_hokusai_auth.server.exchange import Exchange
from mlflow_hokusai_auth.server.gate import asgi
from mlflow_hokusai_auth.server.gate.asgi import AsgiGate
from mlflow_hokusai_auth.server.gate.gate import Gate
from mlflow_hokusai_auth.server.gate.wsgi import wsgi_gate
from mlflow_hokusai_auth.server.observe.decision_log import DecisionLog
from tests.adversarial.grammar import GRAPHQL_READ
from tests.server.sentinel import (
    KEYS,
    PRINCIPALS,
    Adapter,
    Wire,
    both,
    clock_at_now,
    environ_of,
    make_gate,
    scope_of,
    with_key,
)

READ = with_key("read")
ALICE = PRINCIPALS["read"].owner
PAGE = ("Accept", "text/html")


@dataclass
class Observing:
    """An observer that keeps the exchanges it gets."""

    exchanges: list[Exchange] = field(default_factory=list)
    debug_headers = False

    def show_headers(self, exchange: Exchange, after: object) -> None:
        raise AssertionError

    def report(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)

    @property
    def one(self) -> Exchange:
        (exchange,) = self.exchanges
        return exchange


@pytest.fixture
def observer() -> Observing:
    return Observing()


@pytest.fixture
def gate(observer: Observing) -> Gate:
    return make_gate(observer=observer)


@both
def test_each_request_is_observed_once(adapter: Adapter) -> None:
    for wire, status, passed in (
        (READ, 200, True),
        (Wire(), 401, False),
        (with_key("read", "POST", "/api/2.0/mlflow/runs/create"), 403, False),
        (with_key("read", "GET", "/api/mlflow"), 308, False),
    ):
        observer = Observing()
        assert adapter(wire, make_gate(observer=observer)).status == status, wire
        found = (
            observer.one.status,
            observer.one.passed,
            observer.one.broke_off,
            observer.one.answered > 0,
        )
        assert found == (status, passed, False, passed), wire


def asgi_ask(gate: Gate, app: Any, receive: Any = None, wire: Wire = READ) -> list[Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(AsgiGate(app, gate)(scope_of(wire), receive, send))
    return sent


def wsgi_ask(gate: Gate, app: Any, wire: Wire = READ, **extra: Any) -> Any:
    return wsgi_gate(app, gate)(environ_of(wire, **extra), lambda *_: lambda _: None)


class Broken(Exception):
    """An exception of MLflow's."""


def test_request_that_mlflow_breaks_off_is_observed_and_raises(
    gate: Gate, observer: Observing
) -> None:
    async def asgi_app(*_: Any) -> None:
        raise Broken

    def wsgi_app(*_: Any) -> Any:
        raise Broken

    for ask, app in ((asgi_ask, asgi_app), (wsgi_ask, wsgi_app)):
        observer.exchanges.clear()
        with pytest.raises(Broken):
            ask(gate, app)
        assert observer.one.broke_off and observer.one.passed


def test_answer_in_pieces_is_observed_at_its_end(gate: Gate, observer: Observing) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Length", "7")])
        return iter([b"abc", b"defg"])

    answer = wsgi_ask(gate, app)
    assert list(answer) == [b"abc", b"defg"] and observer.exchanges == []
    answer.close()
    assert observer.one.sent == 7


def test_file_reaches_the_server_in_its_wrapper(gate: Gate, observer: Observing) -> None:
    made = FileWrapper(io.BytesIO(b"abc"))

    def app(environ: Any, start_response: Any) -> FileWrapper:
        start_response("200 OK", [("Content-Length", "many")])
        return made

    file_wrapper = {"wsgi.file_wrapper": FileWrapper}
    assert wsgi_ask(gate, app, **file_wrapper) is made
    assert observer.one.sent == 0


def test_answer_that_cannot_be_sent_keeps_nothing_waiting(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def send(_: Any) -> None:
        raise RuntimeError("the server has answered already")

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x", "more_body": True}

    monkeypatch.setattr(asgi, "MAX_END", 0.01)
    refused = Wire("GET", READ.target, ())
    # A body that never ends and is always there: without a pause, the limit of time never comes.
    asyncio.run(AsgiGate(None, gate)(scope_of(refused), receive, send))  # type: ignore[arg-type]


def test_serving_begins_once_with_the_first_request(gate: Gate) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        happened.append("MLflow")
        start_response("200 OK", [])
        return [b""]

    def ask() -> None:
        entry(environ_of(READ), lambda *_: lambda _: None)

    def begin() -> None:
        happened.append("begin")
        # Other requests wait until this is over.
        others.extend(threading.Thread(target=ask) for _ in range(3))
        for other in others:
            other.start()
        happened.append("begun")

    happened: list[str] = []
    others: list[threading.Thread] = []
    entry = wsgi_gate(app, gate, begin)
    assert happened == []
    ask()
    for other in others:
        other.join()
    assert happened == ["begin", "begun", *["MLflow"] * 4]


class _Fails:
    """An answer that fails while it is sent, or when it is closed."""

    def __init__(self, at: str) -> None:
        self._at = at

    def __iter__(self) -> Iterator[bytes]:
        if self._at == "send":
            raise Broken
        yield b"abc"

    def close(self) -> None:
        if self._at == "close":
            raise Broken


def test_thread_has_no_caller_after_a_request(gate: Gate, observer: Observing) -> None:
    seen: list[str] = []

    def see() -> None:
        who = caller.current.get().principal
        seen.append(who.owner if who else "nobody")

    def parts() -> Iterator[bytes]:
        see()
        yield b"abc"
        see()

    def breaks() -> Any:
        raise Broken

    answers: dict[str, tuple[Any, list[str]]] = {
        "list": (lambda: [b"abc"], []),
        "parts": (parts, [ALICE, ALICE]),
        "file": (lambda: FileWrapper(io.BytesIO(b"abc")), []),
        "breaks": (breaks, []),
        "breaks while it is sent": (lambda: _Fails("send"), []),
        "breaks at its end": (lambda: _Fails("close"), []),
    }

    def serve(make: Any, wire: Wire) -> None:
        """Call it as a server does, which answers an exception with 500."""

        def app(environ: Any, start_response: Any) -> Any:
            see()
            start_response("200 OK", [])
            return make()

        with contextlib.suppress(Broken):
            file_wrapper = {"wsgi.file_wrapper": FileWrapper}
            with contextlib.closing(wsgi_ask(gate, app, wire, **file_wrapper)) as answer:
                list(answer)
        see()

    wrong = {}
    with ThreadPoolExecutor(1) as thread:
        for name, (make, sending) in answers.items():
            observer.exchanges.clear()
            seen.clear()
            thread.submit(serve, make, READ).result()
            thread.submit(serve, lambda: [b""], Wire("GET", "/health")).result()
            wanted = [ALICE, *sending, "nobody", "nobody", "nobody"]
            if seen != wanted or len(observer.exchanges) != 2:
                wrong[name] = (list(seen), len(observer.exchanges))
    assert wrong == {}


def test_answer_of_mlflow_is_observed(gate: Gate, observer: Observing) -> None:
    for status, content_type, host in (
        (403, "text/plain", True),
        (403, "text/plain; charset=utf-8", True),
        (403, "application/json", False),
        (403, "", False),
        (404, "text/plain", False),
    ):
        start = {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"Content-Type", content_type.encode())],
        }
        headers = [("Content-Type", content_type), ("Content-Length", "7")]

        async def asgi_app(scope: Any, receive: Any, send: Any, start: Any = start) -> None:
            await send(start)
            await send({"type": "http.response.body", "body": b"abc", "more_body": True})
            await send({"type": "http.response.body", "body": b"defg"})

        def wsgi_app(
            environ: Any, start_response: Any, line: str = f"{status} X", headers: Any = headers
        ) -> list[bytes]:
            start_response(line, headers)
            return [b"abcdefg"]

        observer.exchanges.clear()
        asgi_ask(gate, asgi_app)
        wsgi_ask(gate, wsgi_app).close()
        found = [(one.status, one.host_refusal, one.sent) for one in observer.exchanges]
        assert found == [(status, host, 7)] * 2, content_type


@both
def test_headers_are_logged_if_the_operator_wants(
    adapter: Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    wire = with_key("read", "GET", "/version", ("X-Tenant", "a"))
    for wanted in (True, False):
        caplog.clear()
        with caplog.at_level(logging.INFO, "mlflow_hokusai_auth.headers"):
            adapter(wire, make_gate(observer=DecisionLog(debug_headers=wanted)))
        shown = [one for one in caplog.records if one.name == "mlflow_hokusai_auth.headers"]
        assert len(shown) == wanted
        assert all("x-tenant" in one.getMessage().partition('"after"')[2] for one in shown)


@both
def test_redirect_to_the_sign_in_stays_below_the_prefix(adapter: Adapter) -> None:
    session_that_ended = (
        ("Cookie", f"{browser.LOOPBACK_COOKIE}={keys.session_token()}"),
        ("Host", "127.0.0.1:5000"),
    )
    for target, headers, location in (
        ("/api/mlflow", (), "mlflow/hokusai/login?next=/"),
        ("/api/mlflow/", (), "hokusai/login?next=/"),
        ("/", session_that_ended, "hokusai/login?next=/"),
    ):
        answer = adapter(Wire("GET", target, (PAGE, *headers)), make_gate())
        assert (answer.status, answer.header("location")) == (303, [location]), target
    # After the sign-in one sees the page of the form, which has to be sent again.
    own = (PAGE, ("Sec-Fetch-Site", "same-origin"), *session_that_ended)
    form = adapter(Wire("POST", "/mlflow/hokusai/models/share?x=y", own), make_gate())
    location = "../../hokusai/login?next=/hokusai/models"
    assert (form.status, form.header("location")) == (303, [location])


@both
def test_empty_path_is_the_root(adapter: Adapter) -> None:
    answer = adapter(with_key("read", "GET", ""), make_gate())
    assert answer.status == 200 and answer.inner is not None


def test_mlflow_receives_the_read_bytes_and_then_the_rest(gate: Gate) -> None:
    body = GRAPHQL_READ
    coming = [
        {"type": "http.request", "body": body[:9], "more_body": True},
        {"type": "http.request", "body": body[9:], "more_body": False},
        {"type": "http.disconnect"},
    ]
    messages, received = list(coming), []

    async def receive() -> Any:
        return messages.pop(0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        received.extend([await receive() for _ in range(2)])
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    asgi_ask(gate, app, receive, with_key("read", "POST", "/graphql"))
    # The body comes in one piece and is kept once.
    whole = {"type": "http.request", "body": body, "more_body": False}
    assert received == [whole, coming[2]]


def test_request_without_a_length_has_no_body(gate: Gate) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [environ["wsgi.input"].read()]

    form = Wire("POST", "/hokusai/login")
    assert b"".join(wsgi_ask(gate, app, form, **{"wsgi.input": io.BytesIO()})) == b""


def test_query_key_is_removed_wherever_the_server_repeats_the_query(gate: Gate) -> None:
    called: list[Any] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        called.append(environ)
        start_response("200 OK", [])
        return []

    for more, left in (("a=1&", "a=1"), ("", "")):
        environ = environ_of(Wire("GET", f"/version?{more}api_key={KEYS['read']}"))
        del environ["RAW_URI"]
        wsgi_gate(app, gate)(environ, lambda *_: lambda _: None)
        inner = called.pop()
        assert inner["QUERY_STRING"] == left
        assert inner["REQUEST_URI"] == f"/version{'?' if left else ''}{left}"
        assert "RAW_URI" not in inner


@both
def test_owner_of_the_key_is_logged_and_uses_are_counted(adapter: Adapter) -> None:
    for kind, method, code, owner, counted in (
        ("write", "POST", "", "key_write", ["key_write"]),
        # A refused key is in the log, but doesn't count as used.
        ("read", "POST", "SCOPE_MISSING", "key_read", []),
        ("revoked", "GET", "KEY_REVOKED", "key_revoked", []),
        ("unknown", "GET", "KEY_UNKNOWN", "", []),
    ):
        uses: list[str] = []
        observer = Observing()
        path = "/version" if method == "GET" else "/api/2.0/mlflow/runs/create"
        with clock_at_now():
            adapter(with_key(kind, method, path), make_gate(observer=observer, count=uses.append))
        verdict = observer.one.verdict
        assert verdict is not None
        assert getattr(verdict, "code", "") == code, kind
        assert (verdict.principal.key_id if verdict.principal else "") == owner, kind
        assert uses == counted, kind


def test_request_that_fits_takes_the_fast_path(gate: Gate) -> None:
    ways: list[str] = []

    def way(name: str) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            ways.append(name)

        return app

    for fits in (True, False):
        short = SimpleNamespace(app=way("short"), fits=lambda *_, fits=fits: fits)
        asgi = AsgiGate(way("whole"), gate, short)  # type: ignore[arg-type]
        asyncio.run(asgi(scope_of(READ), None, None))  # type: ignore[arg-type]
    assert ways == ["short", "whole"]

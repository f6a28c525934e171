"""The bridge from ASGI to WSGI: its environ is Starlette's, and answers arrive as they are made."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_hokusai_auth.server.upstream import flask_bridge
from mlflow_hokusai_auth.server.upstream.flask_bridge import (
    SHORT,
    THREADS,
    FlaskBridge,
    environ_of,
)
from tests.server.compare_fast_path import ask

GET: dict[str, Any] = {
    "type": "http",
    "http_version": "1.1",
    "method": "GET",
    "path": "/a b",
    "root_path": "",
    "query_string": b"x=1",
    "headers": [(b"host", b"h:1")],
    "server": ("h", 1),
}

ascii_text = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=9)
names = st.sampled_from(
    [
        b"content-length",
        b"content-type",
        b"content_length",
        b"x" * 99,
        b"x-a",
        b"x_a",
        b"cookie",
        b"host",
    ]
)


@given(
    path=st.text(max_size=20),
    query=ascii_text,
    headers=st.lists(st.tuples(names, st.binary(max_size=9)), max_size=6),
    client=st.sampled_from([None, ("192.0.2.1", 5)]),
    server=st.sampled_from([None, ("h", 1)]),
    body=st.binary(max_size=9),
)
def test_environ_is_the_same_as_starlette_s(
    path: str, query: str, headers: Any, client: Any, server: Any, body: bytes
) -> None:
    wsgi = pytest.importorskip("starlette.middleware.wsgi")
    scope = {**GET, "path": f"/{path}", "query_string": query.encode(), "headers": headers}
    scope |= {"client": client, "server": server}
    try:
        expected = wsgi.build_environ(scope, body)
    except UnicodeEncodeError:  # a lone surrogate can't be in a request
        return
    found = environ_of(scope, body)
    assert found.pop("wsgi.input").read() == expected.pop("wsgi.input").read()
    # PEP 3333 requires a string here.
    expected["SERVER_PORT"] = str(expected["SERVER_PORT"])
    del found["wsgi.errors"], expected["wsgi.errors"]
    assert found == expected


def test_only_short_header_names_are_cached() -> None:
    before = flask_bridge._short_variable.cache_info().misses
    assert environ_of({**GET, "headers": [(b"x" * 65, b"1")]}, b"")["HTTP_" + "X" * 65] == "1"
    assert flask_bridge._short_variable.cache_info().misses == before


def answer(app: Callable[..., Any], scope: dict[str, Any] = GET) -> tuple[Any, ...]:
    return asyncio.run(ask(FlaskBridge(app), scope, b"body"))


async def no_body() -> dict[str, Any]:
    """The messages of a client that stays and sends no body."""
    return {"type": "http.request"}


def test_answer_has_its_status_headers_and_body() -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        assert environ["wsgi.input"].read() == b"body"
        start_response("404 Not Found", [("X-One", " a "), ("x-one", "b"), ("X-L", "\xe9")])
        return [b"one", b"two"]

    headers = [(b"x-l", b"\xe9"), (b"x-one", b"a"), (b"x-one", b"b")]
    assert answer(app) == (404, headers, b"onetwo")

    def broken(environ: Any, start_response: Any) -> list[bytes]:
        raise LookupError("gone")

    assert answer(broken)[0] == "LookupError"


class Closing:
    """A response that is an iterator. It notes its position, and whether it was closed."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    def close(self) -> None:
        self.closed = True


def responding(made: Any, length: int | None = None) -> Callable[..., Any]:
    """An application that answers with `made`."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [] if length is None else [("Content-Length", str(length))])
        return made

    return app


def test_response_is_closed_at_its_end_and_when_it_breaks_off() -> None:
    def breaks() -> Iterator[bytes]:
        yield b"abc"
        raise OSError

    for length in (None, SHORT + 1, 6):
        made = Closing(iter([b"abc", b"def"]))
        assert answer(responding(made, length))[2] == b"abcdef"
        assert made.closed, length
        made = Closing(breaks())
        assert answer(responding(made, length))[0] == "OSError"
        assert made.closed, length


def test_response_is_closed_for_a_client_that_is_gone() -> None:
    made = Closing(iter([b"abc", b"def"]))

    async def send(message: dict[str, Any]) -> None:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        asyncio.run(FlaskBridge(responding(made))(GET, no_body, send))
    assert made.closed


def test_answer_stops_when_its_client_leaves() -> None:
    made = Closing(iter([b"abc"] * 1000))
    gone = asyncio.Event()
    sent: list[dict[str, Any]] = []
    messages = [{"type": "http.request"}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:  # does nothing for a client that is gone
        sent.append(message)
        if len(sent) == 5:
            gone.set()

    asyncio.run(FlaskBridge(responding(made))(GET, receive, send))
    assert made.closed and len(sent) < 10


def test_no_task_is_left_after_a_client_that_stayed_to_the_end() -> None:
    async def whole() -> None:
        messages, waiting = [{"type": "http.request"}], asyncio.Event()

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            try:
                await asyncio.Event().wait()
            finally:
                waiting.set()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            await asyncio.sleep(0)  # lets the other tasks start

        await FlaskBridge(responding(iter([b"abc"] * 3)))(GET, receive, send)
        await asyncio.wait_for(waiting.wait(), 60)

    asyncio.run(whole())


def test_request_can_be_cancelled_while_its_answer_is_being_made() -> None:
    at_it, go_on = threading.Event(), threading.Event()
    closed = threading.Event()

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])

        def chunks() -> Iterator[bytes]:
            try:
                yield b"abc"
                at_it.set()
                assert go_on.wait(60)
                yield b"def"
            finally:
                closed.set()

        return chunks()

    async def cancelled() -> None:
        task = asyncio.ensure_future(ask(FlaskBridge(app), GET, b""))
        assert await asyncio.to_thread(at_it.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    asyncio.run(cancelled())
    assert closed.wait(60)


def test_slow_clients_do_not_delay_others() -> None:
    slow = THREADS + 2

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        return iter([environ["PATH_INFO"].encode()] * 2)

    async def all_of_them() -> None:
        bridging, stopped = FlaskBridge(app), asyncio.Semaphore(0)
        go_on = asyncio.Event()

        async def one() -> None:
            async def send(_: Any) -> None:
                stopped.release()
                await go_on.wait()

            await bridging(GET, no_body, send)

        waiting = [asyncio.create_task(one()) for _ in range(slow)]
        for _ in waiting:
            await asyncio.wait_for(stopped.acquire(), 60)
        assert (await asyncio.wait_for(ask(bridging, GET, b""), 60))[2] == b"/a b" * 2
        go_on.set()
        await asyncio.gather(*waiting)

    asyncio.run(all_of_them())


def test_chunks_arrive_as_they_are_made_and_as_fast_as_they_are_read() -> None:
    taken = threading.Semaphore(0)
    made: list[int] = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])

        def chunks() -> Iterator[bytes]:
            for number in range(5):
                made.append(number)
                yield bytes([number])
                # The server gets each chunk before the next one is made.
                assert taken.acquire(timeout=60)

        return chunks()

    async def send(message: dict[str, Any]) -> None:
        if message.get("more_body"):
            assert made[-1] == message["body"][0]
            await asyncio.sleep(0)
            taken.release()

    asyncio.run(FlaskBridge(app)(GET, no_body, send))
    assert made == [0, 1, 2, 3, 4]


def messages(app: Callable[..., Any]) -> list[tuple[bytes, bool]]:
    """The body and more_body of each message after the start, which comes first and once."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(FlaskBridge(app)(GET, no_body, send))
    start, *rest = sent
    assert start["type"] == "http.response.start"
    assert {message["type"] for message in rest} == {"http.response.body"}
    return [(message["body"], message.get("more_body", False)) for message in rest]


IN_PIECES = [(b"abc", True), (b"def", True), (b"", False)]


def test_short_answer_is_sent_in_one_piece() -> None:
    for made, length, expected in (
        ([b"abc", b"def"], None, [(b"abcdef", False)]),
        (iter([b"abc", b"def"]), 6, [(b"abcdef", False)]),
        (iter([b"abc", b"def"]), SHORT, [(b"abcdef", False)]),
        (iter([b"abc", b"def"]), SHORT + 1, IN_PIECES),
        (iter([b"abc", b"def"]), None, IN_PIECES),
        (iter([]), None, [(b"", False)]),
    ):
        assert messages(responding(made, length)) == expected, (made, length)


def test_error_replaces_an_answer_that_has_not_begun_and_breaks_off_one_that_has() -> None:
    def fails(chunks: int) -> Callable[..., Any]:
        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            start_response("200 OK", [])
            for _ in range(chunks):
                yield b"abc"
            try:
                raise LookupError("late")
            except LookupError:
                start_response("500 Late", [], sys.exc_info())
            yield b"sorry"

        return app

    assert answer(fails(0)) == (500, [], b"sorry")
    assert answer(fails(1))[0] == "LookupError"


def test_request_whose_client_leaves_before_its_end_is_dropped() -> None:
    called = []
    messages = [
        {"type": "http.request", "body": b"ha", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(_: Any) -> None:
        called.append("send")

    def app(*_: Any) -> list[bytes]:
        called.append("app")
        return []

    asyncio.run(FlaskBridge(app)(GET, receive, send))
    assert called == []


who: contextvars.ContextVar[int] = contextvars.ContextVar("who")


def test_each_request_has_a_context_of_its_own() -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        before = who.get()
        who.set(-1)
        return [b"%d" % before]

    bridging = FlaskBridge(app)

    async def one(number: int) -> tuple[bytes, int]:
        who.set(number)
        return (await ask(bridging, GET, b""))[2], who.get()

    async def many() -> list[tuple[bytes, int]]:
        return await asyncio.gather(*map(one, range(200)))

    assert asyncio.run(many()) == [(b"%d" % number, number) for number in range(200)]

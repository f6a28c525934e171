"""The gate as an ASGI application around MLflow's. It decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from mlflow_hokusai_auth.core.prefixes import raw_without
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.upstream.fast_path import FastPath

from .flow import (
    WEBSOCKET,
    Answer,
    Arrival,
    Forward,
    ReadBody,
    Step,
    Unread,
    Wait,
    flow,
)
from .gate import Gate

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Seconds for which a process that ends waits for the last writes, because the store may stall.
MAX_END = 3.0

_log = logging.getLogger(__name__)


class AsgiGate:
    """Calls `app` for the lifespan and for requests that `gate` allows, and for nothing else.

    Requests that fit `fast_path` go there instead and get the same answer. Each of `at_end` is called
    when the server has stopped serving requests.
    """

    def __init__(
        self,
        app: ASGIApp,
        gate: Gate,
        fast_path: FastPath | None = None,
        at_end: Iterable[Callable[[], object]] = (),
    ) -> None:
        self._app = app
        self._gate = gate
        self._fast_path = fast_path
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._app(scope, receive, self._ending(send))
            return
        if kind not in ("http", "websocket"):
            raise RuntimeError(f"hokusai-auth refuses the scope type {kind!r}")
        began = time.perf_counter()
        client = scope.get("client")
        arrival = Arrival(
            scope["method"] if kind == "http" else WEBSOCKET,
            scope["path"],
            scope.get("query_string", b""),
            tuple(scope["headers"]),
            client[0] if client else "",
            began,
            bool(scope.get("root_path")),
        )
        steps = flow(self._gate, arrival)
        result: object = None
        while True:
            try:
                step = steps.send(result)
            except StopIteration as done:
                outcome: Forward | Answer = done.value
                break
            result, receive = await _take(step, scope, receive)
        if isinstance(outcome, Answer):
            await _answer(scope, receive, send, outcome)
            return
        inner = dict(scope)
        if outcome.exchange.prefix:
            inner["path"] = outcome.path
            inner["raw_path"] = raw_without(
                outcome.exchange.prefix, outcome.path, scope.get("raw_path")
            )
        inner["headers"] = outcome.headers
        caller = outcome.caller
        if caller.principal is not None:
            inner["state"] = {**scope.get("state", {}), "username": caller.principal.owner}
        callers.current.set(caller)
        app, fast = self._app, self._fast_path
        if fast is not None and fast.fits(outcome.allow.operation, outcome.exchange.request):
            app = fast.app
        try:
            await app(inner, receive, _reporting(send, outcome))
        except BaseException:
            outcome.end(broke_off=True)
            raise
        outcome.end()

    def _ending(self, send: Send) -> Send:
        """Return a `send` that calls `at_end` before the lifespan's last message.

        After that message uvicorn raises again the signal that stopped it, which kills the process.
        """

        async def sending(message: Message) -> None:
            if message["type"].startswith("lifespan.shutdown."):
                await self._finish()
            await send(message)

        return sending

    async def _finish(self) -> None:
        """Call each of `at_end`, and wait for at most `MAX_END` seconds."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def call() -> None:
            for last in self._at_end:
                try:
                    last()
                except Exception:
                    _log.exception("The last counts are lost")
            # If the loop is closed, nobody waits any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(ended.set)

        # The process doesn't wait for a daemon thread when it ends.
        threading.Thread(target=call, name="hokusai-auth-end", daemon=True).start()
        try:
            await asyncio.wait_for(ended.wait(), MAX_END)
        except asyncio.TimeoutError:
            _log.error("The last counts are lost: not written in %g s", MAX_END)


async def _take(step: Step, scope: Scope, receive: Receive) -> tuple[object, Receive]:
    """Take a step of the flow. Return its result, and the `receive` that gives MLflow the body."""
    if isinstance(step, Wait):
        waiting = asyncio.wrap_future(step.future)
        await asyncio.wait((waiting,), timeout=step.seconds)
        return waiting.result() if waiting.done() else None, receive
    if isinstance(step, ReadBody):
        return await _read(receive, step)
    # The scope is changed in place, because uvicorn's access log prints it afterwards.
    scope["query_string"] = step.query
    return None, receive


def _reporting(send: Send, forward: Forward) -> Send:
    """Return a `send` that adds the gate's headers and reports MLflow's answer to `forward`."""
    exchange = forward.exchange

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            sent = message.get("headers", ())
            status = message["status"]
            added = _encoded(forward.started(status, _content_type(sent, status)))
            message = {**message, "headers": [*sent, *added]}
        else:
            exchange.sent += len(message.get("body", b""))
        await send(message)

    return sending


async def _read(receive: Receive, step: ReadBody) -> tuple[bytes | Unread, Receive]:
    """Read the body. Return it or the reason, and a `receive` that gives the same messages again."""
    body = bytearray()
    #: The message that ended the reading: the last one of the body, or the client's disconnect.
    last: Message | None = None

    async def fill() -> None:
        nonlocal last
        while last is None and len(body) <= step.limit:
            message = await receive()
            body.extend(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body", False):
                last = message

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(fill(), step.seconds)
    whole = last is not None and last["type"] == "http.request"
    first: Message | None = {"type": "http.request", "body": bytes(body), "more_body": not whole}

    async def again() -> Message:
        nonlocal first
        message, first = first, None
        return message if message is not None else await receive()

    if len(body) > step.limit:
        return Unread.TOO_LARGE, again
    return bytes(body) if whole else Unread.INCOMPLETE, again


def _content_type(headers: Iterable[tuple[bytes, bytes]], status: int) -> str:
    # Only a 403 needs it: see `Exchange.host_refusal`.
    if status == 403:
        for name, value in headers:
            if name.lower() == b"content-type":
                return value.decode("latin-1")
    return ""


async def _answer(scope: Scope, receive: Receive, send: Send, answer: Answer) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = _encoded(answer.headers)
    try:
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})
    except Exception as error:
        # The server has answered already, because the body is malformed (uvicorn with h11), and closes
        # the connection. If this function returned before that, the server would log an error.
        _log.debug("An answer could not be sent: %s", type(error).__name__)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_until_left(receive), MAX_END)


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        # If the body is there already, `receive` returns at once, and nothing else would ever run.
        await asyncio.sleep(0)


def _encoded(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]

"""The gate as an ASGI application around MLflow's. Translates; decides nothing."""

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

#: Seconds that the end of a process waits for what is left to do, as the store may stall.
MAX_END = 3.0

_log = logging.getLogger(__name__)


class AsgiGate:
    """Calls `app` for requests that `gate` allows, and for the lifespan; for nothing else.

    What `shortcut` fits it calls instead, which answers the same. Each of `at_end` is called once no
    request is served any more.
    """

    def __init__(
        self,
        app: ASGIApp,
        gate: Gate,
        shortcut: FastPath | None = None,
        at_end: Iterable[Callable[[], object]] = (),
    ) -> None:
        self._app = app
        self._gate = gate
        self._shortcut = shortcut
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._app(scope, receive, self._ending(send))
        elif kind == "http":
            await self._serve(scope, receive, send, scope["method"])
        elif kind == "websocket":
            await self._serve(scope, receive, send, WEBSOCKET)
        else:
            raise RuntimeError(f"hokusai-auth refuses the scope type {kind!r}")

    def _ending(self, send: Send) -> Send:
        """`send`, after `at_end` at the end: uvicorn lets the signal that ended it kill the process."""

        async def sending(message: Message) -> None:
            if message["type"].startswith("lifespan.shutdown."):
                await self._finish()
            await send(message)

        return sending

    async def _finish(self) -> None:
        """Call each of `at_end`, and wait `MAX_END` seconds at most."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def call() -> None:
            for last in self._at_end:
                try:
                    last()
                except Exception:
                    _log.exception("What was counted last is lost")
            # Else nobody waits any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(ended.set)

        # A daemon, for which the end of the process does not wait.
        threading.Thread(target=call, name="hokusai-auth-end", daemon=True).start()
        try:
            await asyncio.wait_for(ended.wait(), MAX_END)
        except asyncio.TimeoutError:
            _log.error("What was counted last is lost: not written in %g s", MAX_END)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, method: str) -> None:
        began = time.perf_counter()
        client = scope.get("client")
        arrival = Arrival(
            method,
            scope["path"],
            scope.get("query_string", b""),
            tuple(scope["headers"]),
            client[0] if client else "",
            began,
            bool(scope.get("root_path")),
        )
        way = flow(self._gate, arrival)
        result: object = None
        while True:
            try:
                step = way.send(result)
            except StopIteration as done:
                found: Forward | Answer = done.value
                break
            result, receive = await _do(step, scope, receive)
        if isinstance(found, Answer):
            await _answer(scope, receive, send, found)
            return
        inner = dict(scope)
        if found.exchange.prefix:
            inner["path"] = found.path
            inner["raw_path"] = raw_without(
                found.exchange.prefix, found.path, scope.get("raw_path")
            )
        inner["headers"] = found.headers
        caller = found.caller
        if caller.principal is not None:
            inner["state"] = {**scope.get("state", {}), "username": caller.principal.owner}
        callers.current.set(caller)
        short = self._shortcut
        fits = short is not None and short.fits(found.allow.operation, found.exchange.request)
        app = short.app if short is not None and fits else self._app
        try:
            await app(inner, receive, _reporting(send, found))
        except BaseException:
            found.over(broke_off=True)
            raise
        found.over()


async def _do(step: Step, scope: Scope, receive: Receive) -> tuple[object, Receive]:
    """Do what the flow asks for: its result, and from where MLflow receives the body."""
    if isinstance(step, Wait):
        waiting = asyncio.wrap_future(step.future)
        await asyncio.wait((waiting,), timeout=step.seconds)
        return waiting.result() if waiting.done() else None, receive
    if isinstance(step, ReadBody):
        return await _read(receive, step)
    # In place, because uvicorn's access log prints this very scope afterwards.
    scope["query_string"] = step.query
    return None, receive


def _reporting(send: Send, forward: Forward) -> Send:
    """`send`, with the gate's headers; reports to `forward` how MLflow answers."""
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
    """The body or why there is none, and a `receive` that gives again what was read."""
    body = bytearray()
    #: The message that ended the reading: the body's last one, or that the client left.
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
    # Looked up only where it tells something.
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
        pass


def _encoded(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]

"""The gate as an ASGI application around MLflow's. Translates; decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any

from mlflow_hokusai_auth.core.credentials import without_query_key
from mlflow_hokusai_auth.core.denials import Refusal
from mlflow_hokusai_auth.core.forwarding import dropped, identity
from mlflow_hokusai_auth.core.types import Allow, Deny, NeedKey, Request

from . import graphql, observe
from . import identity as caller
from .aliases import raw_without, slash_location
from .gate import MISMOUNTED, TOO_LARGE, Gate, any_query, body_limit, read_graphql
from .observe import Exchange, request_id
from .shortcut import Shortcut

#: Seconds that the end of a process waits for what is left to do, as the store may stall.
MAX_END = 3.0

_log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class AsgiGate:
    """Calls `app` for requests that `gate` allows, and for the lifespan; for nothing else.

    What `shortcut` fits it calls instead, which answers the same. Each of `at_end` is called once no
    request is served any more.
    """

    def __init__(
        self,
        app: App,
        gate: Gate,
        shortcut: Shortcut | None = None,
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
            # No route of MLflow's is a websocket, so this asks for what an unknown route does.
            await self._serve(scope, receive, send, "WEBSOCKET")
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
        query: bytes = scope.get("query_string", b"")
        # In place, because uvicorn's access log prints this very scope afterwards.
        scope["query_string"] = without_query_key(query)
        prefix, path = self._gate.prefixes.split(scope["path"])
        request = Request(method, path or "/", query, tuple(scope["headers"]), self._address(scope))
        exchange = Exchange(request, prefix, request_id(request.headers), began)
        if scope.get("root_path"):
            verdict: Allow | Deny = MISMOUNTED
        else:
            verdict, receive = await self._verdict(request, receive)
        verdict = self._gate.conclude(exchange, verdict)
        if isinstance(verdict, Deny):
            refusal = self._gate.refusal(exchange, verdict, "" if path else prefix)
            await _refuse(scope, send, refusal, method)
        elif prefix and not path and scope["type"] == "http":
            exchange.status = 308
            self._gate.observer.over(exchange)
            query = scope["query_string"]
            await _redirect(send, slash_location(prefix), query, self._gate.marks(exchange))
        else:
            inner = dict(scope)
            if prefix:
                inner["path"] = path
                inner["raw_path"] = raw_without(prefix, path, scope.get("raw_path"))
            headers: list[tuple[bytes, bytes]] = scope["headers"]
            gone = dropped([name for name, _ in headers], verdict, self._gate.headers)
            kept = [item for item in headers if item[0] not in gone] if gone else headers
            inner["headers"] = [*kept, *identity(verdict), *exchange.added]
            if self._gate.debug_headers:
                observe.show_headers(exchange, inner["headers"])
            if verdict.principal is not None:
                inner["state"] = {**scope.get("state", {}), "username": verdict.principal.owner}
            caller.current.set(
                caller.Caller(
                    verdict.principal, request.address, exchange.request_id, exchange.answer
                )
            )
            exchange.passed = True
            short = self._shortcut
            app = short.app if short and short.fits(verdict.operation, request) else self._app
            try:
                await app(inner, receive, self._answering(send, exchange, verdict))
            except BaseException:
                exchange.broke_off = True
                raise
            finally:
                self._gate.observer.over(exchange)

    def _answering(self, send: Send, exchange: Exchange, allow: Allow) -> Send:
        """`send`, with the gate's headers; tells `exchange` how MLflow answers."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent = message.get("headers", ())
                exchange.started(message["status"], _content_type(sent, message["status"]))
                added = _encoded(self._gate.response_headers(exchange, allow))
                message = {**message, "headers": [*sent, *added]}
            else:
                exchange.sent += len(message.get("body", b""))
            await send(message)

        return sending

    async def _verdict(self, request: Request, receive: Receive) -> tuple[Allow | Deny, Receive]:
        """The verdict, and from where MLflow receives the body."""
        step = self._gate.plan(request)
        if not isinstance(step, NeedKey):
            if limit := body_limit(step):
                body, receive = await _read(receive, limit)
                return (TOO_LARGE if body is None else step), receive
            return step, receive
        query = any_query(step)
        verdict = await self._settle(query or step)
        if query is not None and isinstance(verdict, Allow):
            body, receive = await _read(receive, graphql.MAX_BODY)
            verdict = read_graphql(step, verdict, body, self._gate.policy)
        return verdict, receive

    async def _settle(self, need: NeedKey) -> Allow | Deny:
        known = self._gate.peek(need)
        if known is not None:
            return known
        asked = asyncio.wrap_future(self._gate.begin(need))
        await asyncio.wait((asked,), timeout=self._gate.lookups.patience)
        return asked.result() if asked.done() else self._gate.late()

    def _address(self, scope: Scope) -> str:
        client = scope.get("client")
        return self._gate.address(client[0] if client else "", scope["headers"])


async def _read(receive: Receive, limit: int) -> tuple[bytes | None, Receive]:
    """The body, None if it has more than `limit` bytes, and a `receive` that gives it again."""
    messages: list[Message] = []
    body = b""
    while len(body) <= limit:
        message = await receive()
        messages.append(message)
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break

    async def again() -> Message:
        return messages.pop(0) if messages else await receive()

    return body if len(body) <= limit else None, again


def _content_type(headers: Iterable[tuple[bytes, bytes]], status: int) -> str:
    # Looked up only where it tells something.
    if status != 403:
        return ""
    found = {name.lower(): value for name, value in headers}
    return found.get(b"content-type", b"").decode("latin-1")


async def _refuse(scope: Scope, send: Send, refusal: Refusal, method: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = _encoded(refusal.headers)
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    body = b"" if method == "HEAD" else refusal.body
    await send({"type": "http.response.body", "body": body})


def _encoded(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]


async def _redirect(
    send: Send, location: str, query: bytes, added: Sequence[tuple[str, str]]
) -> None:
    headers = [
        (b"location", location.encode("ascii") + (b"?" + query if query else b"")),
        (b"content-length", b"0"),
        *_encoded(added),
    ]
    await send({"type": "http.response.start", "status": 308, "headers": headers})
    await send({"type": "http.response.body", "body": b""})

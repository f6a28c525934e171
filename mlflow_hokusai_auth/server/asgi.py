"""The gate as an ASGI application around MLflow's. Translates; decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlflow_hokusai_auth.core.credentials import without_query_key
from mlflow_hokusai_auth.core.denials import Refusal
from mlflow_hokusai_auth.core.forwarding import dropped, identity
from mlflow_hokusai_auth.core.types import Allow, Deny, NeedKey, Request

from . import identity as caller
from .aliases import raw_without, slash_location
from .gate import MISMOUNTED, Gate

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Threads that wait for the key authority. Their own pool, so that a slow authority can't take the
#: threads in which MLflow works.
LOOKUP_THREADS = 8


class AsgiGate:
    """Calls `app` for requests that `gate` allows, and for the lifespan; for nothing else."""

    def __init__(self, app: App, gate: Gate) -> None:
        self._app = app
        self._gate = gate
        self._threads = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="hokusai-auth")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._app(scope, receive, send)
        elif kind == "http":
            await self._serve(scope, receive, send, scope["method"])
        elif kind == "websocket":
            # No route of MLflow's is a websocket, so this asks for what an unknown route does.
            await self._serve(scope, receive, send, "WEBSOCKET")
        else:
            raise RuntimeError(f"hokusai-auth refuses the scope type {kind!r}")

    async def _serve(self, scope: Scope, receive: Receive, send: Send, method: str) -> None:
        query: bytes = scope.get("query_string", b"")
        # In place, because uvicorn's access log prints this very scope afterwards.
        scope["query_string"] = without_query_key(query)
        prefix, path = self._gate.prefixes.split(scope["path"])
        verdict = await self._verdict(
            scope, Request(method, path or "/", query, tuple(scope["headers"]))
        )
        if isinstance(verdict, Deny):
            origin = dict(scope["headers"]).get(b"origin", b"").decode("latin-1")
            await _refuse(scope, send, self._gate.refusal(verdict, origin), method)
        elif prefix and not path and scope["type"] == "http":
            await _redirect(send, slash_location(prefix), scope["query_string"])
        else:
            inner = dict(scope)
            if prefix:
                inner["path"] = path
                inner["raw_path"] = raw_without(prefix, path, scope.get("raw_path"))
            inner["headers"] = [
                item for item in scope["headers"] if not dropped(item[0], verdict)
            ] + list(identity(verdict))
            if verdict.principal is not None:
                inner["state"] = {**scope.get("state", {}), "username": verdict.principal.owner}
            caller.current.set(verdict.principal)
            await self._app(inner, receive, send)

    async def _verdict(self, scope: Scope, request: Request) -> Allow | Deny:
        if scope.get("root_path"):
            return MISMOUNTED
        step = self._gate.plan(request)
        if not isinstance(step, NeedKey):
            return step
        known = self._gate.peek(step)
        if known is not None:
            return known
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._gate.ask, step)


async def _refuse(scope: Scope, send: Send, refusal: Refusal, method: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [
        (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in refusal.headers
    ]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    body = b"" if method == "HEAD" else refusal.body
    await send({"type": "http.response.body", "body": body})


async def _redirect(send: Send, location: str, query: bytes) -> None:
    target = location.encode("ascii") + (b"?" + query if query else b"")
    headers = [(b"location", target), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 308, "headers": headers})
    await send({"type": "http.response.body", "body": b""})

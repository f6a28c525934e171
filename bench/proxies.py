"""Alternatives in front of MLflow: an application that checks keys, and one that also forwards.

They run in the environment of the peers, without this package, and look each request's key up in SQLite
by its SHA-256. The first answers nginx's `auth_request`. The second is like the proxy that the gate
replaced: it holds a request's body whole and streams the answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import AsyncIterator

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_DROPPED = {"host", "x-api-key", "connection", "transfer-encoding"}
_keys = sqlite3.connect(f"file:{os.environ['BENCH_KEYS']}?mode=ro", uri=True)
_mlflow = httpx.AsyncClient(base_url=os.environ["BENCH_MLFLOW"], timeout=None)


@contextlib.asynccontextmanager
async def _lifespan(_: FastAPI) -> AsyncIterator[None]:
    yield
    await _mlflow.aclose()


check = FastAPI(openapi_url=None)
proxy = FastAPI(openapi_url=None, lifespan=_lifespan)


def _known(request: Request) -> bool:
    digest = hashlib.sha256(request.headers.get("x-api-key", "").encode()).hexdigest()
    return _keys.execute("SELECT 1 FROM keys WHERE digest = ?", [digest]).fetchone() is not None


@check.get("/health")
@proxy.get("/health")
async def health() -> str:
    return "OK"


@check.get("/")
async def verdict(request: Request) -> Response:
    return Response(status_code=200 if _known(request) else 401)


@proxy.api_route("/{path:path}", methods=_METHODS)
async def forward(request: Request) -> Response:
    if not _known(request):
        return Response('{"detail":"Invalid API key"}', 401, media_type="application/json")
    target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    headers = [pair for pair in request.headers.items() if pair[0] not in _DROPPED]
    asked = _mlflow.build_request(
        request.method, target, headers=headers, content=await request.body()
    )
    answer = await _mlflow.send(asked, stream=True)
    return StreamingResponse(
        answer.aiter_raw(),
        answer.status_code,
        {name: value for name, value in answer.headers.items() if name not in _DROPPED},
        background=BackgroundTask(answer.aclose),
    )

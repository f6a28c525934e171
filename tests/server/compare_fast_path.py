"""Compares each Flask route of MLflow through its whole application and through the shortcut.

It is a program, as an MLflow application keeps its store until the process ends. It prints JSON: the
number of comparisons, and the differences.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

GOOD, BAD = b"127.0.0.1:5000", b"evil.example"
HOSTS = (GOOD, BAD, None)
ORIGINS = (
    None,
    b"http://localhost:3000",
    b"https://allowed.example",
    b"https://evil.example",
    b"null",
)
#: Whose answers name what is made at random: only status and headers are compared.
RANDOM = ("/mlflow/runs/create", "/mlflow/traces")
#: Which makes something, in as many goes as parts of it fail at random, and then answers the same.
ONCE = ("/mlflow/demo/generate",)
#: What a browser may ask before a request of another origin.
PREFLIGHT = [(b"access-control-request-method", b"POST")]


async def ask(app: Any, scope: dict[str, Any], body: bytes) -> tuple[Any, ...]:
    """Return status, headers and body of the response, or the exception."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[dict[str, Any]] = []
    over = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    try:
        await app(dict(scope), receive, send)
    except Exception as error:
        return type(error).__name__, [], str(error).encode()
    finally:
        over.set()
    headers = sorted((bytes(n), bytes(v)) for n, v in sent[0]["headers"] if n != b"date")
    return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:])


async def settle(app: Any, scope: dict[str, Any], body: bytes) -> None:
    """Repeat the request, at most 50 times, until two responses in a row are equal and no failure."""
    before = None
    for _ in range(50):
        now = await ask(app, scope, body)
        if now == before and now[0] != 500:
            return
        before = now


def without_body(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    status, headers, body = answer
    return status, [header for header in headers if header[0] != b"content-length"], bool(body)


def scopes() -> Any:
    """Yield requests for every route, with Hosts and Origins that MLflow accepts and refuses."""
    from mlflow_hokusai_auth.server.upstream.routes import installed_routes, template

    pairs = list(itertools.product(HOSTS, ORIGINS))
    for number, (method, rule, _) in enumerate(installed_routes()):
        path = re.sub(r"\{\w+(:path)?\}", "1", template(rule))
        # The first pair reaches the route. Each route also gets four of the other pairs in turn, which
        # the middlewares in front of all routes handle.
        others = [pairs[1 + (4 * number + turn) % (len(pairs) - 1)] for turn in range(4)]
        for host, origin in (pairs[0], *others):
            for asked in {method, "HEAD" if method == "GET" else method, "OPTIONS"}:
                headers = [(b"host", host)] if host is not None else []
                headers += [(b"origin", origin)] if origin is not None else []
                if asked == "OPTIONS" and host == GOOD:
                    headers += PREFLIGHT
                body = b"{}" if asked in ("POST", "PATCH", "PUT", "DELETE") else b""
                if body:
                    headers += [(b"content-type", b"application/json"), (b"content-length", b"2")]
                yield (
                    {
                        "type": "http",
                        "asgi": {"version": "3.0"},
                        "http_version": "1.1",
                        "method": asked,
                        "scheme": "http",
                        "path": path,
                        "raw_path": path.encode(),
                        "query_string": b"",
                        "root_path": "",
                        "headers": headers,
                        "client": ("127.0.0.1", 1),
                        "server": ("127.0.0.1", 5000),
                        "state": {},
                    },
                    body,
                )


async def compare() -> dict[str, Any]:
    from mlflow.server import app as flask_app
    from mlflow.server.fastapi_app import create_fastapi_app

    from mlflow_hokusai_auth.core.operations import classify
    from mlflow_hokusai_auth.core.types import Request
    from mlflow_hokusai_auth.server.upstream import fast_path

    whole = create_fastapi_app(flask_app)
    short = fast_path.build(whole, flask_app)
    if short is None:
        return {"built": False}
    compared, differing, statuses = 0, [], set()
    for scope, body in scopes():
        request = Request(scope["method"], scope["path"], b"", tuple(scope["headers"]))
        if not short.fits(classify(request.method, request.path), request):
            continue
        if scope["path"].endswith(ONCE):
            await settle(whole, scope, body)
        expected, found = await ask(whole, scope, body), await ask(short.app, scope, body)
        if scope["path"].endswith(RANDOM):
            expected, found = without_body(expected), without_body(found)
        compared += 1
        statuses.add(expected[0])
        if expected != found:
            differing.append([scope["method"], scope["path"], repr(scope["headers"])])
            differing[-1] += [repr(expected)[:600], repr(found)[:600]]
    return {
        "built": True,
        "compared": compared,
        "rules": len(short._rules),
        "statuses": sorted(map(str, statuses)),
        "differing": differing,
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    folder = Path(sys.argv[1])
    os.environ["_MLFLOW_SERVER_FILE_STORE"] = f"sqlite:///{folder}/mlflow.db"
    os.environ["_MLFLOW_SERVER_REGISTRY_STORE"] = f"sqlite:///{folder}/mlflow.db"
    os.environ["_MLFLOW_SERVER_ARTIFACT_DESTINATION"] = str(folder / "artifacts")
    os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = "mlflow-artifacts:/"
    os.environ["_MLFLOW_SERVER_SERVE_ARTIFACTS"] = "true"
    os.environ["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] = sys.argv[2]
    print(json.dumps(asyncio.run(compare())))

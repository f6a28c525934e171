"""A bridge from ASGI to a WSGI application (PEP 3333). A short answer takes one hop to a thread.

Starlette's bridge, which MLflow uses, is deprecated. It takes a task, a stream and three hops.
"""

from __future__ import annotations

import asyncio
import contextvars
import io
import sys
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication
    from starlette.types import Message, Receive, Scope, Send

#: The number of threads, as in Starlette's bridge.
THREADS = 40
#: The largest answer, in bytes, that is sent in one piece if it has a Content-Length.
SHORT = 65536

Headers = list[tuple[bytes, bytes]]


class FlaskBridge:
    """Calls `app` in a thread for each request when its whole body has arrived.

    No thread waits for a client: each chunk of a longer answer is fetched after the last one is sent.
    """

    def __init__(self, app: WSGIApplication) -> None:
        self._app = app
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="hokusai-auth-flask")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        chunks: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunks.append(message.get("body", b""))
            if not message.get("more_body", False):
                break
        steps = self._steps(environ_of(scope, b"".join(chunks)))
        del chunks
        # The context holds the caller.
        run = contextvars.copy_context().run
        loop = asyncio.get_running_loop()
        more = True
        left: asyncio.Future[Message] | None = None
        try:
            while more and not (left is not None and _has_left(left)):
                for message in await loop.run_in_executor(self._threads, run, next, steps):
                    await send(message)
                    more = message.get("more_body", False)
                if more and left is None:
                    # The whole request has arrived, so the next message is the client's disconnect.
                    left = asyncio.ensure_future(receive())
        except asyncio.CancelledError:
            more = False  # a thread may still run the generator, which closes when that ends
            raise
        finally:
            if left is not None:
                left.cancel()
            if more:
                await loop.run_in_executor(self._threads, run, steps.close)

    def _steps(self, environ: dict[str, Any]) -> Generator[list[Message], None, None]:
        """Call the application. Yield the messages of its answer; only the last has no `more_body`."""
        start: Message = {"type": "http.response.start"}
        begun = False

        def start_response(
            status: str, headers: list[tuple[str, str]], exc_info: Any = None
        ) -> Any:
            if exc_info and begun:
                raise exc_info[1].with_traceback(exc_info[2])
            start["status"] = int(status.split(None, 1)[0])
            start["headers"] = [
                (name.strip().lower().encode("latin-1"), value.strip().encode("latin-1"))
                for name, value in headers
            ]

        answer: Iterable[bytes] = self._app(environ, start_response)
        try:
            body = b""
            if isinstance(answer, (list, tuple)) or _is_short(start.get("headers", [])):
                body = b"".join(answer)
            else:
                for chunk in answer:
                    message = {"type": "http.response.body", "body": chunk, "more_body": True}
                    first, begun = not begun, True
                    yield [start, message] if first else [message]
        finally:
            if close := getattr(answer, "close", None):
                close()
        last: Message = {"type": "http.response.body", "body": body}
        yield [last] if begun else [start, last]


def _has_left(message: asyncio.Future[Message]) -> bool:
    return message.done() and message.result()["type"] == "http.disconnect"


def environ_of(scope: Scope, body: bytes) -> dict[str, Any]:
    """Return the WSGI environ of an HTTP request whose `root_path` is empty."""
    server = scope.get("server") or ("localhost", 80)
    environ: dict[str, Any] = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": "",
        "PATH_INFO": scope["path"].encode("utf-8").decode("latin-1"),
        "QUERY_STRING": scope["query_string"].decode("latin-1"),
        "SERVER_PROTOCOL": f"HTTP/{scope['http_version']}",
        "SERVER_NAME": server[0],
        "SERVER_PORT": str(server[1]),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope.get("scheme", "http"),
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    if scope.get("client"):
        environ["REMOTE_ADDR"] = scope["client"][0]
    for name, value in scope["headers"]:
        variable, text = _variable(name), value.decode("latin-1")
        environ[variable] = f"{environ[variable]},{text}" if variable in environ else text
    return environ


def _variable(name: bytes) -> str:
    # Clients choose the names, so the cache keeps only short ones.
    return _short_variable(name) if len(name) <= 64 else _spelt(name)


def _spelt(name: bytes) -> str:
    variable = name.decode("latin-1").upper().replace("-", "_")
    return variable if name in (b"content-type", b"content-length") else f"HTTP_{variable}"


_short_variable = lru_cache(maxsize=1024)(_spelt)


def _is_short(headers: Headers) -> bool:
    length = dict(headers).get(b"content-length", b"")
    return length.isdigit() and int(length) <= SHORT

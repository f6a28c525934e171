"""The gate as a WSGI application around MLflow's Flask app. It decides nothing."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from mlflow_hokusai_auth.server import caller

from .flow import (
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
    from _typeshed.wsgi import StartResponse, WSGIApplication

    Environ = dict[str, Any]


def wsgi_gate(
    app: WSGIApplication, gate: Gate, begin: Callable[[], object] = lambda: None
) -> WSGIApplication:
    """Return `app` behind `gate`, at the root and under every prefix.

    `begin` is called once, before the first request. It may start threads. The process that assembles
    the application must not, because with gunicorn's --preload it forks: each worker would inherit, for
    good, the locks that a thread holds at that moment, also those of SQLite and of imports.
    """
    begun, beginning = threading.Event(), threading.Lock()

    def entry(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        began = time.perf_counter()
        if not begun.is_set():
            with beginning:
                if not begun.is_set():
                    begin()
                    begun.set()
        # A SCRIPT_NAME from the client would hide part of the path from the gate or from MLflow.
        path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        arrival = Arrival(
            environ["REQUEST_METHOD"],
            path.encode("latin-1").decode("utf-8", "replace"),
            environ.get("QUERY_STRING", "").encode("latin-1"),
            _headers(environ),
            environ.get("REMOTE_ADDR", ""),
            began,
        )
        steps = flow(gate, arrival)
        result: object = None
        while True:
            try:
                step = steps.send(result)
            except StopIteration as done:
                outcome: Forward | Answer = done.value
                break
            result = _take(step, environ)
        if isinstance(outcome, Answer):
            start_response(_status(outcome.status), list(outcome.headers))
            return [outcome.body] if outcome.body else []
        environ["SCRIPT_NAME"] = outcome.exchange.prefix
        # A prefix is ASCII, so its length is the same in characters and in bytes.
        environ["PATH_INFO"] = path[len(outcome.exchange.prefix) :]
        for name in outcome.removed:
            del environ[_variable(name)]
        for name, value in outcome.added:
            environ[_variable(name)] = value.decode("ascii")
        return _forward(app, environ, start_response, outcome)

    return entry


def _take(step: Step, environ: Environ) -> object:
    """Take a step of the flow, and return its result."""
    if isinstance(step, Wait):
        return step.block()
    if isinstance(step, ReadBody):
        return _read(environ, step)
    _set_query(environ, step.query.decode("latin-1"))
    return None


def _forward(
    app: WSGIApplication, environ: Environ, start_response: StartResponse, forward: Forward
) -> Iterable[bytes]:
    """Return MLflow's answer, and report it to `forward`."""

    def starting(status: str, sent: list[tuple[str, str]], *exc_info: Any) -> Any:
        headers = {name.lower(): value for name, value in sent}
        added = forward.started(int(status.split()[0]), headers.get("content-type", ""))
        length = headers.get("content-length", "")
        forward.exchange.sent = int(length) if length.isdecimal() else 0
        return start_response(status, [*sent, *added], *exc_info)

    def end(*, broke_off: bool = False) -> None:
        # The thread serves other requests next.
        caller.current.set(caller.NOBODY)
        forward.end(broke_off=broke_off)

    caller.current.set(forward.caller)
    try:
        answer: Iterable[bytes] = app(environ, starting)
    except BaseException:
        end(broke_off=True)
        raise
    # The server sends a file by itself if it sees the wrapper. No code of MLflow's runs meanwhile.
    file: type = environ.get("wsgi.file_wrapper", type(None))
    if isinstance(answer, file):
        end()
        return answer
    return _Answer(answer, end)


class _Answer:
    """MLflow's answer. When the server closes it, `end` is called, even if MLflow's `close` raises."""

    def __init__(self, answer: Iterable[bytes], end: Callable[[], object]) -> None:
        self._answer = answer
        self._end = end

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._answer)

    def close(self) -> None:
        """Close MLflow's answer. The server calls this also if it stops before the end (PEP 3333)."""
        try:
            if close := getattr(self._answer, "close", None):
                close()
        finally:
            self._end()


def _read(environ: Environ, step: ReadBody) -> bytes | Unread:
    """Read the body, so that MLflow can read it again. Return it or the reason why there is none."""
    length = environ.get("CONTENT_LENGTH") or "0"
    # A chunked body has no length, and Python refuses to convert a number of thousands of digits.
    if environ.get("HTTP_TRANSFER_ENCODING") or not length.isdecimal() or len(length) > 12:
        return Unread.TOO_LARGE
    if int(length) > step.limit:
        return Unread.TOO_LARGE
    with _deadline(environ, step.seconds):
        try:
            body: bytes = environ["wsgi.input"].read(int(length))
        except OSError:  # the client disconnected
            body = b""
    if len(body) < int(length):
        return Unread.INCOMPLETE
    environ["wsgi.input"] = io.BytesIO(body)
    return body


@contextlib.contextmanager
def _deadline(environ: Environ, seconds: float) -> Iterator[None]:
    """End reading from the client after `seconds`, if the server gives its socket.

    gunicorn does. Otherwise its worker would wait in `read` until gunicorn's own timeout kills it.
    waitress calls the application only when the whole body has arrived.
    """
    connection = environ.get("gunicorn.socket")
    # Shutting down a TLS socket would end the encryption of the answer as well.
    if type(connection) is not socket.socket:
        yield
        return

    def end() -> None:
        with contextlib.suppress(OSError):  # the socket is closed already
            connection.shutdown(socket.SHUT_RD)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _headers(environ: Environ) -> tuple[tuple[bytes, bytes], ...]:
    headers = [
        (name[5:].replace("_", "-").lower().encode("latin-1"), value.encode("latin-1"))
        for name, value in environ.items()
        if name.startswith("HTTP_")
    ]
    if environ.get("CONTENT_LENGTH"):
        headers.append((b"content-length", environ["CONTENT_LENGTH"].encode("latin-1")))
    return tuple(headers)


def _variable(name: bytes) -> str:
    return "HTTP_" + name.decode("latin-1").upper().replace("-", "_")


def _set_query(environ: Environ, query: str) -> None:
    """Replace the query wherever the environ repeats it, for the server's access log."""
    environ["QUERY_STRING"] = query
    for name in ("RAW_URI", "REQUEST_URI"):
        if name in environ:
            environ[name] = environ[name].partition("?")[0] + (f"?{query}" if query else "")


def _status(code: int) -> str:
    return f"{code} {HTTPStatus(code).phrase}"

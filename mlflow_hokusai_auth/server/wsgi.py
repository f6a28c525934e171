"""The gate as a WSGI application around MLflow's Flask app. Translates; decides nothing."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from werkzeug.middleware.dispatcher import DispatcherMiddleware

from mlflow_hokusai_auth.core.credentials import without_query_key
from mlflow_hokusai_auth.core.forwarding import dropped, identity
from mlflow_hokusai_auth.core.types import Allow, Deny, NeedKey, Request

from . import graphql, observe
from . import identity as caller
from .aliases import slash_location
from .gate import TOO_LARGE, Gate, any_query, body_limit, read_graphql
from .observe import Exchange, request_id

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication

    Environ = dict[str, Any]


def wsgi_gate(app: WSGIApplication, gate: Gate, prefixes: Iterable[str]) -> WSGIApplication:
    """`app` behind `gate`, at the root and under every prefix."""
    guarded = _WsgiGate(app, gate)
    dispatcher = DispatcherMiddleware(guarded, dict.fromkeys(prefixes, guarded))

    def entry(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        # A SCRIPT_NAME from outside would hide part of the path from the gate or from MLflow; the
        # dispatcher is the only one to split the path.
        environ["PATH_INFO"] = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        environ["SCRIPT_NAME"] = ""
        query = environ.get("QUERY_STRING", "").encode("latin-1")
        environ["hokusai.query"] = query
        _set_query(environ, query, without_query_key(query))
        if not environ["PATH_INFO"].startswith("/"):
            # `OPTIONS *`, or `GET x/health`: the dispatcher would take `x` for a prefix.
            return guarded(environ, start_response)
        return dispatcher(environ, start_response)

    return entry


class _WsgiGate:
    def __init__(self, app: WSGIApplication, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        began = time.perf_counter()
        prefix, path = environ["SCRIPT_NAME"], environ["PATH_INFO"]
        headers = _headers(environ)
        request = Request(
            environ["REQUEST_METHOD"],
            path.encode("latin-1").decode("utf-8", "replace") or "/",
            environ.pop("hokusai.query"),
            tuple(headers.items()),
            self._gate.address(environ.get("REMOTE_ADDR", ""), headers.items()),
        )
        exchange = Exchange(request, prefix, request_id(request.headers), began)
        verdict = self._gate.conclude(exchange, self._verdict(request, environ))
        if isinstance(verdict, Deny):
            refusal = self._gate.refusal(exchange, verdict, "" if path else prefix)
            start_response(_status(refusal.status), list(refusal.headers))
            return [] if request.method == "HEAD" else [refusal.body]
        if prefix and not path:
            query = environ["QUERY_STRING"]
            location = slash_location(prefix) + (f"?{query}" if query else "")
            exchange.status = 308
            self._gate.observer.over(exchange)
            told = [("Location", location), ("Content-Length", "0")]
            start_response(_status(308), [*told, *self._gate.marks(exchange)])
            return []
        for name in dropped(headers, verdict, self._gate.headers):
            del environ[_variable(name)]
        for name, value in (*identity(verdict), *exchange.added):
            environ[_variable(name)] = value.decode("ascii")
        if self._gate.debug_headers:
            observe.show_headers(exchange, tuple(_headers(environ).items()))
        caller.current.set(
            caller.Caller(verdict.principal, request.address, exchange.request_id, exchange.answer)
        )
        exchange.passed = True
        try:
            answering = self._answering(start_response, exchange, verdict)
            answer: Iterable[bytes] = self._app(environ, answering)
        except BaseException:
            exchange.broke_off = True
            self._over(exchange)
            raise
        # A file is sent by the server itself, which must see that it is one. No code of MLflow's runs
        # for that.
        file: type = environ.get("wsgi.file_wrapper", type(None))
        if isinstance(answer, file):
            self._over(exchange)
            return answer
        return _Answer(answer, lambda: self._over(exchange))

    def _over(self, exchange: Exchange) -> None:
        """End the request: what this thread runs from here on is no longer the caller's."""
        caller.current.set(caller.NOBODY)
        self._gate.observer.over(exchange)

    def _verdict(self, request: Request, environ: Environ) -> Allow | Deny:
        step = self._gate.plan(request)
        if not isinstance(step, NeedKey):
            if limit := body_limit(step):
                return step if _read(environ, limit) is not None else TOO_LARGE
            return step
        query = any_query(step)
        verdict = self._gate.decide(query or step)
        if query is not None and isinstance(verdict, Allow):
            body = _read(environ, graphql.MAX_BODY)
            verdict = read_graphql(step, verdict, body, self._gate.policy)
        return verdict

    def _answering(
        self, start_response: StartResponse, exchange: Exchange, allow: Allow
    ) -> StartResponse:
        """`start_response`, with the gate's headers; tells `exchange` how MLflow answers."""

        def starting(status: str, sent: list[tuple[str, str]], *exc_info: Any) -> Any:
            found = {name.lower(): value for name, value in sent}
            exchange.started(int(status.split()[0]), found.get("content-type", ""))
            length = found.get("content-length", "")
            exchange.sent = int(length) if length.isdecimal() else 0
            added = self._gate.response_headers(exchange, allow)
            return start_response(status, [*sent, *added], *exc_info)

        return starting


class _Answer:
    """What MLflow answers; `over` is called when the server closes it, also if MLflow fails at that."""

    def __init__(self, answer: Iterable[bytes], over: Callable[[], object]) -> None:
        self._answer = answer
        self._over = over

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._answer)

    def close(self) -> None:
        """Called by the server after the last part, or instead of it (PEP 3333)."""
        try:
            if close := getattr(self._answer, "close", None):
                close()
        finally:
            self._over()


def _read(environ: Environ, limit: int) -> bytes | None:
    """The body, which can be read again afterwards; None if it may have more than `limit` bytes."""
    length = environ.get("CONTENT_LENGTH") or "0"
    # Chunked has no length; and of a number that long, Python would not make one.
    if environ.get("HTTP_TRANSFER_ENCODING") or not length.isdecimal() or len(length) > 12:
        return None
    if int(length) > limit:
        return None
    body: bytes = environ["wsgi.input"].read(int(length))
    environ["wsgi.input"] = io.BytesIO(body)
    return body


def _headers(environ: Environ) -> dict[bytes, bytes]:
    headers = {
        name[5:].replace("_", "-").lower().encode("latin-1"): value.encode("latin-1")
        for name, value in environ.items()
        if name.startswith("HTTP_")
    }
    if environ.get("CONTENT_LENGTH"):
        headers[b"content-length"] = environ["CONTENT_LENGTH"].encode("latin-1")
    return headers


def _variable(name: bytes) -> str:
    return "HTTP_" + name.decode("latin-1").upper().replace("-", "_")


def _set_query(environ: Environ, before: bytes, after: bytes) -> None:
    """Replace the query wherever the environ repeats it, for the server's access log."""
    if before == after:
        return
    new = after.decode("latin-1")
    environ["QUERY_STRING"] = new
    for name in ("RAW_URI", "REQUEST_URI"):
        if name in environ:
            environ[name] = environ[name].partition("?")[0] + (f"?{new}" if new else "")


def _status(code: int) -> str:
    return f"{code} {HTTPStatus(code).phrase}"

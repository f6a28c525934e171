"""Trailers are not headers.

A chunked body may be followed by more header fields, the trailers (RFC 9112, 7.1.2). uvicorn's protocol
for httptools appends them to the list of headers that the application has already: a key or a client's
address could then come after the body, where no proxy in front removes it. The other servers (uvicorn
with h11, gunicorn, waitress) drop trailers themselves.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from typing import Any

#: Bytes of a connection that may come without a head, or a part of a body, getting complete by them.
MAX_INCOMPLETE = 64 * 1024
#: Requests that may wait on a connection for the one before.
MAX_WAITING = 20

#: uvicorn's module for httptools. uvicorn imports it before it makes the application, and only if the
#: protocol is used.
MODULE = "uvicorn.protocols.http.httptools_impl"

_REQUEST = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"0\r\nX-Trailer: 1\r\n\r\n"
)


class _Complete(list[tuple[bytes, bytes]]):
    """The headers of a complete head. Appending does nothing."""

    def append(self, item: tuple[bytes, bytes]) -> None:
        """Drop `item`, a trailer."""


def ignore() -> bool:
    """Make uvicorn's protocol for httptools drop trailers, in this process.

    Returns False if this uvicorn is made otherwise, and would still give them to the application.
    """
    try:
        protocol: Any = importlib.import_module(MODULE).HttpToolsProtocol
        if not _dropped(protocol):
            _patch(protocol)
        if not hasattr(protocol.data_received, "__wrapped__"):
            _bound(protocol)
        return _dropped(protocol)
    except Exception:  # whatever another version raises
        return False


def prepare() -> None:
    """Tell uvicorn to use h11, by `UVICORN_HTTP`, if trailers can't be kept out of httptools.

    For the process that starts the workers; a choice of the operator's in that variable stays.
    """
    if importlib.util.find_spec("httptools") and not ignore():
        os.environ.setdefault("UVICORN_HTTP", "h11")


def check() -> None:
    """Drop trailers in a worker of uvicorn's. Raises ValueError if httptools is used and can't."""
    if MODULE in sys.modules and not ignore():
        raise ValueError(
            "this version of uvicorn gives the application what follows a body as if it were a header, "
            "which could be a key. Start the server with --uvicorn-opts '--http h11', or install "
            "another version of uvicorn."
        )


def _patch(protocol: Any) -> None:
    complete = protocol.on_headers_complete

    @functools.wraps(complete)
    def on_headers_complete(self: Any) -> None:
        # The application keeps the list that it has in its scope; what comes later goes to this one.
        self.headers = _Complete(self.headers)
        complete(self)

    protocol.on_headers_complete = on_headers_complete


def _bound(protocol: Any) -> None:
    """Have `protocol` end a connection that takes memory without end, as uvicorn with h11 does.

    A head or trailers that never end are kept whole; of requests that are sent at once, a read of
    256 kB holds 14,000, of which each takes 2 kB until its turn.
    """
    begin, body, complete, receive = (
        protocol.on_message_begin,
        protocol.on_body,
        protocol.on_headers_complete,
        protocol.data_received,
    )

    @functools.wraps(begin)
    def on_message_begin(self: Any) -> None:
        if len(self.pipeline) >= MAX_WAITING:
            raise ValueError("too many requests at once")
        begin(self)

    @functools.wraps(complete)
    def on_headers_complete(self: Any) -> None:
        self._incomplete = 0
        complete(self)

    @functools.wraps(body)
    def on_body(self: Any, data: bytes) -> None:
        self._incomplete = 0
        body(self, data)

    @functools.wraps(receive)
    def data_received(self: Any, data: bytes) -> None:
        self._incomplete = getattr(self, "_incomplete", 0) + len(data)
        receive(self, data)
        if self._incomplete > MAX_INCOMPLETE and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.send_400_response("Invalid HTTP request received.")
            else:
                self.transport.close()

    protocol.on_message_begin = on_message_begin
    protocol.on_headers_complete = on_headers_complete
    protocol.on_body = on_body
    protocol.data_received = data_received


def _dropped(protocol: Any) -> bool:
    """Feed `protocol` a request with a trailer, and return whether its scope stays without it."""
    from uvicorn.config import Config
    from uvicorn.server import ServerState

    config = Config(_nothing, http=protocol, ws="none", lifespan="off", log_config=None)
    config.load()
    served = protocol(config=config, server_state=ServerState(), app_state={}, _loop=_Loop())
    served.data_received(_REQUEST)
    names = [name for name, _ in served.cycle.scope["headers"]]
    return names == [b"host", b"transfer-encoding"]


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    """Stand for the application, which is not called."""


class _Loop:
    """Takes the place of the event loop, and runs nothing."""

    def create_task(self, coroutine: Any, **_: Any) -> _Task:
        coroutine.close()
        return _Task()


class _Task:
    def add_done_callback(self, _: Any) -> None:
        """Forget the callback: the task has no end."""

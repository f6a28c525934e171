"""A patch of uvicorn's protocol for httptools: it drops trailers and bounds a connection's memory.

More header fields, the trailers, may follow a chunked body (RFC 9112, 7.1.2). uvicorn's protocol for
httptools appends them to the list of headers that the application already has. A key or a client's
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

#: Bytes that a connection may receive without completing a head or a part of a body.
MAX_INCOMPLETE = 64 * 1024
#: Requests of one connection that may wait for the one before them.
MAX_WAITING = 20

#: uvicorn's module for httptools. uvicorn imports it only to use it, before it makes the application.
MODULE = "uvicorn.protocols.http.httptools_impl"

_REQUEST = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"0\r\nX-Trailer: 1\r\n\r\n"
)


class _Complete(list[tuple[bytes, bytes]]):
    """The headers of a complete head, to which nothing can be appended."""

    def append(self, item: tuple[bytes, bytes]) -> None:
        """Drop `item`, a trailer."""


def ignore() -> bool:
    """Make uvicorn's protocol for httptools drop trailers in this process.

    Return False if this version of uvicorn can't be patched and gives trailers to the application.
    """
    try:
        protocol: Any = importlib.import_module(MODULE).HttpToolsProtocol
        if not _dropped(protocol):
            _patch(protocol)
        if not hasattr(protocol.data_received, "__wrapped__"):
            _bound(protocol)
        return _dropped(protocol)
    except Exception:  # another version of uvicorn may raise anything
        return False


def prepare() -> None:
    """Set `UVICORN_HTTP` to h11 if httptools can't be patched, unless the operator has set it.

    The process that starts the workers calls this.
    """
    if importlib.util.find_spec("httptools") and not ignore():
        os.environ.setdefault("UVICORN_HTTP", "h11")


def check() -> None:
    """Patch httptools in a worker of uvicorn. Raises ValueError if it is used and can't be patched."""
    if MODULE in sys.modules and not ignore():
        raise ValueError(
            "this version of uvicorn adds trailers, the fields after a chunked body, to the headers. "
            "One of them could be a key. Start the server with --uvicorn-opts '--http h11', or install "
            "another version of uvicorn."
        )


def _patch(protocol: Any) -> None:
    complete = protocol.on_headers_complete

    @functools.wraps(complete)
    def on_headers_complete(self: Any) -> None:
        # The application keeps the list in its scope, and uvicorn appends trailers to this other list.
        self.headers = _Complete(self.headers)
        complete(self)

    protocol.on_headers_complete = on_headers_complete


def _bound(protocol: Any) -> None:
    """Have `protocol` end a connection that takes memory without end, as uvicorn with h11 does.

    httptools keeps the whole of a head or of trailers that never end. One read of 256 kB holds up to
    14,000 pipelined requests, and each takes 2 kB until its turn.
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
    """Feed `protocol` a request with a trailer. Return whether the trailer stays out of its scope."""
    from uvicorn.config import Config
    from uvicorn.server import ServerState

    config = Config(_nothing, http=protocol, ws="none", lifespan="off", log_config=None)
    config.load()
    served = protocol(config=config, server_state=ServerState(), app_state={}, _loop=_Loop())
    served.data_received(_REQUEST)
    names = [name for name, _ in served.cycle.scope["headers"]]
    return names == [b"host", b"transfer-encoding"]


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    """Take the application's place. Nobody calls it."""


class _Loop:
    """Takes the event loop's place, and runs nothing."""

    def create_task(self, coroutine: Any, **_: Any) -> _Task:
        coroutine.close()
        return _Task()


class _Task:
    def add_done_callback(self, _: Any) -> None:
        """Ignore the callback, because the task never ends."""

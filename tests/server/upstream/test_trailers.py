"""If uvicorn can't be patched to drop trailers, it serves with h11 or a worker does not start."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from mlflow_hokusai_auth.server.upstream import trailers


class Elsewhere:
    """A protocol of another uvicorn, which keeps a trailer although `headers` is replaced."""

    def __init__(self, **_: Any) -> None:
        self.cycle = self
        self.scope: dict[str, Any] = {"headers": [(b"host", b""), (b"x-trailer", b"1")]}

    def on_headers_complete(self) -> None: ...

    def data_received(self, data: bytes) -> None: ...


def test_httptools_drops_trailers_after_one_patch_or_more() -> None:
    assert trailers.ignore()
    protocol: Any = sys.modules[trailers.MODULE].HttpToolsProtocol
    patched = protocol.on_headers_complete
    assert trailers.ignore()
    assert protocol.on_headers_complete is patched
    trailers.check()


def test_uvicorn_that_can_not_be_patched_serves_with_h11(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UVICORN_HTTP", raising=False)
    trailers.prepare()
    assert "UVICORN_HTTP" not in os.environ
    for made_otherwise in (Elsewhere, object):
        monkeypatch.setattr(f"{trailers.MODULE}.HttpToolsProtocol", made_otherwise)
        trailers.prepare()
        assert os.environ.pop("UVICORN_HTTP") == "h11"
        # The operator's choice of httptools stays.
        with pytest.raises(ValueError, match="--http h11"):
            trailers.check()
    # A worker that serves with h11 does not import httptools.
    monkeypatch.delitem(sys.modules, trailers.MODULE)
    trailers.check()


class Transport:
    """Takes what is written, and tells whether it was closed."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def get_extra_info(self, _: str) -> None: ...

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def connection() -> tuple[Any, Transport]:
    """A connection that httptools reads, whose application is never called."""
    from uvicorn.config import Config
    from uvicorn.server import ServerState

    assert trailers.ignore()
    kind: Any = sys.modules[trailers.MODULE].HttpToolsProtocol
    config = Config(trailers._nothing, http=kind, ws="none", lifespan="off", log_config=None)
    config.load()
    made = kind(config=config, server_state=ServerState(), app_state={}, _loop=trailers._Loop())
    transport = Transport()
    made.connection_made(transport)
    return made, transport


HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    "start",
    [
        b"GET /",
        HEAD + b"X-A: ",
        HEAD + b"X",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-A: ",
    ],
)
def test_endless_head_or_trailer_closes_the_connection(start: bytes) -> None:
    served, transport = connection()
    served.data_received(start)
    sent = 0
    while not transport.closed and sent < 2**20:
        served.data_received(b"a" * 1000)
        sent += 1000
    assert transport.closed and sent <= trailers.MAX_INCOMPLETE + 1000


def test_a_body_may_be_of_any_length() -> None:
    for framing, part in (
        (b"Content-Length: 10000000\r\n\r\n", b"a" * 100_000),
        (b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n" * 20_000),
    ):
        served, transport = connection()
        served.data_received(HEAD + framing)
        for _ in range(10):
            served.data_received(part)
        assert not transport.closed


def test_pipelined_requests_are_bounded() -> None:
    served, transport = connection()
    served.data_received(b"GET / HTTP/1.1\r\n\r\n" * (trailers.MAX_WAITING + 1))
    assert not transport.closed
    served, transport = connection()
    served.data_received(b"GET / HTTP/1.1\r\n\r\n" * 10_000)
    assert transport.closed and len(served.pipeline) <= trailers.MAX_WAITING

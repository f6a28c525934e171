"""A malformed body that comes after the answer to its request only ends the connection."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from mlflow_hokusai_auth.server.upstream.late_bodies import end_quietly

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return False  # the race: what was received is handled before the connection ends

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    await send(
        {"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]}
    )
    await send({"type": "http.response.body", "body": b""})


async def answered(*parts: bytes) -> Transport:
    """Send each of `parts` after what came before was handled."""
    config = Config(refuse, http=H11Protocol, ws="none", lifespan="off", log_config=None)
    config.load()
    protocol = H11Protocol(config=config, server_state=ServerState(), app_state={})
    transport = Transport()
    protocol.connection_made(transport)
    for part in parts:
        protocol.data_received(part)
        for _ in range(5):
            await asyncio.sleep(0)
    return transport


def test_malformed_body_after_its_answer_ends_the_connection() -> None:
    end_quietly()
    transport = asyncio.run(answered(HEAD, b"zz\r\n"))
    assert transport.sent.startswith(b"HTTP/1.1 401") and transport.sent.count(b"HTTP/1.1") == 1
    assert transport.closed


def test_malformed_request_is_answered() -> None:
    end_quietly()
    transport = asyncio.run(answered(b"zz\r\n\r\n"))
    assert transport.sent.startswith(b"HTTP/1.1 400") and transport.closed

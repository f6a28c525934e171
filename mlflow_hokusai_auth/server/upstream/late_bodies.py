"""A patch of uvicorn's protocol for h11: a body that turns out malformed after its answer is no error.

The gate refuses most requests without reading their bodies. If uvicorn finds afterwards that such a
body is malformed, it begins a second answer, for which h11 raises: the log gets a traceback for what
any stranger may send. With the patch it only ends the connection.
"""

from __future__ import annotations

import functools

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def end_quietly() -> None:
    """Let uvicorn's protocol for h11 in this process answer each request at most once."""
    answer = H11Protocol.send_400_response
    if hasattr(answer, "__wrapped__"):
        return

    @functools.wraps(answer)
    def send_400_response(self: H11Protocol, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer(self, msg)
        else:
            self.transport.close()

    H11Protocol.send_400_response = send_400_response  # type: ignore[method-assign]

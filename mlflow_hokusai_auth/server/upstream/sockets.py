"""Answers that leave at once."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

#: The open files of this process, by number; on Linux a link to /proc/self/fd.
_OPEN = Path("/dev/fd")


def send_at_once() -> None:
    """Set TCP_NODELAY on the sockets that this process is bound to; what they accept inherits it.

    With several workers uvicorn makes its socket by family alone (`Config.bind_socket`), which asyncio,
    looking for IPPROTO_TCP, does not take for TCP. The body of each answer on a connection that is kept
    open then waits until the client has acknowledged the headers: 40 ms (RFC 896, RFC 1122 4.2.3.2).
    """
    if not _OPEN.is_dir():
        return
    for entry in list(_OPEN.iterdir()):
        # Not each is a socket, and the folder itself is closed by now.
        with contextlib.suppress(OSError):
            _send_at_once(socket.socket(fileno=int(entry.name)))


def _send_at_once(found: socket.socket) -> None:
    try:
        internet = found.family in (socket.AF_INET, socket.AF_INET6)
        if internet and found.type == socket.SOCK_STREAM and found.getsockname()[1]:
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    finally:
        found.detach()

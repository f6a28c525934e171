"""TCP_NODELAY for the server's sockets, so that answers are sent at once."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

#: The folder of this process's open files by number; on Linux a link to /proc/self/fd.
_OPEN = Path("/dev/fd")


def send_at_once() -> None:
    """Set TCP_NODELAY on the bound sockets of this process; accepted connections inherit it.

    With several workers uvicorn makes its socket without IPPROTO_TCP (`Config.bind_socket`), so asyncio
    does not recognise it as TCP and leaves the option off. On a kept connection the body of each answer
    then waits until the client has acknowledged the headers: 40 ms (RFC 896, RFC 1122 4.2.3.2).
    """
    if not _OPEN.is_dir():
        return
    for entry in list(_OPEN.iterdir()):
        # Other files are no sockets, and the descriptor of the folder itself is closed by now.
        with contextlib.suppress(OSError):
            _send_at_once(socket.socket(fileno=int(entry.name)))


def _send_at_once(opened: socket.socket) -> None:
    try:
        internet = opened.family in (socket.AF_INET, socket.AF_INET6)
        if internet and opened.type == socket.SOCK_STREAM and opened.getsockname()[1]:
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    finally:
        opened.detach()

"""The proxy's faults are what they say; else the tests that rely on them would prove nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from .proxy import DRIP, FAULTS, Proxy

#: Seconds for what is expected, and after which nothing more is.
SOON, QUIET = 60, 0.5
ANSWER = b"0123456789"
#: How a reset shows, by whether it is read or written first.
RESET = (ConnectionResetError, BrokenPipeError)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """In front of a server that answers each line with `ANSWER`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                while connection.recv(100):
                    connection.sendall(ANSWER)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection = listener.accept()[0]
                    threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        with Proxy(listener.getsockname()[1]) as proxy:
            yield proxy
        listener.shutdown(socket.SHUT_RDWR)


def connect(proxy: Proxy, seconds: float = SOON) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=seconds)


def ask(connection: socket.socket, seconds: float = SOON) -> bytes:
    """What comes within so many seconds of the last byte, one answer at most."""
    connection.settimeout(seconds)
    connection.sendall(b"?")
    answer = b""
    with contextlib.suppress(TimeoutError):
        while len(answer) < len(ANSWER) and (data := connection.recv(len(ANSWER) - len(answer))):
            answer += data
    return answer


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_and_its_end(proxy: Proxy, fault: str) -> None:
    with connect(proxy) as before:
        assert ask(before) == ANSWER
        proxy.fail(fault, after=4)
        if fault == "refuse":
            with pytest.raises(ConnectionRefusedError):
                connect(proxy)
        elif fault == "black_hole":
            with pytest.raises(TimeoutError):
                connect(proxy, QUIET)
        elif fault == "reset":
            with pytest.raises(RESET), connect(proxy) as new:
                ask(new)
        if fault in ("refuse", "reset"):
            with pytest.raises(RESET):
                ask(before)
        elif fault in ("stall", "black_hole"):
            assert ask(before, QUIET) == b""
        elif fault == "drip":
            began = time.monotonic()
            assert ask(before) == ANSWER
            assert time.monotonic() - began > DRIP * (len(ANSWER) - 1)
        elif fault == "truncate":
            assert ask(before) == ANSWER[:4]
            assert before.recv(1) == b""  # the end, and no reset
        proxy.lift()
        if fault in ("stall", "black_hole"):
            before.settimeout(SOON)
            assert before.recv(100) == ANSWER
    with connect(proxy) as after:
        assert ask(after) == ANSWER


def test_it_tells_what_happens(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        proxy.wait_for(lambda p: p.connections == 1)
        ask(connection)
        proxy.wait_for(lambda p: (p.asked, p.answered) == (1, len(ANSWER)))
        proxy.fail("stall")
        threading.Timer(0.1, proxy.lift).start()
        connection.sendall(b"?")
        proxy.wait_for(lambda p: p.answered == 2 * len(ANSWER))

"""The load generator: keep-alive connections that each send the next request after the answer.

It runs as a program, with a job as JSON on standard input and the measurements as JSON on standard
output. It imports only the standard library, and reads only a response's status and length, so that on
its own core it waits for the server, not the reverse.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import subprocess
import sys
import time
from collections import Counter
from itertools import count, cycle
from pathlib import Path
from typing import Any

#: A placeholder in a request, for a new number of as many digits each time.
STAMP = "@@@@@@@@@@@@@"
#: Seconds of load on one side before the other side's turn.
SLICE = 0.5
#: Seconds that requests under way at the end of a turn may take.
DRAIN = 10

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def measure(core: int, **job: Any) -> list[dict[str, Any]]:
    """Run `run(**job)` in a new process on `core`, and return its result."""
    done = subprocess.run(
        [sys.executable, "-S", str(Path(__file__).resolve())],
        input=json.dumps({"core": core, **job}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return list(json.loads(done.stdout))


def run(sides: list[dict[str, Any]], *, seconds: float, connections: int) -> list[dict[str, Any]]:
    """Load each of `sides` (`ports`, `request`, `pids`) for `seconds`, in short turns.

    The turns are short because the machine's other work changes within seconds.
    """
    loads = [_Load(**side, connections=connections) for side in sides]
    for load in loads:  # Unmeasured: connections open, caches fill.
        load.turn(SLICE / 2)
        load.forget()
    for number in range(max(1, round(seconds / SLICE))):
        for load in loads[:: -1 if number % 2 else 1]:
            load.turn(min(SLICE, seconds))
    return [load.result() for load in loads]


class _Load:
    def __init__(
        self, *, ports: list[int], request: str, pids: list[int], connections: int
    ) -> None:
        self._ports = cycle(ports)
        self._parts = [part.encode("latin-1") for part in request.split(STAMP)]
        self._stamps = count(time.time_ns() // 1_000_000)
        self._pids = pids
        self._poll = select.epoll()
        self._open: dict[int, tuple[socket.socket, bytearray]] = {}
        self._sent: dict[int, float] = {}
        for _ in range(connections):
            self._connect()
        self.forget()

    def forget(self) -> None:
        """Reset the measurements."""
        self._latencies: list[float] = []
        self._statuses: Counter[str] = Counter()
        self._reopened = 0
        self._elapsed = self._server = self._own = 0.0

    def turn(self, seconds: float) -> None:
        """Load the server for `seconds`, and wait for the requests that are then in progress."""
        begun, server, own = time.perf_counter(), cpu(self._pids), time.process_time()
        for connection, _ in list(self._open.values()):
            self._send(connection)
        self._until(begun + seconds, again=True)
        self._until(begun + seconds + DRAIN, again=False)
        self._elapsed += time.perf_counter() - begun
        self._server += cpu(self._pids) - server
        self._own += time.process_time() - own

    def result(self) -> dict[str, Any]:
        """Return the measurements."""
        times = sorted(self._latencies)
        answers = len(times)
        assert answers, f"no answer within {DRAIN} s"
        return {
            "per_second": answers / self._elapsed,
            "p50_ms": times[answers // 2] * 1e3,
            "p99_ms": times[answers * 99 // 100] * 1e3,
            "cpu_us": self._server / answers * 1e6,
            "load_busy": self._own / self._elapsed,
            "statuses": self._statuses,
            "reopened": self._reopened,
        }

    def _until(self, end: float, *, again: bool) -> None:
        """Read answers until `end`; with `again`, send the next request after each."""
        while self._sent and (left := end - time.perf_counter()) > 0:
            for number, _ in self._poll.poll(left):
                self._take(number, again)

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", next(self._ports)), timeout=DRAIN)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._open[connection.fileno()] = connection, bytearray()
        self._poll.register(connection, select.EPOLLIN)
        return connection

    def _send(self, connection: socket.socket) -> None:
        if len(self._parts) == 1:
            data = self._parts[0]
        else:
            data = (b"%013d" % next(self._stamps)).join(self._parts)
        self._sent[connection.fileno()] = time.perf_counter()
        # `_take` reopens a connection that the server closed during the other side's turn.
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)

    def _take(self, number: int, again: bool) -> None:
        connection, buffer = self._open[number]
        chunk = b""
        with contextlib.suppress(ConnectionError):
            chunk = connection.recv(65536)
        if not chunk:
            self._poll.unregister(connection)
            del self._open[number]
            self._sent.pop(number, None)
            connection.close()
            self._reopened += 1
            connection = self._connect()
            if again:
                self._send(connection)
            return
        buffer += chunk
        if not _complete(buffer):
            return
        self._latencies.append(time.perf_counter() - self._sent.pop(number))
        self._statuses[buffer[9:12].decode()] += 1
        buffer.clear()
        if again:
            self._send(connection)


def _complete(buffer: bytearray) -> bool:
    head = buffer.find(b"\r\n\r\n")
    if head < 0:
        return False
    length = _LENGTH.search(buffer, 0, head)
    if length is None:  # chunked
        return buffer.endswith(b"\r\n0\r\n\r\n")
    return len(buffer) >= head + 4 + int(length[1])


def cpu(pids: list[int]) -> float:
    """Return the seconds of CPU that these processes have used, ended threads included."""
    # clock_getcpuclockid(3): how Linux forms the id of another process's clock.
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


if __name__ == "__main__":
    task = json.load(sys.stdin)
    os.sched_setaffinity(0, {task.pop("core")})
    json.dump(run(**task), sys.stdout)

"""Uploads and downloads of artifacts: their time, and the peak of the servers' memory."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.peers import Contender

PATH = "/api/2.0/mlflow-artifacts/artifacts/bench.bin"
SIZES = (1, 300, 1024)
#: Megabytes that are transferred in one round only, because it takes long.
ONCE = 1024
_MEGABYTE = 1024 * 1024
_TIMEOUT = 300


@dataclass(frozen=True)
class Transfer:
    """An upload or a download of some megabytes."""

    megabytes: int
    up: bool
    key: bool = True

    @property
    def name(self) -> str:
        way = "up" if self.up else "down"
        return f"{self.megabytes} MB {way}{'' if self.key else ', no key: 401'}"

    @property
    def repeats(self) -> int:
        """Return the repetitions in a round: short transfers vary."""
        return 10 if self.megabytes == 1 or not self.key else 1


TRANSFERS = [
    Transfer(300, up=True, key=False),
    *(Transfer(megabytes, up) for megabytes in SIZES for up in (True, False)),
]


def measure(
    transfer: Transfer, contenders: Sequence[Contender], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Return the measurements of each round by contender."""
    found: dict[str, list[dict[str, Any]]] = {one.name: [] for one in contenders}
    for number in range(-1, 1 if transfer.megabytes == ONCE else rounds):
        for contender in contenders[:: -1 if number % 2 else 1]:
            if number < 0:  # The first time, modules are loaded.
                _moved(replace(transfer, megabytes=1), contender, 1)
            else:
                found[contender.name].append(_moved(transfer, contender, transfer.repeats))
    return found


def _moved(transfer: Transfer, contender: Contender, repeats: int) -> dict[str, Any]:
    """Return the medians of that many transfers."""
    file = contender.servers[-1].folder / "artifacts" / "bench.bin"
    file.parent.mkdir(exist_ok=True)
    if not transfer.up:
        with file.open("wb") as opened:
            opened.writelines(bytes(_MEGABYTE) for _ in range(transfer.megabytes))
    ones = [_once(transfer, contender) for _ in range(repeats)]
    file.unlink(missing_ok=True)
    return {
        "seconds": median(one["seconds"] for one in ones),
        "growth_mb": median(one["growth_mb"] for one in ones),
        "statuses": sorted({str(one["status"]) for one in ones}),
    }


def _once(transfer: Transfer, contender: Contender) -> dict[str, float]:
    method, length = ("PUT", transfer.megabytes * _MEGABYTE) if transfer.up else ("GET", 0)
    lines = [
        f"{method} {contender.alias}{PATH} HTTP/1.1",
        f"Host: 127.0.0.1:{contender.port}",
        *([contender.good] if transfer.key else []),
        *([f"Content-Length: {length}"] if transfer.up else []),
        "Connection: close",
    ]
    pids = contender.pids
    before = [_reset_peak(pid) for pid in pids]
    begun = time.perf_counter()
    with socket.create_connection(("127.0.0.1", contender.port), timeout=_TIMEOUT) as connection:
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        if transfer.up:
            _send(connection, transfer.megabytes)
        status, received = _receive(connection)
    seconds = time.perf_counter() - begun
    growth = sum(_peak(pid) - was for pid, was in zip(pids, before, strict=True))
    assert transfer.up or received > transfer.megabytes * _MEGABYTE, (contender.name, received)
    return {"seconds": seconds, "status": status, "growth_mb": growth}


def _send(connection: socket.socket, megabytes: int) -> None:
    """Send the whole body, then read the answer, as `requests` does, unless the server closes."""
    chunk = bytes(_MEGABYTE)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(megabytes):
            connection.sendall(chunk)


def _receive(connection: socket.socket) -> tuple[int, int]:
    """Return the status (0 if the server reset the connection first) and all bytes."""
    buffer = bytearray(_MEGABYTE)
    status = received = 0
    with contextlib.suppress(ConnectionResetError):
        while count := connection.recv_into(buffer):
            status = status or int(buffer[9:12])
            received += count
    return status, received


def _reset_peak(pid: int) -> float:
    """Reset the peak of the process's memory, and return its present memory."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _peak(pid)


def _peak(pid: int) -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found, f"/proc/{pid}/status has no VmHWM"
    return int(found[1]) / 1024


def peak(contender: Contender) -> float:
    """Return the sum of the peaks of all its processes, in megabytes."""
    return sum(_peak(pid) for pid in contender.pids)

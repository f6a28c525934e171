"""Sockets that uvicorn makes for several workers send answers at once."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mlflow_hokusai_auth.server.upstream import sockets
from mlflow_hokusai_auth.server.upstream.sockets import send_at_once

OPEN = Path("/dev/fd")


def nodelay(one: socket.socket) -> bool:
    return bool(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))


def test_accepted_connections_send_at_once_and_nothing_else_is_touched() -> None:
    local, other_end = socket.socketpair()
    with (
        local,
        other_end,
        socket.socket(socket.AF_INET) as listening,
        socket.socket(socket.AF_INET) as idle,
    ):
        listening.bind(("127.0.0.1", 0))
        before = len(list(OPEN.iterdir()))
        send_at_once()
        assert len(list(OPEN.iterdir())) == before
        # uvicorn does this in each worker, after it has made the application.
        listening.listen()
        with socket.create_connection(listening.getsockname()):
            accepted, _ = listening.accept()
            with accepted:
                assert nodelay(accepted)
        assert not nodelay(idle)


def test_nothing_is_done_where_open_files_are_not_listed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sockets, "_OPEN", tmp_path / "none")
    send_at_once()

"""Sockets, made as uvicorn makes them for several workers, do not hold answers back."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mlflow_hokusai_auth.backends.local import LocalStore
from mlflow_hokusai_auth.server import sockets
from mlflow_hokusai_auth.server.sockets import send_at_once
from tests.harness import environment

OPEN = Path("/dev/fd")
STARTS = """
import socket
from mlflow_hokusai_auth.server.app import create_app
with socket.socket(socket.AF_INET) as bound:
    bound.bind(("127.0.0.1", 0))
    create_app()
    print(bound.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
"""


def nodelay(one: socket.socket) -> bool:
    return bool(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))


def test_what_is_accepted_sends_at_once_and_nothing_else_is_touched() -> None:
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
        # As uvicorn does, in each worker and after it has made the application.
        listening.listen()
        with socket.create_connection(listening.getsockname()):
            accepted, _ = listening.accept()
            with accepted:
                assert nodelay(accepted)
        assert not nodelay(idle)


def test_the_server_does_it_at_start(tmp_path: Path) -> None:
    env = environment(tmp_path, _MLFLOW_SGI_NAME="uvicorn")
    LocalStore(env["HOKUSAI_AUTH_DATABASE_URI"]).migrate()
    done = subprocess.run(
        [sys.executable, "-c", STARTS], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stdout.strip().splitlines()[-1:] == ["1"], done.stderr


def test_where_open_files_are_not_listed_nothing_is_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sockets, "_OPEN", tmp_path / "none")
    send_at_once()

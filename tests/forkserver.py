"""A process that has imported MLflow, the app and each server, and forks into what tests start.

A fork is a running server after 0.5 s of CPU instead of 8. `python -m tests.forkserver FOLDER PID`
listens on a Unix socket in FOLDER until PID, the test run, is gone. A connection brings one request and
gets two answers: the process id, and the exit status once there is one.

A fork does what `mlflow server` does: the same command line interface, in a process of its own, starts
the same server, in another, with the same arguments. Only the imports are older, so a fork can't be
told what is decided while something is imported (see `IMPORTED`).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import multiprocessing
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOCKET = "forkserver.sock"
#: Databases in which all migrations have run, for forks that find none of their own.
TEMPLATES = ("mlflow.db", "hokusai_auth.db")
#: Settings and options that are looked at when MLflow or the app is imported, or that have servers
#: started by others than MLflow: with one of these a server is started, not forked.
IMPORTED = frozenset(
    {
        "--allowed-hosts",
        "--cors-allowed-origins",
        "--disable-security-middleware",
        "--enable-workspaces",
        "--expose-prometheus",
        "MLFLOW_ENABLE_WORKSPACES",
        "MLFLOW_SERVER_ALLOWED_HOSTS",
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS",
        "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE",
        "PROMETHEUS_MULTIPROC_DIR",
        "PYTHONPATH",
    }
)
#: What a server imports. Older MLflow lacks some of it.
IMPORTS = (
    "gunicorn.app.wsgiapp",
    "gunicorn.workers.gthread",
    "gunicorn.workers.sync",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "uvicorn.protocols.http.h11_impl",
    "uvicorn.protocols.http.httptools_impl",
    "uvicorn.protocols.websockets.auto",
    "waitress.runner",
    "mlflow.cli",
    "mlflow.server.fastapi_app",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
)
OURS = "mlflow_hokusai_auth.server"
#: These start the server when they are imported, so that a fork does it.
STARTS = ("app", "wsgi_app")


def main() -> None:
    """Serve, or be what a request asks for: a fork ends here, as any process does."""
    folder, owner = Path(sys.argv[1]), int(sys.argv[2])
    # Read when the library is imported; a fork looks anew for the folder.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(dir=folder)
    # MLflow looks at Host and Origin if it is served, which it tells by this when it is imported.
    os.environ["_MLFLOW_SERVER_SERVE_ARTIFACTS"] = "true"
    _import()
    if os.fork() == 0:
        _make_templates(folder)
        return
    assert os.wait()[1] == 0
    gc.collect()
    gc.freeze()
    assert threading.active_count() == 1, threading.enumerate()
    if become := _serve(folder, owner):
        become()


def _import() -> None:
    for name in IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    folder = Path(str(importlib.import_module(OURS).__file__)).parent
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[-1] not in (*STARTS, "__init__"):
            importlib.import_module(".".join((OURS, *parts)))


def _make_templates(folder: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    from mlflow_hokusai_auth.store.keys import LocalStore

    SqlAlchemyStore(f"sqlite:///{folder}/{TEMPLATES[0]}", "mlflow-artifacts:/")
    LocalStore(f"sqlite:///{folder}/{TEMPLATES[1]}").migrate()


def _serve(folder: Path, owner: int) -> Callable[[], object] | None:
    """Answer requests until `owner` is gone; in a fork, return what the fork is to do."""
    # So that ended forks need not be waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gone = os.pidfd_open(owner)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "starting"))
        listener.listen(100)
        (folder / "starting").rename(folder / SOCKET)
        while gone not in select.select([listener, gone], [], [])[0]:
            connection = listener.accept()[0]
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                return _keep(connection, gone)
            connection.close()
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _keep(connection: socket.socket, gone: int) -> Callable[[], object] | None:
    """Start what `connection` asks for, tell how it ends, and end it when nobody needs it any more."""
    request = json.loads(connection.makefile("rb").readline())
    pid = _started(request) if not request["fork"] else os.fork()
    if pid == 0:
        connection.close()
        os.close(gone)
        return lambda: _become(request)
    with contextlib.suppress(OSError):  # done, if the child was faster
        os.setpgid(pid, pid)
    connection.sendall(b"%d\n" % pid)
    ended, needed = os.pidfd_open(pid), gone if request["keep"] else connection
    if needed in select.select([ended, needed], [], [])[0]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return None


def _started(request: dict[str, Any]) -> int:
    with Path(request["log"]).open("wb") as log:
        return subprocess.Popen(
            request["command"],
            cwd=request["folder"],
            env=request["environ"],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ).pid


def _become(request: dict[str, Any]) -> None:
    """Be `mlflow server`, or another Python program."""
    os.setpgid(0, 0)
    os.umask(request.get("umask", os.umask(0)))
    with (
        Path(request["given"]).open("rb") as given,
        Path(request["log"]).open("ab") as log,
        Path(request["errors"]).open("ab") as errors,  # the same file for a server
    ):
        for number, file in enumerate((given, log, errors)):
            os.dup2(file.fileno(), number)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environ"])
    tempfile.tempdir = None
    command = request["command"][1:]
    if command[:3] == ["-m", "mlflow", "server"]:
        _be_server_command(command[1:])
    else:
        _count_alone()
        _run(command)


def _count_alone() -> None:
    """Let this process count for itself, as without a folder: its metrics were imported with one."""
    import prometheus_client.values

    prometheus_client.values.ValueClass = prometheus_client.values.get_value_class()


def _run(command: list[str]) -> None:
    """Run what Python's arguments say: a script, or `-m` and a module."""
    if command[0] == "-c":
        sys.argv[:] = ["-c", *command[2:]]
        exec(command[1], {"__name__": "__main__"})
    elif command[0] == "-m":
        # In place, as waitress has kept the list.
        sys.argv[:] = command[1:]
        if command[1] == "mlflow_hokusai_auth.cli":
            # MLflow before 3.10 lets Alembic talk once it is imported. Few commands import it.
            logging.getLogger("alembic").setLevel(logging.WARNING)
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = command
        runpy.run_path(command[0], run_name="__main__")


def _be_server_command(command: list[str]) -> None:
    # A second fork waits to be the server that the command starts: what the command leaves in this
    # process, a server of its own would not have.
    reading, writing = os.pipe()
    server = os.fork()
    if server == 0:
        os.close(writing)
        with os.fdopen(reading) as pipe:
            told = pipe.read()
        if told:
            server_command, environ = json.loads(told)
            os.environ.update(environ)
            import uvicorn._subprocess

            # Its workers are forks, too, of this process, which has not called the app.
            uvicorn._subprocess.spawn = multiprocessing.get_context("fork")  # type: ignore[assignment]
            _run(server_command[1:])
        return
    os.close(reading)

    def start(command: list[str], *, extra_env: dict[str, str], **options: Any) -> _Process:
        with os.fdopen(writing, "w") as pipe:
            json.dump([command, {**os.environ, **extra_env}], pipe)
        process = _Process(server)
        if options.get("synchronous", True):
            process.wait()
        return process

    import mlflow.cli
    import mlflow.server

    _count_alone()
    mlflow.server._exec_cmd = start
    sys.argv[:] = command
    mlflow.cli.cli()


class _Process:
    """What MLflow asks of the process that it has started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        return self._wait(0)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, options)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


if __name__ == "__main__":
    main()

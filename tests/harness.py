"""Real `mlflow server` processes for the tests, forked or started, and raw requests to them."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mlflow_hokusai_auth.store.keys import LocalStore
from tests.forkserver import IMPORTED, SOCKET, TEMPLATES

ROOT = Path(__file__).parent.parent
PREFIXES = ("", "/mlflow", "/api/mlflow")
#: Options of `mlflow server` for each way of serving. Named in test ids.
SERVERS = {
    "uvicorn": ("--workers", "1", "--uvicorn-opts", "--http h11"),
    "httptools": ("--workers", "1", "--uvicorn-opts", "--http httptools"),
    # uvicorn kills a worker that is silent for five seconds, as all are on a machine that is busy.
    "workers": ("--workers", "2", "--uvicorn-opts", "--timeout-worker-healthcheck 120"),
    "gunicorn": ("--workers", "2", "--gunicorn-opts", "--log-level info --access-logfile -"),
    "waitress": ("--waitress-opts", "--threads=4"),
}
#: The command line tool, whether or not its script is on the path.
HOKUSAI_AUTH = (sys.executable, "-m", "mlflow_hokusai_auth.cli")
START_TIMEOUT = 300
_T = TypeVar("_T")
#: Whether the test that runs may have servers: only those of the tiers that have them.
may_serve = True
#: The variable that names the folder of a run, in which its processes find what they share: the fork
#: server, and servers for all tests.
RUN = "SERVERS_OF_TESTS"


class Process:
    """A process that the fork server has made, with `subprocess.Popen`'s methods."""

    def __init__(self, pid: int, args: Sequence[str], ended: socket.socket | None = None) -> None:
        self.pid = pid
        self.args = args
        self._ended = ended
        self._code: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            assert self._ended is not None, "one that all tests share is not waited for"
            self._ended.settimeout(timeout)
            try:
                # Nothing, if the fork server was killed, and with it all that it had made.
                self._code = int(self._ended.recv(100) or -signal.SIGKILL)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
        return self._code

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@dataclass
class Server:
    """A running server, and what it keeps."""

    origin: str
    folder: Path
    process: Process
    environ: dict[str, str]
    _keys: dict[tuple[str, ...], str] = field(default_factory=dict)

    @property
    def port(self) -> int:
        return int(self.origin.rpartition(":")[2])

    @property
    def store(self) -> LocalStore:
        return LocalStore(self.environ["HOKUSAI_AUTH_DATABASE_URI"])

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")

    def key(self, *scopes: str) -> str:
        """A key with these scopes, the same one for each call."""
        if scopes not in self._keys:
            self._keys[scopes] = self.store.create(owner="test", scopes=scopes)[1]
        return self._keys[scopes]

    def request(
        self,
        method: str,
        path: str,
        *,
        key: str | None = None,
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own: status, headers (lower case), body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            extra = {} if key is None else {"X-API-Key": key}
            connection.request(method, path, body=body, headers={**extra, **(headers or {})})
            response = connection.getresponse()
            answer = response.read()
            names = {name.lower() for name, _ in response.getheaders()}
            found = {name: ", ".join(response.headers.get_all(name)) for name in names}
            return response.status, found, answer

    def raw(self, data: bytes, *, timeout: float = 10) -> bytes:
        """What the server answers to these very bytes, until it closes or has been quiet."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            connection.sendall(data)
            answer = b""
            with contextlib.suppress(OSError):
                while chunk := connection.recv(65536):
                    answer += chunk
            return answer

    def signal(self, number: int) -> None:
        """Signal the server and all that it started: the oldest MLflow leaves its workers behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def workers(self) -> list[int]:
        """Process ids of everything below `mlflow server`."""
        found = [self.process.pid]
        for pid in found:
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                found += [int(child) for child in task.read_text().split()]
        return found[1:]


def environment(folder: Path, **extra: str) -> dict[str, str]:
    """The test's environment without anything of MLflow's or ours, and with `extra`."""
    ours = ("MLFLOW_", "_MLFLOW_", "HOKUSAI_", "PROMETHEUS_")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(ours)},
        "HOME": str(folder),
        # As in an activated environment: `mlflow models serve` looks for uvicorn there.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # The tests' own addresses are one and the same.
        "HOKUSAI_AUTH_FAILURES_PER_MINUTE": "0",
        "HOKUSAI_AUTH_DATABASE_URI": f"sqlite:///{folder}/hokusai_auth.db",
        # Most tests share a server, and change what others made. Empty, it is an operator's default.
        "HOKUSAI_AUTH_ISOLATION": "off",
        **extra,
    }


@contextlib.contextmanager
def serve(
    folder: Path,
    options: Sequence[str] = SERVERS["uvicorn"],
    *,
    app: str | None = "hokusai-auth",
    started: bool = False,
    python: str = sys.executable,
    **environ: str,
) -> Iterator[Server]:
    """A running `mlflow server` with its data in `folder`; stopped, with its workers, at the end.

    It is forked where that can be, with databases that are migrated already, unless it is to be
    `started` as an operator does it.
    """
    server = _begin(folder, options, app, python, started=started, **environ)
    try:
        _wait(server)
        yield server
    finally:
        server.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(20)
        server.signal(signal.SIGKILL)
        server.process.wait()


def run_folder() -> Path:
    """The folder of this run; its first process makes it, and removes it at its end."""
    if RUN not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="hokusai-tests-"))
        os.environ[RUN] = str(folder)
        (folder / "owner").write_text(str(os.getpid()))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(os.environ[RUN])


def shared(name: str) -> Server:
    """One of `SERVERS`, forked for the first that asks and used by all tests of the run."""
    folder = run_folder() / name
    with _locked(folder.with_suffix(".lock")):
        known = folder.with_suffix(".json")
        if not known.exists():
            server = _begin(folder, SERVERS[name], keep=True)
            _wait(server)
            known.write_text(json.dumps([server.port, server.process.pid, server.process.args]))
    port, pid, args = json.loads(known.read_text())
    return Server(f"http://127.0.0.1:{port}", folder, Process(pid, args), environment(folder))


def _begin(
    folder: Path,
    options: Sequence[str],
    app: str | None = "hokusai-auth",
    python: str = sys.executable,
    *,
    started: bool = False,
    keep: bool = False,
    **environ: str,
) -> Server:
    assert may_serve, "a test with servers is marked so: pytest.mark.servers"
    folder.mkdir(parents=True, exist_ok=True)
    env = environment(folder, **environ)
    port = free_port()
    if "--waitress-opts" in options and app:
        app = "hokusai-auth-wsgi"
    command = [python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts"), *options]
    command += ["--app-name", app] if app else []
    fork = not started and python == sys.executable and IMPORTED.isdisjoint((*options, *environ))
    connection = _fork_server()
    if fork:
        for name in TEMPLATES:
            if not (folder / name).exists():
                shutil.copy(run_folder() / name, folder)
    process = _process(
        connection, command, folder, env, folder / "server.log", fork=fork, keep=keep
    )
    return Server(f"http://127.0.0.1:{port}", folder, process, env)


def run_forked(
    folder: Path, *arguments: str, environ: dict[str, str], given: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in `folder`, in a fork of a process that has imported MLflow already.

    `given` is its standard input. PYTHONPATH in `environ` comes too late for what is imported.
    """
    with tempfile.TemporaryDirectory(dir=run_folder()) as kept:
        files = {name: Path(kept) / name for name in ("log", "errors", "given")}
        files["given"].write_text(given)
        command = [sys.executable, *arguments]
        process = _process(_fork_server(), command, folder, environ, fork=True, **files)
        code = process.wait(300)
        printed, errors = files["log"].read_text(), files["errors"].read_text()
    return subprocess.CompletedProcess(command, code, printed, errors)


def run_command(
    folder: Path, *arguments: str, environ: dict[str, str], given: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `hokusai-auth ARGUMENTS` in `folder`, in a fork, as `run_forked` does."""
    return run_forked(folder, *HOKUSAI_AUTH[1:], *arguments, environ=environ, given=given)


def _process(
    connection: socket.socket,
    command: Sequence[str],
    folder: Path,
    environ: dict[str, str],
    log: Path,
    errors: Path | None = None,
    given: Path | str = os.devnull,
    *,
    fork: bool,
    keep: bool = False,
) -> Process:
    request = {
        "command": command,
        "environ": environ,
        "folder": str(folder),
        "log": str(log),
        "errors": str(errors or log),
        "given": str(given),
        "fork": fork,
        "keep": keep,
    }
    log.write_bytes(b"")
    connection.sendall(json.dumps(request).encode() + b"\n")
    # Only the pid's line is read: the status of a process that has ended already may follow.
    pid = b""
    while not pid.endswith(b"\n"):
        pid += connection.recv(1)
    return Process(int(pid), command, connection)


def _fork_server() -> socket.socket:
    """A connection to the run's fork server, which the first that asks starts."""
    run = run_folder()
    with _locked(run / "lock"):
        if not (run / SOCKET).exists():
            owner = (run / "owner").read_text()
            command = [sys.executable, "-m", "tests.forkserver", str(run), owner]
            with (run / "forkserver.log").open("wb") as log:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment(run),
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            while not (run / SOCKET).exists():
                assert process.poll() is None, (run / "forkserver.log").read_text()
                time.sleep(0.05)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(run / SOCKET))
    return connection


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _wait(server: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if server.request("GET", "/health")[0] == 200:
                return
        time.sleep(0.05)
    raise AssertionError(f"the server did not start:\n{server.log}")


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for what happens soon; `seconds` are for a machine that is busy."""
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        assert waited < seconds, f"it did not happen within {seconds:g} s"
        # It asks often at first, and then less and less, because a condition may ask a server.
        time.sleep(min(0.02 + waited / 10, 0.5))


def in_one_minute(attempt: Callable[[int], _T]) -> _T:
    """Return the result of the first `attempt`, numbered from 0, into which no minute's end came.

    Addresses have their attempts by the minute, and a few more just after its end.
    """
    for number in range(20):
        minute = time.time() // 60
        result = attempt(number)
        if time.time() // 60 == minute:
            return result
    raise AssertionError("none of 20 attempts was over within its minute")


def each_worker_answers(server: Server, workers: int = 2) -> None:
    """Let each of gunicorn's sync workers answer one request."""
    # A worker accepts one connection at a time, and waits for the rest of its request.
    address = ("127.0.0.1", server.port)
    request = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    with contextlib.ExitStack() as stack:
        held = [
            stack.enter_context(socket.create_connection(address, START_TIMEOUT))
            for _ in range(workers)
        ]
        for connection in held:
            connection.sendall(request)
        for connection in reversed(held):
            connection.sendall(b"\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

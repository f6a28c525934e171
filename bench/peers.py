"""The contenders: MLflow alone, with the gate, and with the gate's alternatives.

Each is a real `mlflow server` with the same options. The contenders in front of MLflow share the bare
server behind them, because only one contender is loaded at a time.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import issuer, micro, nginx
from bench.rows import RUN, Row, new_run
from tests.harness import START_TIMEOUT, Server, environment, free_port, serve

ROOT = Path(__file__).parent.parent
#: Of the environment that `make bench` makes for them.
PYTHON = ROOT / ".venv-peers/bin/python"
BARE = "bare MLflow"
GATE = "hokusai-auth"
BASIC = "basic-auth"
_KEY = "hk_live_" + "1" * 40
_WRONG = "hk_live_" + "0" * 40


@dataclass(frozen=True)
class Contender:
    """Servers that answer together, and the credentials that they accept."""

    name: str
    #: The server that gets the requests, then those behind it, MLflow last.
    servers: tuple[Server, ...]
    #: Headers, as lines.
    good: str
    wrong: str
    run_id: str
    #: A further prefix, under which artifacts are transferred.
    alias: str = ""

    @property
    def port(self) -> int:
        return self.servers[0].port

    @property
    def pids(self) -> list[int]:
        """Return all processes of all its servers, except one of nginx that ends after a minute."""
        found = [pid for one in self.servers for pid in (one.process.pid, *one.workers())]
        return [
            pid for pid in found if b"cache loader" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def side(self, row: Row) -> dict[str, Any]:
        """Return this contender's side for `load.measure`.

        Bare MLflow gets the header, too, because the gate does not cause the cost of receiving it.
        """
        header = self.good if row.key is None else self.wrong if row.key else ""
        request = row.request(self.port, header).replace(RUN, self.run_id)
        return {"ports": [self.port], "request": request, "pids": self.pids}


@contextlib.contextmanager
def running(workers: int, http: str, core: int) -> Iterator[list[Contender]]:
    """Yield all installed contenders, with that many workers each, on `core` only.

    `http` is uvicorn's HTTP parser: "h11" or "httptools".
    """
    own = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # They start on all cores.
        found = list(_Start(Path(name), workers, http, stack).all())
        for pid in {pid for contender in found for pid in contender.pids}:
            for task in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), {core})
        os.sched_setaffinity(0, own)
        yield found


def missing() -> list[str]:
    """Return the missing programs, without which some contenders are left out."""
    found = [] if PYTHON.exists() else [f"{PYTHON.parent.parent.name} (make bench)"]
    return found + ([] if shutil.which("nginx") else ["nginx (apt-get install nginx-light)"])


def versions() -> str:
    """Of those that are installed."""
    found = []
    if PYTHON.exists():
        names = ("mlflow", "mlflow-oidc-auth", "fastapi", "httpx")
        ask = f"from importlib.metadata import version; print(*map(version, {names}))"
        answer = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True, check=True)
        found = [f"{name} {one}" for name, one in zip(names, answer.stdout.split(), strict=True)]
    if shutil.which("nginx"):
        answer = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=True)
        found.append(answer.stderr.strip().rpartition(": ")[2])
    return ", ".join(found)


class _Start:
    def __init__(self, folder: Path, workers: int, http: str, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        self._workers = workers
        self._http = http
        self._stack = stack

    def all(self) -> Iterator[Contender]:
        bare = self._mlflow("bare", None)
        yield _contender(BARE, bare)
        gate = self._mlflow("gate", "hokusai-auth")
        key = gate.key("mlflow:write")
        yield _contender(GATE, gate, good=f"X-API-Key: {key}", alias=micro.ALIAS)
        if not PYTHON.exists():
            return
        yield self._basic_auth(BASIC, 0)
        yield self._basic_auth(f"{BASIC}, cache on", 60)
        yield self._oidc()
        with contextlib.closing(sqlite3.connect(self._folder / "keys.db")) as database, database:
            database.execute("CREATE TABLE keys (digest TEXT PRIMARY KEY)")
            digest = hashlib.sha256(_KEY.encode()).hexdigest()
            database.execute("INSERT INTO keys VALUES (?)", [digest])
        yield _contender("FastAPI and httpx", self._application("proxy", bare), bare)
        if shutil.which("nginx"):
            check = self._application("check", bare)
            for name, cached in (("nginx auth_request", False), ("nginx, cache on", True)):
                yield _contender(name, self._nginx(name, bare, check, cached), check, bare)

    def _mlflow(self, name: str, app: str | None, **environ: str) -> Server:
        options = ("--workers", str(self._workers), "--uvicorn-opts", f"--http {self._http}")
        python = sys.executable if app in (None, GATE) else str(PYTHON)
        # Not forked, because an operator's server is not.
        server = self._stack.enter_context(
            serve(self._folder / name, options, app=app, started=True, python=python, **environ)
        )
        _wait(server, self._workers)
        return server

    def _basic_auth(self, name: str, cache_seconds: int) -> Contender:
        config = self._folder / f"{name}.ini"
        config.write_text(
            "[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///basic_auth.db\n"
            f"auth_cache_ttl_seconds = {cache_seconds}\n"
        )
        password = secrets.token_urlsafe()
        server = self._mlflow(
            name,
            "basic-auth",
            MLFLOW_AUTH_CONFIG_PATH=str(config),
            MLFLOW_AUTH_ADMIN_USERNAME="admin",
            MLFLOW_AUTH_ADMIN_PASSWORD=password,
            MLFLOW_FLASK_SERVER_SECRET_KEY="bench",
        )
        good, wrong = (
            f"Authorization: Basic {base64.b64encode(f'admin:{word}'.encode()).decode()}"
            for word in (password, "wrong")
        )
        return _contender(name, server, good=good, wrong=wrong)

    def _oidc(self) -> Contender:
        identity = self._stack.enter_context(issuer.running())
        server = self._mlflow(
            "oidc",
            "oidc-auth",
            OIDC_DISCOVERY_URL=identity.discovery_url,
            OIDC_ISSUER=identity.url,
            OIDC_AUDIENCE=issuer.AUDIENCE,
            OIDC_CLIENT_ID="bench",
            OIDC_CLIENT_SECRET="bench",
            # The account of the token's owner; an administrator's needs the fewest lookups.
            OIDC_PROVISION_ON_BEARER_AUTH="true",
            OIDC_TRUST_BEARER_GROUP_CLAIMS="true",
            SECRET_KEY="bench" * 8,
        )
        good, wrong = (
            f"Authorization: Bearer {identity.token(seconds=seconds)}" for seconds in (7200, -7200)
        )
        return _contender("mlflow-oidc-auth", server, good=good, wrong=wrong)

    def _application(self, name: str, mlflow: Server) -> Server:
        port = free_port()
        command = [str(PYTHON), "-m", "uvicorn", f"bench.proxies:{name}"]
        command += ["--http", self._http, "--workers", str(self._workers), "--port", str(port)]
        environ = {"BENCH_KEYS": str(self._folder / "keys.db"), "BENCH_MLFLOW": mlflow.origin}
        return self._program(name, port, command, self._workers, **environ)

    def _nginx(self, name: str, mlflow: Server, check: Server, cached: bool) -> Server:
        folder, port = self._folder / name, free_port()
        config = nginx.configuration(
            folder, port, workers=self._workers, mlflow=mlflow, check=check, cached=cached
        )
        (self._folder / f"{name}.conf").write_text(config)
        command = ["nginx", "-e", str(folder / "error.log"), "-c", str(folder.with_suffix(".conf"))]
        return self._program(name, port, command)

    def _program(
        self, name: str, port: int, command: list[str], workers: int = 0, **environ: str
    ) -> Server:
        """Yield a running server that is not MLflow's."""
        folder = self._folder / name
        folder.mkdir()
        env = environment(folder, **environ)
        with (folder / "server.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = Server(f"http://127.0.0.1:{port}", folder, process, env)
        self._stack.callback(process.wait)
        self._stack.callback(server.signal, signal.SIGKILL)
        _wait(server, workers)
        return server


def _contender(
    name: str,
    *servers: Server,
    good: str = f"X-API-Key: {_KEY}",
    wrong: str = f"X-API-Key: {_WRONG}",
    alias: str = "",
) -> Contender:
    return Contender(name, servers, good, wrong, new_run(servers[0], good), alias)


def _wait(server: Server, workers: int) -> None:
    """Wait until it answers, and that many processes of uvicorn do."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            ready = server.log.count("Application startup complete") >= workers
            if ready and server.request("GET", "/health")[0] == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"the server did not start:\n{server.log}")

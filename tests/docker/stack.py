"""The whole of `docker/` as real containers, under a project name and at ports of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from docker.errors import DockerException
from docker.models.containers import Container

from docker import DockerClient
from mlflow_hokusai_auth.core import keys
from tests.harness import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docker" / "stack"
REPLICAS = ("mlflow-1", "mlflow-2")
#: Everything that runs all the time.
SERVICES = (*REPLICAS, "nginx", "nginx-all", "postgres", "redis", "auth", "prometheus")

#: Asks MLflow from inside of a replica's container, past nginx; prints a line of JSON.
_ASK = """
import http.client, json, os
method, path, headers = json.loads(os.environ["QUESTION"])
connection = http.client.HTTPConnection("127.0.0.1", 5000, timeout=30)
connection.request(method, path, headers={"Host": "localhost:5000", **headers})
answer = connection.getresponse()
print(json.dumps([answer.status, answer.read().decode(errors="replace")]))
"""


def engine_problem() -> str:
    """Why nothing here can run, or ""."""
    try:
        engine().ping()
    except DockerException as error:
        return f"no Docker engine: {error}"
    return "" if shutil.which("docker") else "no docker command"


@cache
def engine() -> DockerClient:
    """The engine of DOCKER_HOST, or the usual one. Raises DockerException."""
    return DockerClient.from_env(timeout=600)


def docker(*arguments: str, stdin: str | None = None, check: bool = True) -> str:
    """What `docker …` prints on standard output; fails with what it prints on standard error."""
    return _run(["docker", *arguments], stdin=stdin, check=check).stdout


def output(container: str) -> str:
    """All that the container has written, standard error included."""
    done = _run(["docker", "logs", container])
    return done.stdout + done.stderr


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """What `condition` returns as soon as that is true; fails if it is not in time."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)
    return found


class Stack:
    """`docker/stack up`, its containers by the names of their services, and what they keep."""

    def __init__(self, folder: Path, **environ: str) -> None:
        self.secrets = folder / "secrets"
        self.project = f"hokusai-test-{os.getpid()}"
        self._ports = {name: free_port() for name in ("nginx", "nginx-all", "prometheus")}
        self.environ = {
            **{
                name: value for name, value in os.environ.items() if not name.startswith("HOKUSAI_")
            },
            "COMPOSE_PROJECT_NAME": self.project,
            "SECRETS": str(self.secrets),
            "PORT": str(self._ports["nginx"]),
            "PORT_ALL": str(self._ports["nginx-all"]),
            "PROMETHEUS_PORT": str(self._ports["prometheus"]),
            "EDGE": f"10.{random.randint(64, 250)}.{random.randint(0, 255)}",
            **environ,
        }
        self._keys: dict[tuple[str, ...], str] = {}

    # The whole

    def up(self) -> str:
        """Build and start everything, again if it runs already; returns what the script said."""
        done = _run([str(SCRIPT), "up"], environ=self.environ, timeout=1800)
        return done.stdout

    def down(self) -> None:
        _run([str(SCRIPT), "down"], environ=self.environ, check=False)

    def compose(
        self, *arguments: str, stdin: str | None = None, check: bool = True, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """`docker compose …`, v2 or v1, with this project's files and variables."""
        command = [str(SCRIPT), "compose", *arguments]
        return _run(command, environ={**self.environ, **environ}, stdin=stdin, check=check)

    # One service

    def container(self, service: str) -> str:
        """The id of the service's container, whether it runs or not."""
        return str(self._container(service).id)

    def _container(self, service: str) -> Container:
        labels = {"project": self.project, "service": service, "oneoff": "False"}
        wanted = [f"com.docker.compose.{name}={value}" for name, value in labels.items()]
        (found,) = engine().containers.list(all=True, filters={"label": wanted})
        return found

    def inspect(self, service: str) -> dict[str, Any]:
        return dict(self._container(service).attrs)

    def exec(
        self, service: str, *command: str, check: bool = True, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """A command in the service's running container."""
        code, said = self._container(service).exec_run(command, environment=environ, demux=True)
        out, err = ((stream or b"").decode(errors="replace") for stream in said)
        assert not check or code == 0, f"{command[:4]}… exits {code}:\n{(out + err)[-4000:]}"
        return subprocess.CompletedProcess(command, code, out, err)

    def logs(self, service: str) -> str:
        """All that the container has written, standard error included."""
        return self._container(service).logs().decode(errors="replace")

    def kill(self, service: str) -> None:
        """It stays down until `start`."""
        self._container(service).kill("KILL")

    def stop(self, service: str) -> None:
        """As in a deployment: its stop signal, and time to finish."""
        self.compose("stop", service)

    def start(self, service: str) -> None:
        """Start it, and wait until it is healthy."""
        self._container(service).start()
        self.wait_healthy(service)

    @contextlib.contextmanager
    def frozen(self, service: str) -> Iterator[None]:
        """The container neither answers nor ends while the context lasts."""
        container = self._container(service)
        container.pause()
        try:
            yield
        finally:
            container.unpause()

    @contextlib.contextmanager
    def cut_off(self, service: str, network: str = "default") -> Iterator[None]:
        """The container is not reachable on `network` (default, edge, outside) meanwhile."""
        container, name = self._container(service), f"{self.project}_{network}"
        (net,) = engine().networks.list(names=[name])
        had = container.attrs["NetworkSettings"]["Networks"][name]["IPAMConfig"] or {}
        net.disconnect(container, force=True)
        try:
            yield
        finally:
            net.connect(container, aliases=[service], ipv4_address=had.get("IPv4Address"))

    def wait_healthy(self, *services: str) -> None:
        """Wait until the health checks of these, or of all, say so."""
        for service in services or SERVICES:
            until(lambda s=service: self.health(s) == "healthy", 180)

    def health(self, service: str) -> str:
        state = self.inspect(service)["State"]
        return str(state["Health"]["Status"]) if state["Running"] else str(state["Status"])

    # Requests

    def url(self, service: str) -> str:
        """Where this machine reaches nginx, nginx-all or prometheus."""
        return f"http://127.0.0.1:{self._ports[service]}"

    def request(
        self,
        service: str,
        method: str,
        path: str,
        *,
        key: str | None = None,
        headers: dict[str, str] | None = None,
        body: Any = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """One request to a published service, on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self._ports[service], timeout=60)
        with contextlib.closing(connection):
            extra = {} if key is None else {"X-API-Key": key}
            connection.request(method, path, body=body, headers={**extra, **(headers or {})})
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, found, answer.read()

    def ask(
        self, replica: str, method: str, path: str, *, key: str | None = None
    ) -> tuple[int, str]:
        """One request to that very replica, past nginx: status and body."""
        headers = {} if key is None else {"X-API-Key": key}
        # Not as an argument, which everybody may read.
        question = json.dumps([method, path, headers])
        status, body = json.loads(
            self.exec(replica, "python", "-c", _ASK, QUESTION=question).stdout
        )
        return status, body

    def client(
        self,
        *command: str,
        key: str = "",
        stdin: str | None = None,
        check: bool = True,
        **environ: str,
    ) -> subprocess.CompletedProcess[str]:
        """A command in a new container of a supplier, who has `key` and reaches nginx only."""
        given = {"HOKUSAI_API_KEY": key, "HOKUSAI_API_KEY_FILE": "", **environ}
        options = [option for name in given for option in ("-e", name)]
        run = ["run", "--rm", "-T", *options, "client", *command]
        return self.compose(*run, stdin=stdin, check=check, **given)

    # Keys

    def key(self, *scopes: str) -> str:
        """A key of the local store with these scopes, the same one for each call."""
        if scopes not in self._keys:
            self._keys[scopes] = self.new_key(*scopes)["key"]
        return self._keys[scopes]

    def new_key(self, *scopes: str, replica: str = "mlflow-1") -> dict[str, Any]:
        """A new key: `key`, `key_id` and so on."""
        options = [f"--scope={scope}" for scope in scopes]
        command = ["hokusai-auth", "keys", "create", "--owner", "test", "--json", *options]
        made: dict[str, Any] = json.loads(self.exec(replica, *command).stdout)
        return made

    def service_key(self, **grant: Any) -> str:
        """A new key of the stand-in auth service; `grant` as in `tests.standin.Grant`."""
        key, file = keys.generate("test"), self.secrets / "service_keys"
        # In place, as the container sees this very file.
        file.write_text(json.dumps({**json.loads(file.read_text()), key: grant}))
        return key


def _run(
    command: list[str],
    *,
    environ: dict[str, str] | None = None,
    stdin: str | None = None,
    check: bool = True,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, env=environ, input=stdin or "", capture_output=True, text=True, timeout=timeout
    )
    said = (done.stdout + done.stderr)[-4000:]
    assert not check or done.returncode == 0, f"{command[:4]}… exits {done.returncode}:\n{said}"
    return done

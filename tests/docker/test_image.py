"""The image by itself, and nginx before replicas that fail."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mlflow_hokusai_auth import __version__
from tests.docker.stack import ROOT, Stack, docker, output, until

pytestmark = pytest.mark.docker

IMAGE = "mlflow-hokusai-auth:latest"
CLIENT = "mlflow-hokusai-auth-client:latest"
NGINX = ROOT / "docker" / "nginx"


@pytest.fixture(autouse=True)
def _built(stack: Stack) -> None:
    """The stack builds the images."""


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[str]:
    """A container of its own; gone at the end."""
    container = docker("run", "--detach", *arguments).strip()
    try:
        yield container
    finally:
        docker("rm", "--force", "--volumes", container)


def state(container: str) -> dict[str, Any]:
    return json.loads(docker("inspect", container))[0]["State"]  # type: ignore[no-any-return]


def listening(container: str, port: int) -> None:
    """Wait until something in the container does."""
    connect = f"until exec 3<>/dev/tcp/127.0.0.1/{port}; do sleep 0.1; done 2>/dev/null"
    docker("exec", container, "bash", "-c", connect)


def run(*arguments: str, image: str = IMAGE) -> str:
    return docker("run", "--rm", "--network=none", image, *arguments)


@pytest.mark.parametrize(("image", "limit"), [(IMAGE, 1500), (CLIENT, 700)])
def test_an_image_says_what_it_is_and_holds_no_more_than_it_runs(image: str, limit: int) -> None:
    (found,) = json.loads(docker("image", "inspect", image))
    print(f"{image}: {found['Size'] / 1e6:.0f} MB")
    assert found["Size"] < limit * 1e6
    assert found["Config"]["User"] == "10001"
    assert found["Config"]["Labels"]["org.opencontainers.image.version"] == __version__
    (base,) = json.loads(docker("image", "inspect", "python:3.11-slim-bookworm"))
    print(f"  of which Python's image: {base['Size'] / 1e6:.0f} MB")
    look = "id -u; ls -d /root/.cache ~/.cache /tmp/* /src /wheels/*.tar.gz 2>/dev/null"
    look += "; find / -xdev -path '*/pip/http*' -o -xdev -path '/opt/venv/bin/pip*' 2>/dev/null"
    look += "; command -v gcc cc make; find /opt/venv ! -user root -writable -type f; true"
    assert run("sh", "-c", look, image=image).split() == ["10001"]


def test_the_client_s_image_has_the_client_alone() -> None:
    listed = run("python", "-c", "import mlflow, mlflow_hokusai_auth", image=CLIENT)
    assert listed == ""
    lacks = "import importlib.util as u; print(*map(u.find_spec, ('flask', 'numpy')))"
    assert run("python", "-c", lacks, image=CLIENT).split() == ["None", "None"]


def test_the_entry_command_takes_options_or_a_command() -> None:
    assert "Run the MLflow tracking server" in run("--help")
    assert __version__ in run("hokusai-auth", "--version")
    with pytest.raises(AssertionError, match=r"exits 2:\n(?s:.*)No such option"):
        run("--no-such-option")
    with pytest.raises(AssertionError, match=r"exits 127:\n.*no-such-command: not found"):
        run("no-such-command")


def test_options_reach_the_server_and_it_stops_when_it_is_told() -> None:
    started = time.monotonic()
    # As in the stack: MLflow's own job runner takes a quarter of a minute to end.
    jobs = "--env=MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"
    with running("--network=none", jobs, IMAGE, "--workers", "1") as container:
        until(lambda: state(container)["Health"]["Status"] == "healthy", 120)
        print(f"healthy after {time.monotonic() - started:.0f} s")
        assert "--workers 1 " in docker("top", container, "-eo", "pid,args")
        # The first process is the server itself, not a shell that would swallow the signal.
        first = docker("top", container, "-eo", "pid,args").splitlines()[1]
        assert "mlflow server --app-name" in first
        told = time.monotonic()
        docker("kill", "--signal=TERM", container)
        until(lambda: not state(container)["Running"])
        print(f"stopped after {time.monotonic() - told:.1f} s")
        assert (state(container)["ExitCode"], state(container)["OOMKilled"]) == (0, False)


def test_a_server_that_does_not_answer_is_unhealthy() -> None:
    quick = ("--health-interval=1s", "--health-start-period=0s", "--health-retries=2")
    with running("--network=none", *quick, IMAGE, "sleep", "600") as container:
        until(lambda: state(container)["Health"]["Status"] == "unhealthy", 300)


#: Counts requests and hangs up without an answer, as a replica that dies in the middle of its work.
DYING = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def handle_one_request(self):
        super().handle_one_request()
        self.close_connection = True
    def do(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        print("TRIED", self.command, flush=True)
    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", 5000), Handler).serve_forever()
"""

#: Sends a request to nginx, from beside it, and prints the status.
SEND = """
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", 80, timeout=30)
method, path, body = sys.argv[1:]
connection.request(method, path, body.encode() or None, {"Referer": "http://x/?api_key=hk_canary"})
print(connection.getresponse().status)
"""


@pytest.fixture(scope="module")
def nginx(stack: Stack) -> Iterator[str]:
    """An nginx whose replicas are 127.0.0.1, where nothing listens, or what a test puts there."""
    hosts = ["--add-host=mlflow-1:127.0.0.1", "--add-host=mlflow-2:127.0.0.1"]
    files = [f"--volume={NGINX}/mlflow.conf:/etc/nginx/conf.d/default.conf:ro"]
    files += [f"--volume={NGINX}/all.conf:/etc/nginx/routes.conf:ro"]
    image = stack.inspect("nginx")["Config"]["Image"]
    with running("--network=none", *hosts, *files, image) as container:
        listening(container, 80)
        yield container


def send(nginx: str, method: str, path: str, body: str = "") -> int:
    beside = f"--network=container:{nginx}"
    return int(docker("run", "--rm", beside, IMAGE, "python", "-c", SEND, method, path, body))


def test_nginx_s_errors_name_no_key(nginx: str) -> None:
    assert send(nginx, "GET", "/version?api_key=hk_canary") == 502
    logs = output(nginx)
    assert '"GET /version" 502' in logs
    assert "canary" not in logs


def test_nothing_is_sent_twice_that_may_have_been_done(nginx: str) -> None:
    beside = f"--network=container:{nginx}"
    # The image's health check would ask it as well.
    with running(beside, "--no-healthcheck", IMAGE, "python", "-c", DYING) as dying:
        listening(dying, 5000)

        def tried() -> list[str]:
            return [line.split()[1] for line in output(dying).splitlines() if "TRIED" in line]

        # As both names are one address, the "other" replica is asked if a request is sent twice.
        cases = [("GET", ""), ("POST", "{}"), ("PATCH", "{}"), ("DELETE", "{}"), ("DELETE", "")]
        for case in cases:
            before = tried()
            # nginx asks nobody for a while after both have failed.
            until(lambda c=case, t=before: send(nginx, c[0], "/x", c[1]) == 502 and tried() != t)
            assert tried() == before + [case[0]] * (2 if case[0] == "GET" else 1)

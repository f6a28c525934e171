"""`hokusai-auth smoke` against real servers: it finds every fault and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlflow_hokusai_auth.cli import main
from mlflow_hokusai_auth.client.diagnose import doctor, smoke
from mlflow_hokusai_auth.core import keys
from tests.client.conftest import Handler, listening
from tests.client.diagnose.test_doctor import IDENTITY, closed_port, silent
from tests.client.test_admin import answering
from tests.harness import HOKUSAI_AUTH, PREFIXES, Server, environment, serve

pytestmark = pytest.mark.servers

#: status, headers and body; None for a connection that ends without a word
Answer = tuple[int, dict[str, str], bytes] | None
SEARCH = "/api/2.0/mlflow/experiments/search"
MADE = ["experiment", "run", "artifacts", "registered model", "model version", "alias", "load"]
MADE += ["list", "clean up"]


class Between:
    """A proxy of `server` with its own answers to requests whose line holds one of the texts."""

    def __init__(self, server: Server) -> None:
        self.server = server
        #: text -> function that makes the answer, given one that asks the server
        self.on: dict[str, Callable[[Callable[[], Answer]], Answer]] = {}
        self.asked: list[str] = []
        self.port = 0

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class _Forwarding(Handler):
    between: Between
    _DROPPED = ("host", "connection", "content-length", "transfer-encoding")

    def answer(self, body: bytes) -> Answer:
        line = f"{self.command} {self.path}"
        self.between.asked.append(line)
        sent = {n: v for n, v in self.headers.items() if n.lower() not in self._DROPPED}

        def forward() -> Answer:
            return self.between.server.request(self.command, self.path, headers=sent, body=body)

        act = next((act for text, act in self.between.on.items() if text in line), None)
        answer = act(forward) if act else forward()
        if answer is None:
            return None
        status, headers, content = answer
        return status, {n: v for n, v in headers.items() if n not in self._DROPPED}, content


@contextlib.contextmanager
def between(server: Server) -> Iterator[Between]:
    way = Between(server)
    with listening(_Forwarding, between=way) as way.port:
        yield way


def things(server: Server) -> dict[str, list[str]]:
    """Everything of smoke's that is visible on `server`."""
    key = server.key("mlflow:admin")

    def ask(method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        status, _, answer = server.request(method, path, key=key, headers=headers, body=data)
        assert status == 200, answer
        return json.loads(answer)

    api = "/api/2.0/mlflow"
    models = ask("GET", f"{api}/registered-models/search?max_results=1000")
    experiments = ask("GET", f"{api}/experiments/search?max_results=1000").get("experiments", [])
    ids = [one["experiment_id"] for one in experiments]
    runs = ask("POST", f"{api}/runs/search", {"experiment_ids": ids, "max_results": 1000})
    kept = (server.folder / "artifacts").rglob("*")
    return {
        "models": [one["name"] for one in models.get("registered_models", [])],
        "experiments": [one["name"] for one in experiments],
        "runs": [one["info"]["run_id"] for one in runs.get("runs", [])],
        # The folder of the default experiment always exists.
        "artifacts": sorted(str(path) for path in kept if path.name != "0"),
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server on which only these tests make anything."""
    with serve(tmp_path_factory.mktemp("smoke")) as server:
        yield server


@pytest.fixture
def live(alone: Server) -> Iterator[Server]:
    """A real server, on which the test must leave nothing."""
    before = things(alone)
    yield alone
    assert things(alone) == before


@pytest.fixture
def way(live: Server) -> Iterator[Between]:
    with between(live) as made:
        yield made


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command with a key. Return its output and its checks by name."""

    def run(url: str, key: str, *, code: int) -> tuple[str, dict[str, dict[str, Any]]]:
        monkeypatch.setenv("HOKUSAI_API_KEY", key)
        result: Result = CliRunner().invoke(main, ["smoke", url, "--json"])
        assert result.exit_code == code, result.output
        report = json.loads(result.stdout)
        assert list(report) == ["ok", "url", "seconds", "checks"]
        assert report["ok"] is (code == 0)
        for check in report["checks"]:
            assert list(check) == ["check", "ok", "seconds", "found", "fix", "warns"]
            assert check["found"] and (check["fix"] or check["ok"] is not False)
        if key:
            assert key not in result.output and key[8:] not in result.output
        return result.output, {check["check"]: check for check in report["checks"]}

    return run


def failed(checks: dict[str, dict[str, Any]]) -> list[str]:
    return [name for name, check in checks.items() if check["ok"] is False]


def skipped(checks: dict[str, dict[str, Any]]) -> list[str]:
    return [name for name, check in checks.items() if check["ok"] is None]


@pytest.mark.parametrize(
    ("scope", "prefix"),
    [*zip(("mlflow:write", "model:write", "mlflow:admin"), PREFIXES, strict=True)],
)
def test_smoke_does_the_whole_job(scope: str, prefix: str, live: Server, run: Any) -> None:
    _, checks = run(live.origin + prefix, live.key(scope), code=0)
    assert failed(checks) == skipped(checks) == []
    assert list(checks)[-len(MADE) :] == MADE
    own = "hokusai-smoke-" in checks["experiment"]["found"]
    assert own is (scope != "model:write")
    assert "`mlflow gc`" in checks["clean up"]["found"]


def test_run_goes_to_the_default_experiment_of_a_confined_key(alone: Server, run: Any) -> None:
    with between(alone) as way:

        def isolated(ask: Callable[[], Answer]) -> Answer:
            status, headers, body = ask() or (0, {}, b"")
            named = json.loads(body) | {"default_experiment": "default:test"}
            return status, headers, json.dumps(named).encode()

        way.on["hokusai/whoami"] = isolated
        before = things(alone)
        for _ in range(2):
            _, checks = run(way.origin, alone.key("model:write"), code=0)
            assert failed(checks) == skipped(checks) == []
            assert not checks["experiment"]["found"].startswith("0,")
    after = things(alone)
    assert after.pop("experiments") == ["default:test", *before.pop("experiments")]
    # Of the runs, only the folder of their experiment stays.
    assert [path for path in after.pop("artifacts") if Path(path).is_file()] == []
    before.pop("artifacts")
    assert after == before


def test_output_is_readable_lines(live: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOKUSAI_API_KEY", live.key("mlflow:write"))
    result = CliRunner().invoke(main, ["smoke", f"{live.origin}/api/mlflow/"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert all(line.startswith("ok    ") and line.endswith(" s)") for line in lines[:-1])
    assert lines[-1].startswith("all is well, ")
    assert CliRunner().invoke(main, ["smoke"]).exit_code == 2


def test_key_without_the_scopes_makes_nothing(way: Between, live: Server, run: Any) -> None:
    for scope in ("model:read", "mlflow:read", "metrics:read"):
        _, checks = run(way.origin, live.key(scope), code=1)
        assert failed(checks) == ["scope"] and skipped(checks) == MADE, scope
        assert "model:write" in checks["scope"]["fix"]
    assert not [line for line in way.asked if not line.startswith(("GET", "POST /v1/traces"))]


def test_key_that_may_not_delete_makes_nothing(run: Any) -> None:
    with answering() as api:
        api.answers["GET /health"] = (200, b"OK")
        api.on("GET whoami", 200, IDENTITY)
        _, checks = run(api.uri, keys.generate("test"), code=1)
        assert "may" in checks["scope"]["fix"] or "mlflow:write" in checks["scope"]["fix"]
        assert "experiment 0: RESOURCE_DOES_NOT_EXIST" in checks["scope"]["found"]
        assert [asked.path for asked in api.asked if asked.method != "GET"] == []
    assert set(skipped(checks)) >= set(MADE)


@pytest.mark.parametrize("text", ["runs/log-metric", "PUT ", "model-versions/create", "alias"])
def test_failed_step_leaves_nothing(text: str, way: Between, live: Server, run: Any) -> None:
    way.on[text] = lambda _: (500, {}, b"down")
    for scope in ("mlflow:write", "model:write"):
        _, checks = run(way.origin, live.key(scope), code=1)
        assert len(failed(checks)) == 1 and checks["clean up"]["ok"] is True


@pytest.mark.parametrize(
    "text", ["experiments/create", "runs/create", "registered-models/create", "model-versions/cre"]
)
def test_objects_of_a_lost_answer_are_deleted(
    text: str, way: Between, live: Server, run: Any
) -> None:
    way.on[text] = lambda forward: forward() and None
    for scope in ("mlflow:write", "model:write"):
        if (scope, text) == ("model:write", "experiments/create"):
            continue
        _, checks = run(way.origin, live.key(scope), code=1)
        assert len(failed(checks)) == 1 and checks["clean up"]["ok"] is True


def test_undeleted_objects_are_named(way: Between, live: Server, run: Any) -> None:
    way.on["registered-models/delete"] = lambda _: (500, {}, b"down")
    _, checks = run(way.origin, live.key("mlflow:write"), code=1)
    assert failed(checks) == ["clean up"]
    name = checks["registered model"]["found"]
    assert (
        checks["clean up"]["fix"] == f"Delete these, as far as they exist: registered model {name}."
    )
    # The rest is gone, and the test deletes this.
    assert "experiment" not in checks["clean up"]["found"].split("registered model")[0]
    body = json.dumps({"name": name}).encode()
    json_type = {"Content-Type": "application/json"}
    path = "/api/2.0/mlflow/registered-models/delete"
    live.request("DELETE", path, key=live.key("mlflow:admin"), headers=json_type, body=body)


def test_changed_bytes_fail(way: Between, live: Server, run: Any) -> None:
    way.on["weights.bin"] = lambda forward: (answer := forward()) and (*answer[:2], b"x" * 4096)
    _, checks = run(way.origin, live.key("mlflow:write"), code=1)
    assert failed(checks) == ["load"]
    assert "weights.bin" in checks["load"]["found"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_job_leaves_nothing(way: Between, live: Server, number: int) -> None:
    arrived, resume = threading.Event(), threading.Event()

    def slow(forward: Callable[[], Answer]) -> Answer:
        answer = forward()
        arrived.set()
        resume.wait(120)
        return answer

    way.on["model-versions/create"] = slow
    environ = {**live.environ, "HOKUSAI_API_KEY": live.key("mlflow:write")}
    process = subprocess.Popen(
        [*HOKUSAI_AUTH, "smoke", way.origin],
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        # A shell's background process ignores SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert arrived.wait(120)
    process.send_signal(number)
    resume.set()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "FAIL  finished: interrupted" in printed and "ok    clean up: " in printed


# Servers on which it has to fail


def test_revoked_key_fails(live: Server, run: Any) -> None:
    record, key = live.store.create(owner="test", scopes=["mlflow:write"])
    live.store.revoke(record.key_id)
    _, checks = run(live.origin, key, code=1)
    assert failed(checks) == ["key accepted"] and "KEY_REVOKED" in checks["key accepted"]["found"]
    assert checks["key accepted"]["fix"] == "Ask the server's operator for a new key."


def test_missing_key_fails(live: Server, run: Any) -> None:
    _, checks = run(live.origin, "", code=1)
    assert failed(checks) == ["key"]
    assert checks["refused without a key"]["ok"] is True


def test_mlflow_without_the_gate_fails(tmp_path: Path, run: Any) -> None:
    with serve(tmp_path, app=None) as server:
        _, checks = run(server.origin, keys.generate("test"), code=1)
    assert "ANSWERS WITHOUT A KEY" in checks["refused without a key"]["found"]
    assert "ANSWERS WITH A WRONG KEY" in checks["refused with a wrong key"]["found"]
    assert "--app-name hokusai-auth" in checks["refused without a key"]["fix"]
    assert "ANSWERS WITHOUT A KEY" in checks["prefix /"]["found"]
    assert "key accepted" in failed(checks) and set(MADE) <= set(skipped(checks))


@pytest.mark.parametrize("mode", ["observe", "off"])
def test_server_in_another_mode_than_enforce_fails(mode: str, tmp_path: Path, run: Any) -> None:
    with serve(tmp_path, HOKUSAI_AUTH_MODE=mode) as server:
        _, checks = run(server.origin, server.key("mlflow:write"), code=1)
        assert things(server)["models"] == []
    for name in ("refused without a key", "refused with a wrong key"):
        assert "in mode observe or off and refuses no request" in checks[name]["found"]
        assert "hokusai-auth mode enforce" in checks[name]["fix"]
    assert checks["clean up"]["ok"] is True


def test_server_that_dies_fails(tmp_path: Path, run: Any) -> None:
    with serve(tmp_path) as server, between(server) as way:

        def die(forward: Callable[[], Answer]) -> Answer:
            forward()
            server.signal(signal.SIGKILL)
            return None

        way.on["runs/create"] = die
        _, checks = run(way.origin, server.key("mlflow:write"), code=1)
    assert failed(checks) == ["run", "clean up"]
    (name,) = checks["experiment"]["found"].split()[1:]
    assert f"experiment {name}" in checks["clean up"]["fix"]


def test_server_that_stops_answering_fails(tmp_path: Path, run: Any) -> None:
    over = threading.Event()
    with serve(tmp_path) as server, between(server) as way:
        way.on["registered-models"] = lambda _: over.wait(600) and None
        _, checks = run(way.origin, server.key("mlflow:write"), code=1)
        over.set()
        assert things(server)["experiments"] == ["Default"]
    assert failed(checks) == ["registered model", "clean up"]
    assert "timeout" in checks["registered model"]["found"]


def test_useless_urls_fail(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TIMEOUT", 0.5)
    for url, check, found in (
        ("https://registry.invalid/api/mlflow", "server", "has no address"),
        ("sqlite:///mlflow.db", "URL", "is not the URL of a server"),
        ("ftp://127.0.0.1/", "URL", "is not the URL of a server"),
        ("registry.example.com", "URL", "has no scheme"),
        ("http://192.0.2.1/", "origin", "plain http would show the key"),
        (f"http://127.0.0.1:{closed_port()}", "server", "nothing listens at"),
    ):
        _, checks = run(url, keys.generate("test"), code=1)
        assert failed(checks)[0] == check and found in checks[check]["found"], url
        assert "MLFLOW_TRACKING_URI" not in str(checks)
        assert set(MADE) <= set(skipped(checks)), url


def test_server_other_than_mlflow_fails(way: Between, run: Any) -> None:
    way.on[" "] = lambda _: (200, {"content-type": "text/html"}, b"<html>Welcome</html>")
    _, checks = run(way.origin, keys.generate("test"), code=1)
    assert failed(checks) == [
        "health",
        "refused without a key",
        "refused with a wrong key",
        "key accepted",
    ]
    assert "--app-name hokusai-auth" in checks["key accepted"]["fix"]


def test_key_is_never_shown(way: Between, run: Any) -> None:
    key = keys.generate("test")
    body = {"error_code": key, "message": f"<{key}>", "error": key, "key_id": key, "can": [key]}
    headers = {"www-authenticate": f"Bearer {key}", "location": f"/{key}", "x": key}
    way.on["/health"] = lambda _: (200, {}, b"OK")
    for status in (200, 401, 404, 500):
        way.on[" "] = lambda _, status=status: (status, headers, json.dumps(body).encode())
        # The fixture searches the output for the key.
        run(way.origin, key, code=1)


def test_password_in_the_url_is_not_shown(live: Server, run: Any) -> None:
    key = live.key("mlflow:write")
    output, _ = run(live.origin.replace("://", f"://me:{key}@"), key, code=0)
    assert '"url": "http://127.0.0.1:' in output


def test_key_is_sent_only_to_the_origin_of_the_url(
    way: Between, live: Server, other: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOKUSAI_ALLOWED_ORIGINS", f"{way.origin},{other.origin}")
    key = live.key("mlflow:write")
    there = {"location": f"{other.origin}/api/2.0/hokusai/whoami"}
    way.on["hokusai/whoami"] = lambda _: (307, there, b"")
    run(way.origin, key, code=1)
    assert other.seen and not other.saw(key)


def test_no_artifact_is_sent_to_another_host(
    way: Between, live: Server, other: Any, run: Any
) -> None:
    def elsewhere(forward: Callable[[], Answer]) -> Answer:
        answer = forward()
        assert answer is not None
        there = f"mlflow-artifacts://127.0.0.1:{other.port}/".encode()
        return (*answer[:2], answer[2].replace(b"mlflow-artifacts:/", there))

    way.on["runs/create"] = elsewhere
    _, checks = run(way.origin, live.key("mlflow:write"), code=1)
    assert failed(checks) == ["run"] and "not through the server" in checks["run"]["found"]
    assert other.seen == []


# Load balancers


def test_prefix_of_another_service_is_skipped(way: Between, live: Server, run: Any) -> None:
    for answer in ((404, {}, b""), (200, {}, b"<html>"), (200, {}, b'{"a":1}')):
        way.on[f" {SEARCH}"] = way.on[f" /mlflow{SEARCH}"] = lambda _, answer=answer: answer
        _, checks = run(f"{way.origin}/api/mlflow", live.key("mlflow:write"), code=0)
        assert skipped(checks) == ["prefix /", "prefix /mlflow"], answer


def test_prefix_without_the_gate_fails(way: Between, live: Server, run: Any) -> None:
    for body in (b'{"experiments": []}', b"{}"):
        way.on[f" /mlflow{SEARCH}"] = lambda _, body=body: (200, {}, body)
        _, checks = run(f"{way.origin}/api/mlflow", live.key("mlflow:read"), code=1)
        assert failed(checks) == ["prefix /mlflow", "scope"], body
        assert "/mlflow ANSWERS WITHOUT A KEY" in checks["prefix /mlflow"]["found"]


# Time


def test_silent_server_fails(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TIMEOUT", 0.5)
    with silent() as port:
        _, checks = run(f"http://127.0.0.1:{port}", keys.generate("test"), code=1)
    assert failed(checks) == ["server"] and "did not answer" in checks["server"]["found"]


class _Dripping(Handler):
    """Endless answers, a byte every 0.1 s, so that no request but /health times out."""

    over: threading.Event
    asked_for_health: Callable[[], None]

    def _answer(self) -> None:
        if self.path.endswith("/health"):
            type(self).asked_for_health()
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            return
        with contextlib.suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while not self.over.wait(0.1):
                self.wfile.write(b" ")

    do_GET = do_POST = _answer


@contextlib.contextmanager
def dripping(asked_for_health: Callable[[], object] = lambda: None) -> Iterator[str]:
    over = threading.Event()
    with listening(_Dripping, over=over, asked_for_health=staticmethod(asked_for_health)) as port:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            over.set()


def test_endless_answers_do_not_outlive_the_deadline(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(smoke, "time", SimpleNamespace(monotonic=lambda: clock.now))
    nearly = smoke.DEADLINE - smoke.CLEANING - 0.1
    with dripping(lambda: setattr(clock, "now", nearly)) as url:
        report = smoke.smoke(url, lambda check: None)
    assert not report.ok and report.stuck
    first = next(check for check in report.checks if check.ok is False)
    assert (first.check, first.found) == ("health", "no answer within 0 s")


def test_command_ends_while_threads_still_wait(tmp_path: Path) -> None:
    environ = environment(tmp_path, HOKUSAI_API_KEY=keys.generate("test"))
    with dripping() as url:
        done = subprocess.run(
            [*HOKUSAI_AUTH, "smoke", url], env=environ, capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 1
    assert "FAIL  health: no answer within" in done.stdout

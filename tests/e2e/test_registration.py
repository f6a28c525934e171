"""The main job, end to end: real servers, the real MLflow client, keys as suppliers have them."""

from __future__ import annotations

import json
import re
import secrets
import string
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from tests.harness import PREFIXES, SERVERS, Server, free_port, run_command, run_forked, serve

JOB = Path(__file__).with_name("job.py")


def run_job(
    environ: dict[str, str], name: str, *uris: str, python: str | None = None
) -> list[dict[str, object]]:
    """What the job says it did, once or once for each of `uris`; in a fork, or started by `python`."""
    if python is None:
        done = run_forked(Path(environ["HOME"]), str(JOB), name, *uris, environ=environ)
    else:
        command = [python, str(JOB), name, *uris]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def assert_done(result: dict[str, object], name: str) -> None:
    assert result["status"] == "READY"
    assert result["prediction"] == [42]
    assert result["listed"] == [name]
    assert result["metric"] == 0.91
    assert result["text"] == "10 % of a+b"
    assert "notes" in result["files"]


def test_supplier_registers_a_model(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        uri = f"{server.origin}/api/mlflow"
        key = server.key("model:write")
        environ = {**server.environ, "HOKUSAI_API_KEY": key, "MLFLOW_TRACKING_URI": uri}
        assert_done(run_job(environ, "first")[0], "first")
        assert server.request("GET", "/api/mlflow/version")[0] == 401
        assert key not in server.log


@pytest.mark.parametrize("kind", SERVERS)
def test_a_model_is_registered_under_every_prefix(servers: dict[str, Server], kind: str) -> None:
    server = servers[kind]
    environ = {**server.environ, "HOKUSAI_API_KEY": server.key("mlflow:write")}
    uris = [server.origin + prefix for prefix in PREFIXES]
    results = run_job(environ, kind, *uris)
    for number, (prefix, result) in enumerate(zip(PREFIXES, results, strict=True)):
        assert_done(result, f"{kind}-{number}")
        # Every request of the client kept the prefix, artifacts and traces included (decision 16).
        requests = re.findall(r'"(?:GET|POST|PUT|PATCH|DELETE) (\S+) HTTP', server.log)
        mine = [path for path in requests if result["run_id"] in path]
        assert all(path.startswith(prefix) for path in mine), mine
        assert mine or kind == "waitress"  # which writes no access log
    if kind in ("uvicorn", "httptools", "workers"):
        assert '"POST /api/mlflow/v1/traces HTTP/1.1" 200' in server.log


@pytest.fixture(scope="module")
def reported(server: Server) -> dict[str, str]:
    """The environment of the report's supplier: a key of the reported shape, imported."""
    letters = string.ascii_letters + string.digits
    key = "hk_live_" + "".join(secrets.choice(letters) for _ in range(32))
    arguments = ("keys", "import", "--owner", "Supplier", "--scope", "model:write")
    imported = run_command(server.folder, *arguments, environ=server.environ, given=key)
    assert imported.returncode == 0, imported.stderr
    assert key not in imported.stdout + imported.stderr
    uri = f"{server.origin}/api/mlflow"
    return {**server.environ, "HOKUSAI_API_KEY": key, "MLFLOW_TRACKING_URI": uri}


def test_the_bug_report_step_by_step(reported: dict[str, str]) -> None:
    assert_done(run_job(reported, "reported", python=sys.executable)[0], "reported")


def test_a_registered_model_is_served(reported: dict[str, str]) -> None:
    run_job(reported, "served")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/served/1"]
    command += ["--env-manager", "local", "--port", str(port), "--host", "127.0.0.1"]
    serving = subprocess.Popen(
        command,
        env=reported,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert serving.stdout is not None
        printed = ""
        while "Uvicorn running" not in printed:
            line = serving.stdout.readline()
            assert line, f"mlflow models serve ended early:\n{printed}"
            printed += line
        invocation = Request(
            f"http://127.0.0.1:{port}/invocations",
            data=json.dumps({"dataframe_split": {"columns": ["x"], "data": [[21]]}}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urlopen(invocation, timeout=60) as response:
            assert json.load(response) == {"predictions": [42]}
    finally:
        subprocess.run(["pkill", "-TERM", "-s", str(serving.pid)], check=False)
        serving.wait(60)


def test_every_way_that_mlflow_can_send_a_key(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    key = server.key("mlflow:read")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password of-a-proxy\n")
    for variables in (
        {"HOKUSAI_API_KEY": key},
        {"MLFLOW_TRACKING_TOKEN": key},
        {"MLFLOW_TRACKING_USERNAME": "anyone", "MLFLOW_TRACKING_PASSWORD": key},
        {"HOKUSAI_API_KEY": key, "MLFLOW_TRACKING_TOKEN": key},
        {"HOKUSAI_API_KEY": key, "MLFLOW_TRACKING_AUTH": "hokusai"},
        {"MLFLOW_TRACKING_URI": f"http://me:{key}@{server.origin[7:]}/mlflow"},
        # What a load balancer, or a proxy, in front takes.
        {"HOKUSAI_API_KEY": key, "MLFLOW_TRACKING_TOKEN": "eyJ.eyJ.c2ln"},
        {"HOKUSAI_API_KEY": key, "NETRC": str(netrc)},
    ):
        with monkeypatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", f"{server.origin}/mlflow")
            for name, value in variables.items():
                patch.setenv(name, value)
            assert MlflowClient().get_experiment("0").name == "Default", list(variables)


def test_a_tool_that_only_knows_a_url_does_the_whole_job(server: Server) -> None:
    uri = f"http://me:{server.key('model:write')}@{server.origin[7:]}/api/mlflow"
    assert_done(run_job({**server.environ, "MLFLOW_TRACKING_URI": uri}, "by-url")[0], "by-url")


def test_two_header_providers_with_the_same_key(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import RestException
    from mlflow.tracking.request_header import registry
    from mlflow.tracking.request_header.abstract_request_header_provider import (
        RequestHeaderProvider,
    )

    class Own(RequestHeaderProvider):
        """As people wrote them, from before this package."""

        def in_context(self) -> bool:
            return True

        def request_headers(self) -> dict[str, str]:
            return {"X-API-Key": sent}

    registered = [*registry._request_header_provider_registry, Own()]
    monkeypatch.setattr(registry._request_header_provider_registry, "_registry", registered)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{server.origin}/mlflow")
    monkeypatch.setenv("HOKUSAI_API_KEY", server.key("mlflow:read"))
    sent = server.key("mlflow:read")
    assert MlflowClient().get_experiment("0").name == "Default"
    sent = server.key("mlflow:write")
    with pytest.raises(RestException, match=r"400 KEY_CONFLICT.*doctor"):
        MlflowClient().get_experiment("0")


def test_spans_of_opentelemetry_arrive(server: Server) -> None:
    pytest.importorskip("mlflow.otel", reason="this MLflow has none")
    code = (
        "import mlflow\n"
        "experiment = mlflow.create_experiment('spans')\n"
        "mlflow.set_experiment('spans')\n"
        "mlflow.otel.autolog(batch=False)\n"
        "from opentelemetry import trace\n"
        "with trace.get_tracer('ours').start_as_current_span('of-opentelemetry'): pass\n"
        "(found,) = mlflow.search_traces(locations=[experiment], return_type='list')\n"
        "print([span.name for span in found.data.spans])"
    )
    environ = {
        **server.environ,
        "HOKUSAI_API_KEY": server.key("mlflow:write"),
        "MLFLOW_TRACKING_URI": f"{server.origin}/api/mlflow",
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=180)
    assert done.stdout.splitlines()[-1:] == ["['of-opentelemetry']"], done.stderr[-3000:]


def test_a_wrong_key_says_what_to_do(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import RestException

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{server.origin}/api/mlflow")
    monkeypatch.setenv("HOKUSAI_API_KEY", server.key("mlflow:read")[:-1] + "!")
    with pytest.raises(RestException, match="401 KEY_MISSING"):
        # A key with such a character is never sent; the client warns, the server sees none.
        MlflowClient().get_experiment("0")
    damaged = list(server.key("mlflow:read"))
    damaged[20] = "a" if damaged[20] != "a" else "b"
    monkeypatch.setenv("HOKUSAI_API_KEY", "".join(damaged))
    with pytest.raises(RestException, match=r"401 KEY_MALFORMED.*Copy it again") as caught:
        MlflowClient().get_experiment("0")
    assert caught.value.error_code == "UNAUTHENTICATED"
    monkeypatch.setenv("HOKUSAI_API_KEY", server.key("mlflow:read"))
    with pytest.raises(RestException, match=r"403 SCOPE_MISSING.*mlflow:write") as caught:
        MlflowClient().create_experiment("not allowed")
    assert caught.value.error_code == "PERMISSION_DENIED"


def test_keys_are_managed_from_python(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.server import get_app_client

    uri = f"{server.origin}/api/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("HOKUSAI_API_KEY", server.key("mlflow:admin"))
    admin = get_app_client("hokusai-auth", tracking_uri=uri)
    made = admin.create_key("ACME", ["mlflow:write"], name="ci", expires_in=3600)
    assert made["key_id"] in [key["key_id"] for key in admin.list_keys()]
    assert "key" not in admin.get_key(made["key_id"])

    monkeypatch.setenv("HOKUSAI_API_KEY", made["key"])
    assert admin.whoami()["owner"] == "ACME"
    with pytest.raises(MlflowException, match="SCOPE_MISSING"):
        admin.create_key("ACME", ["mlflow:admin"])

    monkeypatch.setenv("HOKUSAI_API_KEY", server.key("mlflow:admin"))
    assert admin.revoke_key(made["key_id"])["state"] == "revoked"
    with pytest.raises(MlflowException, match="no key"):
        admin.get_key("key_of_nobody")
    with pytest.raises(MlflowException, match="scope"):
        admin.create_key("ACME", ["mlflow:everything"])

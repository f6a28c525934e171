"""MLflow's server-side jobs behind the gate: they do their work, and their credential nothing else."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.genai.judges import make_judge
from mlflow.genai.scorers import ResponseLength

from tests.e2e.parts import EXPERIMENT, post
from tests.e2e.test_outbound import ENVIRON, PROVIDER_KEY, Upstream, add_endpoint, provider
from tests.harness import Server, serve, wait_until

pytestmark = pytest.mark.servers

AJAX = "/ajax-api/3.0/mlflow"
DONE = {"SUCCEEDED", "FAILED", "TIMEOUT", "CANCELED"}


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    yield from provider()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("jobs")
    # The machine has a key of its own, as a developer's has: jobs must not send it beside theirs.
    config = folder / ".hokusai" / "config"
    config.parent.mkdir()
    config.write_text(f"[default]\napi_key = hk_live_{'x' * 32}\n")
    with serve(
        folder,
        # Else uvicorn replaces workers that a busy machine lets import for longer than five seconds.
        ("--workers", "2", "--uvicorn-opts", "--timeout-worker-healthcheck 120"),
        started=True,  # what its processes were started with is looked at
        **ENVIRON,
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="true",
        HOKUSAI_AUTH_ASSISTANT="true",
        HOKUSAI_AUTH_ISOLATION="writes",
    ) as server:
        add_endpoint(server, "openai", upstream)
        yield server
        # Neither jobs and their scheduler nor the gateway change anything without a caller.
        assert "ISOLATED (isolated) by key none" not in server.log


@pytest.fixture(scope="module")
def secret(server: Server) -> str:
    """The jobs' credential, found where only the server's own user may look."""
    # The command puts it into its own environment after it was started, so only children show it.
    environs = b"".join(Path(f"/proc/{pid}/environ").read_bytes() for pid in server.workers())
    found = re.search(rb"hk_jobs_[0-9a-f]{64}", environs)
    assert found is not None
    return found[0].decode()


@pytest.fixture(scope="module")
def traces(server: Server) -> Iterator[tuple[str, list[str]]]:
    """An experiment's id and those of two traces in it."""
    patch = pytest.MonkeyPatch()
    patch.setenv("MLFLOW_TRACKING_TOKEN", server.key("mlflow:write"))
    patch.setenv("HOME", str(server.folder / "elsewhere"))
    patch.setenv("MLFLOW_TRACKING_URI", server.origin)
    experiment = mlflow.set_experiment("judged").experiment_id
    found = []
    for number in range(2):
        with mlflow.start_span("asked") as span:
            span.set_inputs({"question": f"what is {number}?"})
            span.set_outputs("a number")
        found.append(span.trace_id)
    mlflow.flush_trace_async_logging()
    yield experiment, found
    patch.undo()


def judge() -> str:
    scorer = make_judge(
        name="good",
        instructions="Is {{ outputs }} good? Answer yes or no.",
        model="gateway:/openai",
        feedback_value_type=str,
    )
    return json.dumps(scorer.model_dump())


def plain() -> str:
    return json.dumps(ResponseLength(min_length=1).model_dump())


def finished(server: Server, job: str) -> dict[str, Any]:
    """The job, once it has ended."""
    found: dict[str, Any] = {}

    def ended() -> bool:
        path = f"{AJAX}/jobs/{job}"
        status, _, answer = server.request("GET", path, key=server.key("mlflow:read"))
        assert status == 200, answer
        found.update(json.loads(answer))
        return found["status"] in DONE

    wait_until(ended, 300)
    return found


@pytest.mark.parametrize("basic", [False, True], ids=["header", "basic"])
def test_an_evaluation_with_a_gateway_judge(
    server: Server, upstream: Upstream, traces: tuple[str, list[str]], basic: bool
) -> None:
    experiment, ids = traces
    upstream.seen.clear()
    content = {"experiment_id": experiment, "trace_ids": ids}
    content["serialized_scorers"] = [judge(), plain()]
    answer = start(server, f"{AJAX}/genai/evaluate/invoke", content, basic)
    job = finished(server, answer["job_id"])
    assert job["status"] == "SUCCEEDED", (job, server.log)
    run = json.loads(
        server.request(
            "GET",
            f"/api/2.0/mlflow/runs/get?run_id={answer['run_id']}",
            key=server.key("mlflow:read"),
        )[2]
    )["run"]
    assert run["info"]["status"] == "FINISHED"
    assert {metric["key"] for metric in run["data"]["metrics"]} >= {"response_length/mean"}
    for trace_id in ids:
        feedback = {one.name: one.value for one in mlflow.get_trace(trace_id).info.assessments}
        assert feedback["good"] == "yes"
        assert "response_length" in feedback
    # The judge spoke to its provider through the gateway, with the provider's key alone.
    assert len(upstream.of(PROVIDER_KEY.format("openai"))) == len(upstream.seen) >= len(ids)
    assert "hk_" not in repr(upstream.seen)


@pytest.mark.parametrize("scheme", ["file", "http"])
def test_a_job_opens_nothing_outside_the_artifact_roots(server: Server, scheme: str) -> None:
    """Whatever a trace's tag says that was stored before: the job has the server's rights."""
    key = server.key("mlflow:admin")
    folder = server.folder / "elsewhere"
    folder.mkdir(exist_ok=True)
    (folder / "traces.json").write_text(json.dumps({"spans": []}))
    asked: list[str | None] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Authorization"])
            self.send_error(404)

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        location = str(folder) if scheme == "file" else f"http://127.0.0.1:{listening.server_port}"
        made = post(server, "/api/2.0/mlflow/experiments/create", key, {"name": scheme})
        place = {"experiment_id": made["experiment_id"]}
        info = {
            "trace_id": f"tr-{scheme}",
            "trace_location": {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": place},
            "request_time": "2026-01-01T00:00:00Z",
            "state": "OK",
        }
        post(server, "/api/3.0/mlflow/traces", key, {"trace": {"trace_info": info}})
        tag = json.dumps({"key": "mlflow.artifactLocation", "value": location}).encode()
        path = f"/api/3.0/mlflow/traces/tr-{scheme}/tags"
        headers = {"Content-Type": "application/json"}
        assert server.request("PATCH", path, key=key, headers=headers, body=tag)[0] == 200
        content = {**place, "trace_ids": [f"tr-{scheme}"], "categories": ["latency"]}
        content |= {"provider": "openai", "endpoint_name": "openai"}
        job = finished(server, start(server, f"{AJAX}/issues/invoke", content, False)["job_id"])
        listening.shutdown()
    assert (job["status"], asked) == ("FAILED", [])
    assert "LOCATION_REFUSED" in str(job["result"])


@pytest.mark.parametrize("scorer", [judge, plain])
@pytest.mark.parametrize("basic", [False, True], ids=["header", "basic"])
def test_a_scorer(server: Server, traces: tuple[str, list[str]], scorer: Any, basic: bool) -> None:
    experiment, ids = traces
    content = {"experiment_id": experiment, "trace_ids": ids, "log_assessments": True}
    content["serialized_scorer"] = scorer()
    answer = start(server, f"{AJAX}/scorer/invoke", content, basic)
    for one in answer["jobs"]:
        job = finished(server, one["job_id"])
        assert job["status"] == "SUCCEEDED", (job, server.log)
        assert {trace_id for trace_id in job["result"]} == set(ids)
        for result in job["result"].values():
            assert result["assessments"]
            assert not result["failures"]


def start(server: Server, path: str, content: object, basic: bool) -> dict[str, Any]:
    """Start a job with a key as X-API-Key, or as the password of Basic, as MLflow's clients do.

    With Basic, MLflow has the job call back under the name in it, so both ways are different ones.
    """
    key = server.key("mlflow:write")
    if not basic:
        return post(server, path, key, content)
    pair = base64.b64encode(f"me:{key}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {pair}"}
    status, _, answer = server.request(
        "POST", path, headers=headers, body=json.dumps(content).encode()
    )
    assert status == 200, answer
    found: dict[str, Any] = json.loads(answer)
    return found


REFUSED = [
    ("GET", "/api/2.0/hokusai/whoami"),
    ("GET", "/api/2.0/hokusai/keys"),
    ("POST", "/api/2.0/hokusai/keys"),
    ("DELETE", "/api/2.0/hokusai/keys/x"),
    ("GET", "/api/2.0/mlflow/webhooks"),
    ("POST", "/api/2.0/mlflow/webhooks"),
    ("GET", "/api/3.0/mlflow/gateway/secrets/list"),
    ("POST", "/api/3.0/mlflow/gateway/secrets/create"),
    ("POST", "/api/3.0/mlflow/gateway/endpoints/create"),
    ("POST", "/api/2.0/mlflow/experiments/delete"),
    ("POST", "/api/2.0/mlflow/runs/delete"),
    ("POST", "/api/2.0/mlflow/traces/delete-traces"),
    ("DELETE", "/api/2.0/mlflow/registered-models/delete"),
    ("POST", "/api/2.0/mlflow/model-versions/transition-stage"),
    ("DELETE", "/api/2.0/mlflow-artifacts/artifacts/x"),
    ("GET", f"{AJAX}/assistant/config"),
    ("POST", f"{AJAX}/assistant/message"),
    ("POST", f"{AJAX}/genai/evaluate/invoke"),
    ("POST", f"{AJAX}/scorer/invoke"),
    ("POST", "/ajax-api/3.0/jobs/"),
    ("POST", "/graphql"),
    ("GET", "/"),
    ("POST", "/gateway/proxy/openai/models"),
    ("GET", "/no/such/route"),
    ("GET", "//api/2.0/mlflow/runs/get"),
]


def test_the_jobs_credential_opens_nothing_else(server: Server, secret: str) -> None:
    pair = base64.b64encode(f"hokusai-jobs:{secret}".encode()).decode()
    wrong = []
    for method, path in REFUSED:
        for headers in ({"X-API-Key": secret}, {"Authorization": f"Basic {pair}"}):
            status, _, answer = server.request(method, path, headers=headers, body=b"{}")
            got = status, json.loads(answer).get("error"), secret in answer.decode()
            if got != (403, "SCOPE_MISSING", False):
                wrong.append(f"{method} {path} with {list(headers)}: {got}")
    assert not wrong, "\n".join(wrong)


def test_the_jobs_credential_is_good_for_what_jobs_do(server: Server, secret: str) -> None:
    assert server.request("GET", EXPERIMENT, key=secret)[0] == 200
    assert server.request("GET", EXPERIMENT, key=secret[:-1] + "x")[0] == 401


def test_the_secret_is_in_no_log_nor_on_a_command_line(server: Server, secret: str) -> None:
    server.request("GET", f"/api/2.0/mlflow/runs/get?api_key={secret}")
    server.request("GET", f"/{secret}?run_id={secret}", key=secret)
    assert secret not in server.log
    for child in server.workers():
        assert secret.encode() not in Path(f"/proc/{child}/cmdline").read_bytes()

"""A job on a simulated runner of GitHub's registers a model, with no key anywhere."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mlflow_hokusai_auth.core.trust import workload
from mlflow_hokusai_auth.store.trusts import Trusts
from tests import harness
from tests.core.test_trust import GITHUB
from tests.docs.pages import ADDRESS, ROOT
from tests.e2e.test_registration import assert_done, run_job
from tests.harness import HOKUSAI_AUTH, SERVERS, Server, serve, wait_until
from tests.issuer import REQUEST_TOKEN, Issuer

pytestmark = pytest.mark.servers

VERSION = "/api/mlflow/version"
TIMES = ("iss", "nbf", "exp", "iat", "jti", "aud")


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with Issuer() as running:
        running.job = {name: value for name, value in GITHUB.items() if name not in TIMES}
        yield running


@pytest.fixture(params=["uvicorn", "gunicorn"])
def server(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """A server that knows its public URL."""
    port = harness.free_port()
    monkeypatch.setattr(harness, "free_port", lambda: port)
    url = f"http://127.0.0.1:{port}"
    with serve(tmp_path, SERVERS[request.param], HOKUSAI_AUTH_PUBLIC_URLS=url) as running:
        yield running


def exchange(server: Server, token: str) -> tuple[int, dict[str, str]]:
    fields = {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
        "subject_token_type": "urn:ietf:params:oauth:token-type:id_token",
        "subject_token": token,
    }
    status, _, body = server.request(
        "POST",
        "/api/mlflow/api/2.0/hokusai/token",
        headers={"Content-Type": "application/json"},
        body=json.dumps(fields).encode(),
    )
    return status, json.loads(body)


def of_readme(server: Server) -> dict[str, str]:
    """Return the variables that the workflow in the README sets for its job."""
    blocks = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    (job,) = yaml.safe_load(blocks[0])["jobs"].values()
    assert job["permissions"]["id-token"] == "write"
    step = job["steps"][-1]
    assert "mlflow-hokusai-auth[ci]" in step["run"]
    assert "secrets" not in blocks[0]
    env: dict[str, str] = step["env"]
    return {name: value.replace(ADDRESS, server.origin) for name, value in env.items()}


def test_job_without_a_key_registers_a_model(server: Server, issuer: Issuer) -> None:
    trusts = Trusts(server.store.database)
    trust_id = trusts.add(
        workload(
            github="acme/models", workflow="release.yml", environment="prod", issuer=issuer.url
        ),
        owner="ACME",
        scopes=("model:write",),
        ttl=900.0,
    ).trust.trust_id
    environ = {**server.environ, **issuer.runner(), **of_readme(server)}
    (result,) = run_job(environ, "by-trust")
    assert_done(result, "by-trust")

    # The run and the version say which job made them.
    source = f"github:acme/models@{GITHUB['sha']}#{GITHUB['run_id']}"
    for path in (
        f"runs/get?run_id={result['run_id']}",
        f"model-versions/get?name=by-trust&version={result['version']}",
    ):
        reader = server.key("mlflow:read")
        status, _, body = server.request("GET", f"/api/2.0/mlflow/{path}", key=reader)
        assert status == 200, body
        answer = json.loads(body)
        tags = answer["run"]["data"]["tags"] if "run" in answer else answer["model_version"]["tags"]
        assert {"key": "hokusai_auth.source", "value": source} in tags
        assert {"key": "hokusai_auth.owner", "value": "ACME"} in tags

    # The trust goes in the middle of a job: its key is refused.
    token = issuer.token({**issuer.job, "aud": server.origin})
    status, answer = exchange(server, token)
    assert status == 200
    key = answer["access_token"]
    assert server.request("GET", VERSION, key=key)[0] == 200
    trusts.remove(trust_id)
    # Each worker notices by itself.
    wait_until(
        lambda: all(b"KEY_REVOKED" in server.request("GET", VERSION, key=key)[2] for _ in range(9))
    )
    status, answer = exchange(server, issuer.token({**issuer.job, "aud": server.origin}))
    assert status == 400
    assert "TOKEN_UNTRUSTED" in answer["message"]
    for secret in (key, token, token.split(".")[2], REQUEST_TOKEN):
        assert secret not in server.log


def test_supplier_trusts_its_own_jobs_and_nobody_else_s(tmp_path: Path) -> None:
    """With `trust --url` on its own machine, through a prefix; the key of a job may not."""
    with serve(tmp_path, HOKUSAI_AUTH_SUPPLIER_TRUST="true") as server:
        trusts = Trusts(server.store.database)
        foreign = trusts.add(
            workload(gitlab="globex/models"), owner="Globex", scopes=("model:write",), ttl=900.0
        ).trust.trust_id
        _, key = server.store.create(owner="ACME", scopes=["model:write"])

        def trust(*arguments: str, key: str = key, status: int = 0) -> str:
            # Nothing of the server's is in the supplier's environment.
            ours = {name: v for name, v in server.environ.items() if "HOKUSAI_AUTH" not in name}
            done = subprocess.run(
                (*HOKUSAI_AUTH, "trust", *arguments, "--url", f"{server.origin}/api/mlflow"),
                env={**ours, "HOKUSAI_API_KEY": key},
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == status, done.stderr
            assert key not in done.stdout + done.stderr
            # Warnings don't belong to the JSON.
            return done.stdout if "--json" in arguments else done.stdout + done.stderr

        new = ("add", "--scope", "model:write", "--github", "acme/models", "--workflow", "r.yml")
        trust_id = json.loads(trust(*new, "--models", "acme-*", "--json"))["trust_id"]
        stored = trusts.get(trust_id).trust
        assert (stored.owner, stored.models) == ("ACME", ("acme-*",))
        listed = trust("list")
        assert trust_id in listed
        assert foreign not in listed
        assert "no trust" in trust("remove", foreign, status=1)
        assert "Only the server's operator" in trust(*new, "--claim", "repository_id=74", status=1)
        assert json.loads(trust("edit", trust_id, "--ttl", "5m", "--json"))["ttl"] == 300

        found = trusts.exchange(
            trust_id,
            {**GITHUB, "job_workflow_ref": "acme/models/.github/workflows/r.yml@refs/heads/x"},
            jwks=None,
            digest="0" * 64,
            token_id="1",
            ends_at=2e9,
        )
        assert isinstance(found, tuple)
        of_job = found[1]
        assert server.request("GET", VERSION, key=of_job)[0] == 200
        assert "exchanged" in trust("remove", trust_id, key=of_job, status=1)
        reader = server.store.create(owner="ACME", scopes=["model:read"])[1]
        assert trust_id in trust("list", key=reader)
        assert "SCOPE_MISSING" in trust("remove", trust_id, key=reader, status=1)
        assert json.loads(trust("remove", trust_id, "--json"))["trust_id"] == trust_id
        assert [one.trust.trust_id for one in trusts.each()] == [foreign]

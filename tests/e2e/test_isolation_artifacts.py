"""Two suppliers on one server: nobody changes the other's artifacts, or registered ones."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.contract.test_mlflow import VERSION
from tests.harness import SERVERS, Server, serve
from tests.server.isolation.stores import unused_name

pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(VERSION < (3, 9), reason="isolation needs MLflow 3.9"),
]

API = "/api/2.0/mlflow"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"


class Supplier:
    """A team with a key, an experiment, a run with a file in it, and a registered model."""

    def __init__(self, server: Server, owner: str) -> None:
        self.server = server
        self.key = server.store.create(owner=owner, scopes=["model:write"])[1]
        self.name = unused_name()
        self.experiment = self.made("experiments/create", name=self.name)["experiment_id"]
        run = self.made("runs/create", experiment_id=self.experiment)["run"]["info"]
        self.run, self.uri = run["run_id"], run["artifact_uri"]
        self.made("registered-models/create", name=self.name)
        self.folder = f"{self.experiment}/{self.run}/artifacts/model"
        self.file = f"{self.folder}/MLmodel"
        assert self.put(self.file, b"first") == (200, "")

    def made(self, path: str, **content: Any) -> Any:
        status, answer = self.ask("POST", f"{API}/{path}", json.dumps(content).encode())
        assert status == 200, answer
        return json.loads(answer)

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, str]:
        headers = {"Content-Type": "application/json"}
        status, _, answer = self.server.request(
            method, path, key=self.key, headers=headers, body=body
        )
        return status, answer.decode()

    def code(self, method: str, path: str, body: bytes = b"") -> tuple[int, str]:
        """The status, and the code of a refusal or ""."""
        status, answer = self.ask(method, path, body)
        return status, json.loads(answer).get("error", "") if answer else ""

    def put(self, path: str, body: bytes = b"other") -> tuple[int, str]:
        return self.code("PUT", f"{ARTIFACTS}/{quote(path)}", body)

    def delete(self, path: str) -> tuple[int, str]:
        return self.code("DELETE", f"{ARTIFACTS}/{quote(path)}")

    def upload(self, run: str, path: str) -> tuple[int, str]:
        query = f"run_uuid={run}&path={quote(path)}"
        return self.code("POST", f"/ajax-api/2.0/mlflow/upload-artifact?{query}", b"other")

    def content(self, path: str) -> bytes:
        return (self.server.folder / "artifacts" / path).read_bytes()


@pytest.fixture(scope="module", params=["uvicorn", "gunicorn"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp(f"isolated-{request.param}")
    with serve(folder, SERVERS[request.param], HOKUSAI_AUTH_ISOLATION="writes") as server:
        yield server


def test_another_team_changes_nothing_by_any_route_or_spelling(server: Server) -> None:
    acme, globex = Supplier(server, "ACME"), Supplier(server, "GLOBEX")
    mine = f"{globex.experiment}/{globex.run}/artifacts"
    assert globex.put(f"{mine}/notes.txt") == (200, "")
    refused = (403, "NOT_OWNER")
    for path in (acme.file, f"{acme.folder}/new", f"{mine}/{acme.run}/x", f"{globex.experiment}/x"):
        assert globex.put(path) == refused, path
    for path in (acme.file, acme.folder, f"{acme.experiment}/{acme.run}"):
        assert globex.delete(path) == refused, path
    assert globex.upload(acme.run, "model/MLmodel") == refused
    assert globex.upload(globex.run, "model/MLmodel") == (200, "")
    # MLflow decodes a path again and again.
    for spelled in (
        f"./{acme.file}",
        f"/{acme.file}",
        f"file:{acme.file}",
        f"{acme.file.replace('/', '%2F')}",
        f"{acme.file.replace('/', '%252F')}",
        f"{mine}/%252e%252e/%252e%252e/%252e%252e/{acme.file}",
        f"{mine}/..%2f..%2f..%2f{acme.file}",
        f"{acme.experiment}/%25{ord(acme.run[0]):x}{acme.run[1:]}/artifacts/model/MLmodel",
        f"{acme.file}%3Fx",
        f"{acme.file}%23",
    ):
        for method in ("PUT", "DELETE"):
            status, answer = globex.ask(method, f"{ARTIFACTS}/{spelled}", b"other")
            assert status >= 400 or method == "DELETE", (method, spelled, status, answer)
            assert acme.content(acme.file) == b"first", (method, spelled)
    # The owner goes on, and can delete.
    assert acme.put(acme.file, b"second") == (200, "")
    assert acme.delete(acme.folder) == (200, "")


def test_registered_artifacts_stay_what_they_were(server: Server) -> None:
    acme, globex = Supplier(server, "ACME"), Supplier(server, "GLOBEX")
    for source in (f"{acme.uri}/model", f"runs:/{acme.run}/model"):
        # MLflow itself asks for a source's run.
        version = {"name": globex.name, "source": source, "run_id": acme.run}
        content = json.dumps(version).encode()
        assert globex.code("POST", f"{API}/model-versions/create", content) == (
            403,
            "SOURCE_REFUSED",
        )
    register = {"name": acme.name, "source": f"{acme.uri}/model", "run_id": acme.run}
    # An upload that begins before the registration and ends after it.
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest("PUT", f"{ARTIFACTS}/{acme.file}")
    connection.putheader("X-API-Key", acme.key)
    connection.putheader("Content-Length", "8")
    connection.endheaders(b"late")
    acme.made("model-versions/create", **register)
    connection.send(b"late")
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["error"]) == (403, "ARTIFACT_FROZEN")
    connection.close()
    frozen = (403, "ARTIFACT_FROZEN")
    assert acme.put(acme.file) == frozen
    assert acme.upload(acme.run, "model/MLmodel") == frozen
    for path in (acme.file, acme.folder, f"{acme.experiment}/{acme.run}"):
        assert acme.delete(path) == frozen, path
    assert acme.content(acme.file) == b"first"
    assert acme.put(f"{acme.experiment}/{acme.run}/artifacts/notes.txt") == (200, "")
    staff = server.key("mlflow:write")
    assert server.request("PUT", f"{ARTIFACTS}/{acme.file}", key=staff, body=b"staff")[0] == 200

"""Existing experiments decide what an artifact's path belongs to, and the words in the path don't."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import SERVERS, Server, serve, wait_until

pytestmark = pytest.mark.servers

API = "/api/2.0/mlflow"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
HEX = "0123456789abcdef" * 2


@pytest.fixture(params=["workers", "gunicorn"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """One of two processes, so that an experiment is often made by the other."""
    with serve(tmp_path, SERVERS[request.param]) as server:
        yield server


class Client:
    """Requests with one key."""

    def __init__(self, server: Server, *scopes: str) -> None:
        self.server = server
        self._key = server.key(*scopes)

    def post(self, path: str, **content: Any) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        status, _, body = self.server.request(
            "POST",
            f"{API}/{path}",
            key=self._key,
            headers=headers,
            body=json.dumps(content).encode(),
        )
        assert status == 200, body
        return dict(json.loads(body))

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        status, _, answer = self.server.request(
            method, f"{ARTIFACTS}{path}", key=self._key, body=body
        )
        return status, answer

    def run(self, name: str, location: str) -> str:
        """The path of the artifacts of a new run, of a new experiment at `location`."""
        made = self.post("experiments/create", name=name, artifact_location=location)
        run = self.post("runs/create", experiment_id=made["experiment_id"])
        return "/" + run["run"]["info"]["artifact_uri"].removeprefix("mlflow-artifacts:/")


def lines(server: Server) -> list[dict[str, Any]]:
    """The decision log's lines for artifacts and registrations."""
    found = [json.loads(line) for line in server.log.splitlines() if '"event": "request"' in line]
    rules = ("artifact", "registered-models", "model-versions")
    return [line for line in found if any(rule in line["rule"] for rule in rules)]


def test_a_word_in_an_experiment_s_location_closes_nothing(server: Server) -> None:
    supplier = Client(server, "model:write")
    locations = [
        *(f"teamA/traces/exp{number}" for number in range(4)),
        *("traces", "models/traces/x", f"{HEX}/traces", "own/Traces/ä ö"),
    ]
    for number, location in enumerate(locations):
        artifacts = supplier.run(f"experiment {number}", f"mlflow-artifacts:/{location}")
        folder = artifacts.removesuffix("/artifacts")
        model = f"{folder.rpartition('/')[0]}/models/m-{HEX}/artifacts"
        for path in (f"{artifacts}/model/MLmodel", f"{artifacts}/traces/x", f"{model}/MLmodel"):
            quoted = path.replace(" ", "%20").replace("ä", "%C3%A4").replace("ö", "%C3%B6")
            above = quoted.rpartition("/")[0][1:]
            assert supplier.ask("PUT", quoted, path.encode())[0] == 200, path
            assert supplier.ask("GET", quoted) == (200, path.encode())
            assert supplier.ask("GET", f"?path={above}")[0] == 200, path
            assert supplier.ask("DELETE", quoted)[0] == 200, path


def test_an_experiment_s_name_opens_none_of_its_traces(server: Server) -> None:
    supplier, staff = Client(server, "model:write"), Client(server, "mlflow:write")
    places = [HEX, f"{HEX[1:]}0/artifacts", f"team/models/m-{HEX}/artifacts", f"x/{HEX[::-1]}/team"]
    for number, place in enumerate(places):
        artifacts = supplier.run(f"trap {number}", f"mlflow-artifacts:/{place}")
        attachment = f"/{place}/traces/tr-1/artifacts/attachments/{HEX}"
        assert staff.ask("PUT", attachment, b"secret")[0] == 200
        assert staff.ask("PUT", f"{artifacts}/model", b"kept")[0] == 200
        for spelt in (attachment, attachment.replace("traces", "%2574races")):
            for method, body in (("GET", None), ("PUT", b"forged"), ("DELETE", None)):
                status, answer = supplier.ask(method, spelt, body)
                assert status == 403 and b"secret" not in answer, (method, spelt)
        assert b"path belongs to a trace" in supplier.ask("GET", attachment)[1]
        for path in (f"/{place}", f"/{place}/traces", f"/{place}/models", f"/{place}/%252e"):
            status, answer = supplier.ask("DELETE", path)
            assert status == 403 and (path.endswith("traces") or b"one run or" in answer), path
        assert supplier.ask("GET", f"?path={place}/traces/tr-1")[0] == 403
        assert staff.ask("GET", attachment) == (200, b"secret")
        assert supplier.ask("GET", f"{artifacts}/model") == (200, b"kept")
        assert supplier.ask("DELETE", artifacts)[0] == 200


@pytest.fixture
def one_worker(tmp_path: Path) -> Iterator[Server]:
    """A server of one process: others learn of an administrator's location at their next reading."""
    with serve(tmp_path, SERVERS["uvicorn"]) as server:
        yield server


def test_experiments_that_lie_in_others_open_nothing_of_them(one_worker: Server) -> None:
    server = one_worker
    supplier, staff = Client(server, "model:write"), Client(server, "mlflow:admin")
    outer = staff.run("outer", "mlflow-artifacts:/outer")
    inner = [
        "mlflow-artifacts:/outer/traces/tr-1/artifacts",
        f"mlflow-artifacts:{outer}/inner",
        "mlflow-artifacts:/77/traces/tr-1/artifacts",
    ]
    secrets = []
    for number, location in enumerate(inner):
        below = staff.run(f"inner {number}", location)
        path = location.removeprefix("mlflow-artifacts:")
        secrets += [f"{path}/traces/tr-2/artifacts/x", *([f"{below}/x"] * ("/traces/" in path))]
    for secret in secrets:
        assert staff.ask("PUT", secret, b"secret")[0] == 200
    for secret in secrets:
        for method, body in (("GET", None), ("PUT", b"forged"), ("DELETE", None)):
            assert supplier.ask(method, secret, body)[0] == 403, (method, secret)
    assert supplier.ask("DELETE", outer)[0] == 403
    assert supplier.ask("DELETE", outer.removesuffix("/artifacts"))[0] == 403


def test_the_decision_log_says_which_artifact_and_which_model(server: Server) -> None:
    supplier = Client(server, "model:write")
    artifacts = supplier.run("named", "mlflow-artifacts:/teamA/traces/named")
    run = artifacts.split("/")[-2]
    key = server.key("model:read")
    model = f"/7/models/m-{HEX}/artifacts/MLmodel"
    assert supplier.ask("PUT", f"{artifacts}/model.bin", b"x")[0] == 200
    assert supplier.ask("DELETE", f"{artifacts}/model.bin")[0] == 200
    assert supplier.ask("PUT", model, b"x")[0] == 200
    assert supplier.ask("PUT", f"{artifacts}/{key}/{'x' * 250}", b"x")[0] == 200
    assert Client(server, "model:read").ask("PUT", model, b"x")[0] == 403
    supplier.post("registered-models/create", name="acme fraud")
    source = f"mlflow-artifacts:{artifacts}/model"
    made = supplier.post("model-versions/create", name="acme fraud", source=source, run_id=run)
    assert made["model_version"]["version"] == "1"
    supplier.post("registered-models/get-latest-versions", name="acme fraud")
    with contextlib.suppress(AssertionError):
        supplier.post("registered-models/create", name="acme fraud")
    bounded = f"{artifacts[1:]}/hk_test_***/"
    bounded += "x" * (200 - len(bounded))
    expected = [
        {"run": run, "path": f"{artifacts[1:]}/model.bin"},
        {"run": run, "path": f"{artifacts[1:]}/model.bin"},
        {"logged_model": f"m-{HEX}", "path": model[1:]},
        {"run": run, "path": bounded.replace("hk_test", key[:7])},
        {"logged_model": f"m-{HEX}", "path": model[1:]},
        {"model": "acme fraud"},
        {"model": "acme fraud", "version": "1"},
        {"model": "acme fraud"},
    ]

    def found() -> list[dict[str, Any]]:
        names = ("run", "logged_model", "model", "version", "path")
        return [{name: line[name] for name in names if name in line} for line in lines(server)]

    # A worker of gunicorn logs a request after its answer, when another may have the next one.
    wait_until(lambda: len(found()) == len(expected))
    assert sorted(map(json.dumps, found())) == sorted(map(json.dumps, expected))

"""A location that a client sends decides nothing about what the server reads and writes."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import SERVERS, Server, serve, wait_until

pytestmark = pytest.mark.servers

API = "/api/2.0/mlflow"
SECRET = b"canary: not an artifact"


class Client:
    """Requests with one key."""

    def __init__(self, server: Server, *scopes: str) -> None:
        self.server = server
        self._key = server.key(*scopes)

    def post(self, path: str, **content: Any) -> tuple[int, dict[str, Any]]:
        status, _, body = self.ask("POST", f"{API}/{path}", json.dumps(content).encode())
        return status, json.loads(body)

    def ask(
        self, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
    ) -> tuple[int, dict[str, str], bytes]:
        headers = {"Content-Type": kind}
        return self.server.request(method, path, key=self._key, headers=headers, body=body)

    def experiment(self, name: str, **content: Any) -> tuple[int, dict[str, Any]]:
        return self.post("experiments/create", name=name, **content)

    def run(self, experiment: str) -> dict[str, Any]:
        status, answer = self.post("runs/create", experiment_id=experiment)
        assert status == 200, answer
        return dict(answer["run"]["info"])

    def version(self, model: str, source: str, **content: Any) -> tuple[int, dict[str, Any]]:
        self.post("registered-models/create", name=model)
        return self.post("model-versions/create", name=model, source=source, **content)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serve(tmp_path) as server:
        yield server


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "secret.txt").write_bytes(SECRET)
    return folder


def put(server: Server, statement: str, *values: object) -> None:
    """Change MLflow's database behind its back: what was stored before this version."""
    with contextlib.closing(sqlite3.connect(server.folder / "mlflow.db", timeout=30)) as database:
        database.execute(statement, values)
        database.commit()


def rows(server: Server, query: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(server.folder / "mlflow.db", timeout=30)) as database:
        return database.execute(query).fetchall()


def outside(folder: Path) -> list[str]:
    return [
        str(folder),
        f"file://{folder}",
        f"file:{folder}",
        f"FILE://{folder}",
        f"{folder}/../artifacts/team",
        "relative",
        "s3://another/bucket",
        "S3://another/bucket",
        "gs://another",
        "http://evil.example/api/2.0/mlflow-artifacts/artifacts/team",
        "mlflow-artifacts://evil.example/team",
        "mlflow-artifacts:/../elsewhere",
        "mlflow-artifacts:/a/%2e%2e/%2e%2e/elsewhere",
        "mlflow-artifacts:/a/%252e%252e/b",
        "mlflow-artifacts:/a//b",
        "mlflow-artifacts:/a\\..\\b",
        "mlflow-artifacts:/a;b",
        "mlflow-artifacts:a",
        "runs:/0123/model",
        "dummy-source",
    ]


def test_a_supplier_s_experiment_has_its_artifacts_in_a_folder_of_its_own(
    server: Server, tmp_path: Path, canary: Path
) -> None:
    client, admin = Client(server, "model:write"), Client(server, "mlflow:admin")
    status, made = client.experiment("plain")
    assert status == 200, made
    number = made["experiment_id"]
    assert rows(
        server, f"SELECT artifact_location FROM experiments WHERE experiment_id = {number}"
    ) == [(f"mlflow-artifacts:/{number}",)]
    destination = tmp_path / "artifacts"
    assert admin.experiment("theirs", artifact_location="mlflow-artifacts:/Theirs/one")[0] == 200
    refused = [
        *outside(canary),
        "mlflow-artifacts:/",
        "mlflow-artifacts:///",
        str(destination),
        f"mlflow-artifacts:/{number}",
        f"mlflow-artifacts:/{number}/below",
        "mlflow-artifacts:/999/folder-of-an-experiment-to-come",
        "mlflow-artifacts:/workspaces/team/999",
        "mlflow-artifacts:/Theirs",
        "mlflow-artifacts:/Theirs/one",
        "mlflow-artifacts:/Theirs/one/below",
        "mlflow-artifacts:/theirs/ONE",
        f"{destination}/Theirs/one",
        f"file://{destination}/{number}/x",
    ]
    wrong = []
    for i, location in enumerate(refused):
        status, answer = client.experiment(f"no-{i}", artifact_location=location)
        code = answer.get("error")
        # MLflow 3.17 has checks of its own, which come first.
        if (status, code) != (403, "LOCATION_REFUSED") and status != 400:
            wrong.append((location, status, answer))
        if status == 403 and "HOKUSAI_AUTH_ARTIFACT_ROOTS" not in answer["message"]:
            wrong.append((location, status, answer))
    names = [name for (name,) in rows(server, "SELECT name FROM experiments")]
    assert (wrong, sorted(names)) == ([], ["Default", "plain", "theirs"])
    for i, location in enumerate(
        ["mlflow-artifacts:/team/one", "mlflow-artifacts:/Theirs/two", f"file://{destination}/t/x"]
    ):
        status, answer = client.experiment(f"yes-{i}", artifact_location=location)
        assert status == 200, (location, answer)


def test_version_source_is_not_in_another_experiment(
    server: Server, tmp_path: Path, canary: Path
) -> None:
    client = Client(server, "model:write")
    _, made = client.experiment("runs")
    number = made["experiment_id"]
    info = client.run(number)
    status, logged = client.post("logged-models", experiment_id=number, name="m")
    assert status == 200, logged
    model = logged["model"]["info"]
    refused = [
        *outside(canary)[:-2],
        "runs:/0123/model",
        f"runs://host/{info['run_id']}/model",
        f"runs:/{info['run_id']}/../x",
        "models:/m-0123",
        "mlflow-artifacts:/",
        f"mlflow-artifacts:/{number}",
        f"mlflow-artifacts:/{number}/traces/tr-1",
        f"mlflow-artifacts:/{number}/{info['run_id']}",
        f"mlflow-artifacts:/999/{info['run_id']}/artifacts/model",
        f"{tmp_path}/artifacts/{number}/traces/tr-1",
    ]
    wrong = []
    for source in refused:
        status, answer = client.version("model", source)
        known = (status, answer.get("error")) == (403, "SOURCE_REFUSED") or status in (400, 404)
        # What `models:/` names MLflow looks up itself, and says 500.
        if not known and "Unable to fetch model from model URI" not in answer["message"]:
            wrong.append((source, status, answer))
    assert (wrong, rows(server, "SELECT source FROM model_versions")) == ([], [])
    wrong = []
    for source, more in (
        (f"{info['artifact_uri']}/model", {"run_id": info["run_id"]}),
        (f"runs:/{info['run_id']}/model", {"run_id": info["run_id"]}),
        (model["artifact_uri"], {"model_id": model["model_id"]}),
        (f"models:/{model['model_id']}", {"model_id": model["model_id"]}),
        ("models:/model/1", {}),
    ):
        status, answer = client.version("model", source, **more)
        if status != 200:
            wrong.append((source, status, answer))
    assert not wrong
    content = json.dumps({"name": "model", "version": "1"}).encode()
    assert client.ask("DELETE", f"{API}/model-versions/delete", content)[0] == 200


def test_a_prompt_needs_no_files_and_is_no_way_around(server: Server, canary: Path) -> None:
    client = Client(server, "model:write")
    tags = [{"key": "mlflow.prompt.is_prompt", "value": "true"}]
    client.post("registered-models/create", name="prompt", tags=tags)
    status, answer = client.post(
        "model-versions/create", name="prompt", source="dummy-source", tags=tags
    )
    assert status == 200, answer
    for source in (str(canary), "s3://another/bucket"):
        status, answer = client.post(
            "model-versions/create", name="prompt", source=source, tags=tags
        )
        assert status in (400, 403), answer
    status, _, body = client.ask(
        "GET", "/model-versions/get-artifact?name=prompt&version=1&path=secret.txt"
    )
    assert status in (403, 404), body


def start_trace(client: Client, experiment: str, trace: str, tags: dict[str, str]) -> Any:
    place = {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": experiment}}
    info = {"trace_id": trace, "trace_location": place, "tags": tags, "state": "OK"}
    info["request_time"] = "2026-01-01T00:00:00Z"
    content = json.dumps({"trace": {"trace_info": info}}).encode()
    status, _, answer = client.ask("POST", "/api/3.0/mlflow/traces", content)
    return status, json.loads(answer).get("error")


def test_a_trace_s_files_are_where_mlflow_puts_them(server: Server, canary: Path) -> None:
    client, admin = Client(server, "mlflow:write"), Client(server, "mlflow:admin")
    number = client.experiment("traces")[1]["experiment_id"]
    own = f"mlflow-artifacts:/{number}/traces/tr-0/artifacts"
    assert start_trace(client, number, "tr-0", {"mine": "x"}) == (200, None)
    archived = {"mlflow.trace.spansLocation": "ARCHIVE_REPO"}
    archived["mlflow.trace.archiveLocation"] = str(canary)
    refused = [
        start_trace(client, number, "tr-1", archived),
        start_trace(client, number, "../../0/x", {}),
        start_trace(client, number, "%2e%2e", {}),
    ]

    def tag(sender: Client, value: str) -> tuple[int, str | None]:
        content = json.dumps({"key": "mlflow.artifactLocation", "value": value}).encode()
        status, _, answer = sender.ask("PATCH", "/api/3.0/mlflow/traces/tr-0/tags", content)
        return status, json.loads(answer).get("error")

    elsewhere = (str(canary), "s3://another/bucket", "http://evil.example/", f"{own}/../x")
    refused += [tag(client, value) for value in (*elsewhere, "mlflow-artifacts:/0/traces/tr-0")]
    assert refused == [(403, "LOCATION_REFUSED")] * len(refused)
    kept = (
        "SELECT request_id, value FROM trace_tags WHERE key LIKE '%Location' AND value LIKE '%:%'"
    )
    assert rows(server, kept) == [("tr-0", own)]
    assert tag(client, own)[0] == tag(admin, str(canary))[0] == 200


def test_a_long_source_costs_no_memory(server: Server) -> None:
    client = Client(server, "model:write")
    run = client.run(client.experiment("long")[1]["experiment_id"])
    client.version("model", run["artifact_uri"], run_id=run["run_id"])

    def most() -> int:
        """Megabytes that the server's largest process has had."""
        lines = [
            line.split()
            for process in server.workers()
            for line in Path(f"/proc/{process}/status").read_text().splitlines()
        ]
        return max(int(line[1]) for line in lines if line[:1] == ["VmHWM:"]) // 1024

    before = most()
    source = run["artifact_uri"] + "/x" * 16_000
    status, answer = client.version("model", source, run_id=run["run_id"])
    assert (status, answer["error"]) == (403, "SOURCE_REFUSED")
    assert most() - before < 100


def stored_before(server: Server, location: str) -> tuple[str, str]:
    """A run and a model version at `location`, as an earlier version of this package let them be."""
    client = Client(server, "mlflow:admin")
    number = client.experiment(f"before-{location}")[1]["experiment_id"]
    run = client.run(number)["run_id"]
    put(server, "UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", location, run)
    client.post("registered-models/create", name=f"before-{run}")
    put(
        server,
        "INSERT INTO model_versions (name, version, source, storage_location, current_stage,"
        " creation_time, last_updated_time) VALUES (?, 1, ?, ?, 'None', 1, 1)",
        f"before-{run}",
        location,
        location,
    )
    return run, f"before-{run}"


def touch(client: Client, run: str, model: str) -> list[tuple[int, bytes]]:
    """Whatever reads and writes a run's and a version's files."""
    answers = []
    for method, path, body in (
        ("GET", f"/get-artifact?run_id={run}&path=secret.txt", None),
        ("GET", f"{API}/artifacts/list?run_id={run}", None),
        ("GET", f"{API}/artifacts/list?run_id={run}&path=.", None),
        ("GET", f"/model-versions/get-artifact?name={model}&version=1&path=secret.txt", None),
        ("POST", f"/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path=written.txt", b"x"),
        (
            "POST",
            f"{API}/artifacts/presigned-upload-url",
            json.dumps({"run_id": run, "path": "written.txt"}).encode(),
        ),
    ):
        status, _, answer = client.ask(
            method, path, body, "application/json" if b"{" in (body or b"") else "text/plain"
        )
        answers.append((status, answer))
    return answers


def test_what_is_stored_outside_the_roots_is_not_opened_for_anybody(
    server: Server, tmp_path: Path, canary: Path
) -> None:
    (tmp_path / "artifacts").mkdir(exist_ok=True)
    (tmp_path / "artifacts" / "link").symlink_to(canary)
    wrong = []
    for location in (
        str(canary),
        f"file://{canary}",
        f"{tmp_path}/artifacts/link",
        f"{tmp_path}/artifacts/../elsewhere",
        f"file://{tmp_path}/artifacts/%2e%2e/elsewhere",
        "mlflow-artifacts:/../elsewhere",
        "mlflow-artifacts:/x/../../elsewhere",
        "mlflow-artifacts:/%2e%2e/elsewhere",
        "mlflow-artifacts:/link",
        "s3://another/bucket",
    ):
        run, model = stored_before(server, location)
        for scope in ("model:write", "mlflow:admin"):
            for status, answer in touch(Client(server, scope), run, model):
                if SECRET in answer or b"secret.txt" in answer.replace(b"path=secret.txt", b""):
                    wrong.append((location, status, answer))
                # Proxied uploads go to the run's own folder, whatever its location says.
                elsewhere = location.startswith("mlflow-artifacts:")
                if status not in (400, 403, 404) and not (elsewhere and status in (200, 501)):
                    wrong.append((location, status, answer))
    assert (wrong, sorted(path.name for path in canary.iterdir())) == ([], ["secret.txt"])
    status, _, answer = Client(server, "mlflow:admin").ask(
        "GET", f"/get-artifact?run_id={run}&path=secret.txt"
    )
    said = json.loads(answer)
    assert (status, said["error"]) == (403, "LOCATION_REFUSED"), said
    assert "HOKUSAI_AUTH_ARTIFACT_ROOTS" in said["message"]


def test_an_operator_s_list_and_mode_observe_open_more(tmp_path: Path, canary: Path) -> None:
    with serve(tmp_path, HOKUSAI_AUTH_ARTIFACT_ROOTS=f"s3://team/models,{canary}") as server:
        run, model = stored_before(server, str(canary))
        assert touch(Client(server, "model:read"), run, model)[0] == (200, SECRET)
        status, answer = Client(server, "model:write").experiment(
            "there", artifact_location=f"{canary}/team"
        )
        assert status == 200, answer
    for mode in ("observe", "off"):
        with serve(tmp_path, HOKUSAI_AUTH_MODE=mode) as server:
            client = Client(server, "model:write")
            assert touch(client, run, model)[0] == (200, SECRET)
            status, answer = client.experiment(mode, artifact_location=f"{tmp_path}/{mode}")
            assert status == 200, answer
            told = server.log.count("Only counted, in mode observe: LOCATION_REFUSED")
            assert (told >= 2) == (mode == "observe"), server.log


@pytest.mark.parametrize("kind", ["uvicorn", "gunicorn"])
def test_an_administrator_may_store_another_location_and_is_warned(
    tmp_path: Path, canary: Path, kind: str
) -> None:
    with serve(tmp_path, SERVERS[kind]) as server:
        admin = Client(server, "mlflow:admin")
        answers = {}
        for name, location in (("out", str(canary)), ("in", "mlflow-artifacts:/mine")):
            body = json.dumps({"name": name, "artifact_location": location}).encode()
            status, headers, answer = admin.ask("POST", f"{API}/experiments/create", body)
            assert status == 200, answer
            answers[name] = headers.get("warning", "")
        assert "HOKUSAI_AUTH_ARTIFACT_ROOTS" in answers["out"] and not answers["in"]
        refused, answer = Client(server, "model:write").experiment(
            "no", artifact_location=f"{canary}/x"
        )
        assert (refused, answer["error"]) == (403, "LOCATION_REFUSED")
        assert answer["error_code"] == "PERMISSION_DENIED"


def test_start_up_tells_of_the_locations_that_are_outside(tmp_path: Path, canary: Path) -> None:
    with serve(tmp_path) as server:
        stored_before(server, "s3://team/models/1")
        admin = Client(server, "mlflow:admin")
        for i in range(3):
            number = admin.experiment(f"e{i}")[1]["experiment_id"]
            put(
                server,
                "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?",
                f"s3://user:password@old/mlflow/{number}",
                int(number),
            )
    with serve(tmp_path, HOKUSAI_AUTH_ARTIFACT_ROOTS="/srv/more") as server:
        wait_until(lambda: "HOKUSAI_AUTH_ARTIFACT_ROOTS=" in server.log)
        assert "s3://user:***@old/mlflow (3 experiments or versions)" in server.log
        assert "HOKUSAI_AUTH_ARTIFACT_ROOTS=/srv/more,s3://user:***@old/mlflow,s3" in server.log
        assert "password" not in server.log


@pytest.mark.parametrize("kind", ["uvicorn", "gunicorn"])
def test_of_static_files_only_those_of_mlflow_s_wheel_are_served(kind: str, tmp_path: Path) -> None:
    with serve(tmp_path, SERVERS[kind]) as server:
        static_files_are_served(server)


def static_files_are_served(server: Server) -> None:
    """To everybody under /static-files/, in exactly their spelling; nothing else of their folder."""
    import mlflow

    client = Client(server, "mlflow:admin")
    folder = Path(str(mlflow.__file__)).parent / "server" / "js" / "build"
    script = next(folder.glob("static/js/*.js")).relative_to(folder)
    planted = folder / f"hokusai-test-planted-{server.port}.html"
    planted.write_text("<script>alert(1)</script>")
    try:
        # Path -> status for an administrator, and without a key.
        expected = {
            f"/static-files/{script}": (200, 200),
            f"/api/mlflow/static-files/{script}": (200, 200),
            "/static-files/index.html": (200, 200),
            f"/build/{script}": (200, 401),
            f"/static-files/{planted.name}": (404, 401),
            f"/build/{planted.name}": (404, 401),
            f"/static-files/./{planted.name}": (404, 401),
            f"/static-files/{script.parent}/../js/{script.name}": (404, 401),
            f"/static-files/{script}/": (404, 401),
            f"/static-files//{script}": (308, 401),
            f"/static-files/{str(script).upper()}": (404, 401),
            f"/static-files/%2e/{script}": (404, 401),
            "/static-files/static/js": (404, 401),
            "/": (200, 401),
        }
        found = {
            path: (client.ask("GET", path)[0], server.request("GET", path)[0]) for path in expected
        }
    finally:
        planted.unlink()
    assert found == expected
    methods = {
        method: server.request(method, f"/static-files/{script}")[0]
        for method in ("HEAD", "OPTIONS", "POST", "PUT", "DELETE")
    }
    assert methods == {"HEAD": 200, "OPTIONS": 200, "POST": 401, "PUT": 401, "DELETE": 401}

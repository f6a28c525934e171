"""Whatever URI a client sends by whatever route: nothing outside the artifact roots is read or written.

A file and an object of an S3 stand-in are canaries. MLflow's own messages tell which routes take URIs.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sqlite3
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from tests.harness import Server, serve

SECRET = b"canary: nobody's artifact"
_URI = re.compile(r"uri|url|location|source|path|root|storage|destination")
#: Fields of that kind, by route: all that the messages of the supported versions have.
KNOWN = {
    "GET /mlflow-artifacts/artifacts": {"path"},
    "POST /mlflow-artifacts/mpu/create/": {"path"},
    "POST /mlflow-artifacts/mpu/complete/": {"path", "parts.url"},
    "POST /mlflow-artifacts/mpu/abort/": {"path"},
    "POST /mlflow/model-versions/create": {"source"},
    "POST /mlflow/experiments/create": {"artifact_location"},
    "GET /mlflow/artifacts/list": {"path"},
    "POST /mlflow/artifacts/presigned-upload-url": {"path"},
    "POST /mlflow/artifacts/presigned-download-url": {"path"},
    "GET /mlflow/logged-models/{model_id}/artifacts/directories": {"artifact_directory_path"},
    "POST /mlflow/logged-models": {"source_run_id"},
    "POST /mlflow/runs/log-inputs": {"datasets.dataset.source_type", "datasets.dataset.source"},
    # Not for keys of suppliers; they name datasets, jobs, people and hooks, which the server does not
    # open as artifacts.
    "POST /mlflow/datasets/create": {"source"},
    "POST /mlflow/issues": {"source_run_id", "root_causes"},
    "POST /mlflow/prompt-optimization/jobs": {"source_prompt_uri"},
    "POST /mlflow/traces": {"trace.trace_info.assessments.source.source_id"},
    "GET /mlflow/get-online-trace-details": {
        "source_inference_table",
        "source_databricks_request_id",
    },
    "POST /mlflow/traces/{assessment.trace_id}/assessments": {"assessment.source.source_id"},
    "PATCH /mlflow/traces/{trace_id}/assessments/{assessment_id}": {
        "assessment.source.source_id",
        "update_mask.paths",
    },
    "POST /mlflow/gateway/endpoints/bindings/create": {"resource_type", "resource_id"},
    "DELETE /mlflow/gateway/endpoints/bindings/delete": {"resource_type", "resource_id"},
    "GET /mlflow/gateway/endpoints/bindings/list": {"resource_type", "resource_id"},
    # Administrators' own.
    "POST /mlflow/workspaces": {"default_artifact_root", "trace_archival_config.location"},
    "PATCH /mlflow/workspaces/{workspace_name}": {
        "default_artifact_root",
        "trace_archival_config.location",
    },
    "POST /mlflow/webhooks": {"url"},
    "PATCH /mlflow/webhooks/{webhook_id}": {"url"},
}


def uri_fields() -> dict[str, set[str]]:
    """The fields that may be URIs or paths, of the messages of this MLflow's routes."""
    from mlflow.protos import databricks_pb2

    found: dict[str, set[str]] = {}
    for name in ("service_pb2", "model_registry_pb2", "mlflow_artifacts_pb2", "webhooks_pb2"):
        module = importlib.import_module(f"mlflow.protos.{name}")
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                fields = set(_fields(method.input_type, "", frozenset()))
                rpc = method.GetOptions().Extensions[databricks_pb2.rpc]
                for endpoint in rpc.endpoints if fields else ():
                    path = endpoint.path.partition("<")[0]
                    found[f"{endpoint.method} {path}"] = fields
    return found


def _fields(message: Any, prefix: str, above: frozenset[str]) -> Iterator[str]:
    for field in message.fields:
        if field.cpp_type == field.CPPTYPE_STRING and _URI.search(field.name):
            yield prefix + field.name
        elif field.cpp_type == field.CPPTYPE_MESSAGE and field.message_type.full_name not in above:
            inner = above | {field.message_type.full_name}
            yield from _fields(field.message_type, f"{prefix}{field.name}.", inner)


def test_every_field_that_may_be_a_uri_is_known() -> None:
    unknown = {
        route: fields - KNOWN.get(route, set())
        for route, fields in uri_fields().items()
        if fields - KNOWN.get(route, set())
    }
    assert not unknown, "say in KNOWN what these are, and that the server doesn't open them"


class Place(NamedTuple):
    """A server, an S3 stand-in, and the canaries, outside the roots of both."""

    server: Server
    s3: Any
    folder: Path

    def intact(self) -> bool:
        objects = self.s3.list_objects_v2(Bucket="canary").get("Contents", [])
        files = [(path.name, path.read_bytes()) for path in self.folder.iterdir()]
        keys = [each["Key"] for each in objects]
        return (files, keys) == ([("secret.txt", SECRET)], ["folder/secret.txt"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("locations")
    canary = folder / "canary"
    canary.mkdir()
    (canary / "secret.txt").write_bytes(SECRET)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    environ = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_S3_ENDPOINT_URL": f"http://{host}:{port}",
        "HOKUSAI_AUTH_ARTIFACT_ROOTS": "s3://roots/team",
    }
    s3 = boto3.client(
        "s3",
        endpoint_url=environ["MLFLOW_S3_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    for bucket in ("canary", "roots"):
        s3.create_bucket(Bucket=bucket)
    s3.put_object(Bucket="canary", Key="folder/secret.txt", Body=SECRET)
    for folder_there in ("open", "kept"):
        key = f"team/{folder_there}/secret.txt"
        s3.put_object(Bucket="roots", Key=key, Body=b"an artifact")
    try:
        with serve(folder, **environ) as server:
            yield Place(server, s3, canary)
    finally:
        moto.stop()


def _spelt(text: str, how: int) -> str:
    return {
        0: text,
        1: text.replace("..", "%2e%2e"),
        2: text.replace("/", "%2f"),
        3: text.replace("..", "%252e%252e"),
        4: urllib.parse.quote(urllib.parse.quote(text, safe="")),
        5: text.replace("/", "\\"),
        6: text.replace("/", "//"),
        7: f"{text}?x=/../..",
        8: f"{text}#/../..",
        9: f"{text};x",
    }[how]


TARGETS = st.sampled_from(
    [
        "canary",
        "artifacts/../canary",
        "x/../../../canary",
        "canary/folder",
        "../canary",
        "team/open",
        "team/../x",
        "t/open",
        "../../../../../../tmp",
        "folder",
        ".",
    ]
)
STARTS = st.sampled_from(
    [
        "{folder}/",
        "{folder}/artifacts/",
        "file:{folder}/",
        "file://{folder}/",
        "FILE://{folder}/",
        "file://localhost{folder}/",
        "/proc/self/root{folder}/",
        "/",
        "file:",
        "s3://",
        "s3://canary/",
        "S3://canary/",
        "s3:/canary/",
        "s3://roots@canary/",
        "s3://roots/",
        "s3://roots/team/",
        "mlflow-artifacts:/",
        "mlflow-artifacts:",
        "mlflow-artifacts://canary/",
        "mlflow-artifacts:////",
        "http://127.0.0.1:1/",
        "http://canary/api/2.0/mlflow-artifacts/artifacts/",
        "dbfs:/",
        "runs:/{run}/",
        "runs:/",
        "runs://canary/{run}/",
        "models:/",
        "models:/{model}/",
        "models:/m-1/",
        "",
        " /",
        "\t{folder}/",
    ]
)
URIS = st.builds(
    lambda start, target, how: start + _spelt(target, how), STARTS, TARGETS, st.integers(0, 9)
)


class Attacker:
    """Sends URIs with a key for models, and looks at what comes of them."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.number = 0
        self.stored = 0
        self.key = place.server.key("model:write")
        number = self.json("POST", "/mlflow/experiments/create", {"name": "first"})["experiment_id"]
        run = self.json("POST", "/mlflow/runs/create", {"experiment_id": number})["run"]["info"]
        model = self.json("POST", "/mlflow/logged-models", {"experiment_id": number, "name": "m"})
        self.ids = {
            "experiment_id": number,
            "run_id": run["run_id"],
            "model_id": model["model"]["info"]["model_id"],
            "name": "registered",
        }
        for name in ("registered", "before"):
            self.json("POST", "/mlflow/registered-models/create", {"name": name})

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        kind = {"Content-Type": "application/json" if (body or b"x")[:1] == b"{" else "text/plain"}
        path = urllib.parse.quote(path, safe="/?&=%")
        status, _, answer = self.place.server.request(
            method, path, key=self.key, headers=kind, body=body
        )
        assert SECRET not in answer, (method, path, body, answer)
        return status, answer

    def json(self, method: str, path: str, content: dict[str, Any]) -> Any:
        """The answer of a route, as its message has it; {} if it refuses."""
        body: bytes | None = None
        for name in re.findall(r"\{(\w+)\}", path):
            path = path.replace(f"{{{name}}}", str(self.ids.get(name, "x")))
        if method == "GET":
            path += "?" + urllib.parse.urlencode(content)
        else:
            body = json.dumps(content).encode()
        status, answer = self.ask(method, f"/api/2.0{path}", body)
        with contextlib.suppress(ValueError):
            return json.loads(answer) if status == 200 else {}
        return {}

    def send(self, uri: str) -> None:
        """Send `uri` in every field that there is, and use what is stored."""
        self.number += 1
        for route, fields in uri_fields().items():
            method, _, path = route.partition(" ")
            path += "x/secret.txt" if path.endswith("/") else ""
            for field in fields:
                content: dict[str, Any] = {**self.ids, "version": "1", "key": "k", "value": "v"}
                content["name"] = f"n{self.number}" if "experiments" in path else "registered"
                inner, *names = field.split(".")[::-1]
                value: Any = {inner: uri}
                for name in names:
                    value = {
                        name: [value] if name in ("datasets", "parts", "assessments") else value
                    }
                content.update(value)
                if "presigned-upload" in path:
                    del content["model_id"]
                answer = self.json(method, path, content)
                if number := answer.get("experiment_id"):
                    self.use_experiment(number)
                elif version := answer.get("model_version"):
                    self.use_version(version["name"], version["version"])
        tags = [{"key": "mlflow.prompt.is_prompt", "value": "true"}]
        for more in (
            {"tags": tags},
            {"run_id": self.ids["run_id"]},
            {"model_id": self.ids["model_id"]},
        ):
            content = {"name": "registered", "source": uri, **more}
            answer = self.json("POST", "/mlflow/model-versions/create", content)
            if version := answer.get("model_version"):
                self.use_version(version["name"], version["version"])
        self.store(uri)

    def store(self, uri: str) -> None:
        """Have `uri` stored as an earlier version of this package would, and use it."""
        run = self.json("POST", "/mlflow/runs/create", self.ids)["run"]["info"]["run_id"]
        model = self.json("POST", "/mlflow/logged-models", {**self.ids, "name": "m"})
        model_id = model["model"]["info"]["model_id"]
        with contextlib.closing(
            sqlite3.connect(self.place.server.folder / "mlflow.db", timeout=60)
        ) as database:
            for statement, values in (
                ("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (uri, run)),
                (
                    "UPDATE logged_models SET artifact_location = ? WHERE model_id = ?",
                    (uri, model_id),
                ),
                (
                    "INSERT INTO model_versions (name, version, source, storage_location,"
                    " current_stage, creation_time, last_updated_time)"
                    " VALUES ('before', ?, ?, ?, 'None', 1, 1)",
                    (self.number, uri, uri),
                ),
            ):
                database.execute(statement, values)
            database.commit()
        self.use_run(run)
        self.use_model(model_id)
        self.use_version("before", self.number)

    def use_experiment(self, number: str) -> None:
        self.stored += 1
        run = self.json("POST", "/mlflow/runs/create", {"experiment_id": number})
        self.use_run(run["run"]["info"]["run_id"])

    def use_run(self, run: str) -> None:
        for path in ("written.txt", "folder/written.txt"):
            query = f"run_uuid={run}&path={path}"
            self.ask("POST", f"/ajax-api/2.0/mlflow/upload-artifact?{query}", b"written")
        for path in ("secret.txt", "folder/secret.txt", "canary/secret.txt"):
            self.ask("GET", f"/get-artifact?run_id={run}&path={path}")
            for kind in ("upload", "download"):
                content = {"run_id": run, "path": path}
                answer = self.json("POST", f"/mlflow/artifacts/presigned-{kind}-url", content)
                if url := answer.get("presigned_url"):
                    assert urllib.parse.urlsplit(url).path.startswith("/roots/team/"), url
        listed = self.json("GET", "/mlflow/artifacts/list", {"run_id": run})
        found = [each["path"] for each in listed.get("files", ())]
        assert "secret.txt" not in found or listed["root_uri"].startswith("s3://roots/team")

    def use_model(self, model: str) -> None:
        files = f"/ajax-api/2.0/mlflow/logged-models/{model}/artifacts"
        for path in ("secret.txt", "folder/secret.txt"):
            self.ask("GET", f"{files}/files?artifact_file_path={path}")
        self.ask("GET", f"{files}/directories")

    def use_version(self, name: str, version: object) -> None:
        self.stored += 1
        for path in ("secret.txt", "folder/secret.txt", "canary/secret.txt"):
            query = urllib.parse.urlencode({"name": name, "version": version, "path": path})
            self.ask("GET", f"/model-versions/get-artifact?{query}")


@pytest.mark.servers
def test_no_uri_of_a_supplier_reads_or_writes_outside_the_roots(place: Place) -> None:
    attacker = Attacker(place)

    @settings(
        max_examples=int(os.environ.get("HOKUSAI_TESTS_URIS", "15")),
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(URIS)
    def send(uri: str) -> None:
        attacker.send(uri.format(folder=place.folder.parent, **attacker_names(attacker)))
        assert place.intact(), uri

    # Those that the issue names, and one that may be stored and read.
    for uri in (
        f"{place.folder}",
        f"file://{place.folder}",
        "s3://canary",
        "s3://canary/folder",
        "mlflow-artifacts:/../canary",
        "s3://roots/team/../../canary/folder",
    ):
        attacker.send(uri)
        assert place.intact(), uri
    # What is in the roots is stored and read, so that the rest is refused for what it is.
    before = attacker.stored
    attacker.send("s3://roots/team/open")
    assert attacker.stored > before + 1
    content = {"name": "registered", "source": "s3://roots/team/kept"}
    made = attacker.json("POST", "/mlflow/model-versions/create", content)["model_version"]
    query = f"name=registered&version={made['version']}&path=secret.txt"
    assert attacker.ask("GET", f"/model-versions/get-artifact?{query}") == (200, b"an artifact")
    send()
    # Nothing of ours failed on the way, which would look as if it were refused.
    last = re.findall(r'Traceback.*?((?:  File "[^"]+".*\n(?:    .*\n)*)+)', place.server.log)
    ours = [frames for frames in last if "mlflow_hokusai_auth" in frames.rpartition('  File "')[2]]
    assert not ours, ours


def attacker_names(attacker: Attacker) -> dict[str, str]:
    return {"run": attacker.ids["run_id"], "model": attacker.ids["model_id"]}

"""Two suppliers on one server: MLflow says who made what, whatever they send."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.harness import Server, wait_until
from tests.server.isolation.stores import unused_name

pytestmark = pytest.mark.servers

API = "/api/2.0/mlflow"
FORGED = [{"key": "hokusai_auth.owner", "value": "GLOBEX"}]


@pytest.mark.parametrize("kind", ["uvicorn", "gunicorn"])
def test_what_a_supplier_makes_carries_its_name(servers: dict[str, Server], kind: str) -> None:
    server = servers[kind]
    record, key = server.store.create(owner="ACME", scopes=["mlflow:write"])

    def ask(path: str, method: str = "POST", **content: Any) -> tuple[int, Any]:
        status, _, body = server.request(
            method,
            f"{API}/{path}",
            key=key,
            headers={"Content-Type": "application/json"},
            body=json.dumps(content).encode(),
        )
        return status, json.loads(body)

    def made(path: str, what: str, **content: Any) -> Any:
        status, answer = ask(path, **content, tags=FORGED)
        assert status == 200, answer
        found = answer[what]
        if what != "experiment_id":  # MLflow answers with a number only
            tags = found.get("tags") or found["data"]["tags"]
            assert {"key": "hokusai_auth.owner", "value": "ACME"} in tags, (path, tags)
            assert {"key": "hokusai_auth.key_id", "value": record.key_id} in tags, (path, tags)
        return found

    name = unused_name()
    experiment = made("experiments/create", "experiment_id", name=name)
    run = made("runs/create", "run", experiment_id=experiment)["info"]
    assert run["user_id"] == "ACME"
    made("registered-models/create", "registered_model", name=name)
    source = {"source": run["artifact_uri"] + "/model", "run_id": run["run_id"]}
    version = made("model-versions/create", "model_version", name=name, **source)
    assert version["user_id"] == "ACME"
    for path, content in (
        ("runs/set-tag", {"run_id": run["run_id"]}),
        ("experiments/set-experiment-tag", {"experiment_id": experiment}),
        ("registered-models/set-tag", {"name": name}),
        ("model-versions/set-tag", {"name": name, "version": "1"}),
    ):
        status, answer = ask(path, **content, **FORGED[0])
        assert (status, answer["error"]) == (403, "TAG_RESERVED"), (path, answer)
    status, answer = ask(
        "model-versions/delete-tag", "DELETE", name=name, version="1", key="hokusai_auth.owner"
    )
    assert (status, answer["error"]) == (403, "TAG_RESERVED"), answer
    # The operator reads in the decision log which run it was.
    wait_until(lambda: f'"run": "{run["run_id"]}"' in server.log)

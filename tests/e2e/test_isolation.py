"""Two suppliers share one registry: neither changes what is the other's, unless it is shared."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlflow_hokusai_auth.core.types import MOST_ISOLATION
from tests.contract.test_mlflow import VERSION
from tests.e2e.parts import hokusai_auth
from tests.harness import SERVERS, Server, each_worker_answers, serve, wait_until
from tests.server.isolation.stores import unused_name

pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(VERSION < (3, 9), reason="isolation needs MLflow 3.9"),
]

API = "/api/2.0/mlflow"
OWN = "/api/2.0/hokusai"


class Supplier:
    """Requests with the key of one owner."""

    def __init__(self, server: Server, owner: str, *scopes: str, **more: Any) -> None:
        self.server = server
        _, self.key = server.store.create(owner=owner, scopes=scopes or ("model:write",), **more)

    def ask(self, method: str, path: str, **content: Any) -> tuple[int, Any]:
        status, _, body = self.server.request(
            method,
            path,
            key=self.key,
            headers={"Content-Type": "application/json"},
            body=json.dumps(content).encode() if content or method != "GET" else None,
        )
        return status, json.loads(body)

    def post(self, path: str, **content: Any) -> tuple[int, Any]:
        return self.ask("POST", f"{API}/{path}", **content)

    def good(self, path: str, **content: Any) -> Any:
        status, answer = self.post(path, **content)
        assert status == 200, (path, answer)
        return answer

    def refusal(self, path: str, method: str = "POST", **content: Any) -> str:
        status, answer = self.ask(method, f"{API}/{path}", **content)
        assert status == 403, (path, answer)
        return str(answer["error"])

    def model(self) -> tuple[str, dict[str, str]]:
        """Register a model with one version; return its name, and what a version is made from."""
        name = unused_name()
        experiment = self.good("experiments/create", name=name)["experiment_id"]
        run = self.good("runs/create", experiment_id=experiment)["run"]["info"]
        source = {"source": f"{run['artifact_uri']}/model", "run_id": run["run_id"]}
        self.good("registered-models/create", name=name)
        self.good("model-versions/create", name=name, **source)
        return name, source


@pytest.fixture(scope="module", params=["uvicorn", "gunicorn"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("isolation")
    environ = {
        "HOKUSAI_AUTH_ISOLATION": "writes",
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
    }
    with serve(folder, SERVERS[request.param], **environ) as running:
        yield running


def test_supplier_changes_nothing_of_another_one_s(server: Server) -> None:
    acme, globex = Supplier(server, "ACME"), Supplier(server, "GLOBEX")
    name, _ = acme.model()
    own, source = globex.model()
    for path, content in (
        ("registered-models/rename", {"new_name": unused_name()}),
        ("registered-models/set-tag", {"key": "a", "value": "b"}),
        ("registered-models/alias", {"alias": "champion", "version": "1"}),
        ("model-versions/create", source),
        ("model-versions/set-tag", {"version": "1", "key": "a", "value": "b"}),
        ("model-versions/transition-stage", {"version": "1", "stage": "Production"}),
    ):
        assert globex.refusal(path, name=name, **content) == "NOT_OWNER", path
    assert globex.refusal("registered-models/create", name=name) == "NAME_TAKEN"
    assert globex.refusal("registered-models/rename", name=own, new_name=name) == "NAME_TAKEN"
    for path in ("registered-models/delete", "model-versions/delete"):
        assert globex.refusal(path, "DELETE", name=name, version="1") == "NOT_OWNER", path
    # Reading stays open, and the owner goes on.
    status, answer = globex.ask("GET", f"{API}/registered-models/get?name={name}")
    assert status == 200 and answer["registered_model"]["name"] == name
    acme.good("registered-models/set-tag", name=name, key="a", value="b")


def test_contributor_adds_versions_and_changes_its_own(server: Server) -> None:
    acme, globex = Supplier(server, "ACME"), Supplier(server, "GLOBEX")
    name, _ = acme.model()
    _, source = globex.model()
    status, grant = acme.ask(
        "POST", f"{OWN}/grants", grantee="GLOBEX", pattern=name, level="contribute"
    )
    assert status == 201, grant
    # MLflow's register_model makes the model first, and goes on if it exists.
    status, answer = globex.post("registered-models/create", name=name)
    assert (status, answer["error_code"]) == (400, "RESOURCE_ALREADY_EXISTS")
    version = globex.good("model-versions/create", name=name, **source)["model_version"]
    assert (version["version"], version["user_id"]) == ("2", "GLOBEX")
    globex.good("model-versions/set-tag", name=name, version="2", key="a", value="b")
    assert globex.refusal("model-versions/set-tag", name=name, version="1", key="a", value="b")
    assert globex.refusal("registered-models/alias", name=name, alias="champion", version="2")
    acme.good("registered-models/alias", name=name, alias="champion", version="2")
    delete = f"{API}/model-versions/delete"
    assert globex.refusal("model-versions/delete", "DELETE", name=name, version="2") == "NOT_OWNER"
    assert globex.refusal("model-versions/delete", "DELETE", name=name, version="1") == "NOT_OWNER"
    globex.good("model-versions/create", name=name, **source)
    status, answer = globex.ask("DELETE", delete, name=name, version="3")
    assert status == 200, answer
    assert acme.ask("DELETE", f"{OWN}/grants/{grant['id']}")[0] == 200
    assert globex.refusal("model-versions/create", name=name, **source) == "NOT_OWNER"


def test_webhooks_are_delivered(server: Server) -> None:
    """MLflow sends them from a thread without a caller, which changes nothing."""
    bodies: list[Any] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    admin, acme = Supplier(server, "HOKUSAI", "mlflow:admin"), Supplier(server, "ACME")
    with HTTPServer(("127.0.0.1", 0), Receiver) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{receiver.server_port}/"
        # Not an event of another test: MLflow remembers for a minute that nobody waits for it.
        events = [{"entity": "MODEL_VERSION_TAG", "action": "DELETED"}]
        made = admin.good("webhooks", name="w", url=url, events=events)["webhook"]
        name, _ = acme.model()
        tag = {"name": name, "version": "1", "key": "a"}
        acme.good("model-versions/set-tag", **tag, value="b")
        assert acme.ask("DELETE", f"{API}/model-versions/delete-tag", **tag)[0] == 200
        wait_until(lambda: bool(bodies))
        path = f"{API}/webhooks/{made['webhook_id']}"
        assert admin.ask("DELETE", path, webhook_id=made["webhook_id"])[0] == 200
        receiver.shutdown()
    assert bodies[0]["data"]["name"] == name
    assert "ISOLATED (isolated) by key none" not in server.log


def test_staff_change_everything(server: Server) -> None:
    acme, staff = Supplier(server, "ACME"), Supplier(server, "HOKUSAI", "mlflow:write")
    name, source = acme.model()
    staff.good("registered-models/set-tag", name=name, key="a", value="b")
    staff.good("model-versions/create", name=name, **source)
    staff.good("registered-models/rename", name=name, new_name=unused_name())


def database(server: Server) -> tuple[str, str]:
    """The option with which `hokusai-auth isolation` finds MLflow's database."""
    return "--backend-store-uri", f"sqlite:///{server.folder}/mlflow.db"


def state(server: Server) -> Any:
    """What the server tells an operator of its isolation."""
    staff = Supplier(server, "OPS", "mlflow:admin")
    status, answer = staff.ask("GET", f"{OWN}/isolation")
    assert status == 200, answer
    found = staff.ask("GET", "/api/health/mlflow/detailed")[1]["checks"]["isolation"]
    return {**answer, "found": found["found"]}


def nobody_s(folder: Path) -> str:
    """Return a registered model that plain MLflow has made in the database in `folder`."""
    name = unused_name()
    body, headers = json.dumps({"name": name}).encode(), {"Content-Type": "application/json"}
    with serve(folder, app=None) as plain:
        path = f"{API}/registered-models/create"
        status, _, answer = plain.request("POST", path, headers=headers, body=body)
        assert status == 200, answer
    return name


def test_new_server_keeps_suppliers_apart(tmp_path: Path) -> None:
    with serve(tmp_path, HOKUSAI_AUTH_ISOLATION="") as server:
        acme, globex = Supplier(server, "ACME"), Supplier(server, "GLOBEX")
        name, _ = acme.model()
        change = {"name": name, "key": "a", "value": "b"}
        assert globex.post("registered-models/set-tag", **change)[0] == 404
        assert state(server)["found"] == f"{MOST_ISOLATION}, by default"
        assert "ISOLATION IS" not in server.log
    # A new thing that nobody owns lowers nothing.
    nobody_s(tmp_path)
    with serve(tmp_path, HOKUSAI_AUTH_ISOLATION="") as server:
        globex = Supplier(server, "GLOBEX")
        assert globex.post("registered-models/set-tag", **change)[0] == 404
        shown = json.loads(hokusai_auth(server, "isolation", "--json", *database(server)))
        assert (shown["isolation"], shown["default"]) == ("default", MOST_ISOLATION)
    with serve(tmp_path, HOKUSAI_AUTH_ISOLATION="off") as server:
        Supplier(server, "GLOBEX").good("registered-models/set-tag", **change)
        assert state(server)["found"] == "off"


def test_used_server_goes_on_until_everything_has_an_owner(tmp_path: Path) -> None:
    name = nobody_s(tmp_path)
    with serve(tmp_path, SERVERS["gunicorn"], HOKUSAI_AUTH_ISOLATION="") as server:
        each_worker_answers(server)
        assert "ISOLATION IS observe" in server.log and "1 registered models" in server.log
        globex = Supplier(server, "GLOBEX")
        change = {"name": name, "key": "a", "value": "b"}
        globex.good("registered-models/set-tag", **change)
        assert state(server)["found"] == "observe, by default"
        assign = ("owners", "assign", "--models", name, "--owner", "ACME", "--apply")
        hokusai_auth(server, *assign, *database(server))
        # Only a person switches it on.
        globex.good("registered-models/set-tag", **change)
        staff = Supplier(server, "OPS", "mlflow:admin")
        before = server.log.count("The isolation is now writes")
        status, answer = staff.ask("POST", f"{OWN}/isolation", isolation="writes")
        assert (status, answer["isolation"], answer["by_default"]) == (200, "writes", False)
        wait_until(lambda: server.log.count("The isolation is now writes") >= before + 1)
        change = {"name": name, "key": "a"}
        wait_until(
            lambda: (
                globex.post("registered-models/set-tag", **change, value=unused_name())[0] == 403
            )
        )
        assert hokusai_auth(server, "isolation").startswith("writes\nsince 20")


@pytest.mark.parametrize("chosen", ["", "writes", "full"])
def test_server_that_can_t_know_owners_closes_nothing_unless_it_is_told_to(
    tmp_path: Path, chosen: str
) -> None:
    elsewhere = ("--registry-store-uri", f"sqlite:///{tmp_path}/registry.db")
    options = (*SERVERS["uvicorn"], *elsewhere)
    with serve(tmp_path, options, HOKUSAI_AUTH_ISOLATION=chosen) as server:
        acme, globex = Supplier(server, "ACME"), Supplier(server, "GLOBEX")
        staff = Supplier(server, "OPS", "mlflow:admin")
        name = unused_name()
        staff.good("registered-models/create", name=name)
        change = {"name": name, "key": "a", "value": "b"}
        found = state(server)
        assert "another store" in found["obstacle"] and "another store" not in found["found"]
        if chosen:
            hides = chosen == "full"
            words = "SEE OR CHANGE ANYTHING" if hides else "CHANGE ANYTHING"
            assert f"ISOLATION IS {chosen}, SO SUPPLIERS CAN'T {words}: " in server.log
            assert globex.refusal("registered-models/set-tag", **change) == "ISOLATED"
            assert acme.refusal("registered-models/create", name=unused_name()) == "ISOLATED"
            # Nothing hides a registry of files, or another database than that of the owners.
            for path in (f"registered-models/get?name={name}", "experiments/get?experiment_id=0"):
                status, answer = globex.ask("GET", f"{API}/{path}")
                assert (status, answer.get("error")) == (
                    (403, "ISOLATED") if hides else (200, None)
                )
        else:
            assert "ISOLATION IS off" in server.log
            globex.good("registered-models/set-tag", **change)
        status, answer = staff.ask("POST", f"{OWN}/isolation", isolation="writes")
        assert (status, answer["error_code"]) == (409, "RESOURCE_CONFLICT")
        assert "another store" in answer["message"]
        assert staff.ask("POST", f"{OWN}/isolation", isolation="off")[0] == 200
        wait_until(lambda: globex.post("registered-models/set-tag", **change)[0] == 200)


def test_isolation_changes_while_the_server_runs(tmp_path: Path) -> None:
    with serve(tmp_path, SERVERS["gunicorn"]) as server:
        each_worker_answers(server)
        acme, globex = Supplier(server, "ACME"), Supplier(server, "GLOBEX")
        name, source = acme.model()
        change = {"name": name, "key": "a"}
        globex.good("registered-models/set-tag", **change, value="off")

        def follow(level: str) -> None:
            before = server.log.count(f"The isolation is now {level}")
            hokusai_auth(server, "isolation", level, *database(server))
            wait_until(lambda: server.log.count(f"The isolation is now {level}") == before + 2)

        follow("observe")
        globex.good("registered-models/set-tag", **change, value="observe")
        metrics = [{"key": f"m{n}", "value": 1.0, "timestamp": 1, "step": 1} for n in range(9)]
        globex.good("runs/log-batch", run_id=source["run_id"], metrics=metrics)

        def counted(reason: str) -> list[int]:
            rows = json.loads(hokusai_auth(server, "isolation", "--report", "--json"))
            return [row["requests"] for row in rows if row["reason"] == reason]

        # Two requests, whatever they change.
        wait_until(lambda: sum(counted("NOT_OWNER")) >= 2)
        assert sum(counted("NOT_OWNER")) == 2
        assert globex.ask("GET", f"{API}/registered-models/get?name={name}")[0] == 200
        wait_until(lambda: bool(counted("HIDDEN")))
        follow("writes")
        assert globex.refusal("registered-models/set-tag", **change, value="writes") == "NOT_OWNER"
        hokusai_auth(server, "mode", "observe")
        wait_until(lambda: server.log.count("The mode is now observe") == 2)
        globex.good("registered-models/set-tag", **change, value="mode")
        hokusai_auth(server, "mode", "enforce")
        follow("off")
        globex.good("registered-models/set-tag", **change, value="off again")
        assert hokusai_auth(server, "isolation").startswith("off\nsince 20")

"""Two suppliers' keys against each other: what an attack on isolation found, or found refused.

Each test fails for the reason that its mark gives, until that is mended.
"""

from __future__ import annotations

import contextlib
import sqlite3
import uuid
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import RunTag
from mlflow.exceptions import MlflowException

from mlflow_hokusai_auth.core.policy import Policy
from mlflow_hokusai_auth.server.isolation.facts import Facts
from mlflow_hokusai_auth.server.isolation.writes import Writes
from mlflow_hokusai_auth.server.live_settings import Mode
from mlflow_hokusai_auth.server.upstream.artifact_roots import Watch
from mlflow_hokusai_auth.store import ownership
from tests.e2e.test_isolation import API, OWN, Supplier
from tests.harness import Server, serve
from tests.server.isolation.stores import ACME, GLOBEX, Stores, calling, unused_name

pytestmark = pytest.mark.servers

V3 = "/api/3.0/mlflow"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("attack")
    with serve(folder, HOKUSAI_AUTH_ISOLATION="writes") as running:
        yield running


class Attacker(Supplier):
    """A supplier with files."""

    def put(self, path: str, content: bytes) -> int:
        url = f"/api/2.0/mlflow-artifacts/artifacts/{path}"
        headers = {"Content-Type": "application/octet-stream"}
        return self.server.request("PUT", url, key=self.key, headers=headers, body=content)[0]

    def run(self) -> tuple[str, str]:
        """Make a run in a new experiment; return the ids of both."""
        experiment = self.good("experiments/create", name=unused_name())["experiment_id"]
        run = self.good("runs/create", experiment_id=experiment)["run"]["info"]["run_id"]
        return experiment, run

    def logged(self, experiment: str, name: str, run: str, content: bytes) -> str:
        """Make a finished logged model with the file `p`; return its id."""
        made = self.good("logged-models", experiment_id=experiment, name=name, source_run_id=run)
        model: str = made["model"]["info"]["model_id"]
        assert self.put(f"{experiment}/models/{model}/artifacts/p", content) == HTTPStatus.OK
        self.finish(model, "LOGGED_MODEL_READY")
        return model

    def finish(self, model: str, status: str) -> int:
        return self.ask("PATCH", f"{API}/logged-models/{model}", model_id=model, status=status)[0]

    def share(self, pattern: str, grantee: str) -> int:
        grant = {"grantee": grantee, "pattern": pattern, "level": "contribute"}
        return self.ask("POST", f"{OWN}/grants", **grant)[0]


@pytest.mark.parametrize("scope", ["model:write", "mlflow:write"])
def test_dataset_is_logged_with_its_context(server: Server, scope: str) -> None:
    acme = Attacker(server, "ACME", scope)
    _, run = acme.run()
    dataset = {"name": "d", "digest": "1", "source_type": "local", "source": "{}"}
    tags = [{"key": "mlflow.data.context", "value": "train"}]
    acme.good("runs/log-inputs", run_id=run, datasets=[{"dataset": dataset, "tags": tags}])


def test_logged_model_needs_no_run(server: Server) -> None:
    acme = Attacker(server, "ACME")
    experiment, _ = acme.run()
    acme.good("logged-models", experiment_id=experiment, name="external")


def test_deleted_logged_model_changes_no_registered_bytes(server: Server) -> None:
    acme, globex = Attacker(server, "ACME"), Attacker(server, "GLOBEX")
    name, _ = acme.model()
    acme.share(name, "GLOBEX")
    experiment, run = globex.run()
    globex.logged(experiment, "model", run, b"evil")
    good = globex.logged(experiment, "model", run, b"good")
    version = {"name": name, "source": f"runs:/{run}/model", "run_id": run}
    if globex.post("model-versions/create", **version)[0] == HTTPStatus.OK:
        acme.good("registered-models/alias", name=name, alias="champion", version="2")
        globex.refusal(f"logged-models/{good}", "DELETE")


def test_finished_logged_model_stays_as_it_is(server: Server) -> None:
    globex = Attacker(server, "GLOBEX")
    experiment, run = globex.run()
    model = globex.logged(experiment, "model", run, b"good")
    globex.finish(model, "LOGGED_MODEL_PENDING")
    place = f"{experiment}/models/{model}/artifacts/p"
    assert globex.put(place, b"evil") == HTTPStatus.FORBIDDEN


def test_contributor_puts_no_version_into_production(server: Server) -> None:
    acme, globex = Attacker(server, "ACME"), Attacker(server, "GLOBEX")
    name, _ = acme.model()
    acme.good("model-versions/transition-stage", name=name, version="1", stage="Production")
    acme.share(name, "GLOBEX")
    _, source = globex.model()
    globex.good("model-versions/create", name=name, **source)
    # models:/NAME/Production is the newest version of the stage.
    globex.refusal("model-versions/transition-stage", name=name, version="2", stage="Production")


def test_supplier_changes_no_assessment_of_another_one_s_trace(server: Server) -> None:
    acme, staff = Attacker(server, "ACME"), Attacker(server, "HOKUSAI", "mlflow:write")
    globex = Attacker(server, "GLOBEX", "model:write", "mlflow:access")
    experiment, _ = acme.run()
    _, own_run = globex.run()
    trace, time = f"tr-{uuid.uuid4().hex}", "2025-01-01T00:00:00Z"
    where = {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": experiment}}
    info = {"trace_id": trace, "trace_location": where, "request_time": time, "state": "OK"}
    assert staff.ask("POST", f"{V3}/traces", trace={"trace_info": info})[0] == HTTPStatus.OK
    assessment: dict[str, Any] = {
        "assessment_name": "quality",
        "trace_id": trace,
        "source": {"source_type": "HUMAN", "source_id": "somebody"},
        "create_time": time,
        "last_update_time": time,
        "feedback": {"value": "good"},
    }
    path = f"{V3}/traces/{trace}/assessments"
    made = staff.ask("POST", path, assessment=assessment)[1]["assessment"]["assessment_id"]
    new = {
        "assessment_id": made,
        "trace_id": trace,
        "feedback": {"value": "evil"},
        "metadata": {"mlflow.assessment.sourceRunId": own_run},
    }
    changed = {"assessment": new, "update_mask": "feedback,metadata"}
    assert globex.ask("PATCH", f"{path}/{made}", **changed)[0] == HTTPStatus.FORBIDDEN


def test_source_is_the_model_that_mlflow_opens(server: Server) -> None:
    acme, globex = Attacker(server, "ACME"), Attacker(server, "GLOBEX")
    name, _ = globex.model()
    _, source = acme.model()
    acme.good("registered-models/create", name=f"{name}@acme")
    acme.good("model-versions/create", name=f"{name}@acme", **source)
    foreign = {"name": name, "source": f"models:/{name}@acme/1"}
    assert globex.refusal("model-versions/create", **foreign) == "SOURCE_REFUSED"


def test_narrowed_key_shares_only_what_it_may_change(server: Server) -> None:
    name, _ = Attacker(server, "ACME").model()
    narrowed = Attacker(server, "ACME", models=("other-*",))
    assert narrowed.share(name, "GLOBEX") == HTTPStatus.FORBIDDEN


def test_narrowed_key_ends_only_grants_that_it_may_give(server: Server) -> None:
    acme = Attacker(server, "ACME")
    narrowed = Attacker(server, "ACME", models=("other-*",))
    for pattern, status in {
        "other-x": 200,
        "other-x*": 200,
        unused_name(): 403,
        "oth*": 403,
        "*": 403,
    }.items():
        grant = {"grantee": "GLOBEX", "pattern": pattern, "level": "read"}
        made = acme.ask("POST", f"{OWN}/grants", **grant)[1]["id"]
        assert narrowed.ask("DELETE", f"{OWN}/grants/{made}")[0] == status, pattern
        assert acme.ask("DELETE", f"{OWN}/grants/{made}")[0] == (404 if status == 200 else 200)


def test_model_keeps_its_owner_when_staff_rename_it(server: Server) -> None:
    acme, globex = Attacker(server, "ACME"), Attacker(server, "GLOBEX")
    staff = Attacker(server, "HOKUSAI", "mlflow:write")
    name, _ = acme.model()
    gone, _ = globex.model()
    assert globex.ask("DELETE", f"{API}/registered-models/delete", name=gone)[0] == HTTPStatus.OK
    now = (
        gone if staff.post("registered-models/rename", name=name, new_name=gone)[0] == 200 else name
    )
    assert globex.refusal("registered-models/set-tag", name=now, key="a", value="b") == "NOT_OWNER"


def test_refusal_is_one_line_of_the_log(server: Server) -> None:
    globex = Attacker(server, "GLOBEX")
    globex.refusal("experiments/create", name='default:x\n{"event": "forged"}')
    assert not [line for line in server.log.splitlines() if line.startswith('{"event": "forged"}')]


def test_error_shows_no_sql(server: Server) -> None:
    acme = Attacker(server, "ACME")
    experiment, run = acme.run()
    model = acme.logged(experiment, "model", run, b"good")
    answers = [acme.post("runs/outputs", run_id=run, models=[{"model_id": model}]) for _ in "12"]
    assert "[SQL" not in str(answers) and "[parameters" not in str(answers)


def test_lost_caller_changes_nothing(server: Server) -> None:
    globex = Attacker(server, "GLOBEX", "model:write", "mlflow:access")
    status, answer = globex.ask("POST", "/ajax-api/3.0/mlflow/demo/generate")
    assert status == HTTPStatus.FORBIDDEN, answer
    with contextlib.closing(sqlite3.connect(server.folder / "mlflow.db")) as database:
        query = "SELECT count(*) FROM trace_info JOIN spans ON trace_id = trace_info.request_id"
        assert database.execute(query).fetchone() == (0,)


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    found = Stores(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)
    ownership.prepare(found.registry.engine)
    mode = Mode("enforce")
    # Time stands still.
    Writes(Policy(), Watch(mode), Facts(usable=True, timer=lambda: 0.0)).install()
    yield found
    mode.now = "off"


def test_former_owner_does_not_delete_an_assigned_experiment(stores: Stores) -> None:
    with calling(ACME):
        made = stores.make()
        stores.tracking.set_tag(made.run, RunTag("a", "b"))
    number = int(made.experiment)
    created_at = stores.tracking.get_experiment(made.experiment).creation_time
    with stores.registry.engine.begin() as connection:
        ownership.record_experiment(
            connection, number, owner="GLOBEX", key_id="", created_at=created_at
        )
    with calling(ACME), pytest.raises(MlflowException, match="NOT_OWNER"):
        stores.tracking.delete_experiment(made.experiment)


@pytest.mark.parametrize("way", ["model", "experiment", "rename"])
def test_name_that_is_taken_in_a_race_gets_the_same_answer(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    with calling(ACME):
        theirs = stores.make().model
    with calling(GLOBEX):
        own = stores.make().model
        # The other's transaction ends after the look-up.
        monkeypatch.setattr(Facts, "name_owner", lambda *_: None)
        monkeypatch.setattr(Facts, "is_taken", lambda *_: False)
        with pytest.raises(MlflowException) as refused:
            if way == "model":
                stores.registry.create_registered_model(theirs)
            elif way == "experiment":
                stores.tracking.create_experiment(theirs)
            else:
                stores.registry.rename_registered_model(own, theirs)
    assert "NAME_TAKEN" in str(refused.value) and "[SQL" not in str(refused.value)

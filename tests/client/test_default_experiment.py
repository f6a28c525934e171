"""Runs that name no experiment go where the server says, on MLflow's own way to its default."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType
from mlflow.tracking import fluent

from mlflow_hokusai_auth.client import default_experiment
from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.job_rules import TOKEN
from tests.contract.test_mlflow import VERSION
from tests.harness import Server, serve

from .test_admin import UNKNOWN, Api, answering

MLFLOW = "/api/2.0/mlflow/experiments"
BY_NAME, CREATE = f"GET {MLFLOW}/get-by-name", f"POST {MLFLOW}/create"
EXPERIMENT = {"experiment_id": "7", "name": "default:ACME", "lifecycle_stage": "active"}
FOUND = (200, {"experiment": EXPERIMENT})
TAKEN = (400, {"error_code": "RESOURCE_ALREADY_EXISTS", "message": "It exists."})
REFUSED = (403, {"error_code": "PERMISSION_DENIED", "message": "Not for you."})


@pytest.fixture
def api(key: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """A server that isolates ACME and has its default experiment."""
    monkeypatch.setattr(fluent, "_active_experiment_id", None)
    monkeypatch.setattr(default_experiment, "_answers", default_experiment._Answers())
    with answering() as running:
        running.on("GET whoami", 200, {"key_id": "key_1", "default_experiment": "default:ACME"})
        running.answers[BY_NAME] = FOUND
        mlflow.set_tracking_uri(running.uri)
        yield running


def asked(api: Api) -> list[str]:
    """The last steps of the paths that were asked for, since the last call."""
    steps = [one.path.rpartition("/")[2] for one in api.asked]
    api.asked.clear()
    return steps


def default() -> str | None:
    """The id that `mlflow.start_run` takes if it is given none."""
    found: str | None = fluent._get_experiment_id()
    return found


def test_experiment_is_found_by_name_and_asked_for_once(
    api: Api, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dict(os.environ)
    assert [default() for _ in range(3)] == ["7"] * 3
    assert dict(os.environ) == before
    assert api.last.query == {"experiment_name": "default:ACME"}
    assert {one.headers["x-api-key"] for one in api.asked} == {key}
    assert asked(api) == ["whoami", "get-by-name"]
    # Another key may be another owner's, and another path another server.
    monkeypatch.setenv("HOKUSAI_API_KEY", keys.generate("test"))
    assert default() == "7" and asked(api) == ["whoami", "get-by-name"]
    mlflow.set_tracking_uri(api.origin)
    assert default() == "7" and asked(api) == ["whoami", "get-by-name"]


def test_experiment_is_made_if_it_is_missing(api: Api) -> None:
    api.answers[BY_NAME] = UNKNOWN
    api.answers[CREATE] = (200, {"experiment_id": "8"})
    assert default() == "8"
    assert api.last.body["name"] == "default:ACME"
    assert asked(api) == ["whoami", "get-by-name", "create"]


def test_process_that_was_slower_takes_what_the_other_made(api: Api) -> None:
    answers = iter([UNKNOWN, FOUND])
    api.answers[BY_NAME] = lambda: next(answers)
    api.answers[CREATE] = TAKEN
    assert default() == "7"
    assert asked(api) == ["whoami", "get-by-name", "create", "get-by-name"]


def test_nothing_is_asked_if_the_user_chose_an_experiment(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("MLFLOW_EXPERIMENT_NAME", "mine"), ("MLFLOW_EXPERIMENT_ID", "7")):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            api.answers[f"GET {MLFLOW}/get"] = FOUND
            assert default() == "7"
            assert "whoami" not in asked(api), name
    with monkeypatch.context() as context:
        context.setenv("MLFLOW_EXPERIMENT_ID", "0")  # set_experiment writes to it
        mlflow.set_experiment("mine")
        assert default() == "7"
        assert "whoami" not in asked(api)


def test_mlflow_s_default_counts_if_the_server_names_none(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    for answer in (
        (200, {"key_id": "key_1", "default_experiment": None}),
        (200, {"key_id": "key_1"}),
        # Servers without this package.
        (404, b"<html>Not Found</html>"),
        UNKNOWN,
    ):
        default_experiment._answers = default_experiment._Answers()
        api.on("GET whoami", *answer)
        assert [default() for _ in range(2)] == ["0"] * 2, answer
        assert asked(api) == ["whoami"], answer
    assert not caplog.records


def test_server_that_named_none_is_asked_again(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(default_experiment._answers, "timer", lambda: now[0])
    api.on("GET whoami", 200, {"key_id": "key_1", "default_experiment": None})
    assert default() == "0" and asked(api) == ["whoami"]
    # Its operator switches isolation on.
    api.on("GET whoami", 200, {"key_id": "key_1", "default_experiment": "default:ACME"})
    now[0] += 59
    assert default() == "0" and asked(api) == []
    now[0] += 1
    assert default() == "7" and asked(api) == ["whoami", "get-by-name"]
    now[0] += 1_000_000
    assert default() == "7" and asked(api) == []
    # Another key is asked about at once.
    api.on("GET whoami", 200, {"key_id": "key_2", "default_experiment": None})
    monkeypatch.setenv("HOKUSAI_API_KEY", keys.generate("test"))
    assert default() == "0" and asked(api) == ["whoami"]


def test_error_gives_one_warning_and_mlflow_s_default(
    api: Api, key: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    good = dict(api.answers)
    whoami = "GET /api/2.0/hokusai/whoami"
    refused = (401, {"error_code": "UNAUTHENTICATED", "message": f"Unknown: {key}"})
    cases: list[tuple[str, Any]] = [
        ("UNAUTHENTICATED", {whoami: refused}),
        ("TEMPORARILY_UNAVAILABLE", {whoami: (503, b"", {"Retry-After": "0"})}),
        ("INTERNAL_ERROR", {whoami: (200, f"<html>{key}</html>".encode())}),
        ("AttributeError", {BY_NAME: UNKNOWN, CREATE: TAKEN}),
        ("PERMISSION_DENIED", {BY_NAME: REFUSED}),
        ("PERMISSION_DENIED", {BY_NAME: UNKNOWN, CREATE: REFUSED}),
    ]
    for reason, answers in cases:
        monkeypatch.setattr(default_experiment.profile, "_warned", set())
        default_experiment._answers = default_experiment._Answers()
        caplog.clear()
        api.answers.update({CREATE: TAKEN, **good, **answers})
        assert [default() for _ in range(3)] == ["0"] * 3, answers
        warnings = [one for one in caplog.records if one.levelno >= logging.WARNING]
        assert [one.name for one in warnings] == ["mlflow_hokusai_auth.client"], warnings
        assert f"({reason})" in warnings[0].getMessage()
        assert "MLFLOW_EXPERIMENT_NAME" in warnings[0].getMessage()
        ours = [one for one in caplog.records if one.name.startswith("mlflow_hokusai_auth")]
        assert key not in "".join(one.getMessage() for one in ours)
        # An error is not remembered.
        api.answers.update(good)
        assert default() == "7", answers


def test_run_does_not_wait_for_minutes_if_whoami_fails(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
    api.on("GET whoami", 503, b"", {"Retry-After": "0"})
    assert default() == "0"
    assert asked(api) == ["whoami"] * 2


def test_nothing_is_asked_where_the_key_does_not_go(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as context:
        context.setenv("HOKUSAI_ALLOWED_ORIGINS", "https://registry.example.com")
        assert default() == "0"
    with monkeypatch.context() as context:
        context.delenv("HOKUSAI_API_KEY")
        assert default() == "0"
    for uri in ("sqlite:///mlflow.db", "./mlruns", "databricks"):
        mlflow.set_tracking_uri(uri)
        assert default() == (None if uri == "databricks" else "0")
    assert not asked(api) and not caplog.records and not list(tmp_path.glob("ml*"))


def test_nothing_is_asked_in_servers_and_their_jobs(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    for environ in (
        {"_MLFLOW_SGI_NAME": "gunicorn"},
        {"MLFLOW_SERVER_PID": "1", TOKEN: "hk_jobs_" + "0" * 64},
    ):
        with monkeypatch.context() as context:
            for name, value in environ.items():
                context.setenv(name, value)
            assert default() == "0"
            assert not asked(api), environ


def test_nothing_is_asked_before_an_experiment_is_needed(api: Api) -> None:
    module = "mlflow_hokusai_auth.client.default_experiment"
    code = (
        f"import sys, {module} as module\n"
        "assert 'mlflow' not in sys.modules and 'requests' not in sys.modules\n"
        "import mlflow\n"
        "from mlflow.tracking.default_experiment import registry\n"
        "registry._default_experiment_provider_registry.register(\n"
        "    module.HokusaiDefaultExperimentProvider)\n"
        "mlflow.MlflowClient()\n"
    )
    environ = {**os.environ, "MLFLOW_TRACKING_URI": api.uri}
    command = [sys.executable, "-W", "error::UserWarning:mlflow", "-c", code]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Failure attempting to register" not in done.stderr
    assert not asked(api)


@pytest.fixture(scope="module")
def isolating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("isolating")
    with serve(folder, HOKUSAI_AUTH_ISOLATION="writes") as server:
        yield server


@pytest.mark.servers
@pytest.mark.skipif(VERSION < (3, 9), reason="isolation needs MLflow 3.9")
class TestOnARealServer:
    @pytest.fixture(autouse=True)
    def no_experiment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fluent, "_active_experiment_id", None)

    def use(self, server: Server, patch: pytest.MonkeyPatch, owner: str, scope: str) -> None:
        patch.setenv("HOKUSAI_API_KEY", server.store.create(owner=owner, scopes=[scope])[1])
        mlflow.set_tracking_uri(f"{server.origin}/api/mlflow")

    def test_plain_run_of_a_supplier_goes_to_its_own_experiment(
        self, isolating: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Doubler(mlflow.pyfunc.PythonModel):
            def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
                return [2 * x for x in model_input["x"]]

        made = {}
        for owner, scope in (("ACME", "model:write"), ("Globex & Co", "model:write")):
            self.use(isolating, monkeypatch, owner, scope)
            for number in range(2):
                with mlflow.start_run() as run:
                    mlflow.pyfunc.log_model(
                        "model",
                        python_model=Doubler(),
                        pip_requirements=["mlflow"],
                        registered_model_name=f"model of {owner}",
                    )
                made[owner, number] = run.info.experiment_id
                experiment = mlflow.get_experiment(run.info.experiment_id)
                assert experiment.name == f"default:{owner}"
            # MLflow looks for runs where it puts them.
            found = {one.info.run_id for one in mlflow.search_runs(output_format="list")}
            assert len(found) == 2 and run.info.run_id in found
        assert made["ACME", 0] == made["ACME", 1] != made["Globex & Co", 0]
        # Nothing is made for staff.
        before = {one.name for one in MlflowClient().search_experiments(ViewType.ALL)}
        self.use(isolating, monkeypatch, "Staff", "mlflow:write")
        with mlflow.start_run() as run:
            pass
        assert run.info.experiment_id == "0"
        after = {one.name for one in MlflowClient().search_experiments(ViewType.ALL)}
        assert after == before == {"Default", "default:ACME", "default:Globex & Co"}

    def test_all_who_make_it_at_once_go_on(
        self, isolating: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.use(isolating, monkeypatch, "Many", "model:write")
        together = threading.Barrier(4)

        def find(client: MlflowClient) -> str:
            together.wait(60)
            return default_experiment.find_or_make(client, "default:Many")

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(find, [MlflowClient() for _ in range(4)]))
        assert len(set(found)) == 1 and found[0] != "0"

    def test_key_that_may_not_make_it_gets_a_warning(
        self, isolating: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.use(isolating, monkeypatch, "Reader", "model:read")
        assert [default() for _ in range(2)] == ["0", "0"]
        (warning,) = [one for one in caplog.records if one.levelno >= logging.WARNING]
        assert "PERMISSION_DENIED" in warning.getMessage()

"""Nobody confined changes what is another owner's, by any method of MLflow's stores."""

from __future__ import annotations

import json
import threading
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from mlflow.entities import (
    Dataset,
    DatasetInput,
    ExperimentTag,
    InputTag,
    LoggedModelInput,
    LoggedModelOutput,
    LoggedModelParameter,
    LoggedModelTag,
    Metric,
    Param,
    RunStatus,
    RunTag,
)
from mlflow.entities.logged_model_status import LoggedModelStatus
from mlflow.entities.model_registry import ModelVersionTag, RegisteredModelTag
from mlflow.exceptions import MlflowException
from mlflow.store.db.base_sql_model import Base
from mlflow.store.tracking.dbmodels.models import SqlInputTag
from sqlalchemy.orm import Session

from mlflow_hokusai_auth.core.policy import Policy
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.isolation import bindings
from mlflow_hokusai_auth.server.isolation.facts import Facts
from mlflow_hokusai_auth.server.isolation.writes import Writes
from mlflow_hokusai_auth.server.live_settings import Mode
from mlflow_hokusai_auth.server.upstream import database_errors
from mlflow_hokusai_auth.server.upstream.artifact_roots import Watch
from mlflow_hokusai_auth.server.upstream.stores import open_by_itself
from mlflow_hokusai_auth.store import ownership
from tests.conftest import empty_database
from tests.server.isolation.stores import ACME, GLOBEX, STAFF, Made, Stores, calling, unused_name

Way = Callable[[], object]


@pytest.fixture(autouse=True)
def mode(stores: Stores) -> Iterator[Mode]:
    ownership.prepare(stores.registry.engine)
    database_errors.shorten()
    mode = Mode("enforce")
    Writes(Policy(), Watch(mode), Facts(usable=True)).install()
    yield mode
    # Other tests of this process write without a caller.
    mode.now = "off"


def made_by(stores: Stores, principal: Principal) -> Made:
    with calling(principal):
        return stores.make()


def changes(stores: Stores, of: Made, own: Made) -> dict[str, Way]:
    """Every method that changes something of `of`, for the owner of `own`."""
    tracking, registry = stores.tracking, stores.registry
    metric = Metric("m", 1.0, 1, 1)
    foreign = Metric("m", 1.0, 1, 1, of.logged, run_id=own.run)
    data = [DatasetInput(Dataset("d", "1", "local", "x"), [])]
    ways: dict[str, Way] = {
        "rename experiment": lambda: tracking.rename_experiment(of.experiment, unused_name()),
        "delete experiment": lambda: tracking.delete_experiment(of.experiment),
        "experiment tag": lambda: tracking.set_experiment_tag(
            of.experiment, ExperimentTag("a", "b")
        ),
        "run": lambda: tracking.create_run(of.experiment, "u", 1, [], "r"),
        "update run": lambda: tracking.update_run_info(of.run, RunStatus.FINISHED, 2, "other"),
        "delete run": lambda: tracking.delete_run(of.run),
        "metric": lambda: tracking.log_metric(of.run, metric),
        "param": lambda: tracking.log_param(of.run, Param("p", "1")),
        "tag": lambda: tracking.set_tag(of.run, RunTag("a", "b")),
        "delete tag": lambda: tracking.delete_tag(of.run, "team"),
        "batch": lambda: tracking.log_batch(
            of.run, [metric], [Param("q", "1")], [RunTag("a", "c")]
        ),
        "batch of a run with a foreign model": lambda: tracking.log_batch(
            own.run, [foreign], [], []
        ),
        "metric of a run with a foreign model": lambda: tracking.log_metric(own.run, foreign),
        "inputs": lambda: tracking.log_inputs(of.run, data),
        "foreign model as input": lambda: tracking.log_inputs(
            own.run, models=[LoggedModelInput(of.logged)]
        ),
        "outputs": lambda: tracking.log_outputs(own.run, [LoggedModelOutput(of.logged, 1)]),
        "outputs of a run": lambda: tracking.log_outputs(
            of.run, [LoggedModelOutput(own.logged, 1)]
        ),
        "logged model": lambda: tracking.create_logged_model(of.experiment, "x"),
        "logged model of a foreign run": lambda: tracking.create_logged_model(
            own.experiment, "x", source_run_id=of.run
        ),
        "logged model's status": lambda: tracking.finalize_logged_model(
            of.logged, LoggedModelStatus.READY
        ),
        "logged model's tag": lambda: tracking.set_logged_model_tags(
            of.logged, [LoggedModelTag("a", "b")]
        ),
        "delete logged model's tag": lambda: tracking.delete_logged_model_tag(of.logged, "team"),
        "logged model's param": lambda: tracking.log_logged_model_params(
            of.logged, [LoggedModelParameter("a", "b")]
        ),
        "delete logged model": lambda: tracking.delete_logged_model(of.logged),
        "describe": lambda: registry.update_registered_model(of.model, "mine"),
        "rename": lambda: registry.rename_registered_model(of.model, unused_name()),
        "rename onto": lambda: registry.rename_registered_model(own.model, of.model),
        "take the name": lambda: registry.create_registered_model(of.model),
        "model tag": lambda: registry.set_registered_model_tag(
            of.model, RegisteredModelTag("a", "b")
        ),
        "delete model tag": lambda: registry.delete_registered_model_tag(of.model, "team"),
        "alias": lambda: registry.set_registered_model_alias(of.model, "champion", of.version),
        "delete alias": lambda: registry.delete_registered_model_alias(of.model, "first"),
        "version": lambda: registry.create_model_version(of.model, "s3://bucket/y", own.run),
        "describe version": lambda: registry.update_model_version(of.model, of.version, "mine"),
        "stage": lambda: registry.transition_model_version_stage(
            of.model, of.version, "Production", False
        ),
        "version tag": lambda: registry.set_model_version_tag(
            of.model, of.version, ModelVersionTag("a", "b")
        ),
        "delete version tag": lambda: registry.delete_model_version_tag(
            of.model, of.version, "team"
        ),
        "delete version": lambda: registry.delete_model_version(of.model, of.version),
        "delete": lambda: registry.delete_registered_model(of.model),
    }
    return ways


def contents(stores: Stores) -> dict[str, list[Any]]:
    """All rows of MLflow's and of ownership's tables."""
    found = {}
    with stores.registry.engine.connect() as connection:
        for name in sa.inspect(connection).get_table_names():
            found[name] = sorted(map(str, connection.exec_driver_sql(f"SELECT * FROM {name}")))
    return found


def team(stores: Stores, principal: Principal) -> Made:
    with calling(principal):
        made = stores.make({"team": "x"})
        stores.registry.set_registered_model_alias(made.model, "first", made.version)
    return made


def code(way: Way) -> str:
    with pytest.raises(MlflowException) as refused:
        way()
    said = json.loads(refused.value.serialize_as_json())
    return said.get("error") or said["error_code"]


def test_another_owner_changes_nothing(stores: Stores) -> None:
    theirs, own = team(stores, ACME), team(stores, GLOBEX)
    before = contents(stores)
    with calling(GLOBEX):
        for name, way in changes(stores, theirs, own).items():
            said = code(way)
            assert said in ("NOT_OWNER", "NAME_TAKEN"), (name, said)
            after = contents(stores)
            if name == "batch of a run with a foreign model":
                # MLflow writes the run's own metrics in a transaction of its own, first.
                before["metrics"], before["latest_metrics"] = (
                    after["metrics"],
                    after["latest_metrics"],
                )
            if name == "metric of a run with a foreign model":
                before["metrics"], before["latest_metrics"] = (
                    after["metrics"],
                    after["latest_metrics"],
                )
            assert after == before, name


def test_owners_and_staff_change_everything(stores: Stores) -> None:
    for principal in (ACME, STAFF):
        names = list(changes(stores, team(stores, ACME), team(stores, ACME)))
        for name in names:
            theirs, own = team(stores, ACME), team(stores, ACME)
            if name in ("rename onto", "take the name"):
                continue  # the name exists, whoever asks
            with calling(principal):
                changes(stores, theirs, own)[name]()


def test_default_experiment_takes_nothing(stores: Stores) -> None:
    with calling(ACME):
        assert (
            code(lambda: stores.tracking.create_run("0", "u", 1, [], "r")) == "EXPERIMENT_REFUSED"
        )
        assert code(lambda: stores.tracking.create_logged_model("0", "x")) == "EXPERIMENT_REFUSED"
    with calling(STAFF):
        stores.tracking.create_run("0", "u", 1, [], "r")


def test_name_stays_its_first_owner_s(stores: Stores) -> None:
    deleted, renamed = made_by(stores, ACME), made_by(stores, ACME)
    with calling(ACME):
        stores.registry.delete_registered_model(deleted.model)
        stores.registry.rename_registered_model(renamed.model, unused_name())
    create = stores.registry.create_registered_model
    with calling(GLOBEX):
        for made in (deleted, renamed):
            assert code(partial(create, made.model)) == "NAME_TAKEN"
    with calling(ACME):
        stores.registry.create_registered_model(deleted.model)


def test_what_nobody_owns_is_changed_by_staff_only(stores: Stores, mode: Mode) -> None:
    mode.now = "off"
    with calling(None):
        nobodys = stores.make({"team": "x"})
    mode.now = "enforce"
    own = team(stores, GLOBEX)
    with calling(GLOBEX):
        for name, way in changes(stores, nobodys, own).items():
            if name != "delete alias":
                assert code(way) in ("NOT_OWNER", "NAME_TAKEN"), name
    with calling(STAFF):
        stores.registry.update_registered_model(nobodys.model, "ours")


def test_key_without_an_owner_changes_nothing(stores: Stores) -> None:
    own = team(stores, ACME)
    with calling(replace(ACME, owner_id="")):
        for name, way in changes(stores, own, own).items():
            if name != "rename onto":
                assert code(way) in ("NOT_OWNER", "NAME_TAKEN"), name
        assert code(lambda: stores.tracking.create_experiment(unused_name())) == "NOT_OWNER"
        assert code(lambda: stores.registry.create_registered_model(unused_name())) == "NOT_OWNER"


@pytest.mark.parametrize("kind", ["model", "experiment"])
def test_name_that_two_claim_at_once_is_one_owner_s(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    both, is_taken = threading.Barrier(2), Facts.is_taken

    def look(*arguments: Any) -> bool:
        found = is_taken(*arguments)
        both.wait(60)  # until the other has found it free as well
        return found

    monkeypatch.setattr(Facts, "is_taken", look)
    model, experiment = stores.registry.create_registered_model, stores.tracking.create_experiment
    create: Callable[[str], object] = model if kind == "model" else experiment

    def claim(principal: Principal, name: str) -> str:
        with calling(principal):
            try:
                create(name)
            except MlflowException as refused:
                assert "[SQL" not in str(refused)
                said = json.loads(refused.serialize_as_json())
                return str(said.get("error") or said["error_code"])
        return ""

    # Two processes of one owner go on as MLflow's clients do.
    for other, answer in ((GLOBEX, "NAME_TAKEN"), (ACME, "RESOURCE_ALREADY_EXISTS")):
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(claim, (ACME, other), [unused_name()] * 2))
        assert sorted(answers) == ["", answer]


def test_names_that_look_alike_are_different_names(stores: Stores) -> None:
    """As `docs/operator/isolation.md` says: MLflow's databases compare names by code points."""
    name = f"caf\u00e9-{unused_name()}"
    alike = (name.upper(), name.title(), f"{name} ", name.replace("s", "\u0455"))
    alike += (unicodedata.normalize("NFD", name),)
    for kind, create in (
        ("model", stores.registry.create_registered_model),
        ("experiment", stores.tracking.create_experiment),
    ):
        with calling(ACME):
            create(name)
        for other in alike:
            with calling(GLOBEX):
                create(other)
            with stores.registry.engine.connect() as connection:
                found = Facts(usable=True)
                assert found.name_owner(connection, kind, other) == "GLOBEX"
                assert found.name_owner(connection, kind, name) == "ACME"


def test_narrowed_key_changes_models_of_its_names_only(stores: Stores) -> None:
    own = team(stores, ACME)
    with calling(replace(ACME, models=("acme-*",))):
        assert (
            code(lambda: stores.registry.update_registered_model(own.model, "x")) == "NAME_REFUSED"
        )
        assert (
            code(lambda: stores.registry.create_registered_model(unused_name())) == "NAME_REFUSED"
        )
        name = f"acme-{unused_name()}"
        stores.registry.create_registered_model(name)
        assert code(lambda: stores.registry.rename_registered_model(name, "x")) == "NAME_REFUSED"


def test_key_that_may_not_delete_deletes_nothing(stores: Stores) -> None:
    own = team(stores, ACME)
    with calling(replace(ACME, no_delete=True)):
        ways = changes(stores, own, own)
        for name in [name for name in ways if name.startswith("delete")]:
            assert code(ways[name]) == "DELETE_REFUSED", name
        archive = stores.registry.transition_model_version_stage
        assert code(lambda: archive(own.model, own.version, "Archived", False)) == "DELETE_REFUSED"
        ways["describe"]()


def test_protected_alias_is_staff_s(stores: Stores, mode: Mode) -> None:
    Writes(Policy(), Watch(mode), Facts(usable=True), frozenset({"champion"})).install()
    registry = stores.registry
    own, plain = team(stores, ACME), team(stores, ACME)
    model, version = own.model, own.version
    with calling(ACME):
        second = registry.create_model_version(model, "s3://bucket/x").version
        registry.set_registered_model_alias(model, "challenger", version)
        registry.set_registered_model_alias(model, "Champion", version)
        registry.set_registered_model_alias(plain.model, "challenger", plain.version)
        assert code(lambda: registry.set_registered_model_alias(model, "champion", version)) == (
            "ALIAS_PROTECTED"
        )
    with calling(STAFF):
        registry.set_registered_model_alias(model, "champion", version)
    ways: dict[str, Way] = {
        "move": lambda: registry.set_registered_model_alias(model, "champion", second),
        "remove": lambda: registry.delete_registered_model_alias(model, "champion"),
        "delete its version": lambda: registry.delete_model_version(model, version),
        "rename its model": lambda: registry.rename_registered_model(model, unused_name()),
        "delete its model": lambda: registry.delete_registered_model(model),
    }
    for name, way in ways.items():
        with calling(ACME):
            assert code(way) == "ALIAS_PROTECTED", name
        # A stranger learns nothing of aliases.
        with calling(GLOBEX):
            assert code(way) == "NOT_OWNER", name
    held = registry.get_registered_model(model).aliases
    assert held.items() >= {"champion": version, "Champion": version}.items()
    with calling(ACME):
        registry.delete_registered_model_alias(model, "challenger")
        registry.delete_model_version(model, second)
        registry.set_registered_model_tag(model, RegisteredModelTag("a", "b"))
        name = unused_name()
        registry.rename_registered_model(plain.model, name)
        registry.delete_registered_model(name)
    with calling(STAFF):
        ways["remove"]()
    with calling(ACME):
        ways["delete its model"]()


def test_location_of_an_experiment_is_not_a_supplier_s_to_choose(stores: Stores) -> None:
    with calling(ACME):
        chosen = lambda: stores.tracking.create_experiment(unused_name(), "s3://bucket/mine")  # noqa: E731
        assert code(chosen) == "LOCATION_REFUSED"


def test_other_tables_are_closed(stores: Stores) -> None:
    own = team(stores, ACME)
    with calling(ACME):
        assert code(lambda: stores.tracking.set_trace_tag("tr-1", "a", "b")) != ""
        assert (
            code(lambda: stores.tracking.create_dataset("d", experiment_ids=[own.experiment]))
            == "ISOLATED"
        )


def test_without_a_caller_nothing_changes(stores: Stores) -> None:
    own = team(stores, ACME)
    before = contents(stores)
    ways = changes(stores, own, own)
    with calling(ACME), ThreadPoolExecutor(1) as pool:
        for name, way in ways.items():
            # A thread of a pool has no caller, whoever has filled the pool.
            said = pool.submit(code, way).result()
            # MLflow can't tell that names are taken before it writes them.
            assert said == "ISOLATED" or name in ("rename onto", "take the name"), (name, said)
    assert contents(stores) == before


BULK = {
    "bound": sa.update(Base.metadata.tables["runs"]).values(name="x"),
    "in words": sa.text("UPDATE runs SET name = 'x'"),
    "upsert": sa.insert(Base.metadata.tables["tags"]).values(key="a", value="b", run_uuid="r"),
    "deletion": sa.delete(Base.metadata.tables["model_versions"]),
}


@pytest.mark.parametrize("statement", BULK.values(), ids=BULK)
def test_without_a_caller_no_statement_changes_anything(
    stores: Stores, statement: sa.Executable
) -> None:
    with (
        pytest.raises(MlflowException) as refused,
        Session(stores.tracking.engine) as session,
    ):
        session.execute(statement)
    assert refused.value.error_code == "PERMISSION_DENIED"


def test_without_a_caller_mlflow_keeps_its_own_books(stores: Stores) -> None:
    webhooks = Base.metadata.tables["webhooks"]
    with stores.registry.engine.begin() as connection:
        connection.execute(sa.delete(webhooks).where(webhooks.c.name == "none"))


def test_server_itself_opens_stores(
    stores: Stores, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """MLflow opens a second store while a supplier's request makes a version of a logged model."""
    open_by_itself()
    uri = empty_database(request, stores.registry.engine.dialect.name, tmp_path)
    with calling(GLOBEX):
        driver = uri.replace("postgresql:", "postgresql+psycopg:")
        new = type(stores.tracking)(driver, str(tmp_path / "artifacts"))
        ownership.prepare(new.engine)
        # What comes after is the caller's again.
        assert code(lambda: new.create_run("0", "u", 1, [], "r")) == "EXPERIMENT_REFUSED"
    with new.engine.connect() as connection:
        assert ownership.experiment_owner(connection, 0) is None


def test_tag_of_an_input_belongs_to_the_input_s_run(stores: Stores) -> None:
    theirs, own = team(stores, ACME), team(stores, GLOBEX)
    for made, principal in ((theirs, ACME), (own, GLOBEX)):
        with calling(principal):
            tags = [InputTag("mlflow.data.context", "train")]
            stores.tracking.log_inputs(
                made.run, [DatasetInput(Dataset(unused_name(), "1", "local", "x"), tags)]
            )
    inputs = Base.metadata.tables["inputs"]

    def add(run: str) -> None:
        with Session(stores.tracking.engine) as session, session.begin():
            number = session.execute(
                sa.select(inputs.c.input_uuid).where(inputs.c.destination_id == run)
            ).scalar_one()
            session.add(SqlInputTag(input_uuid=number, name="a", value="b"))

    def add_to_nothing() -> None:
        with Session(stores.tracking.engine) as session, session.begin():
            session.add(SqlInputTag(input_uuid=unused_name()[:36], name="a", value="b"))

    with calling(GLOBEX):
        assert code(lambda: add(theirs.run)) == "NOT_OWNER"
        # Its foreign key alone would keep PostgreSQL from it; MLflow switches SQLite's on.
        with pytest.raises((MlflowException, sa.exc.IntegrityError)):
            add_to_nothing()
        add(own.run)


def test_each_table_of_the_installed_mlflow_is_in_a_list() -> None:
    unknown = [
        mapper.local_table.name
        for mapper in Base.registry.mappers
        if not bindings.is_known(mapper.local_table.name)
    ]
    assert unknown == [], "a new table is closed for suppliers: add it to isolation/bindings.py"


def test_mode_off_refuses_nothing(stores: Stores, mode: Mode) -> None:
    theirs = team(stores, ACME)
    mode.now = "off"
    with calling(GLOBEX):
        stores.registry.update_registered_model(theirs.model, "changed")


def test_request_that_is_only_counted_counts_once_for_each_rule(
    stores: Stores, mode: Mode, caplog: pytest.LogCaptureFixture
) -> None:
    of, own = made_by(stores, ACME), made_by(stores, GLOBEX)
    counted: list[str] = []
    watch = Watch(mode, lambda one: counted.append(one.reason))
    Writes(Policy(), watch, Facts(usable=True)).install()
    mode.now = "observe"

    def request(*calls: Way) -> list[str]:
        counted.clear()
        caplog.clear()
        token = callers.current.set(callers.Caller(GLOBEX, "", "", [], {}, set()))
        try:
            for call in calls:
                call()
        finally:
            callers.current.reset(token)
        assert len(caplog.messages) == len(counted)
        return sorted(counted)

    def batch(run: str = of.run) -> object:
        names = [unused_name() for _ in range(5)]
        metrics = [Metric(name, 1.0, 1, 1) for name in names]
        params, tags = [Param(name, "1") for name in names], [RunTag(name, "1") for name in names]
        return stores.tracking.log_batch(run, metrics, params, tags)

    assert request(batch, batch) == ["NOT_OWNER"]
    assert request(batch) == ["NOT_OWNER"]
    run = stores.tracking.create_run
    assert request(batch, lambda: run("0", "u", 1, [], "r")) == ["EXPERIMENT_REFUSED", "NOT_OWNER"]
    assert request(lambda: batch(own.run)) == []

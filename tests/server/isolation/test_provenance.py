"""What is made gets stamps that say who made it, and no client sets, changes or deletes a stamp."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from mlflow.entities import ExperimentTag, LoggedModelTag, Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersionTag, RegisteredModelTag
from mlflow.exceptions import MlflowException

from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server.isolation.provenance import Provenance
from mlflow_hokusai_auth.server.live_settings import Mode
from mlflow_hokusai_auth.server.upstream.artifact_roots import Watch
from tests.server.isolation.stores import ACME, STAFF, Made, Stores, calling

STAMPS = {"hokusai_auth.owner": "ACME", "hokusai_auth.key_id": "key_acme"}
#: What a client sends that copies something of ACME's, or forges it.
RESENT = {"hokusai_auth.owner": "ACME", "hokusai_auth.source": "forged", "hokusai.benchmark": "1"}


def stamped(tags: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in tags.items() if key.startswith("hokusai_auth.")}


@pytest.fixture(autouse=True)
def mode() -> Mode:
    mode = Mode("enforce")
    Provenance(Watch(mode)).install()
    return mode


def test_everything_that_is_made_says_by_whom(stores: Stores) -> None:
    with calling(ACME) as named:
        made = stores.make({"team": "a"})
        assert stamped(stores.answered) == STAMPS
    assert named["run"] == made.run
    for tags in stores.tags(made):
        assert stamped(tags) == STAMPS and tags["team"] == "a"
    assert stores.users(made) == ["ACME", "ACME"]


def test_stamps_that_a_copy_sends_are_replaced(stores: Stores) -> None:
    with calling(STAFF):
        made = stores.make(RESENT)
    for tags in stores.tags(made):
        assert stamped(tags) == {
            "hokusai_auth.owner": "STAFF",
            "hokusai_auth.key_id": "key_staff",
        }
        assert tags["hokusai.benchmark"] == "1"


def test_run_of_a_supplier_shows_its_owner_as_its_user(stores: Stores) -> None:
    for principal, user in ((ACME, "ACME"), (STAFF, "root")):
        with calling(principal):
            # As MLflow's client sends it; its pages show this tag rather than the run's user.
            made = stores.make({"mlflow.user": "root"})
            assert stores.answered["mlflow.user"] == user
        assert [tags["mlflow.user"] for tags in stores.tags(made)] == ["root", user, *["root"] * 3]
        with calling(principal):
            stores.tracking.set_tag(made.run, RunTag("mlflow.user", "alice"))
        assert stores.tracking.get_run(made.run).data.tags["mlflow.user"] == "alice"


def test_without_a_key_or_the_setting_nothing_is_stamped(stores: Stores) -> None:
    def made_by(principal: Principal | None) -> Made:
        with calling(principal):
            return stores.make(RESENT)

    nobody = made_by(None)
    Provenance(Watch(Mode("enforce")), stamps=False).install()
    for made in (nobody, made_by(ACME)):
        assert [stamped(tags) for tags in stores.tags(made)] == [{}] * 5
        assert stores.users(made) == ["somebody", None]


def ways(stores: Stores, made: Made, key: str, value: str) -> dict[str, Callable[[], object]]:
    """Every way to set the tag `key` on what exists."""
    tracking, registry = stores.tracking, stores.registry
    return {
        "experiment": lambda: tracking.set_experiment_tag(
            made.experiment, ExperimentTag(key, value)
        ),
        "run": lambda: tracking.set_tag(made.run, RunTag(key, value)),
        "batch": lambda: tracking.log_batch(
            made.run, [Metric("m", 1.0, 1, 1)], [Param("p", "1")], [RunTag(key, value)]
        ),
        "logged model": lambda: tracking.set_logged_model_tags(
            made.logged, [LoggedModelTag("other", "1"), LoggedModelTag(key, value)]
        ),
        "model": lambda: registry.set_registered_model_tag(
            made.model, RegisteredModelTag(key, value)
        ),
        "version": lambda: registry.set_model_version_tag(
            made.model, made.version, ModelVersionTag(key, value)
        ),
    }


def deletions(stores: Stores, made: Made, key: str) -> dict[str, Callable[[], object]]:
    """Every way to delete the tag `key`."""
    tracking, registry = stores.tracking, stores.registry
    found: dict[str, Callable[[], object]] = {
        "run": lambda: tracking.delete_tag(made.run, key),
        "logged model": lambda: tracking.delete_logged_model_tag(made.logged, key),
        "model": lambda: registry.delete_registered_model_tag(made.model, key),
        "version": lambda: registry.delete_model_version_tag(made.model, made.version, key),
    }
    if hasattr(tracking, "delete_experiment_tag"):  # MLflow 3.4 has none
        found["experiment"] = lambda: tracking.delete_experiment_tag(made.experiment, key)
    return found


def test_nobody_sets_changes_or_deletes_a_stamp(stores: Stores) -> None:
    with calling(ACME):
        made = stores.make()
    before = stores.tags(made)
    for principal in (STAFF, ACME, None):
        with calling(principal):
            tries = {
                **{
                    f"change {k}": v
                    for k, v in ways(stores, made, "hokusai_auth.owner", "STAFF").items()
                },
                **{f"set {k}": v for k, v in ways(stores, made, "hokusai_auth.new", "x").items()},
                **{
                    f"delete {k}": v
                    for k, v in deletions(stores, made, "hokusai_auth.owner").items()
                },
            }
            for name, way in tries.items():
                with pytest.raises(MlflowException) as refused:
                    way()
                said = json.loads(refused.value.serialize_as_json())
                assert said["error_code"] == "PERMISSION_DENIED", (name, said)
                assert said["error"] == "TAG_RESERVED", (name, said)
                assert stores.tags(made) == before, name


def test_other_tags_are_free(stores: Stores) -> None:
    with calling(ACME):
        made = stores.make()
        for way in ways(stores, made, "hokusai.benchmark", "hokusai_auth.owner").values():
            way()
        for tags in stores.tags(made):
            assert tags["hokusai.benchmark"] == "hokusai_auth.owner"
        for way in deletions(stores, made, "hokusai.benchmark").values():
            way()
        # A stamp that is set to what it is does not change.
        stores.tracking.set_tag(made.run, RunTag("hokusai_auth.owner", "ACME"))


def test_stamped_things_are_renamed_and_deleted_as_ever(stores: Stores) -> None:
    with calling(ACME):
        made = stores.make()
        renamed = made._replace(model=f"{made.model}-renamed")
        stores.registry.rename_registered_model(made.model, renamed.model)
        assert [stamped(tags) for tags in stores.tags(renamed)] == [STAMPS] * 5
        stores.registry.delete_model_version(renamed.model, made.version)
        stores.registry.delete_registered_model(renamed.model)
        stores.tracking.delete_run(made.run)
        stores.tracking.restore_run(made.run)
        stores.tracking.delete_experiment(made.experiment)


def test_mode_off_and_observe_refuse_nothing(stores: Stores, mode: Mode) -> None:
    with calling(ACME):
        made = stores.make()
        for now in ("off", "observe"):
            mode.now = now
            for way in ways(stores, made, "hokusai_auth.owner", now).values():
                way()
            assert [tags["hokusai_auth.owner"] for tags in stores.tags(made)] == [now] * 5

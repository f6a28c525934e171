"""Owners, grants and prefixes as people show and change them, on SQLite and PostgreSQL."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest
import sqlalchemy as sa
from mlflow.store.model_registry.dbmodels.models import (
    SqlModelVersion,
    SqlModelVersionTag,
    SqlRegisteredModel,
    SqlRegisteredModelTag,
)
from mlflow.store.tracking.dbmodels.models import (
    SqlExperiment,
    SqlExperimentTag,
    SqlLoggedModel,
    SqlRun,
    SqlTag,
)

from mlflow_hokusai_auth.core.errors import (
    AuthorityUnavailable,
    Conflict,
    Forbidden,
    InvalidRequest,
    NotFound,
)
from mlflow_hokusai_auth.store import owners, ownership
from mlflow_hokusai_auth.store.owners import Ownership
from mlflow_hokusai_auth.store.ownership_tables import EXPERIMENTS, GRANTS, MODEL_ACCESS, MODELS

NOW = time.time()
RUN, LOGGED = "0" * 31 + "1", "m-" + "0" * 31 + "2"


class Registry:
    """A registry as MLflow and the hooks write it, and its faces."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self.events: list[tuple[str, Mapping[str, Any]]] = []

    def of(self, owner: str | None = None) -> Ownership:
        """The face of `owner`, or of an operator."""
        key = f"key of {owner}" if owner is not None else ""
        return Ownership(self.engine, lambda *event: self.events.append(event), owner, key)

    def model(self, name: str, owner: str = "") -> None:
        with self.engine.begin() as connection:
            connection.execute(sa.insert(SqlRegisteredModel).values(name=name))
            if owner:
                ownership.record_model(connection, name, owner=owner, key_id="key_1", now=NOW)

    def version(self, name: str, number: int, source: str, stage: str = "None") -> None:
        row = {"name": name, "version": number, "source": source, "current_stage": stage}
        with self.engine.begin() as connection:
            connection.execute(sa.insert(SqlModelVersion).values(row))

    def experiment(self, number: int, name: str, owner: str = "", created: int = 1000) -> None:
        with self.engine.begin() as connection:
            row = {"experiment_id": number, "name": name, "creation_time": created}
            connection.execute(sa.insert(SqlExperiment).values(row))
            if owner:
                ownership.record_experiment(
                    connection, number, owner=owner, key_id="key_1", created_at=created
                )

    def delete_model(self, name: str, *, with_gate: bool = True) -> None:
        with self.engine.begin() as connection:
            gone = SqlRegisteredModel.name == name
            connection.execute(sa.delete(SqlRegisteredModel).where(gone))
            if with_gate:
                ownership.model_gone(connection, name, NOW)

    def owner(self, name: str) -> str | None:
        with self.engine.connect() as connection:
            return ownership.model_owner(connection, name)

    def access(self, owner: str, name: str) -> str | None:
        with self.engine.connect() as connection:
            return ownership.access(connection, owner, name, NOW)


@pytest.fixture
def registry(engine: sa.Engine) -> Registry:
    return Registry(engine)


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["name"] for row in rows]


def test_lists_show_whose_everything_is_page_by_page(registry: Registry) -> None:
    for name, owner in (("b", "acme"), ("a", ""), ("c", "globex"), ("d", "acme")):
        registry.model(name, owner)
    registry.experiment(0, "Default")
    registry.experiment(1, "/acme/train", "acme")
    registry.experiment(2, "theirs")
    face = registry.of()
    first = face.list_owners(max_results=3)
    assert [(row["name"], row["owner"]) for row in first] == [
        ("a", None),
        ("b", "acme"),
        ("c", "globex"),
    ]
    rest = face.list_owners(max_results=3, page_token=first.token)
    assert (names(rest), rest.token) == (["d"], None)
    assert names(face.list_owners(owner="acme")) == ["b", "d"]
    assert names(face.list_owners(unowned=True)) == ["a"]
    experiments = face.list_owners(kind="experiment", max_results=2)
    assert [(row["experiment_id"], row["owner"]) for row in experiments] == [(0, None), (1, "acme")]
    more = face.list_owners(kind="experiment", max_results=2, page_token=experiments.token)
    assert names(more) == ["theirs"]
    # MLflow's Default experiment is nobody's for good.
    assert names(face.list_owners(kind="experiment", unowned=True)) == ["theirs"]


def test_only_operators_see_ids_of_the_keys_of_others(registry: Registry) -> None:
    registry.model("a", "acme")
    for owner, shown in ((None, "key_1"), ("acme", "key_1"), ("globex", None)):
        face = registry.of(owner)
        assert [row["key_id"] for row in face.list_owners()] == [shown]
        assert [row["key_id"] for row in face.owners_of("a")] == [shown]


def test_owners_of_a_name_are_those_of_the_model_and_the_experiment(registry: Registry) -> None:
    registry.model("lead", "acme")
    registry.experiment(7, "lead", "globex")
    rows = registry.of("initech").owners_of("lead")
    assert [(row["kind"], row["owner"], row["experiment_id"]) for row in rows] == [
        ("model", "acme", None),
        ("experiment", "globex", 7),
    ]
    for unknown in ("", "a\0", "\ud800", "a" * 5000, "Lead", "lead*"):
        with pytest.raises(NotFound):
            registry.of().owners_of(unknown)


def test_name_of_a_model_that_is_gone_is_shown_to_its_owner_and_operators(
    registry: Registry,
) -> None:
    registry.model("lead", "acme")
    registry.delete_model("lead")
    for owner in (None, "acme"):
        (row,) = registry.of(owner).owners_of("lead")
        assert (row["owner"], row["gone_at"]) == ("acme", NOW)
    with pytest.raises(NotFound):
        registry.of("globex").owners_of("lead")


def test_assignment_changes_nothing_unless_it_is_applied(registry: Registry) -> None:
    for name, owner in (("a-1", ""), ("a-2", "globex"), ("a-3", "acme"), ("b", "globex")):
        registry.model(name, owner)
    face = registry.of()
    planned = face.assign_owner(models="a-*", owner="acme")
    assert (planned["applied"], planned["changed"], planned["unchanged"]) == (False, 2, 1)
    assert [(row["name"], row["before"]) for row in planned["changes"]] == [
        ("a-1", None),
        ("a-2", "globex"),
    ]
    assert registry.owner("a-1") is None
    assert registry.events == []
    done = face.assign_owner(models="a-*", owner="acme", apply=True)
    assert done == {**planned, "applied": True}
    assert [registry.owner(name) for name in ("a-1", "a-2", "a-3", "b")] == [
        *["acme"] * 3,
        "globex",
    ]
    detail = {"owner": "acme", "kind": "model", "names": [["a-1", None], ["a-2", "globex"]]}
    assert registry.events == [("owners.assigned", detail)]
    assert face.assign_owner(models="a-*", owner="acme", apply=True)["changed"] == 0


def test_all_that_a_leaver_owns_is_assigned(registry: Registry) -> None:
    for name, owner in (("a", "acme"), ("b", "globex"), ("gone", "acme"), ("free", "")):
        registry.model(name, owner)
    registry.delete_model("gone")
    registry.experiment(0, "Default")
    registry.experiment(1, "default:acme", "acme")
    registry.experiment(2, "theirs", "globex")
    face = registry.of()
    for prefix, kind, owner in (("a-", "model", "acme"), ("/a", "experiment", "acme")):
        face.add_prefix(prefix=prefix, kind=kind, owner=owner)
    face.add_prefix(prefix="g-", owner="globex")
    registry.events.clear()
    plan = face.assign_owner(from_owner="acme", owner="hooli")
    expected = {
        ("experiment", "default:acme"),
        ("model", "a"),
        ("model", "gone"),
        ("model prefix", "a-"),
        ("experiment prefix", "/a"),
    }
    assert {(row["kind"], row["name"]) for row in plan["changes"]} == expected
    assert {(row["before"], row["owner"]) for row in plan["changes"]} == {("acme", "hooli")}
    assert plan["changed"] == 5 and not plan["applied"] and not plan["missing"]
    assert registry.events == [] and registry.owner("a") == "acme"
    done = face.assign_owner(from_owner="acme", owner="hooli", apply=True)
    assert done == {**plan, "applied": True}
    assert (registry.owner("a"), registry.owner("gone"), registry.owner("b")) == (
        "hooli",
        "hooli",
        "globex",
    )
    assert names(face.list_owners(kind="experiment", owner="hooli")) == ["default:acme"]
    owned = {row["prefix"]: row["owner"] for row in face.list_prefixes()}
    assert owned == {"a-": "hooli", "/a": "hooli", "g-": "globex"}
    assert [event for event, _ in registry.events] == ["owners.assigned"] * 3
    assert face.assign_owner(from_owner="acme", owner="hooli", apply=True)["changed"] == 0


def test_experiments_are_assigned_but_for_mlflows_own(registry: Registry) -> None:
    registry.experiment(0, "Default")
    registry.experiment(1, "/acme/a")
    registry.experiment(2, "/acme/b", "globex", created=5)
    answer = registry.of().assign_owner(experiments="*", owner="acme", apply=True)
    assert answer["changed"] == 2
    with registry.engine.connect() as connection:
        rows = connection.execute(sa.select(EXPERIMENTS).order_by(EXPERIMENTS.c.experiment_id))
        assert rows.all() == [(1, "acme", "", 1000), (2, "acme", "", 5)]
        assert ownership.experiment_owner(connection, 2) == "acme"
    assert registry.of().assign_owner(experiments="Default", owner="acme")["missing"] == ["Default"]


def test_names_of_a_file_are_assigned_in_batches_and_missing_ones_are_named(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owners, "BATCH", 2)
    rows = [{"kind": "model", "name": f"m{number}"} for number in range(5)]
    for row in rows:
        registry.model(row["name"])
    registry.experiment(3, "e")
    rows += [{"kind": "experiment", "name": "e", "owner": "globex"}, {"kind": "model", "name": "x"}]
    answer = registry.of().assign_owner(names=rows, owner="acme", apply=True)
    assert (answer["changed"], answer["missing"]) == (6, ["x"])
    assert {registry.owner(f"m{number}") for number in range(5)} == {"acme"}
    assert [len(detail["names"]) for _, detail in registry.events] == [1, 2, 2, 1]
    with registry.engine.connect() as connection:
        assert ownership.experiment_owner(connection, 3) == "globex"


def test_assignment_of_a_name_that_is_gone_keeps_it_gone(registry: Registry) -> None:
    registry.model("lead", "acme")
    registry.delete_model("lead")
    registry.of().assign_owner(models="lead", owner="globex", apply=True)
    (row,) = registry.of().owners_of("lead")
    assert (row["owner"], row["gone_at"]) == ("globex", NOW)
    # Plain MLflow made the model again, and the operator says whose it is.
    registry.model("lead")
    registry.of().assign_owner(models="lead", owner="acme", apply=True)
    (row,) = registry.of().owners_of("lead")
    assert (row["owner"], row["gone_at"]) == ("acme", None)


def share(registry: Registry) -> None:
    """Models of acme that globex and initech may use by grants of acme and of an operator."""
    registry.model("lead", "acme")
    registry.model("other", "acme")
    registry.of("acme").add_grant(grantee="globex", pattern="lead", level="contribute")
    registry.of("acme").add_grant(grantee="initech", pattern="*")
    registry.of().add_grant(grantee="audit", pattern="*")
    registry.of("hooli").add_grant(grantee="globex", pattern="l*", level="contribute")
    registry.of("initech").add_grant(grantee="globex", pattern="lead")


def test_grants_of_the_former_owner_end_with_an_assignment(registry: Registry) -> None:
    share(registry)
    registry.of().assign_owner(models="lead", owner="hooli", apply=True)
    who = ("globex", "initech", "audit")
    # What the new owner had granted before covers the model now.
    assert [registry.access(o, "lead") for o in who] == ["contribute", None, "read"]
    assert [registry.access(o, "other") for o in who] == [None, "read", "read"]
    assert [row["granted_by"] for row in registry.of("acme").list_grants()] == ["acme"]
    # A grant of somebody who never had the model is for later.
    assert [row["granted_by"] for row in registry.of("initech").list_grants()].count("initech") == 1
    registry.of().assign_owner(models="lead", owner="acme", apply=True)
    assert registry.access("globex", "lead") is None
    assert registry.access("initech", "lead") == "read"


def test_grants_pass_to_the_new_owner_if_they_are_kept(registry: Registry) -> None:
    share(registry)
    registry.of().assign_owner(models="lead", owner="zorg", apply=True, keep_grants=True)
    who = ("globex", "initech", "audit")
    assert [registry.access(o, "lead") for o in who] == ["contribute", "read", "read"]
    assert [registry.access(o, "other") for o in who] == [None, "read", "read"]
    given = registry.of("zorg").list_grants()
    assert sorted((row["grantee"], row["pattern"]) for row in given) == [
        ("globex", "lead"),
        ("initech", "lead"),
    ]
    for row in given:
        registry.of("zorg").remove_grant(row["id"])
    assert [registry.access(o, "lead") for o in who] == [None, None, "read"]


def test_versions_with_files_of_others_are_listed(registry: Registry) -> None:
    registry.experiment(1, "acme's", "acme")
    registry.experiment(2, "globex's", "globex")
    with registry.engine.begin() as connection:
        connection.execute(sa.insert(SqlRun).values(run_uuid=RUN, experiment_id=1))
        logged = {"model_id": LOGGED, "experiment_id": 2, "name": "x", "status": 2}
        logged |= {"artifact_location": "", "creation_timestamp_ms": 1}
        logged |= {"last_updated_timestamp_ms": 1, "lifecycle_stage": "active"}
        connection.execute(sa.insert(SqlLoggedModel).values(logged))
    registry.model("theirs", "globex")
    registry.model("lead")
    sources = [
        (f"runs:/{RUN}/model", "acme"),
        (f"models:/{LOGGED}", "globex"),
        ("models:/theirs/1", "globex"),
        (f"mlflow-artifacts:/1/{RUN}/artifacts/model", "acme"),
        (f"mlflow-artifacts:/2/models/{LOGGED}/artifacts", "globex"),
        (f"mlflow-artifacts:/2/{RUN}/artifacts/{LOGGED}", None),
        ("s3://bucket/model", None),
        ("models:/nobody's@champion", None),
        ("", None),
    ]
    for number, (source, _) in enumerate(sources, 1):
        registry.version("lead", number, source)
    registry.version("lead", 99, "s3://bucket/deleted", "Deleted_Internal")
    found = registry.of().assign_owner(models="*", owner="acme")["foreign_sources"]
    assert [(row["name"], row["version"], row["source_owner"]) for row in found] == [
        ("lead", number, owner) for number, (_, owner) in enumerate(sources, 1) if owner != "acme"
    ]
    # Files that go along to the new owner are no other's, although they have not gone yet.
    registry.model("mine", "acme")
    registry.version("mine", 1, f"runs:/{RUN}/model")
    registry.version("mine", 2, f"models:/{LOGGED}")
    for apply in (False, True):
        move = registry.of().assign_owner(from_owner="acme", owner="initech", apply=apply)
        (row,) = move["foreign_sources"]
        assert (row["name"], row["version"], row["source_owner"]) == ("mine", 2, "globex")


def test_released_name_is_free(registry: Registry) -> None:
    share(registry)
    registry.delete_model("other")
    assert registry.of().release_name("lead")["owner"] == "acme"
    assert registry.of().release_name("other")["gone_at"] == NOW
    assert registry.owner("lead") is None
    assert [registry.access(o, "lead") for o in ("globex", "initech", "audit")] == [
        None,
        None,
        "read",
    ]
    assert [event for event, _ in registry.events[-2:]] == ["owners.released"] * 2
    registry.model("other", "globex")
    assert registry.owner("other") == "globex"
    assert registry.access("initech", "other") is None
    for unknown in ("lead", "a\0", ""):
        with pytest.raises(NotFound):
            registry.of().release_name(unknown)


def test_grant_covers_models_of_its_giver_now_and_later(registry: Registry) -> None:
    for name, owner in (("acme-a", "acme"), ("acme-b", "globex"), ("acme-c", ""), ("x", "acme")):
        registry.model(name, owner)
    registry.model("acme-gone", "acme")
    registry.delete_model("acme-gone")
    grant = registry.of("acme").add_grant(grantee="initech", pattern="acme-*", level="contribute")
    assert (grant["models"], grant["granted_by"], grant["key_id"]) == (1, "acme", "key of acme")
    operators = registry.of().add_grant(grantee="audit", pattern="acme-*")
    assert (operators["models"], operators["granted_by"]) == (3, "")
    registry.model("acme-d", "acme")
    assert [registry.access("initech", f"acme-{x}") for x in "abcd"] == [
        "contribute",
        None,
        None,
        "contribute",
    ]
    assert [registry.access("audit", f"acme-{x}") for x in "abcd"] == ["read"] * 4
    assert registry.access("initech", "x") is None
    removed = registry.of("acme").remove_grant(grant["id"])
    assert removed["models"] == 2
    assert registry.access("initech", "acme-a") is None
    assert [event for event, _ in registry.events] == ["grants.added"] * 2 + ["grants.removed"]
    assert registry.events[-1][1]["pattern"] == "acme-*"


def test_grant_ends(registry: Registry) -> None:
    registry.model("lead", "acme")
    registry.of("acme").add_grant(grantee="globex", pattern="lead", expires_in=60)
    with registry.engine.connect() as connection:
        (ends,) = connection.execute(sa.select(MODEL_ACCESS.c.expires_at)).one()
        assert ownership.access(connection, "globex", "lead", ends - 1) == "read"
        assert ownership.access(connection, "globex", "lead", ends) is None


def test_owners_see_and_remove_their_own_grants_only(registry: Registry) -> None:
    share(registry)
    operators = registry.of()
    page = operators.list_grants(max_results=4)
    assert len([*page, *operators.list_grants(max_results=4, page_token=page.token)]) == 5
    globex = registry.of("globex").list_grants()
    assert {row["granted_by"] for row in globex} == {"acme", "hooli", "initech"}
    assert {row["key_id"] for row in globex} == {None}
    for row in globex:
        with pytest.raises(NotFound):
            registry.of("globex").remove_grant(row["id"])
    for unknown in ("", "grant_0", "a\0", "ä"):
        with pytest.raises(NotFound):
            operators.remove_grant(unknown)
    for row in operators.list_grants():
        operators.remove_grant(row["id"])
    assert registry.access("globex", "lead") is None


def test_ended_grant_tells_its_grantee_nothing(registry: Registry) -> None:
    acme, globex = registry.of("acme"), registry.of("globex")
    for pattern in ("lead", "acme-*"):
        acme.add_grant(grantee="globex", pattern=pattern, expires_in=60)
    assert sorted(row["pattern"] for row in globex.list_grants()) == ["acme-*", "lead"]
    with registry.engine.begin() as connection:
        connection.execute(sa.update(GRANTS).values(expires_at=NOW - 1))
    # The pattern of the first would be the model's new name, and the second would count new models.
    assert globex.list_grants() == globex.find_grants().rows == []
    assert (
        len(acme.list_grants()) == acme.find_grants().total == len(registry.of().list_grants()) == 2
    )


def test_models_are_found_by_name_owner_and_grant(registry: Registry) -> None:
    for name, owner in (("Lead", "acme"), ("lead_2", "globex"), ("other%", "acme"), ("old", "")):
        registry.model(name, owner)
    acme, globex, operator = (registry.of(owner) for owner in ("acme", "globex", None))
    acme.add_grant(grantee="globex", pattern="*", level="contribute")
    acme.add_grant(grantee="globex", pattern="Lead", expires_in=0.001)
    operator.add_grant(grantee="staff", pattern="Lead")
    time.sleep(0.002)

    def found(who: Ownership, **which: Any) -> list[str]:
        part = who.find_models(**which)
        assert part.total == len(part.rows)
        return sorted(names(part.rows))

    assert found(operator) == ["Lead", "lead_2", "old", "other%"]
    assert found(operator, text="LEAD") == ["Lead", "lead_2"]
    assert (found(operator, text="_"), found(operator, text="%")) == (["lead_2"], ["other%"])
    assert found(operator, owner="acme") == ["Lead", "other%"]
    assert found(operator, unowned=True) == ["old"]
    assert found(globex, shared=True) == ["Lead", "other%"]
    assert found(acme, shared=True) == []
    (lead,) = operator.find_models(text="Lead", owner="acme").rows
    told = [(one["grantee"], one["level"], one["granted_by"]) for one in lead["shares"]]
    assert told == [("globex", "contribute", "acme"), ("staff", "read", "")]
    assert lead["shares_in_all"] == 2
    # Nobody is told of the grants of others.
    (lead,) = acme.find_models(text="Lead", owner="acme").rows
    assert [one["grantee"] for one in lead["shares"]] == ["globex"]
    for number in range(owners.MOST_SHARES):
        acme.add_grant(grantee=f"many {number}", pattern="Lead")
    (lead,) = acme.find_models(text="Lead", owner="acme").rows
    assert (len(lead["shares"]), lead["shares_in_all"]) == (owners.MOST_SHARES, 6)


def test_parts_of_lists_say_where_they_are(registry: Registry) -> None:
    for number in range(5):
        registry.model(f"m{number}", "acme")
        registry.of("acme").add_grant(grantee="globex", pattern=f"m{number}")
        registry.of().add_prefix(prefix=f"p{number}", owner="acme")
    operator = registry.of()
    for find in (operator.find_models, operator.find_grants, operator.find_prefixes):
        parts = [find(first=first, most=2) for first in (0, 2, 4, 99)]
        assert [(part.first, part.total, len(part.rows)) for part in parts] == [
            (0, 5, 2),
            (2, 5, 2),
            (4, 5, 1),
            (4, 5, 1),
        ]
        rows = [
            row.get("pattern") or row.get("prefix") or row["name"]
            for part in parts[:3]
            for row in part.rows
        ]
        assert rows in (sorted(rows), sorted(rows, reverse=True)) and len(set(rows)) == 5
        assert find(text="4").total == 1 and find(text="x").first == 0


def test_caller_without_an_owner_has_no_grants(registry: Registry) -> None:
    """The giver of an operator's grant is "", which is not this caller."""
    registry.model("lead", "acme")
    granted = registry.of().add_grant(grantee="globex", pattern="lead")
    nobody = registry.of("")
    assert nobody.list_grants() == [] and nobody.find_grants().total == 0
    assert nobody.find_models().rows[0]["shares"] == []
    with pytest.raises(NotFound):
        nobody.remove_grant(granted["id"])
    assert registry.access("globex", "lead") == "read"


def test_number_of_an_owners_grants_is_bounded(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owners, "MAX_GRANTS", 2)
    for _ in range(2):
        registry.of("acme").add_grant(grantee="globex", pattern="*")
    with pytest.raises(Conflict, match="acme has given 2 grants"):
        registry.of("acme").add_grant(grantee="globex", pattern="*")
    for _ in range(3):
        registry.of().add_grant(grantee="globex", pattern="*")


def test_no_prefix_lies_in_that_of_another_owner(registry: Registry) -> None:
    face = registry.of()
    row = face.add_prefix(prefix="acme-", owner="acme")
    assert face.add_prefix(prefix="acme-", owner="acme") == row
    for prefix in ("acme-", "acme-x", "acm"):
        with pytest.raises(Conflict, match="'acme-' is reserved for acme"):
            face.add_prefix(prefix=prefix, owner="globex")
    face.add_prefix(prefix="acme-x", owner="acme")
    face.add_prefix(prefix="acme-", owner="globex", kind="experiment")
    face.add_prefix(prefix="Acme-", owner="globex")
    listed = sorted((row["kind"], row["prefix"], row["owner"]) for row in face.list_prefixes())
    assert listed == [
        ("experiment", "acme-", "globex"),
        ("model", "Acme-", "globex"),
        ("model", "acme-", "acme"),
        ("model", "acme-x", "acme"),
    ]
    assert face.remove_prefix(prefix="acme-")["owner"] == "acme"
    with pytest.raises(NotFound):
        face.remove_prefix(prefix="acme-")
    assert [event for event, _ in registry.events].count("prefixes.added") == 4


def test_owner_that_differs_in_case_only_is_refused_and_listed(registry: Registry) -> None:
    registry.model("lead", "acme")
    face = registry.of()
    attempts = (
        lambda: face.assign_owner(models="lead", owner="ACME", apply=True),
        lambda: face.assign_owner(
            names=[{"kind": "model", "name": "lead", "owner": o} for o in ("x", "X")], apply=True
        ),
        lambda: face.add_prefix(prefix="x", owner="Acme"),
        lambda: face.add_grant(grantee="aCME", pattern="*"),
    )
    for attempt in attempts:
        with pytest.raises(Conflict, match="equal but for case"):
            attempt()
    assert registry.owner("lead") == "acme"
    assert face.check_owners() == []
    # Suppliers get no such answer, and what they write stands in no operator's way.
    registry.of("acme").add_grant(grantee="GLOBEX", pattern="*")
    registry.of("acme").add_grant(grantee="Globex", pattern="*")
    face.add_prefix(prefix="g-", owner="globex")
    for grant in face.list_grants():
        face.remove_grant(grant["id"])
    with_keys = Ownership(registry.engine, face._audit, key_owners=lambda: ["Acme", "globex"])
    (problem,) = with_keys.check_owners()
    assert (problem["problem"], problem["name"]) == ("LOOK_ALIKES", "Acme, acme")
    # What exists goes on.
    registry.model("other", "Acme")
    face.assign_owner(models="other", owner="acme")
    face.assign_owner(models="lead", owner="Acme")


def test_leftovers_of_plain_mlflow_are_found(registry: Registry) -> None:
    share(registry)
    registry.experiment(5, "e", "acme")
    registry.model("again", "acme")
    registry.delete_model("again")
    with registry.engine.begin() as connection:
        ownership.record_version(
            connection, "other", 3, owner="acme", key_id="", source="s", now=NOW
        )
    registry.version("other", 3, "s")
    assert registry.of().check_owners() == []
    registry.delete_model("lead", with_gate=False)
    registry.model("again")
    with registry.engine.begin() as connection:
        connection.execute(sa.update(SqlExperiment).values(creation_time=1))
        connection.execute(sa.update(SqlModelVersion).values(current_stage="Deleted_Internal"))
        connection.execute(
            sa.insert(MODEL_ACCESS).values(grant_id="x", name="other", grantee="o", level="read")
        )
    found = [(row["problem"], row["name"]) for row in registry.of().check_owners()]
    assert found == [
        ("MODEL_MISSING", "lead"),
        ("MODEL_CAME_BACK", "again"),
        ("EXPERIMENT_MISSING", "5"),
        ("VERSION_MISSING", "other/3"),
        ("ACCESS_LEFT_OVER", "other"),
        ("ACCESS_LEFT_OVER", "lead"),
    ]
    registry.version("other", 4, "s")
    for problems in ([("VERSION_UNRECORDED", "other/4")], []):
        found = [(row["problem"], row["name"]) for row in registry.of().check_owners()]
        assert [one for one in found if one[0].startswith("VERSION")] == problems


def test_mistakes_are_explained(registry: Registry) -> None:
    face, acme = registry.of(), registry.of("acme")
    long, row = "a" * 257, {"kind": "model", "name": "x", "owner": "acme"}
    for attempt, error, says in (
        (lambda: face.list_owners(kind="run"), InvalidRequest, "kind must be one of model, exp"),
        (lambda: face.list_owners(max_results=0), InvalidRequest, "from 1 to 1000"),
        (lambda: face.list_owners(max_results=1001), InvalidRequest, "from 1 to 1000"),
        (lambda: face.list_owners(owner="a\0"), InvalidRequest, "owner: it has a control"),
        (lambda: face.list_owners(owner="a", unowned=True), InvalidRequest, "not both"),
        (lambda: face.list_owners(page_token="\0"), InvalidRequest, "page_token is not"),
        (
            lambda: face.list_owners(kind="experiment", page_token="9" * 10),
            InvalidRequest,
            "page_token is not",
        ),
        (lambda: face.assign_owner(owner="a"), InvalidRequest, "one of them"),
        (lambda: face.assign_owner(owner="a", models="a", experiments="b"), InvalidRequest, "one"),
        (lambda: face.assign_owner(from_owner="a", owner="a"), InvalidRequest, "the same"),
        (lambda: face.assign_owner(from_owner="a"), InvalidRequest, "owner: it is empty"),
        (lambda: face.assign_owner(from_owner="", owner="a"), InvalidRequest, "from_owner: it is"),
        (
            lambda: face.assign_owner(owner="a", models="a", from_owner="b"),
            InvalidRequest,
            "one of",
        ),
        (lambda: face.assign_owner(models="a*b", owner="a"), InvalidRequest, "only at its end"),
        (lambda: face.assign_owner(models="a"), InvalidRequest, "owner: it is empty"),
        (lambda: face.assign_owner(models="a", owner=long), InvalidRequest, "owner: it is longer"),
        (
            lambda: face.assign_owner(names=[row, {**row, "owner": ""}]),
            InvalidRequest,
            "owner of row 2: it is empty",
        ),
        (
            lambda: face.assign_owner(names=[{**row, "name": "\0"}]),
            InvalidRequest,
            "name of row 1: it has a control",
        ),
        (lambda: face.assign_owner(names=[{**row, "kind": "run"}]), InvalidRequest, "kind must"),
        (lambda: acme.add_grant(grantee="", pattern="a"), InvalidRequest, "grantee: it is empty"),
        (lambda: acme.add_grant(grantee="acme", pattern="a"), InvalidRequest, "owns these models"),
        (lambda: acme.add_grant(grantee="g", pattern="*a"), InvalidRequest, "only at its end"),
        (
            lambda: acme.add_grant(grantee="g", pattern="a", level="own"),
            InvalidRequest,
            "level must be one of read, contribute",
        ),
        (
            lambda: acme.add_grant(grantee="g", pattern="a", expires_in=0),
            InvalidRequest,
            "more than 0 seconds",
        ),
        (
            lambda: registry.of("").add_grant(grantee="g", pattern="*"),
            Forbidden,
            "This key has no owner",
        ),
        (lambda: face.add_prefix(prefix="a*", owner="a"), InvalidRequest, "without `*`"),
        (lambda: face.add_prefix(prefix="", owner="a"), InvalidRequest, "prefix: it is empty"),
        (lambda: face.remove_prefix(prefix="a", kind="x"), InvalidRequest, "kind must"),
        (lambda: face.remove_prefix(prefix="\0"), NotFound, "No names of models"),
    ):
        with pytest.raises(error) as raised:
            attempt()  # type: ignore[no-untyped-call]
        assert type(raised.value) is error and says in str(raised.value), (says, raised.value)
    with registry.engine.connect() as connection:
        for table in (MODELS, GRANTS):
            assert connection.execute(sa.select(table)).all() == []
    assert registry.events == []


def test_new_grant_covers_models_that_are_made_in_the_same_moment(registry: Registry) -> None:
    failures: list[BaseException] = []

    def run(work: Any) -> threading.Thread:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=guarded)
        thread.start()
        return thread

    for number in range(8):
        name, grantee = f"m{number}", f"g{number}"
        threads = [
            run(lambda name=name: registry.model(name, "acme")),
            run(lambda to=grantee: registry.of("acme").add_grant(grantee=to, pattern="*")),
        ]
        for thread in threads:
            thread.join()
        assert failures == []
        assert registry.access(grantee, name) == "read"
        grants = [row for row in registry.of().list_grants() if row["grantee"] == grantee]
        threads = [
            run(lambda name=name: registry.model(f"{name}-later", "acme")),
            run(lambda id=grants[0]["id"]: registry.of("acme").remove_grant(id)),
        ]
        for thread in threads:
            thread.join()
        assert failures == []
        assert registry.access(grantee, f"{name}-later") is None


def test_change_waits_for_a_model_under_way_and_says_so_in_the_end(registry: Registry) -> None:
    if registry.engine.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    with registry.engine.begin() as connection:
        ownership.record_model(connection, "m", owner="acme", key_id="", now=NOW)
        with pytest.MonkeyPatch.context() as patch:
            bound = sa.select(sa.func.set_config("lock_timeout", "100", True))
            patch.setattr(owners, "_BOUND", bound)
            with pytest.raises(AuthorityUnavailable, match="MLflow's database can't be used"):
                registry.of("acme").add_grant(grantee="globex", pattern="*")
    assert registry.of("acme").add_grant(grantee="globex", pattern="*")["models"] == 1


def test_operator_sees_whose_unowned_things_may_be(registry: Registry) -> None:
    def add(table: Any, **row: object) -> None:
        # As plain MLflow may have done it: an application of another test would refuse some tags.
        plain = sa.table(table.__tablename__, *map(sa.column, row))
        with registry.engine.begin() as connection:
            connection.execute(sa.insert(plain).values(row))

    def suggested(kind: str, face: Ownership | None = None, **which: Any) -> dict[str, list[str]]:
        rows = (face or registry.of()).list_owners(kind=kind, **{"unowned": True, **which})
        return {row["name"]: row["suggested"] for row in rows}

    stamp = {"key": "hokusai_auth.owner"}
    registry.model("scorer")
    registry.model("silent")
    registry.model("owned", "acme")
    registry.experiment(1, "train")
    registry.experiment(2, "other")
    for number, user in enumerate(("ann", "ann", "bob", "", None)):
        run = f"{number:032}"
        add(SqlRun, run_uuid=run, experiment_id=1, user_id=user)
        registry.version("scorer", number, "s3://b/m")
        with registry.engine.begin() as connection:
            version = sa.and_(SqlModelVersion.name == "scorer", SqlModelVersion.version == number)
            connection.execute(sa.update(SqlModelVersion).where(version).values(run_id=run))
    add(SqlTag, run_uuid=f"{4:032}", key="mlflow.user", value="carl")
    add(SqlTag, run_uuid=f"{4:032}", key="team", value="never")
    assert suggested("model") == {"scorer": ["ann", "bob", "carl"], "silent": []}
    assert suggested("experiment") == {"train": ["ann", "bob", "carl"], "other": []}
    with registry.engine.begin() as connection:
        connection.execute(sa.update(SqlModelVersion).values(user_id="dora"))
    add(SqlModelVersionTag, name="scorer", version=1, value="ACME", **stamp)
    add(SqlModelVersionTag, name="scorer", version=2, value="never", key="hokusai_auth.key_id")
    add(SqlExperimentTag, experiment_id=1, value="ACME", **stamp)
    add(SqlRegisteredModelTag, name="silent", value="GLOBEX", **stamp)
    # What the server itself wrote comes first, and then what there is most of.
    assert suggested("model") == {
        "scorer": ["ACME", "dora", "ann", "bob", "carl"],
        "silent": ["GLOBEX"],
    }
    assert suggested("experiment")["train"] == ["ACME", "ann", "bob", "carl"]
    # It is for operators who look for owners, and changes nothing.
    assert suggested("model", registry.of("acme")) == {"scorer": [], "silent": []}
    assert suggested("model", unowned=False) == {"owned": [], "scorer": [], "silent": []}
    assert registry.owner("scorer") is None

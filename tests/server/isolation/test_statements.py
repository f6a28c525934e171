"""What the hooks ask of the database: how often, and that no statement reads everybody's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from mlflow.entities import LoggedModelTag, Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersionTag, RegisteredModelTag

from tests.server.isolation import plans
from tests.server.isolation.stores import ACME, GLOBEX, STAFF, Stores, calling, unused_name
from tests.server.isolation.test_artifacts import World, checked, code, files, world

__all__ = ["world"]


def ways(world: World) -> dict[str, Callable[[], Any]]:
    """What ACME does in its own corner, one of each kind."""
    made, stores = world.made_by(ACME), world.stores
    tracking, registry = stores.tracking, stores.registry
    folder = files(made)[0].rpartition("/")[0]
    chosen, name = unused_name(), unused_name()
    version = {"name": made.model, "version": made.version}
    return {
        "experiment": lambda: tracking.create_experiment(unused_name()),
        "run": lambda: tracking.create_run(made.experiment, "u", 1, [], "r"),
        "log-metric": lambda: tracking.log_metric(made.run, Metric("m", 1.0, 1, 1)),
        "log-batch": lambda: tracking.log_batch(
            made.run, [Metric("n", 1.0, 1, 1)], [Param("p", "1")], [RunTag("t", "1")]
        ),
        "logged model": lambda: tracking.create_logged_model(made.experiment, "m", made.run),
        "tags of a logged model": lambda: tracking.set_logged_model_tags(
            made.logged, [LoggedModelTag("a", "b")]
        ),
        "file": lambda: world.put(files(made)[1]),
        "file elsewhere": lambda: world.put(f"{chosen}/x"),
        "deletion of a folder": lambda: world.proxy.delete_artifacts(f"{made.experiment}/own"),
        "version of a run": lambda: registry.create_model_version(
            made.model, f"mlflow-artifacts:/{folder}"
        ),
        "version elsewhere": lambda: registry.create_model_version(
            made.model, f"mlflow-artifacts:/{chosen}"
        ),
        "frozen file": lambda: world.put(files(made)[0]),
        "model": lambda: registry.create_registered_model(name),
        "tag of a model": lambda: registry.set_registered_model_tag(
            made.model, RegisteredModelTag("a", "b")
        ),
        "tag of a version": lambda: registry.set_model_version_tag(
            **version, tag=ModelVersionTag("a", "b")
        ),
        "alias": lambda: registry.set_registered_model_alias(made.model, "champion", made.version),
        "stage": lambda: registry.transition_model_version_stage(
            **version, stage="Staging", archive_existing_versions=True
        ),
        "deletion of an alias": lambda: registry.delete_registered_model_alias(
            made.model, "champion"
        ),
        "deletion of a version": lambda: registry.delete_model_version(**version),
        "rename": lambda: registry.rename_registered_model(made.model, unused_name()),
        "deletion of a model": lambda: registry.delete_registered_model(name),
        "deletion of a run": lambda: tracking.delete_run(made.run),
        "deletion of an experiment": lambda: tracking.delete_experiment(made.experiment),
    }


def foreign(world: World) -> dict[str, Callable[[], Any]]:
    """What GLOBEX tries with ACME's."""
    return {f"another's {name}": way for name, way in ways(world).items()}


#: What the hooks still read from end to end: folders that people chose for experiments have no index.
KNOWN = {"experiments"}


@pytest.fixture
def without_scans(stores: Stores) -> Any:
    """PostgreSQL reads small tables from end to end, unless it must not."""
    engine = stores.tracking.engine
    if engine.dialect.name != "postgresql":
        yield
        return

    def forbid(connection: Any, _: object) -> None:
        connection.execute("SET enable_seqscan = off")

    sa.event.listen(engine, "connect", forbid)
    engine.dispose()
    yield
    sa.event.remove(engine, "connect", forbid)
    engine.dispose()


#: Statements of the hooks, at most, of a call whose run and experiment are known. A file is looked at
#: twice, and each look has one.
BUDGETS = {
    "run": 1,
    "log-metric": 0,
    "log-batch": 0,
    "file": 2,
    "version of a run": 3,
    "tag of a model": 1,
    "tag of a version": 1,
    "alias": 1,
}


def check_plans(world: World, least: int = 0) -> None:
    """Check that no statement of the hooks reads a table that grows with others from end to end.

    A table with fewer rows than `least` may be read.
    """
    seen: dict[str, list[plans.Sent]] = {}
    both = ((ACME, ways(world)), (GLOBEX, foreign(world)))
    with checked(world):
        for who, some in both:
            for name, way in some.items():
                with calling(who), plans.sent() as seen[name]:
                    code(way)
    ours = [one for statements in seen.values() for one in statements if one.ours]
    assert len(ours) > 20
    engine = world.stores.tracking.engine
    found = plans.scanned(engine, ours)
    with engine.connect() as connection:
        large = {
            table
            for table in {table for table, _ in found} - KNOWN
            if connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one() >= least
        }
    assert not large, found


def check_budgets(world: World) -> None:
    """Check the number of statements of the hooks, of suppliers and of staff."""
    known = ways(world)
    with checked(world), calling(ACME):
        for name, most in BUDGETS.items():
            assert code(known[name]) == "", name
            with plans.sent() as seen:
                assert code(known[name]) == "", name
            ours = [one.text for one in seen if one.ours]
            assert len(ours) <= most, (name, ours)
    with calling(STAFF):
        for name in ("run", "log-metric", "log-batch", "tag of a model", "alias"):
            with plans.sent() as seen:
                assert code(known[name]) == "", name
            assert not [one for one in seen if one.ours], name


def test_no_statement_of_the_hooks_reads_everybody_s_rows(
    world: World, without_scans: None
) -> None:
    check_plans(world)


def test_hooks_send_no_more_statements_than_they_may(world: World) -> None:
    check_budgets(world)

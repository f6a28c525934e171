"""Ownership in MLflow's database, on SQLite and PostgreSQL: its tables, and what the hooks call."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from mlflow.store.db.utils import create_sqlalchemy_engine
from mlflow.store.model_registry.dbmodels.models import SqlModelVersion, SqlRegisteredModel
from mlflow.store.tracking.dbmodels.models import SqlExperiment

from mlflow_hokusai_auth.core import ownership as rules
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable, StoreError
from mlflow_hokusai_auth.core.types import MOST_ISOLATION
from mlflow_hokusai_auth.store import ownership
from mlflow_hokusai_auth.store.ownership_tables import (
    EXPERIMENTS,
    GRANTS,
    METADATA,
    MODEL_ACCESS,
    MODELS,
    PREFIXES,
    VERSION,
    VERSIONS,
)

NOW = 1_800_000_000.0
ACME = {"owner": "acme", "key_id": "key_a"}
GLOBEX = {"owner": "globex", "key_id": "key_g"}


@pytest.fixture
def connection(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection:
        yield connection


def grant(connection: sa.Connection, id: str, by: str, pattern: str, **fields: object) -> None:
    row = {"id": id, "granted_by": by, "pattern": pattern, "grantee": "globex", "level": "read"}
    row |= {"key_id": "key_a", "created_at": NOW, **fields}  # type: ignore[dict-item]
    connection.execute(sa.insert(GRANTS).values(row))


def experiment(connection: sa.Connection, number: int, name: str, created: int | None) -> None:
    row = {"experiment_id": number, "name": name, "creation_time": created}
    connection.execute(sa.insert(SqlExperiment).values(row))


def contents(connection: sa.Connection) -> dict[str, list[Any]]:
    tables = METADATA.sorted_tables
    return {t.name: sorted(map(repr, connection.execute(sa.select(t)))) for t in tables}


def test_workers_that_start_at_once_make_the_tables_once(empty: sa.Engine) -> None:
    with empty.begin() as connection:
        experiment(connection, 7, "nobody's", 1)
    failures: list[Exception] = []
    decided: list[str] = []
    barrier = threading.Barrier(6)

    def start() -> None:
        engine = create_sqlalchemy_engine(empty.url.render_as_string(hide_password=False))
        barrier.wait()
        try:
            decided.append(ownership.prepare(engine))
        except Exception as error:
            failures.append(error)
        engine.dispose()

    workers = [threading.Thread(target=start) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == [] and decided == ["observe"] * 6
    with empty.connect() as connection:
        row = (ownership.TABLES_VERSION, "observe")
        assert connection.execute(sa.select(VERSION)).all() == [row]
        assert {t.name for t in METADATA.sorted_tables} <= set(
            sa.inspect(connection).get_table_names()
        )


def test_isolation_is_decided_by_what_nobody_owns_and_once(empty: sa.Engine) -> None:
    def decided(*made: tuple[Any, dict[str, Any]]) -> str:
        with empty.begin() as connection:
            METADATA.drop_all(connection)
            for table in (SqlRegisteredModel, SqlExperiment):
                connection.execute(sa.delete(table))
            experiment(connection, 0, "Default", 1)
            for table, row in made:
                connection.execute(sa.insert(table).values(row))
        return ownership.prepare(empty)

    model = (SqlRegisteredModel, {"name": "nobody's"})
    other = (SqlExperiment, {"experiment_id": 1, "name": "nobody's", "creation_time": 1})
    assert ownership.decided(empty) is None
    assert decided(model) == "observe"
    assert decided(other) == "observe"
    with empty.begin() as connection:
        # Everything has an owner, but only a person changes what was decided.
        ownership.record_experiment(connection, 1, **ACME, created_at=1)
        assert ownership.unowned(connection) == (0, 0)
    assert ownership.prepare(empty) == "observe"
    assert decided() == MOST_ISOLATION
    with empty.begin() as connection:
        connection.execute(sa.insert(SqlRegisteredModel).values(name="later"))
        experiment(connection, 1, "later", 1)
        assert ownership.unowned(connection) == (1, 1)
    assert ownership.prepare(empty) == ownership.decided(empty) == MOST_ISOLATION


@pytest.mark.parametrize("owned", [True, False])
def test_tables_from_before_the_decision_go_on(engine: sa.Engine, owned: bool) -> None:
    with engine.begin() as connection:
        connection.execute(sa.insert(SqlRegisteredModel).values(name="scorer"))
        if owned:
            assert ownership.record_model(connection, "scorer", **ACME, now=NOW)
        VERSION.drop(connection)
        connection.exec_driver_sql(f"CREATE TABLE {VERSION.name} (version INTEGER PRIMARY KEY)")
        connection.exec_driver_sql(f"INSERT INTO {VERSION.name} VALUES (1)")
    assert ownership.decided(engine) is None
    for _ in range(2):
        assert ownership.prepare(engine) == (MOST_ISOLATION if owned else "observe")
    with engine.connect() as connection:
        assert ownership.model_owner(connection, "scorer") == ("acme" if owned else None)
        assert connection.execute(sa.select(sa.func.count()).select_from(VERSION)).scalar() == 1


def test_sql_for_administrators_makes_the_same_tables(empty: sa.Engine) -> None:
    def shape() -> Any:
        inspector = sa.inspect(empty)
        return {
            table.name: (
                [str({**column, "default": 0}) for column in inspector.get_columns(table.name)],
                inspector.get_pk_constraint(table.name)["constrained_columns"],
                sorted(str(index) for index in inspector.get_indexes(table.name)),
            )
            for table in METADATA.sorted_tables
        }

    with empty.begin() as connection:
        for statement in ownership.ddl(empty.dialect.name).split(";\n"):
            if statement:
                connection.exec_driver_sql(statement)
    by_hand = shape()
    assert ownership.decided(empty) is None
    ownership.prepare(empty)
    with empty.begin() as connection:
        row = (ownership.TABLES_VERSION, MOST_ISOLATION)
        assert connection.execute(sa.select(VERSION)).all() == [row]
        METADATA.drop_all(connection)
    ownership.prepare(empty)
    assert by_hand == shape()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_user_without_the_right_to_create_tables_is_told_what_to_do(
    empty: sa.Engine, driver: str
) -> None:
    url = empty.url
    if empty.dialect.name == "sqlite":
        url = url.set(database=f"file:{url.database}", query={"mode": "ro", "uri": "true"})
    else:
        with empty.begin() as connection:
            connection.exec_driver_sql("DROP ROLE IF EXISTS reader")
            connection.exec_driver_sql("CREATE ROLE reader LOGIN")
            connection.exec_driver_sql("GRANT USAGE ON SCHEMA public TO reader")
        # SQLAlchemy uses psycopg2 for a URL that names no driver, as most of MLflow's do.
        pytest.importorskip(driver)
        url = url.set(username="reader", drivername=f"postgresql+{driver}")
    reader = sa.create_engine(url)
    with pytest.raises(StoreError, match=r"right to create tables.*`hokusai-auth owners sql`"):
        ownership.prepare(reader)
    reader.dispose()


def test_database_without_tables_of_mlflow_stays_empty(database_uri: str) -> None:
    engine = sa.create_engine(database_uri.replace("postgresql://", "postgresql+psycopg://"))
    with pytest.raises(StoreError, match="no tables of MLflow"):
        ownership.prepare(engine)
    assert sa.inspect(engine).get_table_names() == []
    engine.dispose()


def test_tables_of_a_newer_version_are_not_used(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.update(VERSION).values(version=ownership.TABLES_VERSION + 1))
    with pytest.raises(StoreError, match="newer version"):
        ownership.prepare(engine)


def version(connection: sa.Connection, name: str, number: int, **fields: object) -> None:
    """A version that MLflow has, as plain MLflow makes it."""
    models = sa.select(SqlRegisteredModel.name).where(SqlRegisteredModel.name == name)
    if connection.execute(models).first() is None:
        connection.execute(sa.insert(SqlRegisteredModel).values(name=name))
    row = {"name": name, "version": number, "current_stage": "None", "source": "s", **fields}
    connection.execute(sa.insert(SqlModelVersion).values(row))


def test_tables_of_the_first_version_are_upgraded_in_place(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        version(connection, "scorer", 1, source="models:/m-1", storage_location="s3://b/1/")
        version(connection, "scorer", 2, source="s3://b/2", creation_time=2500)
        ownership.record_version(connection, "scorer", 1, **ACME, source="models:/m-1", now=NOW)
        connection.exec_driver_sql("DROP INDEX hokusai_versions_location")
        connection.exec_driver_sql("ALTER TABLE hokusai_versions DROP COLUMN location")
        connection.execute(sa.update(VERSION).values(version=1))
    ownership.prepare(engine)
    with engine.begin() as connection:
        assert connection.execute(sa.select(VERSIONS).order_by(VERSIONS.c.version)).all() == [
            ("scorer", 1, "acme", "key_a", NOW, "models:/m-1", "s3://b/1"),
            ("scorer", 2, "", "", 2.5, "s3://b/2", "s3://b/2"),
        ]
        row = (ownership.TABLES_VERSION, MOST_ISOLATION)
        assert connection.execute(sa.select(VERSION)).all() == [row]
        assert ownership.version_owner(connection, "scorer", 2) is None
    assert [i["name"] for i in sa.inspect(engine).get_indexes(VERSIONS.name)] == [
        "hokusai_versions_location"
    ]


def test_versions_of_plain_mlflow_are_found(engine: sa.Engine) -> None:
    longest = "s3://b/" + "😀" * 493

    def at(*uris: str, above: tuple[str, ...] = ()) -> bool:
        with engine.connect() as connection:
            return ownership.is_registered(connection, uris, above)

    with engine.begin() as connection:
        for number, source in enumerate(("s3://b/gone", "s3://b/moved", "s3://b/same", None)):
            version(connection, "scorer", number, source=source)
        version(connection, "scorer", 9, source=longest, current_stage=None)
        connection.execute(sa.update(SqlModelVersion).values(storage_location=""))
    assert not at("s3://b/gone", longest)
    ownership.catch_up(engine)
    assert at("s3://b/gone") and at("s3://b/moved") and at(longest)
    assert at("x", above=("s3://b",)) and at("x", above=("s3:/",))
    assert not at("s3://b", above=("s3://b/g", "s3://b/gone"))
    with engine.begin() as connection:
        here = SqlModelVersion.version
        for number, values in (
            (0, {"current_stage": "Deleted_Internal"}),
            (1, {"source": "s3://c/"}),
        ):
            connection.execute(sa.update(SqlModelVersion).where(here == number).values(values))
        connection.execute(sa.delete(SqlModelVersion).where(here == 9))
    ownership.catch_up(engine)
    assert not at("s3://b/gone", "s3://b/moved", longest) and at("s3://c") and at("s3://b/same")
    seen: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *a: seen.append(a[2]))
    ownership.catch_up(engine)
    assert len(seen) == 2 and all(text.startswith("SELECT") for text in seen)


def test_database_out_of_reach_is_no_matter_of_rights() -> None:
    engine = sa.create_engine("postgresql+psycopg://nobody@127.0.0.1:9/none")
    with pytest.raises(AuthorityUnavailable, match="MLflow's database can't be used"):
        ownership.prepare(engine)
    busy = sa.create_engine(
        "sqlite://", poolclass=sa.QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.01
    )
    with busy.connect(), pytest.raises(AuthorityUnavailable, match="no free connection"):
        ownership.prepare(busy)
    with pytest.raises(StoreError, match="tables are in mssql"):
        ownership.prepare(sa.create_mock_engine("mssql://", lambda *_: None))  # type: ignore[arg-type]


def test_name_belongs_to_its_first_owner_for_good(connection: sa.Connection) -> None:
    assert ownership.model_owner(connection, "scorer") is None
    assert ownership.record_model(connection, "scorer", **ACME, now=NOW)
    assert not ownership.record_model(connection, "scorer", **GLOBEX, now=NOW)
    ownership.model_gone(connection, "scorer", NOW + 1)
    assert connection.execute(sa.select(MODELS.c.gone_at)).scalar() == NOW + 1
    assert not ownership.record_model(connection, "scorer", **GLOBEX, now=NOW + 2)
    assert connection.execute(sa.select(MODELS.c.gone_at)).scalar() == NOW + 1
    assert ownership.model_owner(connection, "scorer") == "acme"
    assert ownership.record_model(connection, "scorer", owner="acme", key_id="key_b", now=NOW + 3)
    assert connection.execute(sa.select(MODELS)).all() == [
        ("scorer", "acme", "key_b", NOW + 3, None)
    ]
    assert ownership.model_owner(connection, "Scorer") is None


def test_row_of_an_experiment_counts_while_it_is_the_same_experiment(
    connection: sa.Connection,
) -> None:
    for number, created in ((1, 1000), (2, None)):
        experiment(connection, number, f"e{number}", created)
        ownership.record_experiment(connection, number, **ACME, created_at=created)
        assert ownership.experiment_owner(connection, number) == "acme"
    # SQLite gives the id of a deleted experiment to the next one.
    connection.execute(sa.update(SqlExperiment).values(creation_time=2000))
    assert ownership.experiment_owner(connection, 1) is None
    assert ownership.experiment_owner(connection, 2) is None
    ownership.record_experiment(connection, 1, **GLOBEX, created_at=2000)
    assert ownership.experiment_owner(connection, 1) == "globex"
    connection.execute(sa.delete(SqlExperiment))
    assert ownership.experiment_owner(connection, 1) is None


def test_version_has_an_owner_of_its_own_until_it_ends(connection: sa.Connection) -> None:
    ownership.record_model(connection, "scorer", **ACME, now=NOW)
    ownership.record_version(connection, "scorer", 1, **ACME, source="runs:/1/m", now=NOW)
    ownership.record_version(connection, "scorer", 2, **GLOBEX, source="runs:/2/m", now=NOW)
    assert ownership.version_owner(connection, "scorer", 1) == "acme"
    assert ownership.version_owner(connection, "scorer", 2) == "globex"
    ownership.version_gone(connection, "scorer", 2)
    assert ownership.version_owner(connection, "scorer", 2) is None
    assert ownership.version_owner(connection, "scorer", 1) == "acme"
    # MLflow counts from 1 again after the model was deleted.
    ownership.model_gone(connection, "scorer", NOW)
    assert ownership.version_owner(connection, "scorer", 1) is None


def test_nothing_of_a_model_that_plain_mlflow_deleted_passes_to_its_successor(
    connection: sa.Connection,
) -> None:
    ownership.record_model(connection, "scorer", **ACME, now=NOW)
    ownership.record_version(connection, "scorer", 1, **GLOBEX, source="runs:/2/m", now=NOW)
    grant(connection, "g", "acme", "scorer")
    ownership.expand_model(connection, "scorer", "acme")
    connection.execute(sa.delete(GRANTS))
    assert ownership.access(connection, "globex", "scorer", NOW) == "read"
    ownership.record_model(connection, "scorer", **ACME, now=NOW)
    assert ownership.version_owner(connection, "scorer", 1) is None
    assert ownership.access(connection, "globex", "scorer", NOW) is None


def test_grants_cover_what_their_giver_owns_and_an_operators_any(
    connection: sa.Connection,
) -> None:
    grant(connection, "1", "acme", "acme-*")
    grant(connection, "2", "", "*", grantee="audit")
    grant(connection, "3", "acme", "acme-b", level="contribute")
    grant(connection, "4", "acme", "acme-c", expires_at=NOW + 60)
    for name in ("acme-a", "acme-b", "acme-c", "acme", "Acme-a"):
        ownership.record_model(connection, name, **ACME, now=NOW)
    ownership.record_model(connection, "acme-g", owner="initech", key_id="", now=NOW)

    def levels(owner: str, now: float = NOW) -> dict[str, str | None]:
        names = ("acme-a", "acme-b", "acme-c", "acme", "Acme-a", "acme-g")
        found = {name: ownership.access(connection, owner, name, now) for name in names}
        return {name: level for name, level in found.items() if level}

    assert levels("globex") == {"acme-a": "read", "acme-b": "contribute", "acme-c": "read"}
    assert len(levels("audit")) == 6
    assert levels("acme") == {}
    connection.execute(sa.delete(MODEL_ACCESS).where(MODEL_ACCESS.c.grant_id == "1"))
    assert levels("globex", NOW + 59) == {"acme-b": "contribute", "acme-c": "read"}
    assert levels("globex", NOW + 60) == {"acme-b": "contribute"}
    ownership.model_gone(connection, "acme-b", NOW)
    assert levels("globex", NOW + 60) == {}
    ownership.record_model(connection, "acme-b", **ACME, now=NOW)
    assert levels("globex", NOW + 60) == {"acme-b": "contribute"}


def test_database_and_the_pure_rules_agree_about_names(connection: sa.Connection) -> None:
    chosen = random.Random(21)
    letters = "aA_%-*ß😀'\\ "

    def text(longest: int) -> str:
        return "".join(chosen.choice(letters) for _ in range(chosen.randint(1, longest)))

    patterns = sorted({text(3).replace("*", "x") + chosen.choice(("", "*")) for _ in range(60)})
    for number, pattern in enumerate([*patterns, "*"]):
        grant(connection, str(number), "acme", pattern, grantee=f"by {pattern}")
    prefixes = [("a", "acme"), ("_%", "globex"), ("ß😀", "initech")]
    for prefix, owner in prefixes:
        row = {"prefix": prefix, "kind": "model", "owner": owner}
        connection.execute(sa.insert(PREFIXES).values(row))
    for name in {text(4) for _ in range(200)}:
        ownership.record_model(connection, name, **ACME, now=NOW)
        rows = connection.execute(
            sa.select(MODEL_ACCESS.c.grantee).where(MODEL_ACCESS.c.name == name)
        )
        covered = {f"by {pattern}" for pattern in [*patterns, "*"] if rules.matches(pattern, name)}
        assert set(rows.scalars()) == covered, name
        found = ownership.prefix_owner(connection, "model", name)
        assert found == rules.prefix_owner(prefixes, name), name
        assert ownership.prefix_owner(connection, "experiment", name) is None


def test_rename_takes_owner_versions_and_grants_along(connection: sa.Connection) -> None:
    ownership.record_model(connection, "old", **ACME, now=NOW)
    ownership.record_version(connection, "old", 1, **GLOBEX, source="runs:/2/m", now=NOW)
    grant(connection, "1", "acme", "old", level="contribute")
    grant(connection, "2", "acme", "ol*", grantee="initech")
    grant(connection, "3", "acme", "n*", grantee="hooli")
    grant(connection, "4", "initech", "old", grantee="hooli")
    ownership.expand_model(connection, "old", "acme")
    assert ownership.rename_model(connection, "old", "new", NOW + 1)
    found = {
        owner: ownership.access(connection, owner, "new", NOW)
        for owner in ("globex", "initech", "hooli")
    }
    assert found == {"globex": "contribute", "initech": "read", "hooli": "read"}
    assert ownership.version_owner(connection, "new", 1) == "globex"
    assert ownership.version_owner(connection, "old", 1) is None
    assert connection.execute(sa.select(MODELS).order_by(MODELS.c.name)).all() == [
        ("new", "acme", "key_a", NOW, None),
        ("old", "acme", "key_a", NOW, NOW + 1),
    ]
    assert ownership.access(connection, "globex", "old", NOW) is None
    patterns = connection.execute(sa.select(GRANTS.c.pattern).order_by(GRANTS.c.id)).scalars()
    assert list(patterns) == ["new", "ol*", "n*", "old"]
    # A squatter gets neither of the names, and their owner may go back.
    assert not ownership.record_model(connection, "old", **GLOBEX, now=NOW)
    assert ownership.rename_model(connection, "new", "old", NOW + 2)
    assert ownership.access(connection, "globex", "old", NOW) == "contribute"
    assert ownership.version_owner(connection, "old", 1) == "globex"


def test_rename_onto_a_name_of_another_owner_changes_nothing(connection: sa.Connection) -> None:
    ownership.record_model(connection, "scorer", **ACME, now=NOW)
    ownership.model_gone(connection, "scorer", NOW)
    ownership.record_model(connection, "mine", **GLOBEX, now=NOW)
    before = contents(connection)
    assert not ownership.rename_model(connection, "mine", "scorer", NOW)
    assert not ownership.rename_model(connection, "nobody's", "scorer", NOW)
    assert ownership.rename_model(connection, "mine", "mine", NOW)
    assert contents(connection) == before


def test_rename_to_a_name_with_a_star_widens_no_grant(connection: sa.Connection) -> None:
    for name in ("shared", "acme-secret"):
        ownership.record_model(connection, name, **ACME, now=NOW)
    grant(connection, "1", "", "shared", level="contribute")
    ownership.expand_model(connection, "shared", "acme")
    assert ownership.rename_model(connection, "shared", "acme*", NOW)
    assert ownership.access(connection, "globex", "acme*", NOW) == "contribute"
    ownership.record_model(connection, "acme-later", **ACME, now=NOW)
    ownership.expand_model(connection, "acme-secret", "acme")
    for name in ("acme-secret", "acme-later"):
        assert ownership.access(connection, "globex", name, NOW) is None


def test_rename_of_a_model_without_an_owner_takes_operators_grants_along(
    connection: sa.Connection,
) -> None:
    grant(connection, "1", "", "old")
    ownership.expand_model(connection, "old", "")
    assert ownership.rename_model(connection, "old", "new", NOW)
    assert ownership.access(connection, "globex", "new", NOW) == "read"
    assert ownership.model_owner(connection, "new") is None


CHANGES: list[Callable[[sa.Connection], object]] = [
    lambda c: ownership.record_model(c, "new", **ACME, now=NOW),
    lambda c: ownership.record_model(c, "scorer", **ACME, now=NOW + 9),
    lambda c: ownership.record_experiment(c, 1, **GLOBEX, created_at=1),
    lambda c: ownership.record_version(c, "scorer", 1, **GLOBEX, source="s", now=NOW),
    lambda c: ownership.record_version(c, "scorer", 2, **GLOBEX, source="s", now=NOW),
    lambda c: ownership.rename_model(c, "scorer", "renamed", NOW),
    lambda c: ownership.model_gone(c, "scorer", NOW),
    lambda c: ownership.version_gone(c, "scorer", 1),
]


def test_each_change_is_undone_by_the_rollback_of_its_transaction(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        grant(connection, "1", "acme", "*")
        ownership.record_model(connection, "scorer", **ACME, now=NOW)
        ownership.record_version(connection, "scorer", 1, **ACME, source="s", now=NOW)
        ownership.record_experiment(connection, 1, **ACME, created_at=1)
    with engine.connect() as connection:
        before = contents(connection)
        assert len(before[EXPERIMENTS.name]) == len(before[VERSIONS.name]) == 1
    for number, change in enumerate(CHANGES):
        with engine.connect() as connection:
            change(connection)
            assert contents(connection) != before, number
            connection.rollback()
        with engine.connect() as connection:
            assert contents(connection) == before, number


def test_no_statement_that_changes_data_begins_with_with(engine: sa.Engine) -> None:
    seen: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *a: seen.append(a[2]))
    with engine.connect() as connection:
        for change in CHANGES:
            change(connection)
    assert len(seen) > len(CHANGES)
    assert not [statement for statement in seen if statement.lstrip().upper().startswith("WITH")]


def test_two_owners_who_claim_one_name_at_once_do_not_both_get_it(engine: sa.Engine) -> None:
    for number in range(10):
        barrier = threading.Barrier(2)
        won: list[str] = []

        def claim(owner: str, name: str, barrier: threading.Barrier, won: list[str]) -> None:
            with engine.connect() as connection:
                if engine.dialect.name == "sqlite":
                    connection.exec_driver_sql("PRAGMA busy_timeout=60000")
                barrier.wait()
                if ownership.record_model(connection, name, owner=owner, key_id="", now=NOW):
                    won.append(owner)
                connection.commit()

        both = [
            threading.Thread(target=claim, args=(owner, f"m{number}", barrier, won))
            for owner in ("acme", "globex")
        ]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        with engine.connect() as connection:
            assert won == [ownership.model_owner(connection, f"m{number}")]


#: The revision of MLflow's tables before workspaces, which changed their primary keys. 3.9 is older.
BEFORE_WORKSPACES = "c8d9e0f1a2b3"


def test_rows_outlive_an_upgrade_of_mlflows_tables(database_uri: str) -> None:
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase

    url = database_uri.replace("postgresql://", "postgresql+psycopg://")
    engine = create_sqlalchemy_engine(url)
    config = _get_alembic_config(url)

    def upgrade(revision: str) -> None:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, revision)

    InitialBase.metadata.create_all(engine)
    upgrade(BEFORE_WORKSPACES)
    ownership.prepare(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO registered_models (name) VALUES ('old')")
        for number in (1, 2):
            connection.exec_driver_sql(
                "INSERT INTO model_versions (name, version, current_stage) "
                f"VALUES ('old', {number}, 'None')"
            )
            ownership.record_version(connection, "old", number, **ACME, source="s", now=NOW)
        ownership.record_model(connection, "kept", **ACME, now=NOW)
        ownership.record_model(connection, "old", **ACME, now=NOW)
        ownership.record_version(connection, "old", 1, **ACME, source="s", now=NOW)
        before = contents(connection)
    upgrade("heads")
    ownership.prepare(engine)
    with engine.begin() as connection:
        assert contents(connection) == before
        connection.exec_driver_sql("DELETE FROM model_versions WHERE version = 2")
        connection.exec_driver_sql("UPDATE registered_models SET name = 'new'")
        assert ownership.rename_model(connection, "old", "new", NOW)
        assert ownership.version_owner(connection, "new", 1) == "acme"
        connection.exec_driver_sql("DELETE FROM model_versions")
        connection.exec_driver_sql("DELETE FROM registered_models")
    engine.dispose()

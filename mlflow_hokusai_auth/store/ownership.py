"""Ownership in MLflow's database: the tables are made here, and the gate's hooks read and write them.

The functions take a connection, so that a row is written in the transaction of the change of MLflow's
that it is about. Each statement is constant, and works on SQLite 3.35 and PostgreSQL 12. None begins
with WITH: Python's sqlite3 opens no transaction for such a statement, so a rollback would not undo it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateColumn, CreateIndex, CreateTable

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable, StoreError
from mlflow_hokusai_auth.core.isolation import DEFAULT_EXPERIMENT
from mlflow_hokusai_auth.core.ownership import highest
from mlflow_hokusai_auth.core.types import MOST_ISOLATION

from .database import first_line
from .ownership_tables import (
    EXPERIMENTS,
    GRANTS,
    METADATA,
    MODEL_ACCESS,
    MODELS,
    PREFIXES,
    VERSION,
    VERSIONS,
)

#: The version of the tables that this code makes and uses. In version 1 no version had a `location`.
TABLES_VERSION = 2
#: The stage of a model version that MLflow has deleted; its row stays.
DELETED = "Deleted_Internal"
#: The parts of MLflow's tables that are used here. `store` does not import MLflow.
MLFLOW_EXPERIMENTS = sa.table(
    "experiments",
    sa.column("experiment_id", sa.Integer),
    sa.column("name", sa.String),
    sa.column("creation_time", sa.BigInteger),
)
MLFLOW_MODELS = sa.table("registered_models", sa.column("name", sa.String))
MLFLOW_VERSIONS = sa.table(
    "model_versions",
    sa.column("name", sa.String),
    sa.column("version", sa.Integer),
    sa.column("creation_time", sa.BigInteger),
    sa.column("source", sa.String),
    sa.column("storage_location", sa.String),
    sa.column("current_stage", sa.String),
)
#: The value of `hokusai_versions.location` that follows from MLflow's row of the version.
_LOCATION = sa.func.rtrim(
    sa.func.coalesce(
        sa.func.nullif(MLFLOW_VERSIONS.c.storage_location, ""), MLFLOW_VERSIONS.c.source, ""
    ),
    "/",
    type_=sa.String,
)
_KEPT = MLFLOW_VERSIONS.c.current_stage.is_distinct_from(DELETED)
_SAME_VERSION = sa.and_(
    MLFLOW_VERSIONS.c.name == VERSIONS.c.name, MLFLOW_VERSIONS.c.version == VERSIONS.c.version
)
#: The versions that MLflow has, and this table not, or elsewhere; and the reverse. Outer joins, because
#: SQLite makes an index for them where MLflow's has another column first.
UNRECORDED = (
    sa.select(MLFLOW_VERSIONS.c.name, MLFLOW_VERSIONS.c.version)
    .select_from(MLFLOW_VERSIONS.outerjoin(VERSIONS, _SAME_VERSION))
    .where(_KEPT, VERSIONS.c.location.is_distinct_from(_LOCATION))
)
LEFT_OVER = (
    sa.select(VERSIONS.c.name, VERSIONS.c.version)
    .select_from(VERSIONS.outerjoin(MLFLOW_VERSIONS, sa.and_(_SAME_VERSION, _KEPT)))
    .where(MLFLOW_VERSIONS.c.name.is_(None))
)
_DIFFERENCES = (UNRECORDED, LEFT_OVER)

#: Characters of a prefix, at most.
_LONGEST = 256
#: The number of PostgreSQL's lock under which the tables are made.
_LOCK = 4857534150


def prepare(engine: sa.Engine) -> str:
    """Make the tables in MLflow's database, unless they exist. Several processes may call this at once.

    Return the isolation that was decided when the tables were made: the most if everything in the
    database had an owner, and otherwise "observe", because its users would be locked out of the rest.
    It stays, whatever is made afterwards.

    Raises StoreError if the tables can't be made or used, and AuthorityUnavailable if the database
    can't be reached.
    """
    if engine.dialect.name not in ("sqlite", "postgresql"):
        raise StoreError(
            f"Ownership works in SQLite and PostgreSQL; MLflow's tables are in {engine.dialect.name}."
        )
    with _explained():
        with engine.connect() as connection:
            if (found := _decided(connection)) is not None:
                return found
        with _locked(engine) as connection:
            return _decided(connection) or _make(connection)


def decided(engine: sa.Engine) -> str | None:
    """Return the isolation that was decided when the tables were made; None if they are missing.

    Raises StoreError and AuthorityUnavailable, as `prepare` does.
    """
    with _explained(), engine.connect() as connection:
        return _decided(connection)


def catch_up(engine: sa.Engine) -> None:
    """Make the rows of versions agree with MLflow's, which plain MLflow may have changed meanwhile.

    Reads all versions, and takes the lock only if some differ. Raises as `prepare` does.
    """
    with _explained():
        with engine.connect() as connection:
            if all(connection.execute(query.limit(1)).first() is None for query in _DIFFERENCES):
                return
        with _locked(engine) as connection:
            _catch_up(connection)


def _catch_up(connection: sa.Connection) -> None:
    connection.execute(_RECORD_ALL[connection.dialect.name])
    key = sa.tuple_(VERSIONS.c.name, VERSIONS.c.version)
    connection.execute(sa.delete(VERSIONS).where(key.in_(LEFT_OVER)))


@contextmanager
def _locked(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Yield a transaction that takes its lock now, so that a second process waits here."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
        yield connection
        connection.commit()


@contextmanager
def _explained() -> Iterator[None]:
    """Raise StoreError or AuthorityUnavailable for the database's errors."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        reason = first_line(error)
        if not _is_refused(error):
            raise AuthorityUnavailable(f"MLflow's database can't be used: {reason}") from None
        raise StoreError(
            f"The tables of ownership can't be made or used in MLflow's database: {reason}. Give its "
            "user the right to create tables there (on PostgreSQL: CREATE on the schema), or let a "
            "database administrator run what `hokusai-auth owners sql` prints, and let the user read "
            "and change these tables."
        ) from None
    except sa.exc.TimeoutError:
        raise AuthorityUnavailable("MLflow's database has no free connection") from None


def ddl(dialect: str) -> str:
    """Return the SQL that makes the tables, for people who may not let MLflow's user do it.

    `dialect` is "sqlite" or "postgresql".
    """
    spoken: sa.Dialect = {"sqlite": sqlite, "postgresql": postgresql}[dialect].dialect()
    statements: list[str] = []
    for table in METADATA.sorted_tables:
        made: list[CreateTable | CreateIndex] = [CreateTable(table, if_not_exists=True)]
        if table is VERSIONS and dialect == "postgresql":
            column = CreateColumn(VERSIONS.c.location).compile(dialect=spoken)
            statements.append(str(made.pop().compile(dialect=spoken)).strip())
            statements.append(f"ALTER TABLE {table.name} ADD COLUMN IF NOT EXISTS {column}")
        made += [
            CreateIndex(index, if_not_exists=True)
            for index in sorted(table.indexes, key=lambda index: str(index.name))
        ]
        statements += [str(statement.compile(dialect=spoken)).strip() for statement in made]
    statements.append(str(sa.delete(VERSION)))
    row = sa.insert(VERSION).values(version=TABLES_VERSION)
    statements.append(str(row.compile(dialect=spoken, compile_kwargs={"literal_binds": True})))
    lines = "".join(f"{statement.replace(chr(9), '    ')};\n" for statement in statements)
    return "".join(f"{line.rstrip()}\n" for line in lines.splitlines())


def has_mlflow_tables(connection: sa.Connection) -> bool:
    """Return whether MLflow has made its tables in this database."""
    inspector = sa.inspect(connection)
    return all(inspector.has_table(t.name) for t in (MLFLOW_EXPERIMENTS, MLFLOW_MODELS))


def unowned(connection: sa.Connection) -> tuple[int, int]:
    """Return the numbers of registered models and of experiments that nobody owns.

    MLflow's Default experiment, which can have no owner, does not count.
    """
    models, experiments = (connection.execute(query).scalar_one() for query in _UNOWNED)
    return models, experiments


def _make(connection: sa.Connection) -> str:
    """Make the tables, or what is missing of them, and decide the isolation unless it was."""
    for column in (VERSIONS.c.location, VERSION.c.isolation):
        _add(connection, column)
    METADATA.create_all(connection)
    for index in VERSIONS.indexes:
        index.create(connection, checkfirst=True)
    _catch_up(connection)
    decided = connection.execute(sa.select(VERSION.c.isolation)).scalar()
    decided = decided or ("observe" if any(unowned(connection)) else MOST_ISOLATION)
    row = {"version": TABLES_VERSION, "isolation": decided}
    if not connection.execute(sa.update(VERSION).values(row)).rowcount:
        connection.execute(sa.insert(VERSION).values(row))
    return decided


def _decided(connection: sa.Connection) -> str | None:
    """Return the decision, or None if the tables, or it, are missing.

    Raises StoreError for tables of a newer version.
    """
    if not has_mlflow_tables(connection):
        # MLflow makes its own tables in an empty database only.
        raise StoreError("This database has no tables of MLflow: start `mlflow server` on it once.")
    inspector = sa.inspect(connection)
    if not inspector.has_table(VERSION.name):
        return None
    version = connection.execute(sa.select(sa.func.max(VERSION.c.version))).scalar()
    if version is not None and version > TABLES_VERSION:
        raise StoreError(
            "The tables of ownership were made by a newer version of mlflow-hokusai-auth; run that one."
        )
    names = {column["name"] for column in inspector.get_columns(VERSION.name)}
    if version != TABLES_VERSION or VERSION.c.isolation.name not in names:
        return None
    return connection.execute(sa.select(VERSION.c.isolation)).scalar()


def _add(connection: sa.Connection, column: sa.Column[Any]) -> None:
    """Add a column that tables of an earlier version lack."""
    table = column.table.name
    inspector = sa.inspect(connection)
    if inspector.has_table(table) and column.name not in {
        one["name"] for one in inspector.get_columns(table)
    }:
        made = CreateColumn(column).compile(dialect=connection.dialect)
        connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN {made}")


def _is_refused(error: sa.exc.DBAPIError) -> bool:
    """Return whether the database's user lacks a right."""
    # psycopg has `sqlstate`, and psycopg2 has `pgcode`.
    codes = (getattr(error.orig, name, None) for name in ("sqlstate", "pgcode"))
    return (
        "42501" in codes  # insufficient_privilege
        or "readonly database" in str(error.orig)
    )


_Statements = Mapping[str, sa.Executable]


def _for_each_dialect(build: Callable[[Any], sa.Executable]) -> _Statements:
    """Return `build`'s statement by the name of a dialect; it gets the dialect's `insert`."""
    return {"sqlite": build(sqlite.insert), "postgresql": build(postgresql.insert)}


def _upsert(table: sa.Table) -> _Statements:
    """Return an INSERT that replaces the other columns of a row that exists."""

    def build(insert: Callable[[sa.Table], Any]) -> Any:
        new = insert(table)
        rest = [column.name for column in table.columns if not column.primary_key]
        return new.on_conflict_do_update(
            index_elements=list(table.primary_key), set_={name: new.excluded[name] for name in rest}
        )

    return _for_each_dialect(build)


def _claim(insert: Callable[[sa.Table], Any]) -> Any:
    new = insert(MODELS)
    return new.on_conflict_do_update(
        index_elements=[MODELS.c.name],
        set_={
            "key_id": new.excluded.key_id,
            "created_at": new.excluded.created_at,
            "gone_at": new.excluded.gone_at,
        },
        where=MODELS.c.owner == new.excluded.owner,
    ).returning(MODELS.c.name)


def covers(pattern: sa.ColumnElement[str], name: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    """Return `ownership.matches(pattern, name)` in SQL."""
    start = sa.func.substr(name, 1, sa.func.length(pattern) - 1, type_=sa.String)
    return sa.or_(pattern == name, pattern == start + "*")


def _expand(insert: Callable[[sa.Table], Any]) -> Any:
    name = sa.bindparam("model", type_=sa.String)
    grants = sa.select(
        GRANTS.c.id, name.label("model"), GRANTS.c.grantee, GRANTS.c.level, GRANTS.c.expires_at
    ).where(
        sa.or_(
            GRANTS.c.granted_by == sa.bindparam("by", type_=sa.String), GRANTS.c.granted_by == ""
        ),
        covers(GRANTS.c.pattern, name),
    )
    columns = ["grant_id", "name", "grantee", "level", "expires_at"]
    return insert(MODEL_ACCESS).from_select(columns, grants).on_conflict_do_nothing()


def _expand_to(models: Any, *conditions: sa.ColumnElement[bool]) -> _Statements:
    """Return an INSERT of the access that a grant gives to those of `models` that it covers."""
    grant = [
        sa.bindparam(name, type_=column.type).label(name)
        for name, column in (
            ("grant", GRANTS.c.id),
            ("to", GRANTS.c.grantee),
            ("allowed", GRANTS.c.level),
            ("until", GRANTS.c.expires_at),
        )
    ]
    pattern = sa.bindparam("covers", type_=sa.String)
    covered = sa.select(models.c.name, *grant).where(covers(pattern, models.c.name), *conditions)
    columns = ["name", "grant_id", "grantee", "level", "expires_at"]
    return _for_each_dialect(
        lambda insert: insert(MODEL_ACCESS).from_select(columns, covered).on_conflict_do_nothing()
    )


def _give(insert: Callable[[sa.Table], Any]) -> Any:
    new = insert(MODELS)
    return new.on_conflict_do_update(
        index_elements=[MODELS.c.name],
        set_={name: new.excluded[name] for name in ("owner", "key_id", "gone_at")},
    )


def _record_all(insert: Callable[[sa.Table], Any]) -> Any:
    # With workspaces several versions may have the same name and number.
    one = [MLFLOW_VERSIONS.c.name, MLFLOW_VERSIONS.c.version]
    created = sa.func.coalesce(sa.func.max(MLFLOW_VERSIONS.c.creation_time), 0) / 1000.0
    missing = UNRECORDED.with_only_columns(
        *one,
        sa.literal("").label("owner"),
        sa.literal("").label("key_id"),
        sa.cast(created, sa.Float(53)).label("created_at"),
        sa.func.coalesce(sa.func.max(MLFLOW_VERSIONS.c.source), "").label("source"),
        sa.func.max(_LOCATION).label("location"),
    ).group_by(*one)
    columns = ["name", "version", "owner", "key_id", "created_at", "source", "location"]
    new = insert(VERSIONS).from_select(columns, missing)
    return new.on_conflict_do_update(
        index_elements=list(VERSIONS.primary_key), set_={"location": new.excluded.location}
    )


_CLAIM = _for_each_dialect(_claim)
_GIVE = _for_each_dialect(_give)
_EXPAND_OWNERS = _expand_to(
    MODELS, MODELS.c.owner == sa.bindparam("by", type_=sa.String), MODELS.c.gone_at.is_(None)
)
_EXPAND_OPERATORS = _expand_to(MLFLOW_MODELS)
_EXPAND = _for_each_dialect(_expand)
_RECORD_EXPERIMENT = _upsert(EXPERIMENTS)
_RECORD_VERSION = _upsert(VERSIONS)
_RECORD_ALL = _for_each_dialect(_record_all)

#: An experiment's row counts only while it is about the same experiment: SQLite uses ids again.
SAME_EXPERIMENT = sa.and_(
    EXPERIMENTS.c.experiment_id == MLFLOW_EXPERIMENTS.c.experiment_id,
    EXPERIMENTS.c.experiment_created_at.is_not_distinct_from(MLFLOW_EXPERIMENTS.c.creation_time),
)
_UNOWNED = (
    sa.select(sa.func.count())
    .select_from(MLFLOW_MODELS.outerjoin(MODELS, MODELS.c.name == MLFLOW_MODELS.c.name))
    .where(MODELS.c.name.is_(None)),
    sa.select(sa.func.count())
    .select_from(MLFLOW_EXPERIMENTS.outerjoin(EXPERIMENTS, SAME_EXPERIMENT))
    .where(
        EXPERIMENTS.c.experiment_id.is_(None),
        MLFLOW_EXPERIMENTS.c.experiment_id != DEFAULT_EXPERIMENT,
    ),
)

_name = sa.bindparam("named", type_=sa.String)
_new_name = sa.bindparam("new_name", type_=sa.String)
_MODEL_OWNER = sa.select(MODELS.c.owner).where(MODELS.c.name == _name)
_MODELS_NAMED = sa.select(MODELS).where(MODELS.c.name.in_([_name, _new_name]))
_VERSION_OWNER = sa.select(VERSIONS.c.owner).where(
    VERSIONS.c.name == _name,
    VERSIONS.c.version == sa.bindparam("number", type_=sa.Integer),
    VERSIONS.c.owner != "",
)
_MOVE_VERSION = (
    sa.update(VERSIONS)
    .where(VERSIONS.c.name == _name, VERSIONS.c.version == sa.bindparam("number", type_=sa.Integer))
    .values(location=sa.bindparam("place", type_=sa.String))
)
_EXPERIMENT_OWNER = (
    sa.select(EXPERIMENTS.c.owner)
    .join(MLFLOW_EXPERIMENTS, SAME_EXPERIMENT)
    .where(EXPERIMENTS.c.experiment_id == sa.bindparam("id", type_=sa.Integer))
)
_ACCESS = sa.select(MODEL_ACCESS.c.level).where(
    MODEL_ACCESS.c.grantee == sa.bindparam("owner", type_=sa.String),
    MODEL_ACCESS.c.name == _name,
    sa.or_(
        MODEL_ACCESS.c.expires_at.is_(None),
        MODEL_ACCESS.c.expires_at > sa.bindparam("now", type_=sa.Float(53)),
    ),
)
_PREFIX_OWNER = sa.select(PREFIXES.c.owner).where(
    PREFIXES.c.kind == sa.bindparam("kind", type_=sa.String),
    PREFIXES.c.prefix.in_(sa.bindparam("beginnings", type_=sa.String, expanding=True)),
)
_MODEL_GONE = (
    sa.update(MODELS)
    .where(MODELS.c.name == _name)
    .values(gone_at=sa.bindparam("now", type_=sa.Float(53)))
)
_VERSION_GONE = sa.delete(VERSIONS).where(
    VERSIONS.c.name == _name, VERSIONS.c.version == sa.bindparam("number", type_=sa.Integer)
)
_FORGET = [sa.delete(table).where(table.c.name == _name) for table in (VERSIONS, MODEL_ACCESS)]
_CARRY = [
    sa.update(table).where(table.c.name == _name).values(name=_new_name)
    for table in (VERSIONS, MODEL_ACCESS)
]
_CARRY_GRANTS = (
    sa.update(GRANTS)
    .where(
        GRANTS.c.pattern == _name,
        sa.or_(
            GRANTS.c.granted_by == sa.bindparam("by", type_=sa.String), GRANTS.c.granted_by == ""
        ),
    )
    .values(pattern=_new_name)
)


def record_model(
    connection: sa.Connection, name: str, *, owner: str, key_id: str, now: float
) -> bool:
    """Record that `owner` made the registered model `name`, and the grants that cover it.

    A name that its owner has given up is revived. Returns False, and changes nothing, if the name
    belongs to another owner. It forgets versions, so call it before `record_version`. `now` is in
    seconds since the epoch.
    """
    row = {"name": name, "owner": owner, "key_id": key_id, "created_at": now, "gone_at": None}
    if not _claimed(connection, row):
        return False
    # Plain MLflow on the database may have deleted an earlier model of this name, and left our rows.
    _forget(connection, name)
    expand_model(connection, name, owner)
    return True


def expand_model(connection: sa.Connection, name: str, owner: str) -> None:
    """Add the grants that cover the model `name` of `owner` ("" for none) to those that it has."""
    connection.execute(_EXPAND[connection.dialect.name], {"model": name, "by": owner})


def expand_grant(connection: sa.Connection, grant: Mapping[str, Any]) -> int:
    """Record the models that a new row of `GRANTS` covers now; return their number."""
    statements = _EXPAND_OWNERS if grant["granted_by"] else _EXPAND_OPERATORS
    row = {"grant": grant["id"], "to": grant["grantee"], "allowed": grant["level"]}
    row |= {"until": grant["expires_at"], "covers": grant["pattern"]}
    if grant["granted_by"]:
        row["by"] = grant["granted_by"]
    connection.execute(statements[connection.dialect.name], row)
    covered = sa.select(sa.func.count()).where(MODEL_ACCESS.c.grant_id == grant["id"])
    return int(connection.execute(covered).scalar_one())


def give_model(
    connection: sa.Connection,
    name: str,
    *,
    owner: str,
    key_id: str,
    now: float,
    gone_at: float | None,
) -> None:
    """Make `owner` the owner of the name of a model, whoever had it before."""
    row = {"name": name, "owner": owner, "key_id": key_id, "created_at": now, "gone_at": gone_at}
    connection.execute(_GIVE[connection.dialect.name], row)


def record_experiment(
    connection: sa.Connection,
    experiment_id: int,
    *,
    owner: str,
    key_id: str,
    created_at: int | None,
) -> None:
    """Record that `owner` made the experiment; `created_at` is MLflow's `creation_time`, as it is.

    A row of an earlier experiment with this id is replaced.
    """
    row = {"experiment_id": experiment_id, "owner": owner, "key_id": key_id}
    connection.execute(
        _RECORD_EXPERIMENT[connection.dialect.name], {**row, "experiment_created_at": created_at}
    )


def record_version(
    connection: sa.Connection,
    name: str,
    version: int,
    *,
    owner: str,
    key_id: str,
    source: str,
    now: float,
    location: str | None = None,
) -> None:
    """Record that `owner` ("" for nobody) made this version from `source`.

    `location` is MLflow's `storage_location`; without one, the files are at the source. `now` is in
    seconds since the epoch.
    """
    row = {"name": name, "version": version, "owner": owner, "key_id": key_id, "source": source}
    row |= {"created_at": now, "location": (location or source).rstrip("/")}
    connection.execute(_RECORD_VERSION[connection.dialect.name], row)


def move_version(connection: sa.Connection, name: str, version: int, location: str) -> None:
    """Record that the files of a model version are at `location` now."""
    row = {"named": name, "number": version, "place": location.rstrip("/")}
    connection.execute(_MOVE_VERSION, row)


def model_owner(connection: sa.Connection, name: str) -> str | None:
    """Return the owner of a registered model's name, also after its end; None if nobody owns it."""
    return connection.execute(_MODEL_OWNER, {"named": name}).scalar()


def experiment_owner(connection: sa.Connection, experiment_id: int) -> str | None:
    """Return the owner of the experiment that MLflow has under this id; None if nobody owns it."""
    return connection.execute(_EXPERIMENT_OWNER, {"id": experiment_id}).scalar()


def version_owner(connection: sa.Connection, name: str, version: int) -> str | None:
    """Return the owner of a model version; None if nobody owns it."""
    return connection.execute(_VERSION_OWNER, {"named": name, "number": version}).scalar()


def is_registered(
    connection: sa.Connection, uris: Collection[str], above: Iterable[str] = ()
) -> bool:
    """Return whether a version's location is one of `uris`, or below one of `above`.

    None of them may end in a slash.
    """
    location = VERSIONS.c.location
    found = [sa.select(location).where(location.in_(uris))]
    for uri in above:
        # A text that begins with "uri/" sorts below "uri0", because 0 comes after the slash. The order
        # makes PostgreSQL use the index: with a limit alone it hopes to meet a row soon, and reads them
        # all.
        below = sa.select(location).where(location >= f"{uri}/", location < f"{uri}0")
        found.append(sa.select(below.order_by(location).limit(1).subquery()))
    return connection.execute(sa.union_all(*found)).first() is not None


def access(connection: sa.Connection, owner: str, name: str, now: float) -> str | None:
    """Return the highest level that grants give `owner` on the model `name` at `now`, or None.

    The model's own owner needs no grant: see `model_owner`.
    """
    rows = connection.execute(_ACCESS, {"owner": owner, "named": name, "now": now})
    return highest(rows.scalars())


def prefix_owner(connection: sa.Connection, kind: str, name: str) -> str | None:
    """Return the owner for whom names like `name` are reserved; None if they are free.

    `kind` is "model" or "experiment".
    """
    # The index finds each beginning; comparing the name with every prefix would take all owners'.
    beginnings = [name[:end] for end in range(1, min(len(name), _LONGEST) + 1)]
    return connection.execute(_PREFIX_OWNER, {"kind": kind, "beginnings": beginnings}).scalar()


def rename_model(connection: sa.Connection, old: str, new: str, now: float) -> bool:
    """Record that the model `old` is called `new` now: its owner, versions and grants go along.

    The old name stays its owner's. Returns False, and changes nothing, if the new name belongs to
    another owner.
    """
    if old == new:
        return True
    found = connection.execute(_MODELS_NAMED, {"named": old, "new_name": new}).mappings()
    rows = {row["name"]: row for row in found}
    before = rows.get(old)
    if new in rows and (before is None or before["owner"] != rows[new]["owner"]):
        return False
    names = {"named": old, "new_name": new}
    if before is not None:
        if not _claimed(connection, {**before, "name": new, "gone_at": None}):
            return False
        connection.execute(_MODEL_GONE, {"named": old, "now": now})
    owner = "" if before is None else before["owner"]
    _forget(connection, new)
    for statement in _CARRY:
        connection.execute(statement, names)
    if not old.endswith("*") and not new.endswith("*"):
        # As a pattern, a name that ends in `*` would cover other models.
        connection.execute(_CARRY_GRANTS, {**names, "by": owner})
    expand_model(connection, new, owner)
    return True


def model_gone(connection: sa.Connection, name: str, now: float) -> None:
    """Record that the registered model was deleted. Its name stays its owner's."""
    connection.execute(_MODEL_GONE, {"named": name, "now": now})
    _forget(connection, name)


def version_gone(connection: sa.Connection, name: str, version: int) -> None:
    """Record that the model version was deleted. MLflow does not use its number again."""
    connection.execute(_VERSION_GONE, {"named": name, "number": version})


def _claimed(connection: sa.Connection, row: Mapping[str, Any]) -> bool:
    """Insert or revive a row of `MODELS`; return whether its owner has the name now."""
    # The number of rows is unknown after an INSERT on PostgreSQL, so the statement returns the row.
    return connection.execute(_CLAIM[connection.dialect.name], row).first() is not None


def _forget(connection: sa.Connection, name: str) -> None:
    """Delete the versions of the model `name`, and the access to it."""
    for statement in _FORGET:
        connection.execute(statement, {"named": name})

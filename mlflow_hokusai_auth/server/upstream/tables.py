"""MLflow's database: the models of its tables, and every query that the server sends to them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from mlflow.entities.logged_model_status import LoggedModelStatus
from mlflow.store.db.base_sql_model import Base
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.store.db.utils import create_sqlalchemy_engine
from mlflow.store.model_registry.dbmodels.models import (
    SqlModelVersion,
    SqlModelVersionTag,
    SqlRegisteredModel,
    SqlRegisteredModelAlias,
    SqlRegisteredModelTag,
)
from mlflow.store.tracking.dbmodels.models import (
    SqlDataset,
    SqlExperiment,
    SqlExperimentTag,
    SqlInput,
    SqlLoggedModel,
    SqlLoggedModelTag,
    SqlRun,
    SqlTag,
    SqlTraceInfo,
    SqlTraceTag,
)
from mlflow.utils.mlflow_tags import MLFLOW_ARTIFACT_LOCATION, MLFLOW_USER
from mlflow.utils.uri import append_to_uri_path, resolve_uri_if_local
from sqlalchemy.engine import Connection

from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.store.ownership import DELETED
from mlflow_hokusai_auth.store.ownership_tables import VERSIONS

from . import stores
from .artifact_roots import REGISTRY, TRACKING

__all__ = [
    "CLIENT_USER",
    "DELETED",
    "TRACE_LOCATION",
    "TRACE_LOCATIONS",
    "SqlExperiment",
    "SqlExperimentTag",
    "SqlLoggedModel",
    "SqlLoggedModelTag",
    "SqlModelVersion",
    "SqlModelVersionTag",
    "SqlRegisteredModel",
    "SqlRegisteredModelTag",
    "SqlRun",
    "SqlTag",
    "SqlTraceTag",
]

#: The tag of a run with the user's name on the client's computer.
CLIENT_USER = MLFLOW_USER
#: The tag that holds the location of a trace's files.
TRACE_LOCATION = MLFLOW_ARTIFACT_LOCATION
#: That tag, and the one for the files of a trace that newer versions of MLflow have archived.
TRACE_LOCATIONS = frozenset({TRACE_LOCATION, "mlflow.trace.archiveLocation"})

#: The location of a version's files, and whether the version is not deleted.
_VERSION_LOCATION = sa.func.coalesce(SqlModelVersion.storage_location, SqlModelVersion.source)
_KEPT = SqlModelVersion.current_stage != DELETED

_RECORDED = sa.and_(
    VERSIONS.c.name == SqlModelVersion.name, VERSIONS.c.version == SqlModelVersion.version
)

#: The status of a logged model that is finished.
READY = LoggedModelStatus.READY.to_int()
#: The classes of tags, with the attribute that holds the key.
TAG_KEYS: dict[Any, str] = {
    mapper.class_: "tag_key" if "tag_key" in mapper.columns else "key"
    for mapper in Base.registry.mappers
    # The tags of inputs, which say what a dataset is for, have no key but a name.
    if mapper.local_table.name.endswith("tags") and mapper.local_table.name != "input_tags"
}
#: Their tables, with that attribute's column.
TAG_COLUMNS = {sa.inspect(model).local_table: key for model, key in TAG_KEYS.items()}


def is_database(uri: str) -> bool:
    """Return whether a store's `uri` names a database, and not a folder of files."""
    return uri.startswith(tuple(DATABASE_ENGINES))


@contextlib.contextmanager
def connect(uri: str) -> Iterator[Connection]:
    """Connect to the database at `uri`, with an engine that is disposed of afterwards."""
    engine = create_sqlalchemy_engine(uri)
    try:
        with callers.seeing_all("the server's own look"), engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


@contextlib.contextmanager
def tracking(registry: Connection) -> Iterator[Connection]:
    """Connect to the database of runs: by `registry` itself, if the model registry is in it too."""
    engine = stores.tracking_engine()
    if engine is None or engine.url == registry.engine.url:
        yield registry
        return
    with engine.connect() as connection:
        yield connection


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts that a statement selects, read when they are iterated over."""

    connection: Connection
    statement: sa.Select[Any]

    def __iter__(self) -> Iterator[str]:
        return (text for (text,) in self.connection.execute(self.statement) if text)


def stored_locations() -> Iterator[tuple[str, str]]:
    """Yield the locations of experiments with their number, and of model versions with ""."""
    database = os.environ.get(TRACKING, "")
    queries = (
        (database, sa.select(SqlExperiment.artifact_location, SqlExperiment.experiment_id)),
        (os.environ.get(REGISTRY) or database, sa.select(_VERSION_LOCATION, sa.null()).distinct()),
    )
    for uri, query in queries:
        if not is_database(uri):
            continue
        with connect(uri) as connection:
            for location, number in connection.execution_options(yield_per=1000).execute(query):
                if location:
                    yield str(location), "" if number is None else str(number)


def chosen_folders(connection: Connection, default_root: str) -> Texts:
    """Return the locations of experiments, but not those that MLflow made up from their numbers."""
    query = sa.select(SqlExperiment.artifact_location)
    root = resolve_uri_if_local(default_root).rstrip("/") + "/"
    if default_root and append_to_uri_path(root, "1") == f"{root}1":
        # A location with a number is judged without a query, and most locations are of that kind.
        number = sa.cast(SqlExperiment.experiment_id, sa.String(20))
        query = query.where(SqlExperiment.artifact_location != sa.literal(root) + number)
    return Texts(connection, query)


def trace_location(trace: str, connection: Connection) -> str | None:
    """Return where MLflow keeps the files of the trace with this id; None if there is no such trace."""
    query = sa.select(SqlExperiment.artifact_location).join(
        SqlTraceInfo, SqlTraceInfo.experiment_id == SqlExperiment.experiment_id
    )
    root = connection.execute(query.where(SqlTraceInfo.request_id == trace)).scalar()
    return append_to_uri_path(root, "traces", trace, "artifacts") if root else None


def owner_locations(ids: Iterable[str], connection: Connection) -> Iterator[str]:
    """Yield the locations of the runs and of the logged models with these ids."""
    ids = tuple(ids)
    yield from Texts(connection, sa.select(SqlRun.artifact_uri).where(SqlRun.run_uuid.in_(ids)))
    models = sa.select(SqlLoggedModel.artifact_location).where(SqlLoggedModel.model_id.in_(ids))
    yield from Texts(connection, models)


def version_locations(uri: str, connection: Connection, *, recorded: bool) -> Texts:
    """Return the locations of model versions at or above `uri`.

    All versions are read, unless they are `recorded` in the tables of ownership.
    """
    whole = uri.rstrip("/")
    ends = [i for i, letter in enumerate(whole) if letter == "/"] + [len(whole)]
    above = [whole[:end] for end in ends if whole[:end]]
    column = SqlModelVersion.storage_location
    query = sa.select(column).where(_KEPT)
    if recorded:
        query = query.join(VERSIONS, _RECORDED).where(
            VERSIONS.c.location.in_(above), *_at_home(SqlModelVersion)
        )
    else:
        query = query.where(column.in_(_ended(above)))
    return Texts(connection, query)


def has_run(run_id: str, connection: Connection) -> bool:
    """Return whether there is a run with this id."""
    return _has(connection, SqlRun.run_uuid, run_id)


def has_logged_model(model_id: str, connection: Connection) -> bool:
    """Return whether there is a logged model with this id."""
    return _has(connection, SqlLoggedModel.model_id, model_id)


def has_version(name: str, connection: Connection) -> bool:
    """Return whether the registered model `name` has a version."""
    return _has(connection, SqlModelVersion.name, name, *_at_home(SqlModelVersion))


def has_registered_model(name: str, connection: Connection) -> bool:
    """Return whether there is a registered model of this name."""
    return _has(connection, SqlRegisteredModel.name, name, *_at_home(SqlRegisteredModel))


def experiment_named(name: str, connection: Connection) -> int | None:
    """Return the number of the experiment of this name; None if there is none."""
    query = sa.select(SqlExperiment.experiment_id).where(
        SqlExperiment.name == name, *_at_home(SqlExperiment)
    )
    number = connection.execute(query).scalar()
    return None if number is None else int(number)


#: The column with the number of the experiment, and that with the id, by what is in an experiment.
_IN_EXPERIMENT: dict[str, tuple[Any, Any]] = {
    "run": (SqlRun.experiment_id, SqlRun.run_uuid),
    "logged model": (SqlLoggedModel.experiment_id, SqlLoggedModel.model_id),
    "dataset": (SqlDataset.experiment_id, SqlDataset.dataset_uuid),
}


def experiment_of(kind: str, name: str, connection: Connection) -> int | None:
    """Return the number of the experiment that holds a run, a logged model or a dataset."""
    experiment, key = _IN_EXPERIMENT[kind]
    number = connection.execute(sa.select(experiment).where(key == name)).scalar()
    return None if number is None else int(number)


def experiments_of(
    things: Iterable[tuple[str, str]], connection: Connection
) -> dict[tuple[str, str], int]:
    """Return the numbers of the experiments of those of `things`, by kind and id, that exist."""
    things = tuple(things)
    found: list[sa.Select[Any]] = []
    for kind in ("run", "logged model"):
        experiment, key = _IN_EXPERIMENT[kind]
        ids = [name for other, name in things if other == kind]
        if ids:
            found.append(sa.select(sa.literal(kind), key, experiment).where(key.in_(ids)))
    rows = connection.execute(sa.union_all(*found)) if found else ()
    return {(kind, name): int(number) for kind, name, number in rows}


def experiments_at(uris: Iterable[str], connection: Connection) -> list[tuple[int, str]]:
    """Return the numbers of the experiments whose location is one of `uris`, with their location."""
    location = SqlExperiment.artifact_location
    query = sa.select(SqlExperiment.experiment_id, location).where(location.in_(_ended(uris)))
    return [(int(number), str(uri)) for number, uri in connection.execute(query)]


def versions_at(uris: Iterable[str], connection: Connection) -> list[tuple[str, int, str]]:
    """Return name, version and location of the model versions whose location is one of `uris`.

    The tables of ownership find them, and MLflow's own rows decide. No URI may end in a slash.
    """
    query = (
        sa.select(SqlModelVersion.name, SqlModelVersion.version, _VERSION_LOCATION)
        .join(VERSIONS, _RECORDED)
        .where(VERSIONS.c.location.in_(tuple(uris)), _KEPT, *_at_home(SqlModelVersion))
    )
    return [(name, int(version), uri) for name, version, uri in connection.execute(query)]


def runs_of_versions_at(uris: Iterable[str], connection: Connection) -> list[str | None]:
    """Return the runs of the model versions whose location is one of `uris`: see `versions_at`."""
    query = (
        sa.select(SqlModelVersion.run_id)
        .join(VERSIONS, _RECORDED)
        .where(VERSIONS.c.location.in_(tuple(uris)), _KEPT, *_at_home(SqlModelVersion))
    )
    return list(connection.execute(query).scalars())


def _ended(uris: Iterable[str]) -> list[str]:
    """Return `uris`, with and without a slash at their end."""
    return [uri + slash for uri in uris for slash in ("", "/")]


def logged_models(
    ids: Iterable[str], connection: Connection
) -> list[tuple[str, bool, str | None, str]]:
    """Return id, whether it is ready, the run and the name of each logged model with one of `ids`."""
    query = sa.select(
        SqlLoggedModel.model_id,
        SqlLoggedModel.status == READY,
        SqlLoggedModel.source_run_id,
        SqlLoggedModel.name,
    ).where(SqlLoggedModel.model_id.in_(tuple(ids)))
    return [
        (model, bool(ready), run, name) for model, ready, run, name in connection.execute(query)
    ]


def run_of_input(input_uuid: str, connection: Connection) -> str | None:
    """Return the run that a row of `inputs` is about, whichever of its ends that is."""
    query = sa.select(
        SqlInput.source_type, SqlInput.source_id, SqlInput.destination_type, SqlInput.destination_id
    ).where(SqlInput.input_uuid == input_uuid)
    row = connection.execute(query).first()
    if row is None:
        return None
    return str(row[1] if row[0].startswith("RUN") else row[3])


def stage(name: str, version: int, connection: Connection) -> str | None:
    """Return the stage of a model version."""
    query = sa.select(SqlModelVersion.current_stage).where(
        SqlModelVersion.name == name,
        SqlModelVersion.version == version,
        *_at_home(SqlModelVersion),
    )
    return connection.execute(query).scalar()


def aliases(name: str, version: int | None, connection: Connection) -> list[str]:
    """Return the aliases that point to a model version, or with None, to any version of the model."""
    query = sa.select(SqlRegisteredModelAlias.alias).where(
        SqlRegisteredModelAlias.name == name, *_at_home(SqlRegisteredModelAlias)
    )
    if version is not None:
        query = query.where(SqlRegisteredModelAlias.version == version)
    return list(connection.execute(query).scalars())


def named_in(text: str) -> list[str]:
    """Return the words of a statement that are names of MLflow's tables, each once."""
    # SQL's own names have no case.
    words = dict.fromkeys(re.findall(r"\w+", text.lower()))
    return [word for word in words if word in Base.metadata.tables]


def of_mlflow(table: str, text: str) -> frozenset[str]:
    """Return `table` if it is MLflow's; if a statement has no table, those that its text names."""
    return frozenset([table] if table in Base.metadata.tables else [] if table else named_in(text))


def _at_home(model: Any) -> tuple[sa.ColumnElement[bool], ...]:
    """Return the condition with which rows of `model` are found by a key that begins with a workspace.

    Unless workspaces are enabled, MLflow has all rows in one, and it does not start otherwise.
    """
    workspace = getattr(model, "workspace", None)
    return () if workspace is None or stores.has_workspaces() else (workspace == "default",)


def _has(
    connection: Connection, column: Any, value: str, *conditions: sa.ColumnElement[bool]
) -> bool:
    query = sa.select(sa.literal(1)).where(column == value, *conditions).limit(1)
    return connection.execute(query).first() is not None

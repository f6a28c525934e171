"""The check of locations that clients send, at the place where MLflow stores them.

Whatever the route, an experiment, a model version or a trace's tag becomes a row of MLflow's tables,
which SQLAlchemy's mappers write. The mappers call `Stored` with the row before they write it. An
exception rolls back the row's transaction.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import inspect
from sqlalchemy.engine import Connection

from mlflow_hokusai_auth.core.locations import (
    PROMPT_SOURCES,
    Location,
    Reference,
    Roots,
    location_problem,
    outside_problem,
    owners_named,
    read,
    reference,
    source_problem,
)
from mlflow_hokusai_auth.core.policy import Policy, is_admin
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server import metrics
from mlflow_hokusai_auth.server.upstream import tables
from mlflow_hokusai_auth.server.upstream.artifact_roots import (
    SETTING,
    Watch,
    is_local,
    local_place,
)
from mlflow_hokusai_auth.server.upstream.experiment_folders import ExperimentFolders
from mlflow_hokusai_auth.server.upstream.tables import (
    DELETED,
    TRACE_LOCATION,
    TRACE_LOCATIONS,
    SqlExperiment,
    SqlModelVersion,
    SqlRegisteredModel,
    SqlTraceTag,
)

from .artifacts import Artifacts
from .hooks import Hooks, Listener

_WARNING = (
    "Warning",
    f'299 hokusai-auth "This location is outside the artifact roots of the server, which does not open '
    f'it unless {SETTING} names it."',
)


@dataclass(frozen=True, slots=True)
class Stored(Hooks):
    """Refuses MLflow's rows with a location that the caller may not choose."""

    roots: Roots
    policy: Policy
    watch: Watch
    folders: ExperimentFolders
    #: The further check of sources, for callers whom isolation confines.
    artifacts: Artifacts | None = None

    def listeners(self) -> Iterable[Listener]:
        """Return the listeners that check each row that this process stores."""
        for model, check in (
            # Names come first, so that the log has the name of a refused registration, too.
            (SqlRegisteredModel, _log_name),
            (SqlModelVersion, _log_name),
            (SqlExperiment, self.experiment),
            (SqlModelVersion, self.version),
            (SqlTraceTag, self.trace_tag),
        ):
            for name in ("before_insert", "before_update"):
                yield Listener(model, name, check)
        yield Listener(SqlRegisteredModel, "before_delete", _log_name)

    def experiment(self, _: object, connection: Connection, row: SqlExperiment) -> None:
        """Raise MlflowException if the caller may not choose the row's location."""
        uri, before = _change(row, "artifact_location")
        # If an experiment has no location, MLflow makes one up after the first write of its row,
        # because it needs the row's number.
        made_up = inspect(row).persistent and not before
        if not uri or (made_up and read(uri).parts[-1:] == (str(row.experiment_id),)):
            return
        if self._passes(uri, "artifact_location"):
            return
        others = _Experiments(self.folders, connection)
        if problem := location_problem(uri, self.roots, others):
            self.watch.refuse(
                "LOCATION_REFUSED",
                "artifact_location",
                uri,
                f"An experiment can't have its artifacts at this artifact_location: {problem}. Leave "
                "artifact_location out, or name a folder of its own below mlflow-artifacts:/ "
                f"(or the server's artifact root). The server's operator may set {SETTING} for more.",
            )

    def version(self, _: object, connection: Connection, row: SqlModelVersion) -> None:
        """Raise MlflowException if the caller may not choose the row's source, or its run."""
        if row.current_stage == DELETED:  # MLflow overwrites the source of a deleted version
            return
        source, _ = _change(row, "source")
        storage, _ = _change(row, "storage_location")
        for uri in dict.fromkeys(filter(None, (source, storage))):
            # MLflow has replaced a reference to a model or version by the location that it names.
            derived = uri == storage != source and reference(read(row.source or ""))
            if derived and self.artifacts is not None:
                self.artifacts.check_copy(uri, row.name, connection)
            if derived or uri in PROMPT_SOURCES or self._passes(uri, "source"):
                continue
            if problem := self._source_problem(uri, connection):
                self.watch.refuse(
                    "SOURCE_REFUSED",
                    "source",
                    uri,
                    f"A model version can't have this source: {problem}. Register the files of a run "
                    "or of a logged model (runs:/…, models:/…, or their artifact URI), or of a folder "
                    "of its own in the server's artifact roots. The server's operator may set "
                    f"{SETTING} for more.",
                )
            if self.artifacts is not None:
                self.artifacts.check_source(uri, row.name, connection)
        run, _ = _change(row, "run_id")
        if run and self.artifacts is not None:
            places = filter(None, (row.source, row.storage_location))
            self.artifacts.check_run(run, places, connection)

    def trace_tag(self, _: object, connection: Connection, row: SqlTraceTag) -> None:
        """Raise MlflowException if the row places a trace's files where MLflow would not."""
        uri, _before = _change(row, "value")
        if row.key not in TRACE_LOCATIONS or not uri or self._passes(uri, "trace"):
            return
        if row.key != TRACE_LOCATION or uri != _trace_location(row.request_id, connection):
            self.watch.refuse(
                "LOCATION_REFUSED",
                "trace",
                uri,
                "A client can't choose where the files of a trace are; MLflow does. Leave out the tag "
                f"{row.key}, and use a trace id without characters that make it a path.",
            )

    @property
    def _has_records(self) -> bool:
        return self.artifacts is not None and self.artifacts.facts.usable

    def _passes(self, uri: str, kind: str) -> bool:
        """Return whether the caller may store any `uri`. Warn them if the server won't open it."""
        caller = callers.current.get()
        if not self.watch.looks or caller.principal is None:
            return True
        if not is_admin(caller.principal, self.policy):
            return False
        location = read(uri)
        place = (
            local_place(uri) if is_local(uri) and "\0" not in uri else self.roots.place(location)
        )
        opened = reference(location) is not None or uri in PROMPT_SOURCES
        if not opened and self.roots.root_of(place) is None and caller.answer is not None:
            metrics.LOCATIONS.labels(kind, "stored").inc()
            if _WARNING not in caller.answer:
                caller.answer.append(_WARNING)
        return True

    def _source_problem(self, uri: str, connection: Connection) -> str | None:
        location = read(uri)
        # The query below grows with the square of the location's length.
        if location.odd:
            return location.odd
        with tables.tracking(connection) as tracking:
            if (named := reference(location)) is not None:
                return _missing(named, tracking, connection)
            if self.artifacts is not None and self.artifacts.owns(uri, tracking):
                return outside_problem(uri, self.roots)
            return source_problem(
                uri,
                self.roots,
                tables.owner_locations(owners_named(location), tracking),
                tables.version_locations(uri, connection, recorded=self._has_records),
                _Experiments(self.folders, tracking),
            )


def _log_name(_: object, __: Connection, row: SqlRegisteredModel | SqlModelVersion) -> None:
    """Note the registered model's name, and the version's, for the decision log of the request."""
    named = callers.current.get().named
    if named is not None:
        named["model"] = str(row.name)
        if isinstance(row, SqlModelVersion):
            named["version"] = str(row.version)


def _trace_location(trace: str, connection: Connection) -> str | None:
    """Return where MLflow keeps the files of `trace`; None if its id is not the name of one folder."""
    name = read(f"/{trace}")
    if name.odd or len(name.parts) != 1:
        return None
    return tables.trace_location(trace, connection)


def _change(row: Any, name: str) -> tuple[str | None, str | None]:
    """Return the attribute's new value (None if it stays the same) and its old one."""
    history = inspect(row).attrs[name].history
    return next(iter(history.added or ()), None), next(iter(history.deleted or ()), None)


@dataclass(frozen=True, slots=True)
class _Experiments:
    """The folders of experiments as a transaction sees them, read only when a decision needs them."""

    folders: ExperimentFolders
    connection: Connection

    def overlaps(self, place: Location) -> bool:
        return self.folders.read_by(self.connection).overlaps(place)

    def holds(self, place: Location) -> bool:
        return self.folders.read_by(self.connection).holds(place)


def _missing(named: Reference, tracking: Connection, registry: Connection) -> str | None:
    """Return why `named` can't be registered if there is no such run, model or version."""
    if named.kind == "run":
        exists = tables.has_run(named.name, tracking)
    elif named.kind == "model":
        exists = tables.has_logged_model(named.name, tracking)
    else:
        # The version, stage or alias isn't checked: MLflow stores no source if it finds none.
        exists = tables.has_version(named.model, registry)
    return None if exists else f"there is no such {named.kind}"

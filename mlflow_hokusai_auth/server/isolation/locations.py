"""Locations that clients send are judged where MLflow stores them.

Whatever route they come by, experiments, model versions and traces' tags are rows of MLflow's tables,
written by SQLAlchemy's mappers. These call `Stored` with the row that is about to be written, in its
transaction, which an exception rolls back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import event, inspect
from sqlalchemy.engine import Connection

from mlflow_hokusai_auth.core.locations import (
    PROMPT_SOURCES,
    Location,
    Reference,
    Roots,
    location_problem,
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

_WARNING = (
    "Warning",
    f'299 hokusai-auth "This location is outside the artifact roots of the server, which does not open '
    f'it unless {SETTING} names it."',
)


@dataclass(frozen=True, slots=True)
class Stored:
    """Refuses rows of MLflow's whose location the caller must not name."""

    roots: Roots
    policy: Policy
    watch: Watch
    folders: ExperimentFolders

    def install(self) -> None:
        """See to every row that this process stores from now on."""
        for model, check in (
            # First of all: a refused registration is logged with its name, too.
            (SqlRegisteredModel, _name),
            (SqlModelVersion, _name),
            (SqlExperiment, self.experiment),
            (SqlModelVersion, self.version),
            (SqlTraceTag, self.trace_tag),
        ):
            for name in ("before_insert", "before_update"):
                event.listen(model, name, check)
        event.listen(SqlRegisteredModel, "before_delete", _name)

    def experiment(self, _: object, connection: Connection, row: SqlExperiment) -> None:
        """Raise MlflowException if the row's location is not the caller's to name."""
        uri, before = _change(row, "artifact_location")
        # MLflow makes up the location of a row that is stored already, and so has a number, but no
        # location.
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
        """Raise MlflowException if the row's source is not the caller's to name."""
        if row.current_stage == DELETED:  # whose source MLflow blots out
            return
        source, _ = _change(row, "source")
        storage, _ = _change(row, "storage_location")
        for uri in dict.fromkeys(filter(None, (source, storage))):
            # MLflow has looked up what a reference to a model or version names.
            derived = uri == storage != source and reference(read(row.source or ""))
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

    def trace_tag(self, _: object, connection: Connection, row: SqlTraceTag) -> None:
        """Raise MlflowException if the row has a trace's files elsewhere than MLflow puts them."""
        uri, _before = _change(row, "value")
        if row.key not in TRACE_LOCATIONS or not uri or self._passes(uri, "trace"):
            return
        if row.key != TRACE_LOCATION or uri != _trace_location(row.request_id, connection):
            self.watch.refuse(
                "LOCATION_REFUSED",
                "trace",
                uri,
                "No client says where the files of a trace are, as MLflow does that itself. Leave the "
                f"tag {row.key} out, and have no characters in the trace's id that make it a path.",
            )

    def _passes(self, uri: str, kind: str) -> bool:
        """Whether the caller may store any `uri`; warns them of one that is not opened."""
        caller = callers.current.get()
        if not self.watch.looks or caller.principal is None:
            return True
        if not is_admin(caller.principal, self.policy):
            return False
        location = read(uri)
        place = (
            local_place(uri) if is_local(uri) and "\0" not in uri else self.roots.place(location)
        )
        known = reference(location) is not None or uri in PROMPT_SOURCES
        if not known and self.roots.root_of(place) is None and caller.answer is not None:
            metrics.LOCATIONS.labels(kind, "stored").inc()
            if _WARNING not in caller.answer:
                caller.answer.append(_WARNING)
        return True

    def _source_problem(self, uri: str, connection: Connection) -> str | None:
        location = read(uri)
        # What is asked below grows with the square of its length.
        if location.odd:
            return location.odd
        with tables.tracking(connection) as tracking:
            if (named := reference(location)) is not None:
                return _missing(named, tracking, connection)
            return source_problem(
                uri,
                self.roots,
                tables.owner_locations(owners_named(location), tracking),
                tables.version_locations(uri, connection),
                _Experiments(self.folders, tracking),
            )


def _name(_: object, __: Connection, row: SqlRegisteredModel | SqlModelVersion) -> None:
    """Tell the decision log of the request which registered model, and which version, it is about."""
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
    """The value that the row's attribute is about to get, None if it stays; and the one before."""
    history = inspect(row).attrs[name].history
    return next(iter(history.added or ()), None), next(iter(history.deleted or ()), None)


@dataclass(frozen=True, slots=True)
class _Experiments:
    """The folders of experiments, read when they matter, as a transaction sees them."""

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
        exists = tables.has_version(named.name.partition("@")[0], registry)
    return None if exists else f"there is no such {named.kind}"

"""`Writes` records the owner of everything in MLflow's data, and keeps suppliers from others' things.

SQLAlchemy writes rows in flushes. After each flush, in its transaction, `Writes` records the owner of
what was made, and checks every row that is new, changed or deleted. A check before the flush would lose
a race against another process; after it, the database has decided who came first. A refusal is an
exception, which rolls back the transaction. Statements outside a flush are checked at the cursor.
Without a caller nothing changes, except for the reasons that `caller.INTERNAL` lists.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from sqlalchemy import inspect
from sqlalchemy.engine import Connection, Engine, ExceptionContext
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import LoaderCallableStatus, Session

from mlflow_hokusai_auth.core import isolation
from mlflow_hokusai_auth.core.isolation import Problem
from mlflow_hokusai_auth.core.policy import Policy, is_confined
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.upstream import tables
from mlflow_hokusai_auth.server.upstream.artifact_roots import Watch
from mlflow_hokusai_auth.store import ownership

from . import bindings
from .bindings import ALIASES, BINDINGS, INPUT_TAGS, INPUTS, LOGGED_METRICS
from .confinement import confined, refuse
from .facts import Facts
from .hooks import Hooks, Listener

#: True while SQLAlchemy writes rows that `Writes` checks afterwards.
_flushing: ContextVar[bool] = ContextVar("hokusai_checked_flush", default=False)
#: The new names, by kind, of the rows that are being flushed, which were free before.
_free: ContextVar[tuple[tuple[str, str], ...]] = ContextVar("hokusai_free_names", default=())
#: The kinds of names, by MLflow's tables.
_NAMED = {"registered_models": "model", "experiments": "experiment"}
#: The beginning of a statement that changes data.
_CHANGES = re.compile(
    r"\s*(INSERT|UPDATE|DELETE|REPLACE|MERGE|TRUNCATE|WITH\b.*\b(INSERT|UPDATE|DELETE|MERGE))\b",
    re.IGNORECASE | re.DOTALL,
)
#: Lifecycle and stage of what is deleted or archived, as MLflow writes them.
_ENDED = frozenset({"deleted", "Archived", tables.DELETED})
#: Tables whose rows have an owner of their own.
_RECORDED = frozenset({"registered_models", "model_versions", "experiments"})
#: Stages by which consumers find a version.
_LIVE = ("Production", "Staging")
#: The reason why the checks see more than the caller does.
_REASON = "the check of a change"


@dataclass(frozen=True, slots=True)
class Writes(Hooks):
    """Records owners, and refuses the changes that confined keys may not make."""

    policy: Policy
    watch: Watch
    facts: Facts
    #: The aliases that confined keys don't touch.
    protected: frozenset[str] = frozenset()

    def listeners(self) -> Iterable[Listener]:
        """Return the listeners that record and check what this process writes to MLflow's tables."""
        return (
            Listener(Session, "before_flush", self.before_flush),
            Listener(Session, "after_flush", self.after_flush),
            Listener(Session, "after_soft_rollback", _rolled_back),
            Listener(Engine, "before_cursor_execute", self.before_statement),
            Listener(Engine, "handle_error", self.failed),
        )

    @callers.seeing_all(_REASON)
    def before_flush(self, session: Session, *_: object) -> None:
        """Raise MlflowException if a confined caller takes a name, before the database refuses it.

        The database would name the statement and its values.
        """
        principal = self._confined()
        if principal is not None:
            self._require_facts()
            self._require_logged_models(session)
            names: list[tuple[str, str]] = []
            for row in (*session.new, *session.dirty):
                kind = _NAMED.get(row.__tablename__)
                if kind is None:
                    continue
                new = row in session.new
                old, name = _old_and_new(row, "name")
                renamed = new or old != name
                if renamed and self._name(session.connection(), principal, kind, name):
                    names.append((kind, name))
                if new and kind == "experiment":
                    self._location(row)
            _free.set(tuple(names))
        _flushing.set(True)

    @callers.seeing_all(_REASON)
    def after_flush(self, session: Session, _: object) -> None:
        """Record the owners of what was made; raise MlflowException for what may not be changed."""
        _flushing.set(False)
        _free.set(())
        caller, principal = callers.current.get(), self._confined()
        if caller.principal is None:
            changes = [row for row in session.dirty if session.is_modified(row)]
            rows = (*session.new, *changes, *session.deleted)
            self._require_caller(caller, (row.__tablename__ for row in rows))
        if not self.facts.usable:
            return
        some: list[Iterable[Any]] = [session.new, session.dirty, session.deleted]
        if principal is None:
            # Most rows of staff need nothing.
            some = [[row for row in rows if row.__tablename__ in _RECORDED] for rows in some]
            if not any(some):
                return
        new, dirty, deleted = some
        connection = session.connection()
        changed = [row for row in dirty if session.is_modified(row)]
        self._record(connection, caller.principal, new, changed)
        if principal is not None:
            flush = _Flush(connection, principal, self.facts, tuple(session.new))
            inputs = {row.input_uuid for row in session.new if row.__tablename__ == INPUTS}
            for row in session.new:
                # A caller who may make an input may make its tags.
                if row.__tablename__ != INPUT_TAGS or row.input_uuid not in inputs:
                    self._check_row(flush, row, new=True)
            for row in changed:
                self._check_row(flush, row)
            for row in session.deleted:
                self._check_row(flush, row, deleted=True)
        # The check of a version that is deleted asks who made it.
        _forget(connection, changed, deleted)

    # Recording

    def _record(
        self,
        connection: Connection,
        principal: Principal | None,
        new: Iterable[Any],
        changed: Iterable[Any],
    ) -> None:
        """Record which models, versions and experiments were made, renamed or moved, whoever did it.

        Versions are recorded without an owner, too: their files are frozen.
        """
        now = time.time()
        owner, key_id = (principal.owner_id, principal.key_id) if principal else ("", "")
        # A version needs its model's row, so models come first.
        for row in sorted(new, key=lambda row: row.__tablename__, reverse=True):
            if row.__tablename__ == "registered_models" and owner:
                if not ownership.record_model(
                    connection, row.name, owner=owner, key_id=key_id, now=now
                ):
                    self._taken(principal, "model", row.name)
            elif row.__tablename__ == "model_versions":
                ownership.record_version(
                    connection,
                    row.name,
                    int(row.version),
                    owner=owner,
                    key_id=key_id,
                    source=row.source or "",
                    now=now,
                    location=row.storage_location,
                )
            elif row.__tablename__ == "experiments" and owner:
                ownership.record_experiment(
                    connection,
                    int(row.experiment_id),
                    owner=owner,
                    key_id=key_id,
                    created_at=row.creation_time,
                )
        for row in changed:
            if row.__tablename__ == "registered_models":
                old, renamed = _old_and_new(row, "name")
                if old != renamed and not ownership.rename_model(connection, old, renamed, now):
                    self._taken(principal, "model", renamed)
            elif (
                row.__tablename__ == "model_versions"
                and not _is_gone(row)
                and _changed(row) & {"source", "storage_location"}
            ):
                location = row.storage_location or row.source or ""
                ownership.move_version(connection, row.name, int(row.version), location)

    def _taken(self, principal: Principal | None, kind: str, name: str) -> None:
        """Refuse a name that belongs to another owner, to staff as well.

        Whatever staff put under it would belong to the other owner.
        """
        if not self.watch.looks or principal is None:
            return
        if is_confined(principal, self.policy):
            self._refuse(isolation.name_problem(principal.owner_id, kind, name, None, True, None))
        else:
            self._refuse(isolation.staff_name_problem(name))

    # Checking

    def _confined(self) -> Principal | None:
        """Return the caller if isolation keeps them to what is theirs."""
        return confined(self.watch, self.policy)

    def _require_caller(self, caller: callers.Caller, names: Iterable[str]) -> None:
        """Raise MlflowException if nobody acts, and one of the tables `names` belongs to somebody."""
        if self.watch.looks and not caller.internal and any(map(bindings.is_bound, names)):
            self._refuse(isolation.NO_CALLER)

    def _require_facts(self) -> None:
        """Raise MlflowException if no owner can be known: then no confined key changes anything."""
        if not self.facts.usable:
            self._refuse(isolation.UNKNOWN)

    def _require_logged_models(self, session: Session) -> None:
        """Raise MlflowException for a metric of a logged model that does not exist.

        The database would refuse it in other words than those for another owner's.
        """
        models = {row.model_id for row in session.new if row.__tablename__ == LOGGED_METRICS}
        for model in models:
            if self.facts.experiment_of(session.connection(), "logged model", model) is None:
                self._refuse(isolation.missing_problem("logged model", model))

    def _name(self, connection: Connection, principal: Principal, kind: str, name: str) -> bool:
        """Raise MlflowException if `principal` may not have this name; return whether it is free."""
        owner = self.facts.name_owner(connection, kind, name)
        taken = self.facts.is_taken(connection, kind, name)
        reserved = ownership.prefix_owner(connection, kind, name)
        problem = isolation.name_problem(principal.owner_id, kind, name, owner, taken, reserved)
        if (
            problem is not None
            and kind == "model"
            and self.facts.level(connection, principal.owner_id, name) == "contribute"
        ):
            # MLflow answers that the model exists, and its client goes on to add a version.
            return False
        self._refuse(problem)
        return not taken

    def failed(self, context: ExceptionContext) -> None:
        """Raise MlflowException if another owner took a name after `before_flush` had found it free.

        MLflow itself would answer that the name exists, and its client would go on with it.
        """
        principal = self._confined() if _free.get() else None
        if principal is None or not isinstance(context.sqlalchemy_exception, IntegrityError):
            return
        executed = context.execution_context
        statement = executed.compiled and executed.compiled.statement if executed else None
        kind = _NAMED.get(getattr(getattr(statement, "table", None), "name", ""))
        for name in [name for other, name in _free.get() if other == kind]:
            if not self._has_now(context.engine, principal, str(kind), name):
                me = principal.owner_id
                self._refuse(isolation.name_problem(me, str(kind), name, None, True, None))

    def _has_now(self, engine: Engine | None, principal: Principal, kind: str, name: str) -> bool:
        """Return whether a name is `principal`'s, or shared to contribute, since somebody took it."""
        if engine is None:
            return False
        try:
            # In the transaction that has failed PostgreSQL answers nothing.
            with engine.connect() as connection:
                if self.facts.name_owner(connection, kind, name) == principal.owner_id:
                    return True
                level = self.facts.level(connection, principal.owner_id, name)
                return kind == "model" and level == "contribute"
        except SQLAlchemyError:
            return False

    def _location(self, row: Any) -> None:
        if row.artifact_location:
            self._refuse(
                Problem(
                    "LOCATION_REFUSED",
                    "Your key can't choose where an experiment keeps its artifacts. Leave "
                    "artifact_location out.",
                )
            )

    def _check_row(
        self, flush: _Flush, row: Any, *, new: bool = False, deleted: bool = False
    ) -> None:
        """Raise MlflowException if the caller may not write this row."""
        table = row.__tablename__
        connection, principal = flush.connection, flush.principal
        if principal.no_delete and (deleted or (not new and _ends(row))):
            self._refuse(isolation.DELETING)
        if table == INPUT_TAGS and not deleted:
            # MLflow makes an input together with its tags. For an input that exists already, the run
            # decides.
            for (number,) in _identities(row, ("input_uuid",), new=new):
                run = tables.run_of_input(number, connection) or f"of the input {number}"
                self._check_in_experiment(flush, "run", run)
            return
        if table == INPUTS and new:
            self._check_input(flush, row)
            return
        if table not in BINDINGS:
            self._closed(table)
            return
        if table == "logged_models" and not new:
            old, status = _old_and_new(row, "status")
            if old == tables.READY != status:
                self._refuse(isolation.FROZEN)
        # A refusal of another owner's says nothing about aliases, so it comes first.
        self._check_things(flush, row, new=new, deleted=deleted)
        if self.protected:
            self._check_aliases(connection, row)

    def _check_things(self, flush: _Flush, row: Any, *, new: bool, deleted: bool) -> None:
        for thing in BINDINGS[row.__tablename__]:
            for values in _identities(row, thing.columns, new=new):
                if thing.kind == "version":
                    self._check_version(flush, row, values, new=new)
                elif thing.kind == "model":
                    self._check_model(flush, row, str(values[0]), deleted=deleted)
                else:
                    self._check_in_experiment(flush, thing.kind, values[0])

    def _check_aliases(self, connection: Connection, row: Any) -> None:
        """Raise MlflowException for a protected alias that changes, or whose model is renamed.

        MLflow deletes the aliases of a model or a version that it deletes, row by row.
        """
        if row.__tablename__ == ALIASES:
            self._refuse(
                isolation.alias_problem(self.protected, row.name, _old_and_new(row, "alias"))
            )
        elif row.__tablename__ == "registered_models":
            old, new = _old_and_new(row, "name")
            if old != new:
                held = [
                    *tables.aliases(old, None, connection),
                    *tables.aliases(new, None, connection),
                ]
                self._refuse(isolation.alias_problem(self.protected, old, held))

    def _check_input(self, flush: _Flush, row: Any) -> None:
        found = bindings.ends(
            (row.source_type, row.source_id), (row.destination_type, row.destination_id)
        )
        if found is None:
            self._closed(INPUTS)
            return
        for kind, name in found:
            self._check_in_experiment(flush, kind, name)

    def _check_in_experiment(self, flush: _Flush, kind: str, name: object) -> None:
        connection = flush.connection
        if (kind, name) in flush.judged or (not name and kind == "run"):
            # It is one of many metrics of a run, or a logged model without a run.
            return
        missing = isolation.missing_problem(kind, name)
        flush.judged.add((kind, name))
        number = flush.experiments.get((kind, name))
        if number is None:
            number = self.facts.experiment_of(connection, kind, name)
        if number is None:
            self._refuse(missing)
            return
        owner = (
            # A change of an experiment itself is rare and final, so the database is asked.
            ownership.experiment_owner(connection, number)
            if kind == "experiment"
            else self.facts.experiment_owner(connection, number)
        )
        problem = isolation.experiment_problem(flush.principal.owner_id, number, owner)
        # Every key sees the Default experiment, and not what is in it.
        seen = kind == "experiment" and number == isolation.DEFAULT_EXPERIMENT
        if problem is not None and not seen and self.watch.hides:
            # The caller must not tell it from one that does not exist.
            problem = missing
        self._refuse(problem)

    def _check_model(self, flush: _Flush, row: Any, name: str, *, deleted: bool) -> None:
        me, owner = flush.principal.owner_id, flush.owner(name)
        touched = (
            row.__tablename__ == "registered_models"
            and not deleted
            and _changed(row) <= {"last_updated_time"}
        )
        level = None if owner == me else flush.level(name)
        self._refuse(isolation.model_problem(me, name, owner, level, touched=touched))
        self._refuse(isolation.narrowing_problem(flush.principal.models, name))

    def _check_version(
        self, flush: _Flush, row: Any, values: tuple[Any, ...], *, new: bool
    ) -> None:
        connection, me, (name, version) = flush.connection, flush.principal.owner_id, values
        owner = flush.owner(name)
        problem = None
        if owner != me:
            # The tags of a new version are new as well.
            made = new and (name, int(version)) in flush.made
            problem = isolation.version_problem(
                me,
                name,
                owner,
                flush.level(name),
                new=made,
                maker=None if made else ownership.version_owner(connection, name, int(version)),
                held=() if made else _held(connection, name, int(version), row),
            )
        self._refuse(problem)
        self._refuse(isolation.narrowing_problem(flush.principal.models, name))

    def before_statement(
        self,
        connection: Connection,
        _: object,
        text: str,
        _given: object,
        context: Any,
        _many: bool,
    ) -> None:
        """Check a statement outside a flush that changes MLflow's data for a confined caller."""
        if not self.watch.looks or not _CHANGES.match(text) or _flushing.get():
            return
        caller, principal = callers.current.get(), self._confined()
        if caller.principal is not None and principal is None:
            return
        statement = context.compiled and context.compiled.statement
        table = getattr(getattr(statement, "table", None), "name", "")
        named = tables.of_mlflow(table, text)
        if principal is None:
            self._require_caller(caller, named)
            return
        if not named or table in bindings.OPEN:
            return
        self._require_facts()
        # A statement that takes its values from a query may name anything.
        things = list(_named(table, context)) if getattr(statement, "select", None) is None else []
        if not things:
            self._closed(table or "this")
        flush = _Flush(connection, principal, self.facts)
        with callers.seeing_all(_REASON):
            for kind, name in things:
                self._check_in_experiment(flush, kind, name)
        if principal.no_delete and context.isdelete:
            self._refuse(isolation.DELETING)

    def _closed(self, table: str) -> None:
        self._refuse(
            Problem(
                "ISOLATED",
                f"This server does not let your key change {table}. Ask its operator for a key with a "
                "scope such as mlflow:write.",
            )
        )

    def _refuse(self, problem: Problem | None) -> None:
        refuse(self.watch, problem)


class _Flush:
    """A flush of a confined caller, or a statement outside one: what is asked once for all its rows.

    Tags come with the run or the version that they belong to, which is `new`, too.
    """

    def __init__(
        self,
        connection: Connection,
        principal: Principal,
        facts: Facts,
        new: Collection[Any] = (),
    ) -> None:
        self.connection = connection
        self.principal = principal
        #: Name and number of each version that the flush has made.
        self.made = {
            (row.name, int(row.version)) for row in new if row.__tablename__ == "model_versions"
        }
        #: Things that were judged already, by kind and id: a batch has many rows of one run.
        self.judged: set[tuple[str, object]] = set()
        #: The experiments of the runs and the logged models that the flush has made.
        self.experiments: dict[tuple[str, object], int] = {}
        for row in new:
            if row.__tablename__ == "runs":
                self.experiments["run", row.run_uuid] = int(row.experiment_id)
            elif row.__tablename__ == "logged_models":
                self.experiments["logged model", row.model_id] = int(row.experiment_id)
        #: Return the owner of a model's name, and what grants give the caller on the model.
        self.owner = cache(partial(ownership.model_owner, connection))
        self.level = cache(partial(facts.level, connection, principal.owner_id))


def _held(connection: Connection, name: str, version: int, row: Any) -> list[str]:
    """Return what points to a version of a model, before the change of `row` or after it."""
    stages = {*_old_and_new(row, "current_stage"), tables.stage(name, version, connection)}
    live = sorted(stage for stage in stages & set(_LIVE))
    aliases = tables.aliases(name, version, connection)
    return [*(f"alias {alias}" for alias in sorted(aliases)), *(f"stage {stage}" for stage in live)]


def _is_gone(version: Any) -> bool:
    return bool(version.current_stage == tables.DELETED)


def _forget(connection: Connection, changed: Iterable[Any], deleted: Iterable[Any]) -> None:
    """Record which versions and models were deleted."""
    for row in changed:
        if row.__tablename__ == "model_versions" and _is_gone(row):
            ownership.version_gone(connection, row.name, int(row.version))
    for row in deleted:
        if row.__tablename__ == "registered_models":
            ownership.model_gone(connection, row.name, time.time())


def _rolled_back(*_: object) -> None:
    _flushing.set(False)
    _free.set(())


def _old_and_new(row: Any, name: str) -> tuple[Any, Any]:
    """Return the attribute's value before the flush, and its value now; None if the row has none."""
    new = getattr(row, name, None)
    # The history of an attribute says the same, and takes ten times as long to make.
    old = inspect(row).committed_state.get(name, new)
    return (new if isinstance(old, LoaderCallableStatus) else old), new


def _changed(row: Any) -> set[str]:
    """Return the names of the columns that the flush wrote."""
    columns = inspect(type(row)).column_attrs.keys()
    return {name for name in columns if inspect(row).attrs[name].history.has_changes()}


def _ends(row: Any) -> bool:
    """Return whether a change of the row deletes or archives what it stands for."""
    for name in ("lifecycle_stage", "current_stage"):
        old, new = _old_and_new(row, name)
        if old != new and new in _ENDED:
            return True
    return False


def _identities(row: Any, columns: tuple[str, ...], *, new: bool) -> Iterator[tuple[Any, ...]]:
    """Yield what the row belongs to now, and what it belonged to before."""
    if new:
        yield tuple(getattr(row, name) for name in columns)
        return
    both = [_old_and_new(row, name) for name in columns]
    before, now = (tuple(values) for values in zip(*both, strict=True))
    yield now
    if before != now:
        yield before


def _named(table: str, context: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a statement's parameters say that its rows belong to, by kind and id.

    Nothing is yielded for rows of registered models, because MLflow writes these in flushes only.
    """
    things = BINDINGS.get(table, ())
    if any(thing.kind in ("model", "version") for thing in things):
        return
    for given in context.compiled_parameters:
        for name, value in given.items():
            for thing in things:
                # SQLAlchemy numbers the parameters for a column: key, key_1, key_m0.
                if re.fullmatch(rf"{thing.columns[0]}(_m?\d+)*", name):
                    for one in value if isinstance(value, list) else [value]:
                        yield thing.kind, one
            pattern = bindings.NAMING_A_RUN.get(table) if context.isdelete else None
            if pattern is not None and (match := pattern.fullmatch(str(value))):
                yield "run", match[1]

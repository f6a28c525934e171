"""`Writes` records whose everything in MLflow's data is, and keeps suppliers from changing others'.

SQLAlchemy writes rows in flushes. After each flush, in its transaction, `Writes` records the owner of
what was made, and checks every row that is new, changed or deleted. A check before the flush would lose
a race against another process; after it, the database has decided who came first. A refusal is an
exception, which rolls back the transaction. Statements outside a flush are checked at the cursor.
Without a caller nothing of it may change, but for what `caller.INTERNAL` lists.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from sqlalchemy import event, inspect
from sqlalchemy.engine import Connection, Engine, ExceptionContext
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from mlflow_hokusai_auth.core import isolation
from mlflow_hokusai_auth.core.isolation import Problem
from mlflow_hokusai_auth.core.policy import Policy, is_confined
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.upstream import tables
from mlflow_hokusai_auth.server.upstream.artifact_roots import Watch
from mlflow_hokusai_auth.store import ownership

from . import bindings
from .bindings import BINDINGS, INPUT_TAGS, INPUTS
from .confinement import confined, refuse
from .facts import Facts

#: True while SQLAlchemy writes rows that `Writes` checks afterwards.
_flushing: ContextVar[bool] = ContextVar("hokusai_checked_flush", default=False)
#: The new names, by kind, of the rows that are being flushed, which were free before.
_free: ContextVar[tuple[tuple[str, str], ...]] = ContextVar("hokusai_free_names", default=())
#: The kinds of names, by MLflow's tables.
_NAMED = {"registered_models": "model", "experiments": "experiment"}
#: The beginning of a statement that changes data.
_CHANGES = re.compile(r"\s*(INSERT|UPDATE|DELETE|REPLACE|MERGE|TRUNCATE|WITH)\b", re.IGNORECASE)
#: Lifecycle and stage of what is deleted or archived, as MLflow writes them.
_ENDED = frozenset({"deleted", "Archived", tables.DELETED})
#: Stages by which consumers find a version.
_LIVE = ("Production", "Staging")
_installed: Writes | None = None


@dataclass(frozen=True, slots=True)
class Writes:
    """Records owners, and refuses the changes that confined keys may not make."""

    policy: Policy
    watch: Watch
    facts: Facts

    def install(self) -> None:
        """Record and check whatever this process writes to MLflow's tables from now on."""
        global _installed
        if _installed is not None:
            _installed._listeners(event.remove)
        self._listeners(event.listen)
        _installed = self

    def _listeners(self, change: Callable[[Any, str, Any], None]) -> None:
        for target, name, function in (
            (Session, "before_flush", self.before_flush),
            (Session, "after_flush", self.after_flush),
            (Session, "after_soft_rollback", _rolled_back),
            (Engine, "before_cursor_execute", self.before_statement),
            (Engine, "handle_error", self.failed),
        ):
            change(target, name, function)

    def before_flush(self, session: Session, *_: object) -> None:
        """Raise MlflowException if a confined caller takes a name, before the database refuses it.

        The database would name the statement and its values.
        """
        principal = self._confined()
        if principal is not None:
            self._require_facts()
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

    def after_flush(self, session: Session, _: object) -> None:
        """Record the owners of what was made; raise MlflowException for what may not be changed."""
        _flushing.set(False)
        _free.set(())
        changed = [row for row in session.dirty if session.is_modified(row)]
        caller = callers.current.get()
        if not caller.principal:
            rows = (*session.new, *changed, *session.deleted)
            self._require_caller(caller, (row.__tablename__ for row in rows))
            return
        if not self.facts.usable:
            return
        principal, connection = caller.principal, session.connection()
        self._record(connection, principal, session.new, changed, session.deleted)
        if self._confined() is not None:
            inputs = {row.input_uuid for row in session.new if row.__tablename__ == INPUTS}
            for row in session.new:
                # A tag of a new input may be made by whoever may make the input.
                if row.__tablename__ != INPUT_TAGS or row.input_uuid not in inputs:
                    self._check_row(session, principal, row, new=True)
            for row in changed:
                self._check_row(session, principal, row)
            for row in session.deleted:
                self._check_row(session, principal, row, deleted=True)

    # Recording

    def _record(
        self,
        connection: Connection,
        principal: Principal,
        new: Iterable[Any],
        changed: Iterable[Any],
        deleted: Iterable[Any],
    ) -> None:
        """Record what happened to models, versions and experiments, whoever did it."""
        now = time.time()
        owner, key_id = principal.owner_id, principal.key_id
        # A version needs its model's row, so models come first.
        for row in sorted(new, key=lambda row: row.__tablename__, reverse=True):
            if not owner:
                break
            if row.__tablename__ == "registered_models":
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
                )
            elif row.__tablename__ == "experiments":
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
            elif row.__tablename__ == "model_versions" and row.current_stage == tables.DELETED:
                ownership.version_gone(connection, row.name, int(row.version))
        for row in deleted:
            if row.__tablename__ == "registered_models":
                ownership.model_gone(connection, row.name, now)

    def _taken(self, principal: Principal, kind: str, name: str) -> None:
        """Refuse a name that belongs to another owner, to staff as well.

        What staff would put under it were the other owner's.
        """
        if not self.watch.looks:
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
        """Raise MlflowException if no owner can be known: then nobody confined changes anything."""
        if not self.facts.usable:
            self._refuse(isolation.UNKNOWN)

    def _name(self, connection: Connection, principal: Principal, kind: str, name: str) -> bool:
        """Raise MlflowException if `principal` may not have this name; return whether it is free."""
        owner = self.facts.name_owner(connection, kind, name)
        taken = self.facts.is_taken(connection, kind, name)
        reserved = ownership.prefix_owner(connection, kind, name)
        problem = isolation.name_problem(principal.owner_id, kind, name, owner, taken, reserved)
        if (
            problem is not None
            and problem.code == "NAME_TAKEN"
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
        self,
        session: Session,
        principal: Principal,
        row: Any,
        *,
        new: bool = False,
        deleted: bool = False,
    ) -> None:
        """Raise MlflowException if `principal` may not write this row."""
        table = row.__tablename__
        connection = session.connection()
        if principal.no_delete and (deleted or (not new and _ends(row))):
            self._refuse(isolation.DELETING)
        if table == INPUT_TAGS and not deleted:
            # MLflow makes an input together with its tags. Of one that exists already, the run counts.
            for (number,) in _identities(row, ("input_uuid",)):
                run = tables.run_of_input(number, connection) or f"of the input {number}"
                self._check_in_experiment(connection, principal, "run", run)
            return
        if table == INPUTS and new:
            self._check_input(connection, principal, row)
            return
        things = BINDINGS.get(table)
        if things is None:
            self._closed(table)
            return
        if table == "logged_models" and not new:
            old, status = _old_and_new(row, "status")
            if old == tables.READY != status:
                self._refuse(isolation.FROZEN)
        for thing in things:
            for values in _identities(row, thing.columns):
                if thing.kind == "version":
                    self._check_version(connection, principal, row, values, new=new)
                elif thing.kind == "model":
                    self._check_model(connection, principal, row, str(values[0]), deleted=deleted)
                else:
                    self._check_in_experiment(connection, principal, thing.kind, values[0])

    def _check_input(self, connection: Connection, principal: Principal, row: Any) -> None:
        found = bindings.ends(
            (row.source_type, row.source_id), (row.destination_type, row.destination_id)
        )
        if found is None:
            self._closed(INPUTS)
            return
        for kind, name in found:
            self._check_in_experiment(connection, principal, kind, name)

    def _check_in_experiment(
        self, connection: Connection, principal: Principal, kind: str, name: object
    ) -> None:
        if not name and kind == "run":  # a logged model without a run
            return
        number = self.facts.experiment_of(connection, kind, name)
        if number is None:
            missing = f"There is no {kind} {name} that your key may change."
            self._refuse(Problem("NOT_OWNER", missing))
            return
        owner = (
            # What happens to an experiment itself is rare, and final.
            ownership.experiment_owner(connection, number)
            if kind == "experiment"
            else self.facts.experiment_owner(connection, number)
        )
        self._refuse(isolation.experiment_problem(principal.owner_id, number, owner))

    def _check_model(
        self, connection: Connection, principal: Principal, row: Any, name: str, *, deleted: bool
    ) -> None:
        me = principal.owner_id
        owner = ownership.model_owner(connection, name)
        touched = (
            row.__tablename__ == "registered_models"
            and not deleted
            and _changed(row) <= {"last_updated_time"}
        )
        level = None if owner == me else self.facts.level(connection, me, name)
        self._refuse(isolation.model_problem(me, name, owner, level, touched=touched))
        self._refuse(isolation.narrowing_problem(principal.models, name))

    def _check_version(
        self,
        connection: Connection,
        principal: Principal,
        row: Any,
        values: tuple[Any, ...],
        *,
        new: bool,
    ) -> None:
        me, (name, version) = principal.owner_id, values
        owner = ownership.model_owner(connection, name)
        problem = None
        if owner != me:
            level = self.facts.level(connection, me, name)
            made = new and row.__tablename__ == "model_versions"
            problem = isolation.version_problem(
                me,
                name,
                owner,
                level,
                new=made,
                maker=ownership.version_owner(connection, name, int(version)),
                held=() if made else _held(connection, name, int(version), row),
            )
        self._refuse(problem)
        self._refuse(isolation.narrowing_problem(principal.models, name))

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
        for kind, name in things:
            self._check_in_experiment(connection, principal, kind, name)
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


def _held(connection: Connection, name: str, version: int, row: Any) -> list[str]:
    """Return what points to a version of a model, before the change of `row` or after it."""
    stages = {*_old_and_new(row, "current_stage"), tables.stage(name, version, connection)}
    live = sorted(stage for stage in stages & set(_LIVE))
    aliases = tables.aliases(name, version, connection)
    return [*(f"alias {alias}" for alias in sorted(aliases)), *(f"stage {stage}" for stage in live)]


def _rolled_back(*_: object) -> None:
    _flushing.set(False)
    _free.set(())


def _old_and_new(row: Any, name: str) -> tuple[Any, Any]:
    """Return the attribute's value before the flush, and its value now; None if the row has none."""
    attribute = inspect(row).attrs.get(name)
    if attribute is None:
        return None, None
    before = attribute.history.deleted
    return (before[0] if before else attribute.value), attribute.value


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


def _identities(row: Any, columns: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield what the row belongs to now, and what it belonged to before."""
    both = [_old_and_new(row, name) for name in columns]
    old, new = (tuple(values) for values in zip(*both, strict=True))
    yield new
    if old != new:
        yield old


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

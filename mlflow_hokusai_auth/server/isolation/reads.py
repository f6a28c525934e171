"""`Reads` lets a supplier see only its own rows in MLflow's data, and those that were shared with it.

Every SELECT that MLflow sends for a confined caller gets its shadows (see `shadows`) at the cursor,
which each statement passes, however MLflow made it. A statement that can't have them is refused. While
isolation is `writes`, reading is open: only what MLflow looks up to link it has shadows.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cachetools import LRUCache
from sqlalchemy.engine import Connection, Engine

from mlflow_hokusai_auth.core import isolation
from mlflow_hokusai_auth.core.policy import Policy
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.upstream import stores, tables
from mlflow_hokusai_auth.server.upstream.artifact_roots import Watch

from . import bindings, hidden
from .confinement import confined, refuse
from .facts import Facts
from .hooks import Hooks, Listener
from .shadows import PLAIN, Dialect, Shadowed, shadowed

#: The characters that all statements in memory have together, at most.
_SIZE = 4_000_000
_SELECT = re.compile(r"[\s(]*(SELECT|WITH)\b", re.IGNORECASE)
#: Statements that `Writes` checks, and those of SQLite that describe a table and show no row.
_OTHER = re.compile(r"\s*(INSERT|UPDATE|DELETE|PRAGMA)\b", re.IGNORECASE)
#: The only SELECT of MLflow's that has no other table looks for a dataset to link with a run. MLflow
#: before 3.12 looks in all experiments, and would link another supplier's.
_LINKED = ["datasets"]

_Key = tuple[Dialect, str]


class Statements:
    """The shadowed form of statements that were seen before, by their text."""

    def __init__(self, size: int = _SIZE) -> None:
        self._lock = threading.Lock()
        self._found: LRUCache[_Key, Shadowed | None] = LRUCache(size, getsizeof=_length)

    def of(self, dialect: Dialect, text: str) -> Shadowed | None:
        """Return `text` with its shadows, or as it is if it needs none; None if it can't have them."""
        key = dialect, text
        with self._lock:
            if key in self._found:
                return self._found[key]
        made = _shadowed(dialect, text)
        if _length(made) <= self._found.maxsize:
            with self._lock:
                self._found[key] = made
        return made


def _length(made: Shadowed | None) -> int:
    return 100 if made is None else 2 * len(made.text)


def _shadowed(dialect: Dialect, text: str) -> Shadowed | None:
    named = tuple(name for name in tables.named_in(text) if name not in PLAIN)
    if _SELECT.match(text) and named:
        return shadowed(text, named, dialect)
    return Shadowed(text, ()) if not named or _OTHER.match(text) else None


def _check_patterns(given: Any, dialect: str) -> None:
    """Raise MlflowException for a pattern with which LIKE fails on some rows, perhaps hidden ones."""
    values = given.values() if isinstance(given, dict) else given
    if problem := isolation.pattern_problem(values, escapes=dialect == "postgresql"):
        raise stores.invalid(problem)


@dataclass(frozen=True, slots=True)
class Reads(Hooks):
    """Hides from confined callers what is neither theirs nor shared with them."""

    policy: Policy
    watch: Watch
    facts: Facts
    statements: Statements = field(default_factory=Statements)

    def listeners(self) -> Iterable[Listener]:
        """Return the listener that shadows each statement that this process sends.

        Install it after `Writes`, which judges a statement by the text that MLflow made.
        """
        return (Listener(Engine, "before_cursor_execute", self.before_statement, returns=True),)

    def before_statement(
        self,
        connection: Connection,
        _: object,
        text: str,
        given: Any,
        context: Any,
        _many: bool,
    ) -> tuple[str, Any]:
        """Return the statement and its values for the caller. Raises MlflowException."""
        hides, observes = self.watch.hides, self.watch.observes and self.facts.usable
        if not hides and not observes and not self._looks_for_a_dataset(text):
            return text, given
        if callers.sees_all() or "hokusai_store" in context.execution_options:
            return text, given
        caller, principal = callers.current.get(), confined(self.watch, self.policy)
        if principal is None:
            lost = hides and not (caller.principal or caller.request_id or caller.internal)
            if lost and any(map(bindings.is_bound, tables.named_in(text))):
                refuse(self.watch, isolation.NO_CALLER)
            return text, given
        if observes and not hidden.tries():
            if _SELECT.match(text) and any(map(bindings.is_bound, tables.named_in(text))):
                hidden.asks(connection.engine, text, given)
            return text, given
        dialect = connection.dialect
        schema = "main" if dialect.name == "sqlite" else str(dialect.default_schema_name)
        made = self.statements.of(Dialect(dialect.name, schema, dialect.paramstyle), text)
        if made is None:
            refuse(self.watch, isolation.CLOSED_STATEMENT)
            raise AssertionError(f"{self.watch} refuses")
        if not made.values:
            return made.text, given
        if not self.facts.usable:
            refuse(self.watch, isolation.UNKNOWN)
        if made.patterns:
            _check_patterns(given, dialect.name)
        if hides:
            hidden.asks(connection.engine, text, given)
        values = {"me": principal.owner_id, "now": time.time()}
        if isinstance(given, dict):
            return made.text, given | {f"hokusai_{name}": values[name] for name in made.values}
        return made.text, (*(values[name] for name in made.values), *given)

    def _looks_for_a_dataset(self, text: str) -> bool:
        """Return whether isolation is on and a supplier would be refused what this SELECT finds."""
        return (
            _LINKED[0] in text
            and self.watch.mode.now == "enforce"
            and _SELECT.match(text) is not None
            and tables.named_in(text) == _LINKED
        )

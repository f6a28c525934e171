"""The rows of MLflow's tables that a supplier sees, as SQL.

A statement begins with a shadow of each table that it names: a WITH query that has the table's name,
and only its visible rows. Whatever the statement joins, counts or sorts, it finds nothing else. A
table that is in no list of `bindings` has no shadow, and statements that name it are refused.

The database may compare a row with the caller's values before it judges whether the row is visible.
That shows nothing unless the comparison fails, so none may fail on some rows only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from . import bindings
from .bindings import BINDINGS, INPUT_TAGS, INPUTS
from .provenance import KEY_ID

#: The way in which the SQL of this module names a value: `me` is the caller's owner, and `now` the time
#: in seconds since the epoch.
_VALUE = re.compile(r":(me|now)\b")
_WITH = re.compile(r"\s*WITH\s+(RECURSIVE\s+)?", re.IGNORECASE)
_PATTERNS = re.compile(r"\bI?LIKE\b", re.IGNORECASE)
#: A statement that names an escape character for LIKE, as the search of our page of models does, has
#: the caller's text escaped with it.
_ESCAPES = re.compile(r"\bESCAPE\b", re.IGNORECASE)
#: Regular expressions fail in more ways than `isolation.pattern_problem` knows. MLflow has them for
#: traces only.
_EXPRESSIONS = re.compile(r"~|\b(REGEXP|SIMILAR)\b", re.IGNORECASE)
_LOCKS = re.compile(r"\bFOR\s+(NO\s+KEY\s+)?(UPDATE|SHARE|KEY\s+SHARE)\b", re.IGNORECASE)
#: Style of parameters (PEP 249) -> the name of a value in a statement for a driver of that style.
_STYLES: Mapping[str, Callable[[str], str]] = {
    "qmark": lambda _: "?",
    "format": lambda _: "%s",
    "pyformat": lambda name: f"%(hokusai_{name})s",
    "named": lambda name: f":hokusai_{name}",
}

# `{s}` stands for the schema, and `{same}` for a join of `_SAME`. `one` is the row of the shadowed
# table.
_MY_EXPERIMENTS = (
    "SELECT h.experiment_id FROM {s}hokusai_experiments AS h {same}WHERE h.owner = :me"
)
#: The join by which an owner's row counts only for the experiment that it is about: SQLite gives the id
#: of an experiment that was deleted for good to a new one. PostgreSQL gives no id twice, and there a
#: join would only cost time.
_SAME = {
    "sqlite": "JOIN {s}experiments AS e ON e.experiment_id = h.experiment_id AND "
    "coalesce(e.creation_time, -1) = coalesce(h.experiment_created_at, -1) ",
    "postgresql": "",
}
_SHARED = (
    "FROM {s}hokusai_model_access AS a WHERE a.grantee = :me "
    "AND (a.expires_at IS NULL OR a.expires_at > :now)"
)
_MY_NAMES = (
    "SELECT m.name FROM {s}hokusai_models AS m WHERE m.owner = :me AND m.gone_at IS NULL "
    f"UNION ALL SELECT a.name {_SHARED}"
)
_MY_MODEL = (
    "EXISTS (SELECT 1 FROM {s}hokusai_models AS m "
    "WHERE m.name = one.name AND m.owner = :me AND m.gone_at IS NULL)"
)
_SEEN_MODEL = f"({_MY_MODEL} OR EXISTS (SELECT 1 {_SHARED} AND a.name = one.name))"
#: Whoever sees a version also sees the row of its logged model, for which MLflow's clients ask when
#: they copy the version. The version's maker or the model's owner must own it: a version from before
#: isolation may name anybody's.
_SHARED_LOGGED = (
    "EXISTS (SELECT 1 FROM {s}hokusai_versions AS v "
    "JOIN {s}hokusai_experiments AS h ON h.experiment_id = one.experiment_id {same}"
    "LEFT JOIN {s}hokusai_models AS m ON m.name = v.name AND m.gone_at IS NULL "
    "WHERE v.location = one.artifact_location AND h.owner IN (v.owner, m.owner) "
    f"AND (m.owner = :me OR EXISTS (SELECT 1 {_SHARED} AND a.name = v.name)))"
)
_NOTHING = "1 = 0"
#: MLflow's tables that get no shadow. MLflow reads its webhooks whenever a supplier causes an event,
#: and no route that shows webhooks is open to a confined key.
PLAIN = frozenset({"webhooks", "webhook_events"})


def _in_experiment(column: str) -> str:
    return f"EXISTS ({_MY_EXPERIMENTS} AND h.experiment_id = {column})"


def _through(table: str, key: str, found: str) -> str:
    """Return SQL for: the run or logged model with `key` as `found` is in an experiment of mine."""
    return (
        f"EXISTS (SELECT 1 FROM {{s}}{table} AS p JOIN {{s}}hokusai_experiments AS h "
        f"ON h.experiment_id = p.experiment_id {{same}}WHERE p.{key} {found} AND h.owner = :me)"
    )


def _input(row: str) -> str:
    """Return SQL for: one end of `row`, a row of `inputs`, is a run in an experiment of mine.

    Both ends are looked up at once: PostgreSQL takes longer to plan a query for each than to run them.
    """
    runs = ", ".join(f"'{kind}'" for kind, what in bindings.ENDS.items() if what == "run")
    ends = ", ".join(
        f"CASE WHEN {row}.{end}_type IN ({runs}) THEN {row}.{end}_id END"
        for end in ("destination", "source")
    )
    return _through("runs", "run_uuid", f"IN ({ends})")


#: Table -> SQL for: this row is visible. Those that are not here follow from `BINDINGS`.
_SPECIAL = {
    # Every key sees experiment 0, which MLflow looks for when it opens a store. It has no owner, so its
    # runs are hidden.
    "experiments": f"one.experiment_id IN (SELECT 0 UNION ALL {_MY_EXPERIMENTS})",
    "logged_models": f"({_in_experiment('one.experiment_id')} OR {_SHARED_LOGGED})",
    "registered_models": f"one.name IN ({_MY_NAMES})",
    "model_versions": f"one.name IN ({_MY_NAMES})",
    INPUTS: _input("one"),
    INPUT_TAGS: "EXISTS (SELECT 1 FROM {s}inputs AS i "
    f"WHERE i.input_uuid = one.input_uuid AND {_input('i')})",
} | {
    # Only the model's owner sees which key made a model or a version.
    table: f"({_SEEN_MODEL} AND (one.key <> '{KEY_ID}' OR {_MY_MODEL}))"
    for table in ("registered_model_tags", "model_version_tags")
}


def _is_visible(table: str) -> str | None:
    """Return SQL for: this row of `table` is visible; None if nothing is known about the table."""
    if table in _SPECIAL:
        return _SPECIAL[table]
    if things := BINDINGS.get(table):
        kind, (column, *_) = things[0]
        return {
            "experiment": _in_experiment(f"one.{column}"),
            "run": _through("runs", "run_uuid", f"= one.{column}"),
            "logged model": _through("logged_models", "model_id", f"= one.{column}"),
            "model": _SEEN_MODEL,
            "version": _SEEN_MODEL,
        }[kind]
    return _NOTHING if bindings.is_known(table) or table in bindings.OPEN else None


@dataclass(frozen=True, slots=True)
class Shadowed:
    """A statement with its shadows, and the names of the values that come before its own."""

    text: str
    values: tuple[str, ...]
    #: True if it compares texts with patterns (LIKE) as a caller sends them.
    patterns: bool = False


class Dialect(NamedTuple):
    """The dialect of a database: its name, the schema of its tables, and the style of parameters."""

    name: str
    schema: str
    #: The driver's (PEP 249).
    style: str


def shadowed(text: str, tables: tuple[str, ...], dialect: Dialect) -> Shadowed | None:
    """Return the SELECT `text`, which names `tables`, with shadows; None if that can't be done."""
    if dialect.name not in _SAME or dialect.style not in _STYLES:
        return None
    value = _STYLES[dialect.style]
    if _EXPRESSIONS.search(text):
        return None
    if _LOCKS.search(text):
        return _locked(text, tables, dialect)
    found = [_shadow(table, dialect) for table in tables]
    if None in found:
        return None
    shadows = ", ".join(
        f"{table} AS NOT MATERIALIZED ({sql})" for table, sql in zip(tables, found, strict=True)
    )
    values = tuple(_VALUE.findall(shadows))
    start = f"WITH {shadows}"
    if own := _WITH.match(text):
        start = f"WITH {own[1] or ''}{shadows}, "
        text = text[own.end() :]
    else:
        start += " "
    made = _VALUE.sub(lambda name: value(name[1]), start) + text
    return Shadowed(made, values, _has_patterns(text))


def _has_patterns(text: str) -> bool:
    return len(_PATTERNS.findall(text)) > len(_ESCAPES.findall(text))


def _locked(text: str, tables: tuple[str, ...], dialect: Dialect) -> Shadowed | None:
    """Return `text`, which locks rows of its only table, with that table's shadow in FROM.

    FOR UPDATE locks nothing through a WITH, but it locks the rows of a subquery in FROM.
    """
    # The shadow's values come after others here, so a driver that tells values by their order won't do.
    if len(tables) != 1 or dialect.style not in ("pyformat", "named"):
        return None
    (table,) = tables
    sql = _shadow(table, dialect)
    sources = re.findall(r"\b(?:FROM|JOIN)\s+(\S+)", text, re.IGNORECASE)
    if sql is None or [source.strip('"') for source in sources] != [table]:
        return None
    values = tuple(_VALUE.findall(sql))
    sql = _VALUE.sub(lambda name: _STYLES[dialect.style](name[1]), sql)
    source = re.compile(rf'\bFROM\s+"?{table}"?(?=\s|$)', re.IGNORECASE)
    made = source.sub(lambda _: f"FROM ({sql}) AS {table}", text)
    return Shadowed(made, values, _has_patterns(text))


@lru_cache(maxsize=512)
def _shadow(table: str, dialect: Dialect) -> str | None:
    """Return the SELECT of the visible rows of `table`."""
    visible = _is_visible(table)
    if visible is None:
        return None
    sql = f"SELECT one.* FROM {{s}}{table} AS one WHERE {visible}"
    return sql.replace("{same}", _SAME[dialect.name]).replace("{s}", f'"{dialect.schema}".')

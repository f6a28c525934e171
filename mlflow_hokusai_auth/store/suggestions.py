"""Suggestions of owners for models and experiments that have none, from MLflow's own tables.

These are suggestions for an operator, who decides: clients may have set each of these names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

#: Names for one thing, at most.
MOST = 5
#: The tag by which the server says who made something, and MLflow's tag of a run.
_STAMP, _USER = "hokusai_auth.owner", "mlflow.user"


def _table(name: str, *columns: str) -> sa.TableClause:
    return sa.table(name, *(sa.column(column) for column in columns))


_RUNS = _table("runs", "run_uuid", "experiment_id", "user_id")
_RUN_TAGS = _table("tags", "run_uuid", "key", "value")
_EXPERIMENT_TAGS = _table("experiment_tags", "experiment_id", "key", "value")
_MODEL_TAGS = _table("registered_model_tags", "name", "key", "value")
_VERSION_TAGS = _table("model_version_tags", "name", "key", "value")
_VERSIONS = _table("model_versions", "name", "run_id", "user_id")
_RUN_OF_VERSION = _VERSIONS.join(_RUNS, _RUNS.c.run_uuid == _VERSIONS.c.run_id)


class _Source(NamedTuple):
    """A place where a name may stand: what it is about, the name, where both are, and which rows."""

    about: Any
    name: Any
    rows: Any
    only: tuple[sa.ColumnElement[bool], ...] = ()


def _stamps(table: Any, about: Any) -> _Source:
    return _Source(about, table.c.value, table, (table.c.key == _STAMP,))


def _users(about: Any, rows: Any) -> tuple[_Source, _Source]:
    """Return the users of the runs in `rows`: MLflow's column, and the tag."""
    tagged = rows.join(_RUN_TAGS, _RUN_TAGS.c.run_uuid == _RUNS.c.run_uuid)
    return (
        _Source(about, _RUNS.c.user_id, rows),
        _Source(about, _RUN_TAGS.c.value, tagged, (_RUN_TAGS.c.key == _USER,)),
    )


#: The server's own stamp comes first.
_SOURCES: dict[str, tuple[tuple[_Source, ...], ...]] = {
    "model": (
        (_stamps(_MODEL_TAGS, _MODEL_TAGS.c.name), _stamps(_VERSION_TAGS, _VERSION_TAGS.c.name)),
        (
            _Source(_VERSIONS.c.name, _VERSIONS.c.user_id, _VERSIONS),
            *_users(_VERSIONS.c.name, _RUN_OF_VERSION),
        ),
    ),
    "experiment": (
        (_stamps(_EXPERIMENT_TAGS, _EXPERIMENT_TAGS.c.experiment_id),),
        _users(_RUNS.c.experiment_id, _RUNS),
    ),
}


def suggest(
    connection: sa.Connection, kind: str, things: Sequence[str] | Sequence[int]
) -> dict[Any, list[str]]:
    """Return names of possible owners, the likeliest first, of models by name or experiments by id."""
    found: dict[Any, list[str]] = {thing: [] for thing in things}
    for sources in _SOURCES[kind]:
        counts: Counter[tuple[Any, str]] = Counter()
        for source in sources:
            for about, name, count in _read(connection, source, things):
                counts[about, name] += count
        for about, name in sorted(counts, key=lambda pair: (-counts[pair], pair[1])):
            if name not in found[about]:
                found[about].append(name)
    return {thing: names[:MOST] for thing, names in found.items()}


def _read(
    connection: sa.Connection, source: _Source, things: Sequence[str] | Sequence[int]
) -> Iterator[tuple[Any, str, int]]:
    query = (
        sa.select(source.about, source.name, sa.func.count())
        .select_from(source.rows)
        .where(source.about.in_(things), source.name != "", *source.only)
        .group_by(source.about, source.name)
    )
    for about, name, count in connection.execute(query):
        yield about, str(name), int(count)

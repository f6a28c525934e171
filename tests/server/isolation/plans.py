"""The statements of a call, whose they are, and which tables each reads from end to end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import sqlalchemy as sa


class Sent(NamedTuple):
    """A statement as the driver got it."""

    text: str
    given: Any
    #: Whether the package sent it, and not MLflow.
    ours: bool


@contextmanager
def sent() -> Iterator[list[Sent]]:
    """Note the statements that this process sends, by any engine: MLflow's stores have one each.

    The key store's own are left out: a cache of another test may be asking for its generation.
    """
    seen: list[Sent] = []

    def note(_: object, __: object, text: str, given: Any, context: Any, many: bool) -> None:
        if context.execution_options.get("hokusai_store"):
            return
        if not text.startswith(("PRAGMA", "BEGIN")):
            seen.append(Sent(text, given[0] if many else given, _is_ours()))

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)


def _is_ours() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/mlflow_hokusai_auth/" in name:
            return True
        if "/mlflow/store/" in name:
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False


def scanned(engine: sa.Engine, statements: Iterable[Sent]) -> set[tuple[str, str]]:
    """Return the tables that the database reads without an index, with the statement's text."""
    with engine.connect() as connection:
        read = _sqlite if engine.dialect.name == "sqlite" else _postgresql
        return {(table, one.text) for one in statements for table in read(connection, one)}


def _sqlite(connection: sa.Connection, one: Sent) -> Iterator[str]:
    if one.text.startswith("INSERT") and "SELECT" not in one.text:
        return
    for *_, detail in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {one.text}", one.given):
        way, table, *_ = detail.split()
        # What SQLAlchemy calls anon is the result of a part of the statement.
        if not table.startswith(("CONSTANT", "(", "anon_")) and (
            way == "SCAN" or "AUTOMATIC" in detail
        ):
            yield table


_FIRST = """
SELECT attname FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0] WHERE relname = %(index)s
"""


def _postgresql(connection: sa.Connection, one: Sent) -> Iterator[str]:
    rows = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {one.text}", one.given)
    found = rows.scalar()
    nodes = [json.loads(found)[0]["Plan"] if isinstance(found, str) else found[0]["Plan"]]
    table = ""
    for node in nodes:
        nodes += [{"Relation Name": node.get("Relation Name"), **n} for n in node.get("Plans", ())]
        table = node.get("Relation Name") or table
        if node["Node Type"] == "Seq Scan":
            yield table
        elif "Index Name" in node:
            # An index whose first column is in no condition is read from end to end.
            first = connection.exec_driver_sql(_FIRST, {"index": node["Index Name"]}).scalar()
            if first not in node.get("Index Cond", ""):
                yield table

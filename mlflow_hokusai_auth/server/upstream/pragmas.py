"""MLflow's options of a connection to SQLite, set once for each connection.

MLflow sets them at the start of each session, with PRAGMAs that make SQLite forget how it runs the
statements that the connection has sent. So it parses each statement of each request anew. For
statements with shadows (see `isolation.shadows`) that takes several times as long as to run them.
"""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

#: The options of a connection that stay as they are until they are set again, by their names.
_LASTING = {
    "foreign_keys": "PRAGMA foreign_keys = ON;",
    "case_sensitive_like": "PRAGMA case_sensitive_like = true;",
}
_PRAGMA = re.compile(r"\s*PRAGMA\s+(\w+)", re.IGNORECASE)
#: SQLite ignores a PRAGMA that it does not know.
_NOTHING = "PRAGMA hokusai_is_set_already"


def set_once() -> None:
    """Leave out PRAGMAs that change nothing, on each connection of this process from now on."""
    if not event.contains(Engine, "before_cursor_execute", _leave_out):
        event.listen(Engine, "before_cursor_execute", _leave_out, retval=True)
        event.listen(Engine, "after_cursor_execute", _note)


def _leave_out(
    connection: Connection, _: object, text: str, given: Any, _context: object, _many: bool
) -> tuple[str, Any]:
    if text in _LASTING.values() and text in _set(connection):
        return _NOTHING, given
    return text, given


def _note(
    connection: Connection, _: object, text: str, _given: object, _context: object, _many: bool
) -> None:
    found = _PRAGMA.match(text)
    if found is None or (option := found[1].lower()) not in _LASTING:
        return
    # SQLite ignores foreign_keys within a transaction, without an error.
    ignored = getattr(connection.connection.driver_connection, "in_transaction", True)
    if text == _LASTING[option] and not ignored:
        _set(connection).add(text)
    else:
        _set(connection).discard(_LASTING[option])


def _set(connection: Connection) -> set[str]:
    """Return those of `_LASTING` that are in effect; a new connection of the driver has none."""
    options: set[str] = connection.info.setdefault("hokusai_pragmas", set())
    return options

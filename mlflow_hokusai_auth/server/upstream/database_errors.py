"""Errors of a database without the statement and its values, which MLflow would show to clients.

MLflow answers with the text of the error. A value may be another caller's, for example the name of a
model or the owner of a key's id.
"""

from __future__ import annotations

import logging

from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext
from sqlalchemy.exc import DataError, IntegrityError, ProgrammingError, StatementError

_log = logging.getLogger(__name__)


def shorten() -> None:
    """Cut statements and values out of each error of this process from now on."""
    if not event.contains(Engine, "handle_error", _cut):
        event.listen(Engine, "handle_error", _cut)


def _cut(context: ExceptionContext) -> None:
    error = context.sqlalchemy_exception
    if not isinstance(error, StatementError):
        return
    _log.debug("The database refused: %s", error.statement)
    error.statement = error.params = None
    if isinstance(error, (IntegrityError, DataError, ProgrammingError)):
        # After the first line, PostgreSQL shows the row's values or a part of the statement.
        error.args = (str(error.args[0]).partition("\n")[0], *error.args[1:])

"""Options of SQLite that MLflow sets in each session are set once for each connection."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from mlflow_hokusai_auth.server.upstream import pragmas

_OPTIONS = ("PRAGMA foreign_keys = ON;", "PRAGMA case_sensitive_like = true;")


@pytest.fixture
def connected(tmp_path: Path) -> tuple[SqlAlchemyStore, Callable[[], list[str]]]:
    """A store of MLflow's, and a function that returns what its database got since the last call."""
    pragmas.set_once()
    store = SqlAlchemyStore(f"sqlite:///{tmp_path}/mlflow.db", tmp_path.as_uri())
    store.engine.dispose()
    got: list[str] = []
    sa.event.listen(
        store.engine, "connect", lambda driver, _: driver.set_trace_callback(got.append)
    )

    def since() -> list[str]:
        found = got.copy()
        got.clear()
        return found

    return store, since


def _in_effect(store: SqlAlchemyStore) -> tuple[bool, bool]:
    """Return whether SQLite checks foreign keys, and whether LIKE tells cases apart."""
    with store.engine.connect() as connection:
        ask = connection.exec_driver_sql
        return ask("PRAGMA foreign_keys").scalar() == 1, ask("SELECT 'a' LIKE 'A'").scalar() == 0


def test_each_connection_gets_mlflows_options_once(
    connected: tuple[SqlAlchemyStore, Callable[[], list[str]]],
) -> None:
    store, since = connected
    store.search_experiments()
    assert set(_OPTIONS) <= set(since())
    store.search_experiments()
    again = since()
    assert any("FROM experiments" in text for text in again)
    assert not set(_OPTIONS) & set(again)
    assert _in_effect(store) == (True, True)
    # The pool opens another connection while it has lent out the first.
    with store.engine.connect():
        store.search_experiments()
    assert set(_OPTIONS) <= set(since())
    store.engine.dispose()
    assert _in_effect(store) == (False, False)
    store.search_experiments()
    assert _in_effect(store) == (True, True)


def test_an_option_that_was_changed_is_set_again(
    connected: tuple[SqlAlchemyStore, Callable[[], list[str]]],
) -> None:
    store, _ = connected
    store.search_experiments()
    with store.engine.connect() as connection:
        connection.exec_driver_sql("pragma foreign_keys=0")
        connection.exec_driver_sql("PRAGMA case_sensitive_like = false")
    assert _in_effect(store) == (False, False)
    store.search_experiments()
    assert _in_effect(store) == (True, True)


def test_an_option_that_sqlite_ignored_is_set_again(
    connected: tuple[SqlAlchemyStore, Callable[[], list[str]]],
) -> None:
    store, _ = connected
    with store.engine.connect() as connection:
        connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql(_OPTIONS[0])
        connection.rollback()
    assert _in_effect(store)[0] is False
    store.search_experiments()
    assert _in_effect(store)[0] is True

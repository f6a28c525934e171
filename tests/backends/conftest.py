"""A store for each test, in SQLite and in PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mlflow_hokusai_auth.backends.local import LocalStore


@pytest.fixture
def store(database_uri: str) -> Iterator[LocalStore]:
    store = LocalStore(database_uri)
    store.migrate()
    yield store
    store.database.engine.dispose()

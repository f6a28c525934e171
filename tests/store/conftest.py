"""A store for each test, in SQLite and in PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import time_machine

from mlflow_hokusai_auth.store import ownership
from mlflow_hokusai_auth.store.keys import LocalStore
from tests import mlflow_tables
from tests.conftest import Postgresql

#: Seconds after which a test fails, even on a busy machine.
LONG = 60
#: The time of tests with a `clock`: the beginning of an hour.
START = 1_800_000_000


@pytest.fixture
def clock() -> Iterator[time_machine.Traveller]:
    with time_machine.travel(START, tick=False) as traveller:
        yield traveller


@pytest.fixture(scope="session")
def schema(postgresql: Postgresql) -> Iterator[sa.Engine]:
    """Return the PostgreSQL database that these tests use, one after the other."""
    url = sa.make_url(postgresql.uri).set(drivername="postgresql+psycopg")
    maintenance = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with maintenance.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE backends")
    maintenance.dispose()
    # Other tests may have restarted the cluster.
    engine = sa.create_engine(
        url.set(database="backends"), isolation_level="AUTOCOMMIT", pool_pre_ping=True
    )
    yield engine
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return an empty database of each supported kind.

    PostgreSQL's is shared, since creating one takes half a second, and removing it as long.
    """
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/keys.db"
    engine: sa.Engine = request.getfixturevalue("schema")
    with engine.connect() as connection:
        # Connections that an earlier test has left open may hold locks.
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    return engine.url.set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture
def store(database_uri: str) -> Iterator[LocalStore]:
    store = LocalStore(database_uri)
    store.migrate()
    yield store
    store.database.engine.dispose()


@pytest.fixture
def empty(database_uri: str) -> Iterator[sa.Engine]:
    """Return MLflow's engine on a database with those of its tables that ownership is about."""
    from mlflow.store.db.utils import create_sqlalchemy_engine

    engine = create_sqlalchemy_engine(database_uri.replace("postgresql:", "postgresql+psycopg:"))
    mlflow_tables.make(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def engine(empty: sa.Engine) -> sa.Engine:
    """Return the engine of `empty`, with the tables of ownership."""
    ownership.prepare(empty)
    return empty

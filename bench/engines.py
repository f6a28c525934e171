"""A private PostgreSQL and Redis for a measurement, with the statistics that they keep."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bench import load
from bench.store import PROGRAMS
from tests.conftest import Postgresql, redis_server
from tests.harness import free_port


class Postgres:
    """A running PostgreSQL cluster that counts its statements."""

    def __init__(self, cluster: Postgresql) -> None:
        self._uri = cluster.uri
        self._engine = sa.create_engine(
            _driven(self._uri), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool
        )
        self.ask("CREATE EXTENSION pg_stat_statements")

    def ask(self, statement: str, **values: Any) -> list[Any]:
        """Return the rows of `statement`."""
        with self._engine.connect() as connection:
            found = connection.execute(sa.text(statement), values)
            return list(found) if found.returns_rows else []

    def create(self, name: str) -> str:
        """Create an empty database, and return its URL."""
        self.ask(f"CREATE DATABASE {name}")
        return _driven(self._uri.removesuffix("postgres") + name)

    def forget(self) -> None:
        """Reset the counts of statements."""
        self.ask("SELECT pg_stat_statements_reset()")

    def statements(self, database: str) -> dict[str, int]:
        """Return how often each statement ran in `database`."""
        rows = self.ask(
            "SELECT query, sum(calls) FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid "
            "WHERE d.datname = :name GROUP BY query ORDER BY 2 DESC",
            name=database,
        )
        return {query: int(calls) for query, calls in rows}

    def backends(self, database: str, application: str) -> list[int]:
        """Return the process ids of the connections of `application` (PGAPPNAME) to `database`."""
        rows = self.ask(
            "SELECT pid FROM pg_stat_activity WHERE datname = :name AND application_name = :by",
            name=database,
            by=application,
        )
        return [pid for (pid,) in rows]

    @contextlib.contextmanager
    def most(self, database: str, application: str) -> Iterator[list[int]]:
        """Yield a list to which a thread adds the number of such connections, again and again."""
        found: list[int] = []
        over = threading.Event()

        def watch() -> None:
            while not found or not over.wait(0.05):
                found.append(len(self.backends(database, application)))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield found
        finally:
            over.set()
            thread.join()


@contextlib.contextmanager
def running() -> Iterator[tuple[Postgres, str]]:
    """Yield a running PostgreSQL, and the URL of a running Redis."""
    cluster = Postgresql(PROGRAMS[-1].parent)
    port = free_port()
    try:
        cluster.start()
        engine = sa.create_engine(_driven(cluster.uri), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for setting in (
                "shared_preload_libraries = pg_stat_statements",
                "max_connections = 400",
            ):
                connection.exec_driver_sql(f"ALTER SYSTEM SET {setting}")
        engine.dispose()
        cluster.stop()
        cluster.start()
        with tempfile.TemporaryDirectory() as name, redis_server(Path(name), "--port", str(port)):
            yield Postgres(cluster), f"redis://127.0.0.1:{port}/0"
    finally:
        cluster.remove()


def memory(pid: int) -> dict[str, float]:
    """Return megabytes of a process: resident, proportional share, and dirty (written).

    Only the last does not depend on other processes with the same libraries.
    """
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    fields = {
        name: int(value.split()[0]) / 1024 for name, value in (one.split(":") for one in lines)
    }
    dirty = fields["Private_Dirty"] + fields["Shared_Dirty"]
    return {"Rss": fields["Rss"], "Pss": fields["Pss"], "Dirty": dirty}


def cpu(pids: list[int]) -> float:
    """Return the seconds of CPU that the processes have used, of those that still run."""
    return load.cpu([pid for pid in pids if Path(f"/proc/{pid}").exists()])


def _driven(uri: str) -> str:
    return uri.replace("postgresql:", "postgresql+psycopg:", 1)

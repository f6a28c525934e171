"""The database of the embedded store: its schema's version, and how it is written to.

SQLite by default, PostgreSQL for servers on several hosts. Every change of what a lookup may answer
adds one to `generation` in the same transaction, which is how processes that cache identities learn of
it; and every event worth an auditor's time is written in the transaction that it is about.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy.dialects import postgresql, sqlite

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable, StoreError

from . import metrics
from .tables import AUDIT, STATE

VERSION_TABLE = "hokusai_auth_alembic_version"
#: Seconds that a change waits for another process's before it gives up.
BUSY_TIMEOUT = 5.0
#: Seconds after which PostgreSQL ends a change whose host says no more: it holds up all others.
IDLE_TIMEOUT = 4.0

#: What libpq takes for the time that a server may be out of reach, unless the URL has its own: seconds
#: to connect, milliseconds until what was sent is acknowledged, and seconds until a server that says
#: nothing is asked whether it is there, and how often. The defaults are many minutes, or hours.
_BOUNDS = {
    "connect_timeout": "3",
    "tcp_user_timeout": "5000",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "2",
}
# Built once: to build a statement takes longer than to execute it.
_GENERATION = sa.select(STATE.c.value).where(STATE.c.name == "generation")
_STATES = sa.select(STATE.c.name, STATE.c.value)
_BOUND = sa.select(
    sa.func.set_config("lock_timeout", f"{BUSY_TIMEOUT * 1000:.0f}", True),
    sa.func.set_config("idle_in_transaction_session_timeout", f"{IDLE_TIMEOUT * 1000:.0f}", True),
)
_BUMP = sa.update(STATE).where(STATE.c.name == "generation").values(value=STATE.c.value + 1)

_audit_log = logging.getLogger("mlflow_hokusai_auth.audit")


@dataclass(frozen=True, slots=True)
class Actor:
    """Who changes something, and from where."""

    name: str
    #: The key that was used, or "" for the command line.
    key_id: str = ""
    address: str = ""
    request_id: str = ""


#: For what nobody in particular does, such as a test's own preparations.
NOBODY = Actor("")


@dataclass(slots=True)
class Change:
    """A transaction that writes, and what will be in the audit log once it is done."""

    connection: sa.Connection
    events: list[dict[str, object]] = field(default_factory=list)

    def audit(self, event: str, by: Actor, key_id: str = "", **detail: object) -> None:
        """Write down, in this transaction, that `by` did `event` to the key with this id.

        A `count` in `detail` says how often; the metric of events counts as many.
        """
        row: dict[str, object] = {
            "at": time.time(),
            "event": event,
            "actor": by.name[:255],
            "actor_key_id": by.key_id[:255],
            "address": by.address[:64],
            "request_id": by.request_id[:64],
            "key_id": key_id[:255],
            "detail": detail,
        }
        self.connection.execute(sa.insert(AUDIT).values(row))
        self.events.append(row)


class Database:
    """The database at `uri`, an SQLAlchemy URL. Raises StoreError for one that can't be used."""

    def __init__(self, uri: str) -> None:
        self._url = _normalised(uri)
        try:
            self.engine = sa.create_engine(
                self._url, pool_pre_ping=self._url.drivername != "sqlite"
            )
        except sa.exc.ArgumentError:
            raise StoreError(
                "HOKUSAI_AUTH_DATABASE_URI names a driver that SQLAlchemy does not know."
            ) from None
        except ModuleNotFoundError as error:
            way = (
                "pip install 'mlflow-hokusai-auth[postgres]'"
                if error.name == "psycopg"
                else "name no driver, as in postgresql:// and sqlite:///"
            )
            raise StoreError(f"HOKUSAI_AUTH_DATABASE_URI needs {error.name}: {way}") from None
        #: SQLite's file; None for PostgreSQL.
        self.file = Path(self._url.database or "") if self.engine.dialect.name == "sqlite" else None
        if self.file is not None:
            sa.event.listen(self.engine, "connect", _prepare_sqlite)
        # What is one statement needs no transaction, which with PostgreSQL takes two more questions.
        self._reader = self.engine.execution_options(
            **({} if self.file is not None else {"isolation_level": "AUTOCOMMIT"})
        )
        # A connection must not be shared with a process forked off this one (gunicorn --preload).
        os.register_at_fork(after_in_child=lambda: self.engine.dispose(close=False))

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection to read with. Raises AuthorityUnavailable."""
        with _unavailable("read"), self._reader.connect() as connection:
            yield connection

    @contextmanager
    def changing(self, *, generation: bool = True) -> Iterator[Change]:
        """A transaction; `generation` is whether it may change what a lookup answers.

        Raises AuthorityUnavailable, and lets IntegrityError through.
        """
        with _unavailable("changed"), self.engine.begin() as connection:
            change = Change(connection)
            if self.engine.dialect.name == "postgresql":
                # In the transaction, not in the URL: a pooler such as PgBouncer passes that on.
                connection.execute(_BOUND)
            if generation:
                # First, so that changes wait for one another here, and then see all of the last.
                connection.execute(_BUMP)
            yield change
        for event in change.events:
            _audit_log.info("%s", json.dumps(event))
            detail: Any = event["detail"]
            metrics.EVENTS.labels(event["event"]).inc(detail.get("count", 1))

    def generation(self) -> int:
        """The number that every change makes larger. Raises AuthorityUnavailable."""
        with self.reading() as connection:
            return int(connection.execute(_GENERATION).scalar_one())

    def states(self) -> dict[str, int]:
        """The numbers kept under their names. Raises AuthorityUnavailable."""
        with self.reading() as connection:
            rows = connection.execute(_STATES)
            return {row.name: row.value for row in rows}

    def set_state(self, name: str, value: int, event: str, by: Actor, **detail: object) -> None:
        """Keep `value` under `name`, as `by` wants it. Raises AuthorityUnavailable."""
        with self.changing() as change:
            row = STATE.c.name == name
            if not change.connection.execute(
                sa.update(STATE).where(row).values(value=value)
            ).rowcount:
                change.connection.execute(sa.insert(STATE).values(name=name, value=value))
            change.audit(event, by, "", **detail)

    def insert(self, table: sa.Table) -> Any:
        """An INSERT into `table` that can say what to do about a row that is there already."""
        dialect = sqlite if self.engine.dialect.name == "sqlite" else postgresql
        return dialect.insert(table)

    def migrate(self) -> None:
        """Create or upgrade the tables; those of a newer version that this one can use stay.

        Safe to run from several processes at once. Raises StoreError, or AuthorityUnavailable.
        """
        if self.engine.dialect.name == "sqlite":
            _create_private(self._url.database)
        with _unavailable("read", self._url), self.engine.connect() as connection:
            # A transaction that writes from its start, so that a second process waits here.
            if self.engine.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(4857534149)")
            if not _usable(connection):
                config = _alembic_config()
                config.attributes["connection"] = connection
                try:
                    command.upgrade(config, "head")
                except CommandError:
                    raise StoreError(
                        "the key store was migrated by a newer version of mlflow-hokusai-auth; run "
                        "that one, or restore the backup from before."
                    ) from None
            connection.commit()

    def is_current(self) -> bool:
        """Whether the tables are there, in a version that this code can use."""
        with self.reading() as connection:
            return _usable(connection)

    def audited(
        self,
        *,
        since: float | None = None,
        event: str | None = None,
        key_id: str | None = None,
        actor: str | None = None,
        limit: int = 100,
    ) -> list[Mapping[str, Any]]:
        """The last `limit` audited events that fit, oldest first; `key_id` as target or as actor.

        `since` is in seconds since the epoch; `event` may be a beginning, such as "session".
        """
        query = sa.select(AUDIT).order_by(AUDIT.c.id.desc()).limit(limit)
        if since is not None:
            query = query.where(AUDIT.c.at >= since)
        if event is not None:
            query = query.where(AUDIT.c.event.startswith(event, autoescape=True))
        if key_id is not None:
            query = query.where(sa.or_(AUDIT.c.key_id == key_id, AUDIT.c.actor_key_id == key_id))
        if actor is not None:
            query = query.where(AUDIT.c.actor == actor)
        with self.reading() as connection:
            rows = connection.execute(query).mappings().all()
        return [dict(row) for row in reversed(rows)]


def _usable(connection: sa.Connection) -> bool:
    """Whether this code can use the tables: they are its own, or those of a newer one that says so.

    So that a newer version can be replaced by the one before, without touching the store.
    """
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    found = context.get_current_revision()
    head = ScriptDirectory.from_config(_alembic_config()).get_current_head()
    if found is None or head is None or found <= head:
        return found == head
    since = sa.select(STATE.c.value).where(STATE.c.name == "usable_since")
    return int(connection.execute(since).scalar_one_or_none() or found) <= int(head)


@contextmanager
def _unavailable(done: str, url: sa.URL | None = None) -> Iterator[None]:
    """Raise AuthorityUnavailable for what a driver raises; it names the SQLite file of `url`."""
    try:
        yield
    except sa.exc.IntegrityError:
        raise
    except sa.exc.DatabaseError as error:
        # The driver's first line only: the next ones, and SQLAlchemy, tell the statement as well.
        said = str(error.orig).partition("\n")[0]
        if url is None or url.get_backend_name() != "sqlite":
            raise AuthorityUnavailable(f"the key store can't be {done}: {said}") from None
        raise AuthorityUnavailable(
            f"the key store {url.database} can't be {done}: {said}. See to its disk, restore its "
            "backup, or name another file in HOKUSAI_AUTH_DATABASE_URI."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AuthorityUnavailable(f"the key store holds what it can't have: {error}") from None
    except sa.exc.TimeoutError:
        raise AuthorityUnavailable("the key store has no free connection") from None


def _normalised(uri: str) -> sa.URL:
    try:
        url = sa.make_url(uri)
    except (sa.exc.ArgumentError, ValueError):  # the latter quotes the URL
        raise StoreError(
            "HOKUSAI_AUTH_DATABASE_URI is no database URL; try sqlite:///hokusai_auth.db."
        ) from None
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername in ("postgresql+psycopg", "postgresql+psycopg2"):
        url = url.set(query={**_BOUNDS, **url.query})
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise StoreError("HOKUSAI_AUTH_DATABASE_URI must begin with sqlite:/// or postgresql://.")
    if url.get_backend_name() == "sqlite" and (url.database or ":memory:") == ":memory:":
        raise StoreError(
            "HOKUSAI_AUTH_DATABASE_URI names an SQLite database in memory, which server processes "
            "can't share; name a file, such as sqlite:///hokusai_auth.db."
        )
    return url


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.execute(f"PRAGMA busy_timeout={int(BUSY_TIMEOUT * 1000)}")
    # Readers and a writer then do not wait for each other.
    connection.execute("PRAGMA journal_mode=WAL")


def _create_private(path: str | None) -> None:
    """Make the SQLite file readable by its owner only, before SQLite makes it readable by all."""
    assert path
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise StoreError(f"the key store {path} can't be written: {error.strerror}.") from None


def _alembic_config() -> Config:
    config = Config()
    config.set_main_option(
        "script_location", str(Path(__file__).parent.parent / "migrations").replace("%", "%%")
    )
    return config

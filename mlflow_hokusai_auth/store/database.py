"""The store's database: its connections, transactions, migrations and audit log.

It is SQLite by default, and PostgreSQL for servers on several hosts. Every change that affects lookups
adds one to the generation in the same transaction, so that processes with caches notice it. Every
audited event is written in the transaction of the change that it describes.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
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
#: Seconds that a change waits for another process's change before it fails.
BUSY_TIMEOUT = 5.0
#: Seconds after which PostgreSQL ends a change whose host is silent, because all others wait for it.
IDLE_TIMEOUT = 4.0

#: libpq's limits for a server out of reach, unless the URL has its own: seconds to connect,
#: milliseconds until sent data is acknowledged, seconds of silence before a keepalive and between two,
#: and their number. libpq's defaults add up to many minutes, or hours.
_BOUNDS = {
    "connect_timeout": "3",
    "tcp_user_timeout": "5000",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "2",
}
# The statements are built once, because building one takes longer than executing it.
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
    """The author of a change, and the address that it came from."""

    name: str
    #: The id of the key that was used, or "" for the command line.
    key_id: str = ""
    address: str = ""
    request_id: str = ""


#: The actor of changes without an author, such as a test's preparations.
NOBODY = Actor("")


@dataclass(slots=True)
class Change:
    """A transaction that writes, and the audited events in it."""

    connection: sa.Connection
    events: list[dict[str, object]] = field(default_factory=list)

    def bump(self) -> None:
        """Show caches that an answer to a lookup changes: move the generation.

        Call it before the table of keys is changed: all changes take their locks in this order.
        """
        self.connection.execute(_BUMP)

    def audit(self, event: str, by: Actor, key_id: str = "", **detail: object) -> None:
        """Add a row to the audit log, in this transaction: `by` did `event` to the key `key_id`.

        If `detail` has a `count`, the metric of events grows by it.
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
    """The database at `uri`, an SQLAlchemy URL. Raises StoreError if it can't be used."""

    def __init__(self, uri: str) -> None:
        self._url = _normalised(uri)
        try:
            self.engine = sa.create_engine(
                self._url,
                pool_pre_ping=self._url.drivername != "sqlite",
                # The hooks on MLflow's statements leave those of this engine alone.
                execution_options={"hokusai_store": True},
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
        # A single statement needs no transaction, which costs PostgreSQL two more round trips.
        self._reader = self.engine.execution_options(
            **({} if self.file is not None else {"isolation_level": "AUTOCOMMIT"})
        )
        # A forked process must not share connections with its parent (gunicorn --preload).
        os.register_at_fork(after_in_child=lambda: self.engine.dispose(close=False))

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Yield a connection for reading. Raises AuthorityUnavailable."""
        with _unavailable("read"), self._reader.connect() as connection:
            yield connection

    @contextmanager
    def changing(self, *, generation: bool = True) -> Iterator[Change]:
        """Yield a transaction that writes; `generation` says whether it may affect lookups.

        Raises AuthorityUnavailable, or IntegrityError.
        """
        with _unavailable("changed"), self.engine.begin() as connection:
            change = Change(connection)
            if self.engine.dialect.name == "postgresql":
                # Options in the URL do not get through a pooler such as PgBouncer, but statements do.
                connection.execute(_BOUND)
            if generation:
                # This comes first: concurrent changes queue here, and each sees what the one before it
                # wrote.
                change.bump()
            yield change
        for event in change.events:
            _audit_log.info("%s", json.dumps(event))
            detail: Any = event["detail"]
            metrics.EVENTS.labels(event["event"]).inc(detail.get("count", 1))

    def generation(self) -> int:
        """Return the number that grows with each change. Raises AuthorityUnavailable."""
        with self.reading() as connection:
            return int(connection.execute(_GENERATION).scalar_one())

    def states(self) -> dict[str, int]:
        """Return all numbers of the table of state by name. Raises AuthorityUnavailable."""
        with self.reading() as connection:
            rows = connection.execute(_STATES)
            return {row.name: row.value for row in rows}

    def set_state(self, name: str, value: int, event: str, by: Actor, **detail: object) -> None:
        """Store `value` under `name`, and audit it as `event`. Raises AuthorityUnavailable."""
        with self.changing() as change:
            row = STATE.c.name == name
            if not change.connection.execute(
                sa.update(STATE).where(row).values(value=value)
            ).rowcount:
                change.connection.execute(sa.insert(STATE).values(name=name, value=value))
            change.audit(event, by, "", **detail)

    def choose(self, name: str, choices: Sequence[str], choice: str, by: Actor) -> None:
        """Store which of `choices` is to hold under `name`; any other `choice` means the default.

        Raises AuthorityUnavailable.
        """
        number = choices.index(choice) if choice in choices else -1
        self.set_state(name, number, f"{name}.changed", by, **{name: choice})

    def note(self, event: str, by: Actor, detail: Mapping[str, Any]) -> None:
        """Audit a change of another database, after it. Raises AuthorityUnavailable."""
        with self.changing(generation=False) as change:
            change.audit(event, by, **detail)

    def insert(self, table: sa.Table) -> Any:
        """Return an INSERT into `table` with `on_conflict_do_update`."""
        dialect = sqlite if self.engine.dialect.name == "sqlite" else postgresql
        return dialect.insert(table)

    def migrate(self) -> None:
        """Create or upgrade the tables. Newer tables that this version can use stay as they are.

        Several processes may call this at once. Raises StoreError or AuthorityUnavailable.
        """
        if self.engine.dialect.name == "sqlite":
            _create_private(self._url.database)
        with _unavailable("read", self._url), self.engine.connect() as connection:
            # The transaction takes its lock now, so that a second process waits here.
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
        """Return whether the tables exist, in a version that this code can use."""
        with self.reading() as connection:
            return _usable(connection)

    def audited(
        self,
        *,
        since: float | None = None,
        event: str | None = None,
        key_id: str | None = None,
        actor: str | None = None,
        after: int | None = None,
        before: int | None = None,
        limit: int | None = 100,
    ) -> list[Mapping[str, Any]]:
        """Return the last `limit` audited events that match (None: all), oldest first.

        With the id of an event as `after`, they are the first ones after it; with one as `before`, the
        last ones before it. `since` is in seconds since the epoch. `event` may be a beginning, such as
        "session". `key_id` matches the changed key and the actor's key. Raises AuthorityUnavailable.
        """
        newest_first = after is None
        query = sa.select(AUDIT).order_by(AUDIT.c.id.desc() if newest_first else AUDIT.c.id)
        if limit is not None:
            query = query.limit(limit)
        if after is not None:
            query = query.where(AUDIT.c.id > after)
        if before is not None:
            query = query.where(AUDIT.c.id < before)
        if since is not None:
            query = query.where(AUDIT.c.at >= since)
        if event is not None:
            query = query.where(AUDIT.c.event.startswith(event, autoescape=True))
        if key_id is not None:
            query = query.where(sa.or_(AUDIT.c.key_id == key_id, AUDIT.c.actor_key_id == key_id))
        if actor is not None:
            query = query.where(AUDIT.c.actor == actor)
        with self.reading() as connection:
            events: list[Mapping[str, Any]] = [
                dict(row) for row in connection.execute(query).mappings()
            ]
        return events[::-1] if newest_first else events


def _usable(connection: sa.Connection) -> bool:
    """Return whether this code can use the tables: they have its revision, or a compatible newer one.

    So an operator can go back to the previous version without changing the store.
    """
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    revision = context.get_current_revision()
    head = ScriptDirectory.from_config(_alembic_config()).get_current_head()
    if revision is None or head is None or revision <= head:
        return revision == head
    since = sa.select(STATE.c.value).where(STATE.c.name == "usable_since")
    return int(connection.execute(since).scalar_one_or_none() or revision) <= int(head)


@contextmanager
def _unavailable(done: str, url: sa.URL | None = None) -> Iterator[None]:
    """Raise AuthorityUnavailable for a driver's error; with `url`, the message names SQLite's file."""
    try:
        yield
    except sa.exc.IntegrityError:
        raise
    except sa.exc.DBAPIError as error:
        reason = first_line(error)
        if url is None or url.get_backend_name() != "sqlite":
            raise AuthorityUnavailable(f"the key store can't be {done}: {reason}") from None
        raise AuthorityUnavailable(
            f"the key store {url.database} can't be {done}: {reason}. Check its disk, restore its "
            "backup, or name another file in HOKUSAI_AUTH_DATABASE_URI."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AuthorityUnavailable(f"the key store holds an invalid value: {error}") from None
    except sa.exc.TimeoutError:
        raise AuthorityUnavailable("the key store has no free connection") from None


def first_line(error: sa.exc.DBAPIError) -> str:
    """Return the driver's first line: its other lines, and SQLAlchemy, show the statement as well."""
    return str(error.orig).partition("\n")[0]


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
    # With WAL, readers and a writer do not wait for each other.
    connection.execute("PRAGMA journal_mode=WAL")


def _create_private(path: str | None) -> None:
    """Create the SQLite file for its owner only; SQLite itself would let everybody read it."""
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

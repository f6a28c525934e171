"""The embedded key store: SQL, SQLite by default, PostgreSQL for servers on several hosts.

Only a digest of a key is stored, and a key is looked up by it in one indexed query. Every change adds
one to `generation` in the same transaction, which is how processes that cache identities learn of it.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from mlflow_hokusai_auth.core import keys as key_format
from mlflow_hokusai_auth.core.types import Principal, Rejected

from . import BackendUnavailable

VERSION_TABLE = "hokusai_auth_alembic_version"
#: Seconds that SQLite waits for another process's write before it gives up.
BUSY_TIMEOUT = 5.0

_metadata = sa.MetaData()
_keys = sa.Table(
    "hokusai_auth_keys",
    _metadata,
    sa.Column("key_id", sa.String(32), primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False, unique=True),
    sa.Column("environment", sa.String(8), nullable=False),
    sa.Column("owner", sa.String(255), nullable=False),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float(53), nullable=False),
    sa.Column("expires_at", sa.Float(53)),
    sa.Column("revoked_at", sa.Float(53)),
)
_state = sa.Table(
    "hokusai_auth_state",
    _metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)
# Built once: to build a statement takes longer than to execute it.
_LOOKUP = sa.select(
    _keys.c.key_id, _keys.c.owner, _keys.c.scopes, _keys.c.expires_at, _keys.c.revoked_at
).where(_keys.c.digest == sa.bindparam("digest"))
_GENERATION = sa.select(_state.c.value).where(_state.c.name == "generation")


class StoreError(Exception):
    """The store refuses; the message says what to do."""


class KeyNotFound(StoreError):
    """No key has this id."""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What the store knows of a key; never the key. Times are seconds since the epoch."""

    key_id: str
    environment: str
    owner: str
    name: str
    scopes: tuple[str, ...]
    created_at: float
    expires_at: float | None
    revoked_at: float | None

    def state(self, now: float) -> str:
        """ "active", "expired" or "revoked" at `now`."""
        if self.revoked_at is not None and self.revoked_at <= now:
            return "revoked"
        if self.expires_at is not None and self.expires_at <= now:
            return "expired"
        return "active"


class LocalStore:
    """The keys in the database at `uri`, an SQLAlchemy URL."""

    name = "local"
    by_address = False
    watched = True

    def __init__(self, uri: str) -> None:
        self._url = _normalised(uri)
        self._engine = sa.create_engine(self._url, pool_pre_ping=self._url.drivername != "sqlite")
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "connect", _prepare_sqlite)
        # A connection must not be shared with a process forked off this one (gunicorn --preload).
        os.register_at_fork(after_in_child=lambda: self._engine.dispose(close=False))

    # The gate's side

    def lookup(self, key: str, address: str = "") -> Principal | Rejected:
        """Whom `key` belongs to; one indexed query. Raises BackendUnavailable."""
        with self._connection() as connection:
            row = connection.execute(_LOOKUP, {"digest": key_format.digest(key)}).one_or_none()
        if row is None:
            return Rejected()
        return Principal(
            row.key_id, row.owner, frozenset(row.scopes), row.expires_at, row.revoked_at
        )

    def generation(self) -> int:
        """A number that every change of a key makes larger. Raises BackendUnavailable."""
        with self._connection() as connection:
            return int(connection.execute(_GENERATION).scalar_one())

    # The operator's side

    def create(
        self,
        *,
        owner: str,
        scopes: Iterable[str],
        name: str = "",
        environment: str = "live",
        expires_at: float | None = None,
    ) -> tuple[KeyRecord, str]:
        """A new key and its record. The key itself is returned here and never again."""
        key = key_format.generate(environment)
        return self._insert(key, owner, name, scopes, expires_at), key

    def add(
        self,
        key: str,
        *,
        owner: str,
        scopes: Iterable[str],
        name: str = "",
        expires_at: float | None = None,
    ) -> KeyRecord:
        """Take in a `key` made elsewhere; raises StoreError for a wrong shape or a known key."""
        if not key_format.importable(key):
            reason = key_format.problem(key) or "hk_live_, hk_test_ or hk_dev_ and 32 or 40 letters"
            raise StoreError(f"This is no key that can be imported: {reason}.")
        return self._insert(key, owner, name, scopes, expires_at)

    def list(self) -> list[KeyRecord]:
        """Every key, oldest first."""
        with self._connection() as connection:
            rows = connection.execute(sa.select(_keys).order_by(_keys.c.created_at, _keys.c.key_id))
            return [_record(row) for row in rows]

    def get(self, key_id: str) -> KeyRecord:
        """The key with this id; raises KeyNotFound."""
        with self._connection() as connection:
            row = connection.execute(sa.select(_keys).where(_keys.c.key_id == key_id)).one_or_none()
        if row is None:
            raise KeyNotFound(f"There is no key {key_id!r}; `hokusai-auth keys list` shows them.")
        return _record(row)

    def revoke(self, key_id: str) -> KeyRecord:
        """End a key now and for good; raises KeyNotFound. A key revoked before keeps its time."""
        with self._changes() as connection:
            connection.execute(
                sa.update(_keys)
                .where(_keys.c.key_id == key_id, _keys.c.revoked_at.is_(None))
                .values(revoked_at=time.time())
            )
        return self.get(key_id)

    # The schema

    def migrate(self) -> None:
        """Create or upgrade the tables. Safe to run from several processes at once."""
        if self._engine.dialect.name == "sqlite":
            _create_private(self._url.database)
        with self._connection() as connection:
            # A transaction that writes from its start, so that a second process waits here.
            if self._engine.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(4857534149)")
            config = _alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            connection.commit()

    def is_current(self) -> bool:
        """Whether the tables are there, in the version that this code needs."""
        with self._connection() as connection:
            context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
            head = ScriptDirectory.from_config(_alembic_config()).get_current_head()
            return context.get_current_revision() == head

    def _insert(
        self,
        key: str,
        owner: str,
        name: str,
        scopes: Iterable[str],
        expires_at: float | None,
    ) -> KeyRecord:
        record = KeyRecord(
            key_id=f"key_{secrets.token_hex(8)}",
            environment=key_format.environment(key),
            owner=owner,
            name=name,
            scopes=tuple(sorted(set(scopes))),
            created_at=time.time(),
            expires_at=expires_at,
            revoked_at=None,
        )
        values: dict[str, Any] = {
            "key_id": record.key_id,
            "digest": key_format.digest(key),
            "environment": record.environment,
            "owner": owner,
            "name": name,
            "scopes": list(record.scopes),
            "created_at": record.created_at,
            "expires_at": expires_at,
        }
        try:
            with self._changes() as connection:
                connection.execute(sa.insert(_keys).values(values))
        except sa.exc.IntegrityError:
            raise StoreError("This key is in the store already.") from None
        return record

    @contextmanager
    def _connection(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except (sa.exc.OperationalError, sa.exc.ProgrammingError, sa.exc.DatabaseError) as error:
            # The driver's text only: SQLAlchemy's own adds the statement and its parameters.
            raise BackendUnavailable(f"the key store can't be read: {error.orig}") from None
        except sa.exc.TimeoutError:
            raise BackendUnavailable("the key store has no free connection") from None

    @contextmanager
    def _changes(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                connection.execute(
                    sa.update(_state)
                    .where(_state.c.name == "generation")
                    .values(value=_state.c.value + 1)
                )
                yield connection
        except sa.exc.IntegrityError:
            raise
        except sa.exc.DatabaseError as error:
            raise BackendUnavailable(f"the key store can't be changed: {error.orig}") from None


def _normalised(uri: str) -> sa.URL:
    try:
        url = sa.make_url(uri)
    except sa.exc.ArgumentError:
        raise StoreError(
            "DATABASE_URI is no database URL; try sqlite:///hokusai_auth.db."
        ) from None
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise StoreError("DATABASE_URI must begin with sqlite:/// or postgresql://.")
    if url.get_backend_name() == "sqlite" and (url.database or ":memory:") == ":memory:":
        raise StoreError(
            "DATABASE_URI names an SQLite database in memory, which server processes can't share; "
            "name a file, such as sqlite:///hokusai_auth.db."
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


def _record(row: Any) -> KeyRecord:
    return KeyRecord(
        key_id=row.key_id,
        environment=row.environment,
        owner=row.owner,
        name=row.name,
        scopes=tuple(row.scopes),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )

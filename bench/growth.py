"""The size of keys, uses, changes and limits, in PostgreSQL, in Redis and in a worker's memory."""

from __future__ import annotations

import time
import tracemalloc
from functools import partial

import sqlalchemy as sa
from alembic import command

from bench import store as bench_store
from bench.engines import Postgres
from mlflow_hokusai_auth.authorities.cache import CachedBackend
from mlflow_hokusai_auth.authorities.redis_client import client
from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.core.types import Allow, Principal
from mlflow_hokusai_auth.server.gate.limits import Limits
from mlflow_hokusai_auth.store.database import _alembic_config
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.tables import AUDIT, KEYS, USES
from mlflow_hokusai_auth.store.usage import UseCounter

#: Keys that were used since the counts were last written.
USED = 1_000
#: Changes of keys, each with its event in the audit log.
CHANGES = 500
#: Uses of a limited key within the hour.
WINDOWS = {"few": 1_000, "many": 100_000}
_CACHED = 10_000


def costs(postgres: Postgres, redis_url: str, key_count: int) -> dict[str, float]:
    """Figures by name, up to so many keys; `_ms`, `_us` and `_bytes` in a name are its unit."""
    found = {"cached_key_bytes": _cached_key(), **_windows(redis_url)}
    for word, count in {"few": 100, "more": 10, "many": 1}.items():
        store = LocalStore(postgres.create(f"keys_{word}"))
        begun = time.perf_counter()
        store.migrate()
        found["migrate_empty_ms"] = (time.perf_counter() - begun) * 1000
        known = bench_store.fill(store, key_count // count)
        lookup = bench_store.times(partial(store.lookup, known[0]), 1000)
        found[f"lookup_{word}_ms"], found[f"lookup_{word}_p99_ms"] = lookup
        found[f"count_{word}_ms"] = bench_store.times(store.counts, 20)[0]
    found["migrate_current_ms"] = bench_store.times(store.migrate, 10)[0]
    found["key_bytes"] = _row_bytes(store, KEYS)
    found["use_bytes"] = _row_bytes(store, USES)
    found |= _uses(store) | _changes(store)
    found["migrate_first_ms"] = _migration(postgres, key_count)
    return found


def _row_bytes(store: LocalStore, table: sa.Table) -> float:
    """Return the bytes of a row on disk, indexes included."""
    with store.database.reading() as connection:
        count = connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
        size = sa.select(sa.func.pg_total_relation_size(table.name))
        return float(connection.execute(size).scalar_one() / count)


def _uses(store: LocalStore) -> dict[str, float]:
    """Measure the write of the uses of `USED` keys, which each worker does every 5 s."""
    ids = [record.key_id for record in store.page(max_results=USED)[0]]
    counter = UseCounter(store.database)
    taken = []
    for _ in range(3):
        for key_id in ids:
            counter.add(key_id)
        begun = time.perf_counter()
        counter.write()
        taken.append((time.perf_counter() - begun) / len(ids) * 1000)
    return {"use_write_ms": sorted(taken)[1]}


def _changes(store: LocalStore) -> dict[str, float]:
    begun = time.perf_counter()
    for number in range(CHANGES):
        store.create(owner=f"Supplier {number}", scopes=["model:write"], name=f"pipeline {number}")
    taken = time.perf_counter() - begun
    return {"change_ms": taken / CHANGES * 1000, "event_bytes": _row_bytes(store, AUDIT)}


def _migration(postgres: Postgres, key_count: int) -> float:
    """Return the milliseconds of each migration after the first, of a store with that many keys."""
    store = LocalStore(postgres.create("keys_before"))
    config, now = _alembic_config(), time.time()
    with store.database.engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        table = sa.Table(KEYS.name, sa.MetaData(), autoload_with=connection)
        rows = (bench_store.row(number, keys.generate(), now) for number in range(key_count))
        wanted = [{column.name: row[column.name] for column in table.c} for row in rows]
        connection.execute(sa.insert(table), wanted)
    begun = time.perf_counter()
    store.migrate()
    return (time.perf_counter() - begun) * 1000


class _Suppliers:
    """A backend that accepts every key, with another id for each."""

    name = "bench"
    by_address = False
    watched = False

    def lookup(self, key: str, address: str) -> Principal:
        scopes = frozenset({"model:read", "model:write"})
        return Principal(f"key_{key[8:24]}", f"Supplier {key[8:12]}", scopes, time.time())

    def generation(self) -> int:
        return 0


def _cached_key() -> float:
    known = [keys.generate() for _ in range(_CACHED)]
    cache = CachedBackend(_Suppliers(), ttl=3600, secret=b"s" * 32, size=_CACHED)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for key in known:
            cache.lookup(key, "")
        return (tracemalloc.get_traced_memory()[0] - before) / len(known)
    finally:
        tracemalloc.stop()


def _windows(redis_url: str) -> dict[str, float]:
    """Return the bytes of a limited key in Redis after that many uses."""
    redis, limits, found = client(redis_url, 5), Limits(redis_url), {}
    for word, uses in WINDOWS.items():
        principal = Principal(f"key_{word}", "", frozenset(), rate_limit_per_hour=2 * uses)
        allow = Allow(classify("GET", "/version"), principal)
        limits.admit(allow)
        (name,) = redis.keys(f"*key_{word}*")
        for _ in range(uses // 1000):
            redis.lpush(name, *[time.time()] * 1000)
        redis.config_resetstat()
        found[f"admit_{word}_ms"] = bench_store.times(partial(limits.admit, allow), 500)[0]
        found[f"redis_{word}_us"] = redis.info("commandstats")["cmdstat_evalsha"]["usec"] / 510
        found[f"window_{word}_bytes"] = float(redis.memory_usage(name, samples=0))
    return found

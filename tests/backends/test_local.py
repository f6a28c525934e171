"""The key store: what it keeps, what it finds, and that processes may share it."""

from __future__ import annotations

import multiprocessing
import sqlite3
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from mlflow_hokusai_auth.backends import BackendUnavailable
from mlflow_hokusai_auth.backends.local import KeyNotFound, LocalStore, StoreError
from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.types import Principal, Rejected


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(f"sqlite:///{tmp_path}/keys.db")
    store.migrate()
    return store


def test_a_made_key_is_found_by_its_text_alone(store: LocalStore) -> None:
    record, key = store.create(owner="ACME", scopes=["mlflow:write", "mlflow:read"], name="ci")
    principal = store.lookup(key)
    assert isinstance(principal, Principal)
    assert (principal.key_id, principal.owner) == (record.key_id, "ACME")
    assert principal.scopes == {"mlflow:read", "mlflow:write"}
    assert store.lookup(keys.generate()) == Rejected()


def test_the_key_itself_is_nowhere_in_the_file(store: LocalStore, tmp_path: Path) -> None:
    key = store.create(owner="ACME", scopes=["mlflow:read"])[1]
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert keys.digest(key).encode() in kept
    assert key.encode() not in kept and key[8:].encode() not in kept


def test_a_lookup_is_one_indexed_query(store: LocalStore) -> None:
    key = store.create(owner="ACME", scopes=["mlflow:read"])[1]
    statements: list[tuple[str, object]] = []

    def record(_c: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        statements.append((statement, parameters))

    sa.event.listen(store._engine, "before_cursor_execute", record)
    store.lookup(key)
    ((statement, parameters),) = statements
    with store._engine.connect() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
    assert "USING INDEX" in str(plan)
    assert key not in str(parameters)


@pytest.mark.parametrize("length", [32, 40])
def test_an_older_key_without_checksum_is_imported_and_works(
    store: LocalStore, length: int
) -> None:
    key = "hk_live_" + ("aB3" * 20)[:length]
    record = store.add(key, owner="Supplier", scopes=["model:write"])
    assert record.environment == "live"
    found = store.lookup(key)
    assert isinstance(found, Principal) and found.key_id == record.key_id


def test_what_is_no_key_is_not_imported(store: LocalStore) -> None:
    damaged = keys.generate()[:-1] + "_"
    for text in ("", "hk_live_short", "hk_prod_" + "a" * 32, damaged, "hk_live_" + "a" * 46):
        with pytest.raises(StoreError, match="no key that can be imported"):
            store.add(text, owner="x", scopes=["mlflow:read"])
    assert store.list() == []


def test_a_key_is_imported_once(store: LocalStore) -> None:
    key = store.create(owner="a", scopes=["mlflow:read"])[1]
    with pytest.raises(StoreError, match="already") as refused:
        store.add(key, owner="b", scopes=["mlflow:admin"])
    assert key not in str(refused.value)


def test_revoking_keeps_the_first_time_and_names_the_unknown(store: LocalStore) -> None:
    record, key = store.create(owner="a", scopes=["mlflow:read"])
    first = store.revoke(record.key_id)
    assert first.state(time.time()) == "revoked"
    assert store.revoke(record.key_id).revoked_at == first.revoked_at
    found = store.lookup(key)
    assert isinstance(found, Principal) and found.revoked_at == first.revoked_at
    with pytest.raises(KeyNotFound, match="key_none"):
        store.revoke("key_none")


def test_every_change_moves_the_generation(store: LocalStore) -> None:
    seen = [store.generation()]
    record, _ = store.create(owner="a", scopes=["mlflow:read"])
    seen.append(store.generation())
    store.add("hk_test_" + "a" * 32, owner="b", scopes=["mlflow:read"])
    seen.append(store.generation())
    store.revoke(record.key_id)
    seen.append(store.generation())
    assert seen == sorted(set(seen))


def test_a_store_without_tables_is_unavailable_and_says_no_secret(tmp_path: Path) -> None:
    store = LocalStore(f"sqlite:///{tmp_path}/keys.db")
    assert not store.is_current()
    key = keys.generate()
    with pytest.raises(BackendUnavailable) as refused:
        store.lookup(key)
    with pytest.raises(BackendUnavailable):
        store.create(owner="a", scopes=["mlflow:read"])
    assert keys.digest(key) not in str(refused.value)


def test_a_writer_does_not_block_lookups(store: LocalStore, tmp_path: Path) -> None:
    key = store.create(owner="a", scopes=["mlflow:read"])[1]
    with sqlite3.connect(tmp_path / "keys.db") as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("UPDATE hokusai_auth_state SET value = 99")
        assert isinstance(store.lookup(key), Principal)
        other.rollback()


def test_migrating_again_changes_nothing(store: LocalStore) -> None:
    record, _ = store.create(owner="a", scopes=["mlflow:read"])
    store.migrate()
    assert store.is_current()
    assert [kept.key_id for kept in store.list()] == [record.key_id]


def test_processes_migrate_and_write_at_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/keys.db"
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(_migrate_and_create, [uri] * 8) == [True] * 8
    assert len(LocalStore(uri).list()) == 8
    assert LocalStore(uri).generation() == 8


def _migrate_and_create(uri: str) -> bool:
    store = LocalStore(uri)
    store.migrate()
    store.create(owner="x", scopes=["mlflow:read"])
    return store.is_current()

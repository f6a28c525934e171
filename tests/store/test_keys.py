"""The key store: its contents, its lookups and changes, and its use by several processes."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import time_machine
from alembic import command

from mlflow_hokusai_auth.core import keys, scopes
from mlflow_hokusai_auth.core.errors import (
    AuthorityUnavailable,
    InvalidRequest,
    KeyConflict,
    KeyNotFound,
    StaffNarrowed,
)
from mlflow_hokusai_auth.core.types import Principal, Rejected
from mlflow_hokusai_auth.store import keys as store_keys
from mlflow_hokusai_auth.store.database import Actor, Database, _alembic_config
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.records import STATES, KeyFilter, KeyRecord
from mlflow_hokusai_auth.store.tables import AUDIT, KEYS
from tests.store.conftest import START

OPERATOR = Actor("Operator", "key_op", "192.0.2.7", "r-1")

sqlite_only = pytest.mark.parametrize("database_uri", ["sqlite"], indirect=True)


def made(store: LocalStore, *names: str, **fields: Any) -> str:
    fields = {"owner": "ACME", **fields}
    return store.create(scopes=names or ["mlflow:read"], **fields)[0].key_id


def refused(error: type[Exception], call: Callable[[], object], words: str = ".") -> str:
    """Return the message of the error with which `call` must fail."""
    with pytest.raises(error, match=words) as caught:
        call()
    return str(caught.value)


def ids(store: LocalStore, **which: Any) -> list[str]:
    return [record.key_id for record in store.each(KeyFilter(**which))]


@sqlite_only
def test_file_does_not_contain_the_key(store: LocalStore, tmp_path: Path) -> None:
    key = store.create(owner="ACME", scopes=["mlflow:read"])[1]
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert keys.digest(key).encode() in kept
    assert key.encode() not in kept and key[8:].encode() not in kept


@sqlite_only
def test_a_lookup_is_one_indexed_query(store: LocalStore) -> None:
    key = store.create(owner="ACME", scopes=["mlflow:read"])[1]
    statements: list[tuple[str, object]] = []

    def record(_c: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        statements.append((statement, parameters))

    sa.event.listen(store.database.engine, "before_cursor_execute", record)
    store.lookup(key)
    ((statement, parameters),) = statements
    with store.database.engine.connect() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
    assert "USING INDEX" in str(plan)
    assert key not in str(parameters)


def test_an_older_key_without_checksum_is_imported_and_works(store: LocalStore) -> None:
    for length in (32, 40):
        key = "hk_live_" + ("aB3" * 20)[:length]
        record = store.add(key, owner="Supplier", scopes=["model:write"])
        assert record.environment == "live"
        found = store.lookup(key)
        assert isinstance(found, Principal) and found.key_id == record.key_id


def test_malformed_key_is_not_imported(store: LocalStore) -> None:
    damaged = keys.generate()[:-1] + "_"
    for text in ("", "hk_live_short", "hk_prod_" + "a" * 32, damaged, "hk_live_" + "a" * 46):
        with pytest.raises(InvalidRequest, match="not a key that can be imported"):
            store.add(text, owner="x", scopes=["mlflow:read"])
    assert list(store.each()) == []


def test_a_key_is_imported_once(store: LocalStore) -> None:
    key = store.create(owner="a", scopes=["mlflow:read"])[1]
    again = partial(store.add, key, owner="b", scopes=["mlflow:admin"])
    assert key not in refused(InvalidRequest, again, "already")


def test_second_revocation_keeps_the_first_time(
    store: LocalStore,
) -> None:
    record, key = store.create(owner="a", scopes=["mlflow:read"])
    first = store.revoke(record.key_id)
    assert first.state(time.time()) == "revoked"
    assert store.revoke(record.key_id).revoked_at == first.revoked_at
    found = store.lookup(key)
    assert isinstance(found, Principal) and found.revoked_at == first.revoked_at
    refused(KeyNotFound, lambda: store.revoke("key_none"), "key_none")


def test_every_change_moves_the_generation(store: LocalStore) -> None:
    seen = [store.generation()]
    record, _ = store.create(owner="a", scopes=["mlflow:read"])
    seen.append(store.generation())
    store.add("hk_test_" + "a" * 32, owner="b", scopes=["mlflow:read"])
    seen.append(store.generation())
    store.revoke(record.key_id)
    seen.append(store.generation())
    assert seen == sorted(set(seen))


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_connections_that_postgresql_ends_make_the_store_unavailable(
    schema: sa.Engine, driver: str
) -> None:
    """At any moment: while it is used, and when it goes back to the pool."""
    pytest.importorskip(driver)
    database = Database(schema.url.set(drivername=f"postgresql+{driver}").render_as_string(False))
    number = sa.text("SELECT pg_backend_pid()")

    def end(connection: sa.Connection) -> None:
        pid = connection.execute(number).scalar_one()
        with schema.connect() as other:
            other.execute(sa.text("SELECT pg_terminate_backend(:pid, 60000)"), {"pid": pid})

    def while_it_reads() -> None:
        with database.reading() as connection:
            end(connection)
            connection.execute(number)

    def before_the_commit() -> None:
        with database.changing(generation=False) as change:
            end(change.connection)

    def after_the_last_answer() -> None:
        with database.reading() as connection:
            connection.execute(number)
            # As the driver does when it notices the end.
            connection.connection.dbapi_connection.close()  # type: ignore[union-attr]

    for call in (while_it_reads, before_the_commit, after_the_last_answer):
        refused(AuthorityUnavailable, call)
    with database.reading() as connection:
        assert connection.execute(number).scalar_one()
    database.engine.dispose()


def test_store_without_tables_is_unavailable_and_shows_no_secret(tmp_path: Path) -> None:
    store = LocalStore(f"sqlite:///{tmp_path}/keys.db")
    assert not store.is_current()
    key = keys.generate()
    assert keys.digest(key) not in refused(AuthorityUnavailable, lambda: store.lookup(key))
    refused(AuthorityUnavailable, lambda: store.create(owner="a", scopes=["mlflow:read"]))


@sqlite_only
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
    assert ids(store) == [record.key_id]


def test_processes_migrate_and_write_at_once(database_uri: str) -> None:
    uri = database_uri
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(_migrate_and_create, [uri] * 8) == [True] * 8
    assert len(ids(LocalStore(uri))) == 8
    assert LocalStore(uri).generation() == 8


def _migrate_and_create(uri: str) -> bool:
    store = LocalStore(uri)
    store.migrate()
    store.create(owner="x", scopes=["mlflow:read"])
    return store.is_current()


def test_lookup_returns_everything_that_a_verdict_needs(store: LocalStore) -> None:
    limits: dict[str, Any] = {
        "expires_at": time.time() + 60,
        "networks": ("192.0.2.0/24", "2001:db8::/32"),
        "rate_limit_per_hour": 100,
        "models": ("acme-*", "b"),
        "no_delete": True,
    }
    record, key = store.create(owner="ACME", scopes=["model:read"], **limits)
    plain = Principal(record.key_id, "ACME", frozenset({"model:read"}), owner_id="ACME")
    assert store.lookup(key) == replace(plain, **limits)
    old = store.rotate(record.key_id, overlap=5)[2]
    found = store.lookup(key)
    assert isinstance(found, Principal)
    assert (found.deprecated_at, found.expires_at) == (old.deprecated_at, old.expires_at)


def test_a_record_is_found_by_its_id_and_by_its_key(store: LocalStore) -> None:
    record, key = store.create(owner="ACME", scopes=["read"], name="ci", note="see #1")
    assert store.get(record.key_id) == store.find(key) == record
    assert store.find(keys.generate()) is None
    for unknown in ("key_none", "", record.key_id.upper(), "\0", "é", "%"):
        with pytest.raises(KeyNotFound):
            store.get(unknown)


# Pages


def test_pages_are_complete_and_stay_so_while_keys_are_added(
    store: LocalStore, clock: time_machine.Traveller
) -> None:
    # Several keys have the same time.
    for number in range(25):
        clock.shift(number % 3 == 0)
        made(store)
    expected = ids(store)
    assert len(set(expected)) == 25
    found: list[str] = []
    token = None
    pages = 0
    while pages == 0 or token is not None:
        pages += 1
        records, token, *_ = store.page(max_results=4, page_token=token)
        found += [record.key_id for record in records]
        assert len(records) == (1 if token is None else 4)
        clock.shift(1)
        made(store)
        store.revoke(records[-1].key_id)
    assert pages == 7
    assert found == expected


def test_the_newest_key_is_first(store: LocalStore, clock: time_machine.Traveller) -> None:
    expected = []
    for _ in range(5):
        expected.insert(0, made(store))
        clock.shift(0.001)
    assert ids(store) == expected


def test_full_last_page_has_no_next_page(store: LocalStore) -> None:
    assert store.page(max_results=2) == ([], None, None, 0, 0)
    for _ in range(4):
        made(store)
    first, token, *_ = store.page(max_results=2)
    second, end, *_ = store.page(max_results=2, page_token=token)
    assert (len(first), len(second), end) == (2, 2, None)
    assert store.page(max_results=1000)[1] is None


def test_each_reads_all_pages(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_keys, "MAX_RESULTS", 3)
    expected = {made(store, owner="a") for _ in range(7)}
    made(store, owner="b")
    found = ids(store, owner="a")
    assert len(found) == 7 and set(found) == expected


def test_invalid_page_size_or_token_is_refused(store: LocalStore) -> None:
    made(store)
    for size in (0, -1, 1001, 10**9):
        refused(InvalidRequest, lambda size=size: store.page(max_results=size), "from 1 to 1000")
    for token in ("", "key_none", "0", "' OR 1=1 --"):
        refused(InvalidRequest, lambda token=token: store.page(page_token=token), "page_token")


def test_every_filter_and_state(store: LocalStore, clock: time_machine.Traveller) -> None:
    for owner, environment in itertools.product(["ACME", "Zoë"], ["live", "test"]):
        given = {"owner": owner, "environment": environment}
        made(store, **given, name="CI runner")
        made(store, **given, expires_at=START + 50)
        made(store, **given, expires_at=START + 500)
        store.rotate(made(store, **given), overlap=500)
        store.rotate(made(store, **given), overlap=50)
        store.revoke(made(store, **given, expires_at=START + 50))
        store.revoke(store.rotate(made(store, **given))[2].key_id)
    clock.shift(50)
    everything = list(store.each())
    assert {record.state(time.time()) for record in everything} == set(STATES)
    some_id = everything[3].key_id
    for owner, environment, state, query in itertools.product(
        [None, "ACME", "Zoë", "acme", ""],
        [None, "live", "test", "dev"],
        [None, *STATES],
        [None, "acm", "RUNNER", some_id[5:12], "nobody"],
    ):
        expected = [
            record
            for record in everything
            if owner in (None, record.owner)
            and environment in (None, record.environment)
            and state in (None, record.state(time.time()))
            and (
                query is None
                or any(
                    query.lower() in text.lower()
                    for text in (record.owner, record.name, record.key_id)
                )
            )
        ]
        assert list(store.each(KeyFilter(owner, environment, state, query))) == expected
    for wrong in ("", "Active", "active\n"):
        with pytest.raises(
            InvalidRequest, match="active, deprecated, expired, revoked, valid, ended"
        ):
            store.page(KeyFilter(state=wrong))


def test_query_is_literal_text(store: LocalStore) -> None:
    for text in ("%", "_", "/", "\\", "'", '"', "[a]", "100%", "a_b"):
        key_id = made(store, name=f"x{text}y")
        made(store, name="100x aXb")
        # (Every id has an underscore.)
        assert ids(store, query=text) == [key_id] or text == "_"
        assert ids(store, query=f"x{text}y") == [key_id]
        assert ids(store, query=f"X{text}Y") == [key_id]
        assert ids(store, query=f"x{text}z") == []
        with store.database.changing() as change:
            change.connection.execute(sa.delete(KEYS))


# Changes


def test_edit_changes_the_given_fields_only(store: LocalStore) -> None:
    record, key = store.create(owner="ACME", scopes=["mlflow:read"], name="a", note="n")
    changes: dict[str, Any] = {
        "owner": "ACME Ltd",
        "name": "b",
        "scopes": ["model:write", "mlflow:read", "mlflow:read"],
        "expires_at": START,
        "networks": ("192.0.2.0/24",),
        "rate_limit_per_hour": 5,
        "models": ("acme-*",),
        "no_delete": True,
    }
    expected = replace(record, **{**changes, "scopes": ("mlflow:read", "model:write")})
    before = store.generation()
    assert store.edit(record.key_id, changes, OPERATOR) == expected == store.find(key)
    assert store.generation() == before + 1
    detail = store.database.audited(limit=1)[0]["detail"]
    assert (detail["models"], detail["no_delete"]) == (["acme-*"], True)
    nothing: dict[str, Any] = {
        "expires_at": None,
        "networks": (),
        "rate_limit_per_hour": None,
        "models": (),
        "no_delete": False,
    }
    assert store.edit(record.key_id, nothing) == replace(expected, **nothing)


def test_revoked_key_can_not_be_edited(store: LocalStore) -> None:
    refused(KeyNotFound, lambda: store.edit("key_none", {"name": "b"}))
    key_id = made(store)
    store.revoke(key_id)
    refused(KeyConflict, lambda: store.edit(key_id, {"expires_at": None}), "revoked")


def test_rotation_copies_the_key_and_ends_the_old_one_later(
    store: LocalStore, clock: time_machine.Traveller
) -> None:
    given: dict[str, Any] = {
        "name": "ci",
        "note": "n",
        "networks": ("192.0.2.0/24",),
        "rate_limit_per_hour": 5,
        "models": ("acme-*",),
        "no_delete": True,
    }
    record, key = store.create(
        owner="ACME", scopes=["model:read", "model:write"], environment="test", **given
    )
    clock.shift(1000)
    with store.database.changing() as change:
        change.connection.execute(sa.update(KEYS).values(last_used_at=START))
    new, new_key, old = store.rotate(record.key_id, overlap=60)
    assert keys.environment(new_key) == "test" and new_key != key
    assert new == replace(
        record, key_id=new.key_id, created_at=START + 1000, last_four=new.last_four
    )
    assert new.last_four != record.last_four
    assert old == replace(
        record,
        deprecated_at=START + 1000,
        expires_at=START + 1060,
        replaced_by=new.key_id,
        last_used_at=START,
    )
    assert (store.find(new_key), store.find(key)) == (new, old)
    states = []
    for shift in (0, 59, 1):
        clock.shift(shift)
        states.append((old.state(time.time()), new.state(time.time())))
    assert states == [("deprecated", "active")] * 2 + [("expired", "active")]


def test_overlap_does_not_prolong_a_key(store: LocalStore, clock: time_machine.Traveller) -> None:
    for ends, overlap, old_ends in ((100, 60, 60), (100, 600, 100), (None, 0, 0), (100, 0, 0)):
        until = None if ends is None else START + ends
        new, _, old = store.rotate(made(store, expires_at=until), overlap=overlap)
        assert (new.expires_at, old.expires_at) == (until, START + old_ends)


def test_only_an_active_key_can_be_rotated(store: LocalStore) -> None:
    rotated, revoked, expired = made(store), made(store), made(store, expires_at=time.time() - 1)
    new = store.rotate(rotated)[0]
    store.revoke(revoked)
    before = len(ids(store)), len(store.database.audited())
    for key_id, words in (
        (rotated, f"replaced by {new.key_id} already"),
        (revoked, "is revoked"),
        (expired, "is expired"),
    ):
        refused(KeyConflict, partial(store.rotate, key_id), words)
    refused(KeyNotFound, lambda: store.rotate("key_none"))
    assert (len(ids(store)), len(store.database.audited())) == before
    # The key that replaced it may be rotated in turn.
    store.rotate(new.key_id)


def at_once(*calls: Callable[[], object]) -> list[object]:
    """Begin `calls` at the same time; return the result of each, or the KeyConflict that it raises."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], object]) -> object:
        barrier.wait()
        try:
            return call()
        except KeyConflict as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


@pytest.fixture
def another(store: LocalStore, database_uri: str) -> Iterator[LocalStore]:
    """Return the same store as another process opens it."""
    another = LocalStore(database_uri)
    yield another
    another.database.engine.dispose()


def test_one_of_two_simultaneous_rotations_succeeds(store: LocalStore, another: LocalStore) -> None:
    for _ in range(10):
        key_id = made(store)
        done = at_once(partial(store.rotate, key_id), partial(another.rotate, key_id))
        assert sorted(type(one).__name__ for one in done) == ["KeyConflict", "tuple"]


# A key's own narrowing


def test_staffs_keys_are_not_narrowed(store: LocalStore) -> None:
    narrowing: tuple[dict[str, Any], ...] = ({"models": ("acme-*",)}, {"no_delete": True})
    supplier = made(store, "model:write", "mlflow:access", **narrowing[0], **narrowing[1])
    staff = made(store, "mlflow:write")
    before = ids(store), store.generation(), store.database.audited()
    for names, fields in itertools.product(
        (["mlflow:read"], ["mlflow:access", "metrics:read"], ["model:write", "admin"]), narrowing
    ):
        for change in (
            partial(made, store, *names, **fields),
            partial(store.add, "hk_live_" + "a" * 32, owner="A", scopes=names, **fields),
            partial(store.edit, supplier, {"scopes": names}),
            partial(store.edit, staff, fields),
        ):
            refused(StaffNarrowed, change, "staff's keys are never narrowed")
    assert (ids(store), store.generation(), store.database.audited()) == before
    widened = {"scopes": ["mlflow:write"], "models": (), "no_delete": False}
    assert store.edit(supplier, widened).scopes == ("mlflow:write",)
    narrowed = {"scopes": ["metrics:read"], "no_delete": True}
    assert store.edit(staff, narrowed).no_delete is True


# Owners


def test_owner_that_differs_in_case_only_is_refused(store: LocalStore) -> None:
    first, second = made(store, owner="Straße GmbH"), made(store, owner="Straße GmbH")
    other = made(store, owner="Globex")
    before = ids(store), store.generation(), store.database.audited()
    for owner in ("straße gmbh", "STRASSE GMBH", "Strasse GmbH", "\u017ftra\u1e9ee GMBH"):
        for change in (
            partial(made, store, owner=owner),
            partial(store.add, "hk_live_" + "a" * 32, owner=owner, scopes=["read"]),
            partial(store.edit, other, {"owner": owner}),
            # The second key still has the old spelling.
            partial(store.edit, first, {"owner": owner}),
        ):
            refused(KeyConflict, change, "'Straße GmbH' exists")
    assert (ids(store), store.generation(), store.database.audited()) == before
    made(store, owner="Strabe GmbH")
    store.edit(second, {"owner": "Globex"})
    assert store.edit(first, {"owner": "STRASSE GMBH"}).owner == "STRASSE GMBH"
    # What a key made stays its owner's, so the spelling of a revoked key still counts.
    store.revoke(first)
    refused(KeyConflict, partial(made, store, owner="Straße GmbH"), "'STRASSE GMBH' exists")


def test_owners_that_exist_go_on_although_they_differ_in_case_only(store: LocalStore) -> None:
    upper, lower = made(store, owner="ACME"), made(store, owner="Other")
    with store.database.changing() as change:
        this = KEYS.c.key_id == lower
        change.connection.execute(sa.update(KEYS).where(this).values(owner="acme"))
    for key_id, owner in ((upper, "ACME"), (lower, "acme")):
        assert store.rotate(key_id)[0].owner == owner
        store.edit(made(store, owner=owner), {"name": "x", "owner": owner})
    refused(KeyConflict, partial(made, store, owner="Acme"), "'(ACME|acme)' exists")
    # So the keys of one owner can be given to the other, one after the other.
    for record in store.each(KeyFilter(owner="acme", state="active")):
        store.edit(record.key_id, {"owner": "ACME"})


def test_one_of_two_owners_that_come_at_once_is_made(
    store: LocalStore, another: LocalStore
) -> None:
    for number in range(10):
        done = at_once(
            partial(made, store, owner=f"ACME {number}"),
            partial(made, another, owner=f"acme {number}"),
        )
        assert sorted(type(one).__name__ for one in done) == ["KeyConflict", "str"]


# The last administrator


def test_regression_26_the_last_key_that_manages_keys_stays(store: LocalStore) -> None:
    # After each of these changes, no administrator's key would be left.
    for scope in sorted(scopes.ADMIN):
        last = made(store, "mlflow:read", scope)
        others = [made(store, "mlflow:write"), made(store, "mlflow:read")]
        # These administrators' keys have ended, so they don't count.
        ended = made(store, scope, expires_at=time.time() - 1)
        store.revoke(made(store, scope))
        for change in (
            partial(store.revoke, last),
            partial(store.edit, last, {"scopes": ["mlflow:write"]}),
        ):
            refused(KeyConflict, change, f"{last} is the last key.*force it")
        assert store.get(last).state(time.time()) == "active"
        assert scope in store.get(last).scopes
        # The other fields don't matter.
        store.edit(last, {"name": "x", "scopes": [scope]})
        for key_id in others:
            store.revoke(key_id)
        assert store.revoke(last, force=True).revoked_at is not None
        assert store.revoke(last).revoked_at is not None
        # After that, other keys may end as well, since nobody is locked out by it.
        store.revoke(ended)


def test_administrator_s_key_can_end_if_another_one_is_left(store: LocalStore) -> None:
    first, second, third = (made(store, scope) for scope in ("admin", "mlflow:admin", "admin"))
    store.revoke(first)
    store.edit(second, {"scopes": ["read"]})
    with pytest.raises(KeyConflict):
        store.revoke(third)


def test_replaced_administrator_s_key_does_not_count_as_another_one(store: LocalStore) -> None:
    new = store.rotate(made(store, "mlflow:admin"))[0]
    with pytest.raises(KeyConflict):
        store.revoke(new.key_id)
    (old,) = ids(store, state="deprecated")
    store.revoke(old)


def test_one_of_two_administrators_who_revoke_each_other_stays(
    store: LocalStore, another: LocalStore
) -> None:
    for change in (
        lambda store, key_id: store.revoke(key_id),
        lambda store, key_id: store.edit(key_id, {"scopes": ["mlflow:read"]}),
    ):
        for _ in range(5):
            one, two = made(store, "mlflow:admin"), made(store, "mlflow:admin")
            done = at_once(partial(change, store, one), partial(change, another, two))
            assert sum(isinstance(result, KeyRecord) for result in done) == 1
            left = [
                key.key_id
                for key in store.each(KeyFilter(state="active"))
                if not scopes.ADMIN.isdisjoint(key.scopes)
            ]
            assert len(left) == 1
            store.revoke(left[0], force=True)


def test_no_key_of_an_owner_is_left_even_if_one_is_rotated_meanwhile(
    store: LocalStore, another: LocalStore
) -> None:
    other = made(store, owner="ACME Ltd")
    for _ in range(5):
        key_id = made(store)
        made(store, environment="ci", trust_id="trust_1")
        made(store, expires_at=START - 1)
        results = at_once(
            partial(store.rotate, key_id), partial(another.revoke_owner, "ACME", OPERATOR)
        )
        ended, kept, *_ = next(
            one for one in results if isinstance(one, tuple) and isinstance(one[1], list)
        )
        assert {"ACME"} == {one.owner for one in ended} and not kept
        assert all(one.revoked_at is not None for one in ended) and store.valid_of("ACME") == []
    assert store.get(other).revoked_at is None and store.valid_of("\0") == []
    assert {row["actor"] for row in store.database.audited(event="key.revoked")} == {"Operator"}


def test_of_an_owner_s_administrators_the_caller_s_own_key_stays_if_one_must(
    store: LocalStore,
) -> None:
    own, *_ = (made(store, "mlflow:admin") for _ in range(3))
    ended, kept, *_ = store.revoke_owner("ACME", Actor("ACME", own))
    assert len(ended) == 2 and own in str(kept[0]) and ids(store, state="valid") == [own]
    assert [one.key_id for one in store.revoke_owner("ACME", force=True)[0]] == [own]


# The audit log


def test_every_change_is_audited_with_its_author(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mlflow_hokusai_auth.audit")
    record, key = store.create(
        owner="ACME", scopes=["mlflow:read"], name="ci", networks=("192.0.2.7/32",), by=OPERATOR
    )
    imported = store.add("hk_live_" + "a" * 32, owner="B", scopes=["read"], by=OPERATOR)
    store.edit(record.key_id, {"scopes": ["read"], "name": "x"}, OPERATOR)
    new, new_key, old = store.rotate(record.key_id, by=OPERATOR)
    store.revoke(new.key_id, OPERATOR)
    store.revoke(new.key_id, OPERATOR)
    store.revoke(imported.key_id, OPERATOR, event="key.leaked", source="commit")
    events = store.database.audited()
    assert [(event["event"], event["key_id"]) for event in events] == [
        ("key.created", record.key_id),
        ("key.imported", imported.key_id),
        ("key.edited", record.key_id),
        ("key.rotated", record.key_id),
        ("key.revoked", new.key_id),
        ("key.leaked", imported.key_id),
    ]
    for event in events:
        assert event["actor"] == "Operator" and event["actor_key_id"] == "key_op"
        assert event["address"] == "192.0.2.7" and event["request_id"] == "r-1"
        assert time.time() - 60 < event["at"] <= time.time()
    details = [event["detail"] for event in events]
    assert details[0] == {
        "owner": "ACME",
        "name": "ci",
        "scopes": ["mlflow:read"],
        "expires_at": None,
        "networks": ["192.0.2.7/32"],
        "rate_limit_per_hour": None,
        "models": [],
        "no_delete": False,
    }
    assert details[2:] == [
        {"scopes": ["read"], "name": "x"},
        {"replaced_by": new.key_id, "expires_at": old.expires_at},
        {},
        {"source": "commit"},
    ]
    # The log has the same events.
    logged = [json.loads(record.getMessage()) for record in caplog.records]
    assert logged == [{k: v for k, v in event.items() if k != "id"} for event in events]
    for secret in (key, new_key, "a" * 32, keys.digest(key)):
        assert secret not in caplog.text + str(events)


def test_audited_events_can_be_filtered(store: LocalStore, clock: time_machine.Traveller) -> None:
    one, two = made(store, by=Actor("a", "key_a")), made(store, by=Actor("b", "key_b"))
    clock.shift(10)
    store.revoke(one, Actor("b", two))
    store.edit(two, {"name": "100%"}, Actor("a"))
    audited = store.database.audited

    def found(**which: Any) -> list[str]:
        return [event["event"].removeprefix("key.") for event in audited(**which)]

    assert found() == ["created", "created", "revoked", "edited"]
    assert found(limit=2) == ["revoked", "edited"]
    assert found(since=START + 10) == ["revoked", "edited"]
    assert found(event="key.c") == ["created", "created"]
    assert found(event="k%") == found(event="key_") == []
    assert found(key_id=two) == ["created", "revoked", "edited"]
    assert found(actor="a") == ["created", "edited"]
    assert found(actor="b", event="key.revoked", key_id=one, since=0) == ["revoked"]


def test_a_change_that_fails_is_not_audited(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    key = store.create(owner="a", scopes=["mlflow:admin"])[1]
    (key_id,) = ids(store)
    caplog.set_level(logging.INFO, "mlflow_hokusai_auth.audit")
    before = store.generation(), store.database.audited()
    for change in (
        lambda: store.add(key, owner="b", scopes=["read"]),
        lambda: store.revoke(key_id),
        lambda: store.revoke("key_none"),
        lambda: store.edit(key_id, {"scopes": ["read"]}),
    ):
        with pytest.raises(InvalidRequest):
            change()
    assert (store.generation(), store.database.audited()) == before
    assert caplog.records == []


def test_change_that_can_not_be_audited_is_undone(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    record, key = store.create(owner="a", scopes=["mlflow:admin"])
    caplog.set_level(logging.INFO, "mlflow_hokusai_auth.audit")
    with store.database.changing(generation=False) as change:
        change.connection.exec_driver_sql("ALTER TABLE hokusai_auth_audit RENAME TO away")
    before = store.generation()
    for call in (
        lambda: store.create(owner="b", scopes=["read"]),
        lambda: store.add("hk_live_" + "a" * 32, owner="b", scopes=["read"]),
        lambda: store.edit(record.key_id, {"name": "x"}),
        lambda: store.rotate(record.key_id),
        lambda: store.revoke(record.key_id, force=True),
    ):
        with pytest.raises(AuthorityUnavailable):
            call()
    assert list(store.each()) == [record] == [store.find(key)]
    assert store.generation() == before
    assert caplog.records == []


def test_the_audit_log_is_append_only(store: LocalStore) -> None:
    made(store)
    before = store.database.audited()
    attempts = ["UPDATE hokusai_auth_audit SET actor = 'x'", "DELETE FROM hokusai_auth_audit"]
    if store.database.engine.dialect.name == "postgresql":
        attempts += ["TRUNCATE hokusai_auth_audit", "DELETE FROM hokusai_auth_audit WHERE 1 = 2"]
    for statement in attempts:
        with (
            pytest.raises((AuthorityUnavailable, sa.exc.IntegrityError), match="append-only"),
            store.database.changing(generation=False) as change,
        ):
            change.connection.exec_driver_sql(statement)
    assert store.database.audited() == before != []


def test_audited_texts_have_bounded_length(store: LocalStore) -> None:
    long = Actor("n" * 999, "k" * 999, "a" * 999, "r" * 999)
    with store.database.changing(generation=False) as change:
        change.audit("key.test", long, "t" * 999)
    (event,) = store.database.audited()
    fields = ("actor", "actor_key_id", "address", "request_id", "key_id")
    assert [len(event[name]) for name in fields] == [255, 255, 64, 64, 255]


# Migrations


def migrated(database: Database, revision: str, how: Callable[..., None] = command.upgrade) -> None:
    with database.engine.connect() as connection:
        config = _alembic_config()
        config.attributes["connection"] = connection
        how(config, revision)
        connection.commit()


def columns(database: Database) -> dict[str, set[str]]:
    inspector = sa.inspect(database.engine)
    return {
        table: {column["name"] for column in inspector.get_columns(table)}
        for table in inspector.get_table_names()
    }


OLD_KEY = sa.text(
    "INSERT INTO hokusai_auth_keys (key_id, digest, environment, owner, name, scopes, created_at, "
    "expires_at, revoked_at) VALUES (:key_id, :digest, 'live', 'ACME', 'ci', :scopes, 5.5, "
    "NULL, :revoked_at)"
)


def test_keys_are_found_by_their_last_four_characters(
    store: LocalStore, clock: time_machine.Traveller
) -> None:
    record, key = store.create(owner="ACME", scopes=["mlflow:read"])
    clock.shift(1)
    new, new_key, _ = store.rotate(record.key_id)
    clock.shift(1)
    old = "hk_live_" + "a1B2" * 7 + new_key[-4:]
    imported = store.add(old, owner="ACME", scopes=["mlflow:read"])
    assert store.get(record.key_id).last_four == key[-4:]
    assert [one.key_id for one in store.ending_in(new_key[-4:])] == [imported.key_id, new.key_id]
    with store.database.changing() as change:
        change.connection.execute(sa.update(KEYS).values(last_four=None))  # as older keys have it
    assert store.ending_in(new_key[-4:]) == [] and store.lookup(key) != Rejected()


def test_regression_35_older_keys_stay_valid_after_a_migration(database_uri: str) -> None:
    store = LocalStore(database_uri)
    migrated(store.database, "0001")
    tables = columns(store.database)
    good, ended, later = keys.generate(), keys.generate(), keys.generate()

    def insert(key_id: str, key: str, revoked_at: float | None = None) -> None:
        values = {"key_id": key_id, "digest": keys.digest(key), "revoked_at": revoked_at}
        with store.database.engine.begin() as connection:
            connection.execute(OLD_KEY, {**values, "scopes": '["mlflow:admin"]'})

    insert("key_good", good)
    insert("key_ended", ended, 7.5)
    assert not store.is_current()
    store.migrate()
    assert store.is_current()
    admin = Principal("key_good", "ACME", frozenset({"mlflow:admin"}), owner_id="ACME")
    assert store.lookup(good) == admin
    assert store.lookup(ended) == replace(admin, key_id="key_ended", revoked_at=7.5)
    assert store.get("key_good") == KeyRecord(
        "key_good", "live", "ACME", "ci", ("mlflow:admin",), created_at=5.5
    )
    # A server of the previous version may still run.
    insert("key_later", later)
    assert store.lookup(later) == replace(admin, key_id="key_later")
    new_key = store.rotate("key_good")[1]
    # The migration can be undone.
    migrated(store.database, "0001", command.downgrade)
    assert columns(store.database) == tables
    assert not store.is_current()
    store.migrate()
    assert store.lookup(good) != Rejected() and store.lookup(new_key) != Rejected()
    assert store.lookup(keys.generate()) == Rejected()
    migrated(store.database, "base", command.downgrade)
    assert set(columns(store.database)) == {"hokusai_auth_alembic_version"}
    store.database.engine.dispose()


def test_the_tables_are_those_that_the_code_knows(store: LocalStore) -> None:
    known = {table.name: set(table.columns.keys()) for table in AUDIT.metadata.sorted_tables}
    found = columns(store.database)
    del found["hokusai_auth_alembic_version"]
    assert found == known

"""Uses of keys: every process counts them, and none is lost on the way to the database."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import sqlalchemy as sa
import time_machine

from mlflow_hokusai_auth.store import write_behind
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.tables import USES
from mlflow_hokusai_auth.store.usage import (
    HOURS,
    KEPT,
    UseCounter,
    by_hour,
)
from tests.store.conftest import LONG, START


@pytest.fixture(autouse=True)
def nothing_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_behind, "INTERVAL", 3600)


def made(store: LocalStore, owner: str = "ACME") -> str:
    return store.create(owner=owner, scopes=["mlflow:read"])[0].key_id


def use(counter: UseCounter, key_id: str, times: int = 1) -> None:
    for _ in range(times):
        counter.add(key_id)


def minutes(store: LocalStore) -> dict[tuple[str, int], int]:
    with store.database.reading() as connection:
        rows = connection.execute(sa.select(USES.c.key_id, USES.c.minute, USES.c.uses))
        return {(row.key_id, row.minute): row.uses for row in rows}


def total(store: LocalStore, key_id: str) -> int:
    return sum(by_hour(store.database, [key_id])[key_id])


def rename(store: LocalStore, old: str, new: str) -> None:
    with store.database.changing(generation=False) as change:
        change.connection.exec_driver_sql(f"ALTER TABLE {old} RENAME TO {new}")


def store_uri(store: LocalStore) -> str:
    return store.database.engine.url.render_as_string(hide_password=False)


def test_counting_does_not_use_the_database(store: LocalStore) -> None:
    seen: list[str] = []
    sa.event.listen(
        store.database.engine, "before_cursor_execute", lambda *event: seen.append(event[2])
    )
    counter = UseCounter(store.database)
    use(counter, "key_1", 100)
    assert seen == []
    UseCounter(store.database).write()
    assert seen == []
    counter.write()


def test_the_last_use_is_known_to_the_minute(
    store: LocalStore, clock: time_machine.Traveller
) -> None:
    counter, late = UseCounter(store.database), UseCounter(store.database)
    key_id, other = made(store), made(store)
    assert store.get(key_id).last_used_at is None
    use(late, key_id)
    clock.shift(60 * 5 + 59)
    use(counter, key_id)
    counter.write()
    assert store.get(key_id).last_used_at == START + 300
    # Another process writes an older count later.
    late.write()
    assert store.get(key_id).last_used_at == START + 300
    assert store.get(other).last_used_at is None
    clock.shift(1)
    use(counter, key_id)
    counter.write()
    assert store.get(key_id).last_used_at == START + 360


def test_uses_are_reported_by_the_hour(store: LocalStore, clock: time_machine.Traveller) -> None:
    counter = UseCounter(store.database)
    key_id, other = made(store), made(store)
    # The key was used once 25 hours ago, twice 24 hours ago, …, 26 times in the present hour.
    clock.shift(-25 * 3600)
    for hour in range(26):
        use(counter, key_id, hour + 1)
        clock.shift(3599)
        use(counter, other)
        clock.shift(1)
    clock.shift(-1)
    counter.write()
    found = by_hour(store.database, [key_id, other, "key_none"])
    assert len(found[key_id]) == HOURS == 24
    assert found == {key_id: list(range(3, 27)), other: [1] * 24, "key_none": [0] * 24}
    assert by_hour(store.database, []) == {}
    # A server whose clock is ahead has counted this use.
    clock.shift(-7200)
    assert by_hour(store.database, [key_id])[key_id] == list(range(1, 25))


def test_a_database_that_fails_loses_no_use(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    counter = UseCounter(store.database)
    key_id = made(store)
    expected = 0
    # One fails at the start of the transaction, the other in the middle of it.
    for table in ("hokusai_auth_keys", "hokusai_auth_uses"):
        use(counter, key_id, 3)
        rename(store, table, "away")
        counter.write()
        use(counter, key_id, 2)
        counter.write()
        rename(store, "away", table)
        assert total(store, key_id) == expected
        expected += 5
        counter.write()
        assert total(store, key_id) == expected
    counter.write()
    assert total(store, key_id) == expected
    logged = [record for record in caplog.records if record.name == write_behind.__name__]
    assert {record.levelno for record in logged} == {logging.WARNING}


def test_use_during_a_failed_write_is_kept(
    store: LocalStore, clock: time_machine.Traveller, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = UseCounter(store.database)
    key_id = made(store)

    def fails(*_: object) -> None:
        clock.shift(60)
        use(counter, key_id, 2)
        raise OSError

    use(counter, key_id)
    with monkeypatch.context() as patched:
        patched.setattr(counter._batch, "_write", fails)
        counter.write()
    counter.write()
    assert minutes(store) == {(key_id, START // 60): 1, (key_id, START // 60 + 1): 2}
    assert store.get(key_id).last_used_at == START + 60


def test_last_write_waits_for_a_running_one(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = UseCounter(store.database)
    key_id = made(store)
    began, go_on = threading.Event(), threading.Event()
    write = counter._batch._write

    def slowly(counts: Counter[tuple[str, int]]) -> None:
        began.set()
        assert go_on.wait(LONG)
        write(counts)

    monkeypatch.setattr(counter._batch, "_write", slowly)
    use(counter, key_id)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(counter.write)
        assert began.wait(LONG)
        last = threads.submit(counter.write)
        assert wait([last], 0.2).not_done
        go_on.set()
        first.result(LONG)
        last.result(LONG)
    assert total(store, key_id) == 1


def test_uses_of_another_authority_s_keys_are_not_written(store: LocalStore) -> None:
    counter = UseCounter(store.database)
    key_id = made(store)
    for name in ("another", key_id.upper(), "x" * 255, "", key_id):
        use(counter, name)
    counter.write()
    assert [name for name, _ in minutes(store)] == [key_id]
    # They are not kept in memory either.
    assert not counter._batch._counts


def test_statements_do_not_depend_on_the_number_of_keys(store: LocalStore) -> None:
    # sqlite3 caches the last 128 statements of each connection. When one statement had all keys, a busy
    # server grew by 40 MB.
    counter = UseCounter(store.database)
    key_ids = [made(store) for _ in range(5)]
    said: list[set[str]] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        said[-1].add(statement)

    sa.event.listen(store.database.engine, "before_cursor_execute", note)
    for count in (1, 2, 5):
        said.append(set())
        for key_id in key_ids[:count]:
            use(counter, key_id)
        counter.write()
    assert said[0]
    assert said[0] == said[1] == said[2]


def test_old_counts_are_deleted(store: LocalStore, clock: time_machine.Traveller) -> None:
    counter = UseCounter(store.database)
    key_id = made(store)
    use(counter, key_id)
    clock.shift(60)
    use(counter, key_id)
    counter.write()
    clock.shift(KEPT - 60)
    use(counter, key_id)
    counter.write()
    assert len(minutes(store)) == 3
    clock.shift(60)
    use(counter, key_id)
    counter.write()
    first = START // 60
    assert sorted(minute for _, minute in minutes(store))[0] == first + 1


def test_threads_lose_no_use(store: LocalStore) -> None:
    counter = UseCounter(store.database)
    key_ids = [made(store) for _ in range(3)]
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            counter.write()

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: [use(counter, key_id, 500) for key_id in key_ids], range(8)))
    done.set()
    for writer in writers:
        writer.join()
    counter.write()
    assert [total(store, key_id) for key_id in key_ids] == [4000] * 3


def test_processes_that_write_at_once_lose_no_use(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    key_ids = [made(store) for _ in range(5)]
    uri = store_uri(store)

    def serve(number: int) -> None:
        database = LocalStore(uri).database
        counter = UseCounter(database)
        # Each process has another order of keys, which must not cause a deadlock.
        for _ in range(10):
            for key_id in key_ids if number % 2 else key_ids[::-1]:
                use(counter, key_id)
            counter.write()
        while counter._batch._counts:
            counter.write()
        database.engine.dispose()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(serve, range(4)))
    assert [total(store, key_id) for key_id in key_ids] == [40] * 5
    assert not [record for record in caplog.records if record.name == write_behind.__name__]


@pytest.mark.parametrize("database_uri", ["sqlite"], indirect=True)
def test_uses_are_written_in_the_background(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_behind, "INTERVAL", 0.02)
    counter = UseCounter(store.database)
    assert counter._batch._writer is None
    key_id = made(store)
    writers = set()
    for expected in (1, 2):
        use(counter, key_id)
        writers.add(counter._batch._writer)
        ends = time.monotonic() + LONG
        while total(store, key_id) < expected and time.monotonic() < ends:
            time.sleep(0.01)
        assert total(store, key_id) == expected
    assert writers == {counter._batch._writer} and counter._batch._writer.daemon
    monkeypatch.setattr(write_behind, "INTERVAL", 3600)


@pytest.mark.parametrize("database_uri", ["sqlite"], indirect=True)
def test_forked_process_has_its_own_writer(store: LocalStore) -> None:
    counter = UseCounter(store.database)
    counter._batch._writer = threading.Thread(target=int)  # which fork does not bring along
    use(counter, "key_1")
    assert counter._batch._writer.is_alive()
    counter.write()


def test_number_of_unwritten_counts_is_bounded(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_behind, "LIMIT", 3)
    counter = UseCounter(store.database)
    rename(store, USES.name, "gone")
    for number in range(4):
        use(counter, f"key_{number}a")
        use(counter, f"key_{number}b")
        counter.write()
    assert len(counter._batch._counts) == 3

"""Keys that end soon, or that nobody uses, are announced once, by whichever process comes first."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import sqlalchemy as sa
import time_machine

from mlflow_hokusai_auth.store import notices
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.notices import DAY, announce
from mlflow_hokusai_auth.store.tables import KEYS
from tests.store.conftest import START

UNUSED = notices.UNUSED_DAYS


def made(store: LocalStore, days: float | None = None, **fields: Any) -> str:
    """Create a key that ends in `days`, and return its id."""
    ends = None if days is None else START + days * DAY
    return store.create(owner="ACME", scopes=["mlflow:read"], expires_at=ends, **fields)[0].key_id


def used(store: LocalStore, key_id: str, at: float) -> None:
    with store.database.engine.begin() as connection:
        connection.execute(
            sa.update(KEYS).where(KEYS.c.key_id == key_id).values(last_used_at=float(at))
        )


def told(store: LocalStore) -> list[tuple[str, str, int]]:
    """Announce what is due, and return all events so far."""
    announce(store.database)
    events = [*store.database.audited(event="key.ending"), *store.database.audited(event="key.un")]
    return [(event["event"], event["key_id"], event["detail"]["days"]) for event in events]


def test_end_is_announced_once_at_each_threshold(
    store: LocalStore, clock: time_machine.Traveller
) -> None:
    key = made(store, 40)
    far, near = ("key.ending", key, 14), ("key.ending", key, 3)
    clock.shift(26 * DAY - 1)
    assert told(store) == []
    for shift, expected in (
        (1, [far]),
        (DAY, [far]),
        (10 * DAY - 1, [far]),
        (1, [far, near]),
        (3 * DAY - 1, [far, near]),
        (1, [far, near]),
        (200 * DAY, [far, near]),
    ):
        clock.shift(shift)
        assert told(store) == expected, shift
    (event, _) = store.database.audited(event="key.ending")
    assert event["detail"] == {"owner": "ACME", "days": 14, "expires_at": START + 40 * DAY}
    assert (event["actor"], event["actor_key_id"]) == ("server", "")


def test_only_the_nearer_threshold_is_announced_after_a_pause(
    store: LocalStore, clock: time_machine.Traveller
) -> None:
    key = made(store, 40)
    clock.shift(38 * DAY)
    assert told(store) == [("key.ending", key, 3)]


def test_changed_end_counts_anew(store: LocalStore, clock: time_machine.Traveller) -> None:
    key = made(store, 40)
    clock.shift(38 * DAY)
    expected = [("key.ending", key, 3)]
    assert told(store) == expected
    store.edit(key, {"expires_at": START + 50 * DAY})
    expected += [("key.ending", key, 14)]
    assert told(store) == expected
    store.edit(key, {"expires_at": START + 41 * DAY})
    expected += [("key.ending", key, 3)]
    assert told(store) == expected == told(store)
    store.edit(key, {"expires_at": None})
    clock.shift(30 * DAY)
    assert told(store) == expected


def test_replaced_revoked_ended_and_short_lived_keys_are_not_announced(
    store: LocalStore, clock: time_machine.Traveller
) -> None:
    store.rotate(made(store), overlap=100 * DAY)
    store.revoke(made(store, 40))
    made(store, 20)
    made(store)
    clock.shift(UNUSED * DAY - 1)
    announce(store.database)
    made(store, UNUSED + 13)  # It was made for 13 days.
    clock.shift(DAY)
    told(store)
    events = {event["key_id"] for event in store.database.audited(event="key.ending")}
    assert not events
    lives = [record.key_id for record in store.each() if record.state(START) == "active"]
    unused = [event["key_id"] for event in store.database.audited(event="key.unused")]
    assert len(unused) == 2 and set(unused) < set(lives)


def test_key_that_is_used_again_is_announced_again_when_it_rests(
    store: LocalStore, clock: time_machine.Traveller
) -> None:
    key, never = made(store), made(store)
    used(store, key, START + 5 * DAY)
    clock.shift(UNUSED * DAY)
    expected = [("key.unused", never, UNUSED)]
    assert told(store) == expected
    clock.shift(5 * DAY)
    expected += [("key.unused", key, UNUSED)]
    assert told(store) == expected == told(store)
    used(store, key, START + 95 * DAY)
    clock.shift((UNUSED - 1) * DAY)
    assert told(store) == expected
    clock.shift(DAY)
    assert told(store) == [*expected, ("key.unused", key, UNUSED)]
    details = [event["detail"] for event in store.database.audited(event="key.unused")]
    assert [detail["last_used_at"] for detail in details] == [
        None,
        START + 5 * DAY,
        START + 95 * DAY,
    ]


def _announce(arguments: tuple[str, int]) -> None:
    uri, _ = arguments
    with time_machine.travel(START + 38 * DAY, tick=False):
        announce(LocalStore(uri).database)


def test_one_of_many_processes_announces_a_key(
    store: LocalStore, database_uri: str, clock: time_machine.Traveller
) -> None:
    keys = {made(store, 40) for _ in range(30)}
    with multiprocessing.get_context("fork").Pool(6) as pool:
        pool.map(_announce, [(database_uri, number) for number in range(12)], chunksize=1)
    events = store.database.audited(event="key.ending", limit=None)
    assert sorted(event["key_id"] for event in events) == sorted(keys)


def test_many_keys_are_announced_in_several_looks(
    store: LocalStore, clock: time_machine.Traveller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "BATCH", 10)
    for _ in range(11):
        made(store, 40)
    clock.shift(38 * DAY)
    for more, events in ((True, 10), (False, 11), (False, 11)):
        assert announce(store.database) == more
        assert len(store.database.audited(event="key.ending")) == events


def test_counts_are_of_the_keys_that_are_announced(
    store: LocalStore, clock: time_machine.Traveller
) -> None:
    def counted() -> list[int]:
        return [
            notices.counts(store.database)[which]
            for which in (("key.ending", 14), ("key.ending", 3), ("key.unused", UNUSED))
        ]

    made(store, 100)
    store.rotate(made(store, 100), overlap=100 * DAY)  # The new one ends with the old one.
    made(store, 93)
    made(store)
    assert counted() == [0, 0, 0]
    clock.shift(90 * DAY - 1)
    assert counted() == [3, 0, 0]
    clock.shift(1)
    assert counted() == [3, 1, 4]
    clock.shift(10 * DAY)
    assert counted() == [0, 0, 1]

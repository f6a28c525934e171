"""The number of keys in each state, which metrics show."""

from __future__ import annotations

from collections import Counter

import pytest
import sqlalchemy as sa
import time_machine

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.records import STATES
from tests.store.conftest import START

DAY = 86400.0
NONE = dict.fromkeys(STATES, 0)


def made(store: LocalStore, ends: float | None = None) -> str:
    expires_at = None if ends is None else START + ends
    record, _ = store.create(owner="ACME", scopes=["mlflow:read"], expires_at=expires_at)
    return record.key_id


def test_empty_store_has_no_key_in_any_state(store: LocalStore) -> None:
    assert store.counts() == NONE


def test_each_key_is_in_one_state(store: LocalStore, clock: time_machine.Traveller) -> None:
    made(store)
    made(store, ends=8 * DAY)
    made(store, ends=6 * DAY)
    made(store, ends=-1)
    store.revoke(made(store, ends=DAY))
    store.revoke(made(store, ends=-1))  # revoked first of all, as `KeyRecord.state` has it
    store.rotate(made(store, ends=2 * DAY))
    store.rotate(made(store))  # the old key ends in a day, but it counts as deprecated
    assert store.counts() == {"active": 5, "deprecated": 2, "expired": 1, "revoked": 2}
    # The counts agree with the records' own states.
    assert store.counts() == dict(Counter(record.state(START) for record in store.each()))


def test_counts_change_with_time(store: LocalStore, clock: time_machine.Traveller) -> None:
    made(store, ends=10 * DAY)
    store.rotate(made(store))
    assert store.counts() == {**NONE, "active": 2, "deprecated": 1}
    clock.shift(10 * DAY - 1)
    assert store.counts() == {**NONE, "active": 2, "expired": 1}
    clock.shift(1)
    assert store.counts() == {**NONE, "active": 1, "expired": 2}


def test_failing_store_raises_an_error(store: LocalStore) -> None:
    with store.database.engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE hokusai_auth_keys"))
    with pytest.raises(AuthorityUnavailable):
        store.counts()

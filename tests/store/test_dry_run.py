"""The report of mode observe, on SQLite and PostgreSQL."""

from __future__ import annotations

import time

import pytest

from mlflow_hokusai_auth.store import dry_run
from mlflow_hokusai_auth.store.dry_run import (
    OTHERS,
    Observed,
    WouldRefuse,
    report,
)
from mlflow_hokusai_auth.store.keys import LocalStore

NOW = int(time.time()) // 60


def one(**fields: object) -> WouldRefuse:
    usual = {"reason": "KEY_MISSING", "rule": "GET /a", "key_id": "", "address": "192.0.2.1"}
    return WouldRefuse(**{**usual, "owner": "", "minute": NOW, **fields})  # type: ignore[arg-type]


def test_counts_of_processes_add_up_and_keep_first_and_last_times(store: LocalStore) -> None:
    first, second = Observed(store.database), Observed(store.database)
    for process, minute in ((first, NOW - 5), (second, NOW), (first, NOW - 9), (first, NOW - 5)):
        process.add(one(minute=minute, key_id="k", owner=f"at {minute}"))
        process.write()
    (row,) = report(store.database, 0)
    assert (row["requests"], row["last_at"]) == (4, NOW * 60)
    assert row["first_at"] == (NOW - 5) * 60


def test_reason_route_key_and_address_have_rows_of_their_own(store: LocalStore) -> None:
    process = Observed(store.database)
    kinds = [
        one(),
        one(reason="KEY_UNKNOWN"),
        one(rule="GET /b"),
        one(key_id="k"),
        one(address="192.0.2.2"),
    ]
    for times, kind in enumerate(kinds, 1):
        for _ in range(times):
            process.add(kind)
    process.write()
    rows = report(store.database, 0)
    assert [row["requests"] for row in rows] == [5, 4, 3, 2, 1]
    assert rows[0]["address"] == "192.0.2.2"


def test_row_is_deleted_after_a_month_without_a_request(store: LocalStore) -> None:
    process = Observed(store.database)
    process.add(one(minute=NOW - 32 * 1440))
    process.add(one(rule="GET /b", minute=NOW - 8 * 1440))
    process.write()
    assert len(report(store.database, 0)) == 2
    assert report(store.database, time.time() - 7 * 86400) == []
    process.add(one(rule="GET /c"))
    process.write()
    assert {row["rule"] for row in report(store.database, 0)} == {"GET /b", "GET /c"}


def test_any_number_of_addresses_makes_a_bounded_number_of_rows(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "MAX_ROWS", 10)
    process = Observed(store.database)
    for number in range(8):
        process.add(one(address=f"192.0.2.{number}"))
    process.write()
    for number in range(100):
        process.add(one(address=f"198.51.100.{number}", key_id=str(number)))
    process.write()
    rows = report(store.database, 0)
    assert len(rows) == 9
    assert (rows[0]["requests"], rows[0]["address"], rows[0]["key_id"]) == (100, OTHERS, OTHERS)
    assert rows[0]["reason"] == "KEY_MISSING"

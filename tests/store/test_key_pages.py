"""Pages of the list of keys: their orders, the way forward and back, and their tokens."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
import time_machine

from mlflow_hokusai_auth.core.errors import InvalidRequest
from mlflow_hokusai_auth.store import key_pages
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.records import STATES, KeyFilter, KeyRecord
from mlflow_hokusai_auth.store.tables import KEYS
from tests.store.conftest import START

DAY = 86400.0
NEWEST = key_pages.NEWEST_FIRST
#: Field -> the value by which records are ordered, as Python has it.
VALUES: dict[str, Callable[[KeyRecord], Any]] = {
    "created_at": lambda one: one.created_at,
    "expires_at": lambda one: float("inf") if one.expires_at is None else one.expires_at,
    "last_used_at": lambda one: -1 if one.last_used_at is None else one.last_used_at,
    "name": lambda one: (one.name or one.owner).lower()[:64],
    "owner": lambda one: one.owner.lower()[:64],
    "scopes": lambda one: one.scopes,
    "state": lambda one: STATES.index(one.state(START)),
}


def used(store: LocalStore, key_id: str, at: float) -> None:
    with store.database.changing() as change:
        this = sa.update(KEYS).where(KEYS.c.key_id == key_id)
        change.connection.execute(this.values(last_used_at=at))


@pytest.fixture
def full(store: LocalStore, clock: time_machine.Traveller) -> LocalStore:
    """A store of keys in every state, with equal and missing values of every field."""
    for number in range(20):
        clock.move_to(START - 3600 + number // 3)
        record, _ = store.create(
            owner=("acme", "BETA", "x" * 80)[number % 3],
            name=("", "Zeta", "eta", "y" * 200)[number % 4],
            scopes=[("model:read", "model:write"), ("mlflow:read",)][number % 2],
            expires_at=(None, START + DAY, START - 1)[number % 3],
        )
        if number % 4 == 1:
            used(store, record.key_id, START - number // 8 * 60.0)
        if number % 5 == 0:
            store.revoke(record.key_id)
        if number % 6 == 1:
            store.rotate(record.key_id)
    clock.move_to(START)
    return store


def test_every_order_leads_forward_and_back_through_all_keys(full: LocalStore) -> None:
    for field, value in VALUES.items():
        for descending in (False, True):
            order = key_pages.Order(field, descending)
            whole = full.page(order=order, max_results=1000)
            ids = [one.key_id for one in whole.records]
            assert len(ids) == len(set(ids)) == whole.total > 20, order
            values = [value(one) for one in whole.records]
            assert values == sorted(values, reverse=descending), order
            page, seen, pages = full.page(order=order, max_results=4), [], []
            while True:
                assert page.before == len(seen) and page.total == whole.total, order
                seen += [one.key_id for one in page.records]
                pages.append(page)
                if page.next_page_token is None:
                    break
                page = full.page(order=order, max_results=4, page_token=page.next_page_token)
            assert seen == ids, order
            for earlier in reversed(pages[:-1]):
                assert page.previous_page_token is not None
                page = full.page(order=order, max_results=4, page_token=page.previous_page_token)
                assert page == earlier, order
    assert set(VALUES) == set(key_pages.FIELDS)


def test_pages_go_on_where_they_were_while_keys_are_used_and_revoked(full: LocalStore) -> None:
    order = key_pages.Order("last_used_at", descending=True)
    first = full.page(order=order, max_results=3)
    rest = full.page(order=order, max_results=1000, page_token=first.next_page_token)
    # The last key of the page is used now, so it is the first of all.
    used(full, first.records[-1].key_id, START)
    again = full.page(order=order, max_results=1000, page_token=first.next_page_token)
    assert again.records == rest.records
    valid = KeyFilter(state="valid")
    first = full.page(valid, max_results=3)
    rest = full.page(valid, max_results=1000, page_token=first.next_page_token)
    for record in first.records:
        full.revoke(record.key_id)
    again = full.page(valid, max_results=1000, page_token=first.next_page_token)
    assert (again.records, again.before, again.total) == (rest.records, 0, len(rest.records))


def test_the_way_back_ends_at_a_whole_first_page(full: LocalStore) -> None:
    second = full.page(
        max_results=4, page_token=full.page(max_results=2).next_page_token
    ).previous_page_token
    assert full.page(max_results=4, page_token=second) == full.page(max_results=4)


def test_tokens_of_others_and_other_orders_are_refused(full: LocalStore) -> None:
    def encoded(*content: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")

    good = full.page(max_results=1).next_page_token
    assert good is not None
    by = str(NEWEST)
    for token in (
        "",
        "key_none",
        "é",
        good[:-2],
        "A" * 600,
        encoded(),
        encoded(by, "text", "key_1", False),
        encoded(by, float("nan"), "key_1", False),
        encoded(by, 10**400, "key_1", False),
        encoded(by, None, "key_1", False),
        encoded(by, 1.0, "key_\0", False),
        encoded(by, 1.0, 1, False),
        encoded(by, 1.0, "key_1", 2),
        encoded(by, 1.0, "key_1", []),
        base64.urlsafe_b64encode(b"[" * 300).decode(),
    ):
        with pytest.raises(InvalidRequest, match="page_token is not one"):
            full.page(page_token=token)
    owners = key_pages.Order("owner", descending=False)
    for text in (5, "\ud800", "a\0"):
        with pytest.raises(InvalidRequest, match="page_token is not one"):
            full.page(order=owners, page_token=encoded("owner ASC", text, "key_1", False))
    with pytest.raises(InvalidRequest, match="another order_by"):
        full.page(order=key_pages.Order("created_at", descending=False), page_token=good)
    longest = key_pages.token(owners, key_pages.Place("\U0001f30a" * 64, "key_" + "0" * 16))
    assert len(longest) <= key_pages.MAX_TOKEN
    full.page(order=owners, page_token=longest)


def test_orders_are_read_and_mistakes_explained() -> None:
    assert key_pages.order("owner") == key_pages.Order("owner", descending=False)
    assert key_pages.order(" owner  asc ") == key_pages.Order("owner", descending=False)
    assert key_pages.order(str(NEWEST)) == NEWEST
    for text, says in (
        ("", "must begin with one of"),
        ("digest", "must begin with one of"),
        ("ownr", "Did you mean `owner`"),
        ("owner up", "takes ASC or DESC"),
        ("owner DESC, name", "takes ASC or DESC"),
    ):
        with pytest.raises(InvalidRequest, match=says):
            key_pages.order(text)


def test_filters_by_scope_by_end_and_by_use(
    store: LocalStore, clock: time_machine.Traveller
) -> None:
    def made(*scopes: str, ends: float | None = None) -> str:
        expires_at = None if ends is None else START + ends
        return store.create(owner="a", scopes=scopes, expires_at=expires_at)[0].key_id

    old = made("model:read", ends=10 * DAY)
    forgotten = made("read")
    clock.move_to(START + 5 * DAY)
    young = made("mlflow:read", "model:read", ends=9 * DAY)
    replaced = made("model:read")
    store.rotate(replaced, overlap=DAY)
    for ended in (made("model:read", ends=8 * DAY), made("model:read", ends=1 * DAY)):
        if store.get(ended).state(START + 5 * DAY) != "expired":
            store.revoke(ended)
    used(store, old, START + 4 * DAY)

    def found(**which: Any) -> set[str]:
        return {one.key_id for one in store.each(KeyFilter(**which))}

    assert found(scope="read") == {forgotten}
    assert found(scope="mlflow:read") == {young}
    assert found(expires_within=5 * DAY) == {old, young, replaced}
    assert found(expires_within=4 * DAY) == {young, replaced}
    assert found(unused_for=DAY) == {old, forgotten}
    assert found(unused_for=2 * DAY) == {forgotten}
    states = {one.key_id: one.state(START + 5 * DAY) for one in store.each()}
    valid = {key_id for key_id, state in states.items() if state in ("active", "deprecated")}
    assert found(state="valid") == valid and replaced in valid
    assert found(state="ended") == states.keys() - valid != set()
    with pytest.raises(InvalidRequest, match="Did you mean `model:read`"):
        store.page(KeyFilter(scope="model:raed"))

"""`GET audit`: the audit log by REST."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flask
import pytest

from mlflow_hokusai_auth.server.web import audit_api
from mlflow_hokusai_auth.store.database import Actor
from mlflow_hokusai_auth.store.keys import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(f"sqlite:///{tmp_path}/keys.db")
    store.migrate()
    with store.database.changing() as change:
        for number in range(5):
            change.audit("key.edited", Actor("alice", f"key_{number % 2}"), "key_x", number=number)
        change.audit("session.ended", Actor("bob"))
    return store


def ask(store: LocalStore, query: str, status: int = 200) -> dict[str, Any]:
    app = flask.Flask("mlflow")
    app.register_blueprint(audit_api.blueprint(store.database))
    answer = app.test_client().get(f"/api/2.0/hokusai/audit{query}")
    assert answer.status_code == status, answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    found: dict[str, Any] = answer.get_json()
    return found


def numbers(page: dict[str, Any]) -> list[int | None]:
    return [event["detail"].get("number") for event in page["events"]]


def test_pages_lead_to_the_oldest_event(store: LocalStore) -> None:
    page = ask(store, "?max_results=4")
    assert numbers(page) == [2, 3, 4, None]
    page = ask(store, f"?max_results=4&page_token={page['next_page_token']}")
    assert (numbers(page), page["next_page_token"]) == ([0, 1], None)
    assert ask(store, "?max_results=6")["next_page_token"] is None


def test_after_gives_the_first_events_after_one(store: LocalStore) -> None:
    first = ask(store, "")["events"][0]["id"]
    page = ask(store, f"?after={first}&max_results=2")
    assert (numbers(page), page["next_page_token"]) == ([1, 2], None)
    assert numbers(ask(store, f"?after={first + 4}")) == [None]
    assert numbers(ask(store, f"?after={first + 5}")) == []


def test_filters(store: LocalStore) -> None:
    for query, found in (
        ("?event=session", [None]),
        ("?key_id=key_1", [1, 3]),
        ("?key_id=key_x&actor=alice", [0, 1, 2, 3, 4]),
        ("?actor=bob", [None]),
        ("?since=1.5&actor=bob", [None]),
        ("?since=9999999999", []),
    ):
        assert numbers(ask(store, query)) == found, query


def test_mistakes_are_400(store: LocalStore) -> None:
    for query, says in (
        ("?max_results=0", "max_results must be from 1"),
        ("?max_results=1001", "max_results must be from 1"),
        ("?since=yesterday", "since must be a time"),
        ("?since=nan", "since must be a time"),
        ("?after=x", "after is not one"),
        ("?page_token=-1", "page_token is not one"),
        ("?actor=a%00", "actor must be printable"),
    ):
        assert says in ask(store, query, 400)["message"], query

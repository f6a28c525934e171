"""The authority for browser sessions: a token gets the answer for its key while the session lasts."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import time_machine
from cachetools import TTLCache

from mlflow_hokusai_auth.authorities.browser_session import SessionAuthority
from mlflow_hokusai_auth.authorities.cache import MAX_UNCONFIRMED, CachedBackend
from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.core.policy import Policy, settle
from mlflow_hokusai_auth.core.types import (
    Access,
    Credential,
    Deny,
    NeedKey,
    Operation,
    Principal,
    Rejected,
)
from mlflow_hokusai_auth.store.database import Actor, Database
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.sessions import Sessions

HERE = "192.0.2.7"
ALICE, BOB = (
    Principal(name, name, frozenset({"read"}), owner_id=f"id of {name}")
    for name in ("alice", "bob")
)
ACTOR = Actor("ACME", "key_1")


class Known:
    """An authority that knows every key without a lookup, and records the keys."""

    def __init__(self) -> None:
        self.known: dict[str, Principal | Rejected] = {"alice": ALICE, "bob": BOB}
        self.asked: list[tuple[str, str, str]] = []

    def peek(self, key: str, address: str) -> Principal | Rejected | None:
        self.asked.append(("peek", key, address))
        return self.known.get(key)

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        self.asked.append(("lookup", key, address))
        return self.known.get(key, Rejected())


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    return another(tmp_path)


def another(folder: Path) -> Sessions:
    """The sessions of another process with the same database."""
    database = Database(f"sqlite:///{folder}/keys.db")
    database.migrate()
    return Sessions(database)


@pytest.fixture
def statements(sessions: Sessions) -> Iterator[list[str]]:
    """The statements that the database gets from here on."""
    seen: list[str] = []

    def record(_c: object, _cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    engine = sessions._database.engine
    sa.event.listen(engine, "before_cursor_execute", record)
    yield seen
    sa.event.remove(engine, "before_cursor_execute", record)


def end(sessions: Sessions, token: str) -> None:
    sessions.end(token, address=HERE, request_id="")


def test_session_token_gets_the_answer_for_its_key(sessions: Sessions) -> None:
    inner = Known()
    authority = SessionAuthority(inner, sessions)
    token = sessions.begin("alice", 60, ACTOR)
    assert authority.lookup(token, HERE) == ALICE
    assert authority.peek(token, HERE) == ALICE
    assert inner.asked == [("lookup", "alice", HERE), ("peek", "alice", HERE)]
    other = sessions.begin("bob", 60, ACTOR)
    assert authority.lookup(other, HERE) == BOB
    assert (authority.peek(token, HERE), authority.peek(other, HERE)) == (ALICE, BOB)


def test_other_keys_are_looked_up_unchanged(sessions: Sessions, statements: list[str]) -> None:
    inner = Known()
    authority = SessionAuthority(inner, sessions)
    assert authority.lookup("alice", HERE) == ALICE
    assert authority.peek("bob", HERE) == BOB
    assert authority.lookup("carol", HERE) == Rejected()
    assert len(inner.asked) == 3
    assert statements == []


def test_token_without_a_session_is_rejected_without_a_lookup(sessions: Sessions) -> None:
    inner = Known()
    authority = SessionAuthority(inner, sessions)
    sessions.begin("alice", 60, ACTOR)
    for token in (keys.session_token(), "hk_session_"):
        inner.known[token] = BOB
        assert authority.peek(token, HERE) is None
        assert authority.lookup(token, HERE) == Rejected()
    assert inner.asked == []


def test_peek_asks_no_database(sessions: Sessions, statements: list[str]) -> None:
    authority = SessionAuthority(Known(), sessions)
    token = sessions.begin("alice", 60, ACTOR)
    statements.clear()
    assert authority.peek(token, HERE) is None
    assert statements == []
    authority.lookup(token, HERE)
    assert len(statements) == 1
    for _ in range(10):
        assert authority.peek(token, HERE) == ALICE
    assert len(statements) == 1


def test_peek_does_not_answer_for_an_expired_session(sessions: Sessions) -> None:
    authority = SessionAuthority(Known(), sessions)
    with time_machine.travel(2_000_000_000, tick=False) as clock:
        # The session ends before its cached copy does.
        token = sessions.begin("alice", MAX_UNCONFIRMED / 2, ACTOR)
        assert authority.lookup(token, HERE) == ALICE
        clock.shift(MAX_UNCONFIRMED / 2)
        assert authority.peek(token, HERE) is None
        assert authority.lookup(token, HERE) == Rejected()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of the sessions' cache."""
    now = [1000.0]
    timed = functools.partial(TTLCache, timer=lambda: now[0])
    monkeypatch.setattr("mlflow_hokusai_auth.authorities.browser_session.TTLCache", timed)
    return now


def test_every_process_notices_a_sign_out_in_time(
    sessions: Sessions, tmp_path: Path, now: list[float]
) -> None:
    authority = SessionAuthority(Known(), sessions)
    token, other = sessions.begin("alice", 60, ACTOR), sessions.begin("alice", 60, ACTOR)
    authority.lookup(token, HERE)
    authority.lookup(other, HERE)
    end(another(tmp_path), token)
    now[0] += MAX_UNCONFIRMED
    assert authority.peek(token, HERE) is None
    assert authority.lookup(token, HERE) == Rejected()
    assert authority.peek(token, HERE) is None
    assert authority.lookup(other, HERE) == ALICE


def verdict(found: Principal | Rejected) -> str:
    need = NeedKey(
        Credential(keys.session_token(), ("the session cookie",), session=True),
        Operation(Access.READ, "runs", "GET /x"),
        HERE,
    )
    settled = settle(need, found, time.time(), Policy())
    return settled.code if isinstance(settled, Deny) else "ALLOWED"


def test_regression_44_a_session_dies_with_its_key(tmp_path: Path, now: list[float]) -> None:
    store = LocalStore(f"sqlite:///{tmp_path}/keys.db")
    store.migrate()
    sessions = Sessions(store.database)
    cached = CachedBackend(store, ttl=60, secret=b"secret", timer=lambda: now[0])
    authority = SessionAuthority(cached, sessions)
    record, key = store.create(owner="ACME", scopes=["mlflow:read"])
    token = sessions.begin(key, 60, Actor("ACME", record.key_id))
    assert verdict(authority.lookup(token, HERE)) == "ALLOWED"
    LocalStore(f"sqlite:///{tmp_path}/keys.db").revoke(record.key_id)
    # A reading that began before the revocation confirms for exactly this long.
    now[0] += MAX_UNCONFIRMED + 0.01
    assert authority.peek(token, HERE) is None
    assert verdict(authority.lookup(token, HERE)) == "SESSION_ENDED"


def test_outage_is_no_answer_for_a_session(sessions: Sessions) -> None:
    authority = SessionAuthority(Known(), sessions)
    token = sessions.begin("alice", 60, ACTOR)
    with sessions._database.changing() as change:
        change.connection.exec_driver_sql("ALTER TABLE hokusai_auth_sessions RENAME TO away")
    with pytest.raises(AuthorityUnavailable):
        authority.lookup(token, HERE)
    with sessions._database.changing() as change:
        change.connection.exec_driver_sql("ALTER TABLE away RENAME TO hokusai_auth_sessions")
    assert authority.lookup(token, HERE) == ALICE

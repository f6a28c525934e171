"""Sessions in the database: they open a key with their token, and none without it."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import time_machine
from cryptography.fernet import Fernet, InvalidToken

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.store import metrics
from mlflow_hokusai_auth.store.database import Actor, Database
from mlflow_hokusai_auth.store.sessions import MAX_REFUSED, Sessions
from mlflow_hokusai_auth.store.sweep import sweep
from mlflow_hokusai_auth.store.tables import SESSIONS
from tests.harness import ROOT

ACME = Actor("ACME", "key_1", "192.0.2.7", "r-1")
KEY = keys.generate()


@pytest.fixture
def database(database_uri: str) -> Iterator[Database]:
    database = Database(database_uri)
    database.migrate()
    yield database
    database.engine.dispose()


@pytest.fixture
def sessions(database: Database) -> Sessions:
    return Sessions(database)


def rows(database: Database) -> list[sa.Row[tuple[object, ...]]]:
    with database.reading() as connection:
        return list(connection.execute(sa.select(SESSIONS)))


def end(sessions: Sessions, token: str) -> None:
    sessions.end(token, address="192.0.2.8", request_id="r-2")


def test_a_session_stands_for_its_key_and_has_a_token_of_its_own(sessions: Sessions) -> None:
    tokens = {sessions.begin(KEY, 3600, ACME) for _ in range(5)}
    assert len(tokens) == 5
    for token in tokens:
        assert keys.is_session_token(token)
        found = sessions.find(token)
        assert found is not None and found[0] == KEY
        assert 3000 < found[1] - time.time() <= 3600


@pytest.mark.parametrize("database_uri", ["sqlite"], indirect=True)
def test_regression_44_the_file_holds_neither_keys_nor_sessions(
    sessions: Sessions, tmp_path: Path
) -> None:
    token = sessions.begin(KEY, 60, ACME)
    end(sessions, sessions.begin(KEY, 60, ACME))
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"ACME" in kept
    for secret in (KEY, KEY[8:], keys.digest(KEY), token, token[11:], keys.digest(token)):
        assert secret.encode() not in kept


def test_stored_data_opens_no_seal(sessions: Sessions, database: Database) -> None:
    sessions.begin(KEY, 60, ACME)
    (row,) = rows(database)
    for secret in (bytes.fromhex(row.digest), bytes(32)):
        with pytest.raises(InvalidToken):
            Fernet(base64.urlsafe_b64encode(secret)).decrypt(row.sealed_key.encode())


def test_no_other_token_finds_a_session(sessions: Sessions) -> None:
    token = sessions.begin(KEY, 60, ACME)
    for wrong in (token[:-1], token + "a", token.swapcase(), KEY, "", "%", keys.session_token()):
        assert sessions.find(wrong) is None
    assert sessions.find(token) is not None


def test_a_session_opens_its_own_seal_only(sessions: Sessions, database: Database) -> None:
    mine = sessions.begin(KEY, 60, ACME)
    (row,) = rows(database)
    yours = sessions.begin(keys.generate(), 60, ACME)
    # An attacker who may write to the database, but has only one session, swaps the keys.
    with database.changing(generation=False) as change:
        theirs = change.connection.execute(
            sa.select(SESSIONS.c.sealed_key).where(SESSIONS.c.digest != row.digest)
        ).scalar_one()
        change.connection.execute(
            sa.update(SESSIONS).where(SESSIONS.c.digest == row.digest).values(sealed_key=theirs)
        )
    with pytest.raises(InvalidToken):
        sessions.find(mine)
    assert sessions.find(yours) is not None


def test_a_session_ends_by_itself(sessions: Sessions, database: Database) -> None:
    with time_machine.travel(2_000_000_000, tick=False) as clock:
        token = sessions.begin(KEY, 60, ACME)
        clock.shift(59.9)
        assert sessions.find(token) == (KEY, 2_000_000_060)
        clock.shift(0.1)
        assert sessions.find(token) is None
        # Ended sessions are deleted, and no others.
        long = sessions.begin(KEY, 600, ACME)
        sweep(database)
        assert len(rows(database)) == 1
        assert sessions.find(long) is not None


def test_ending_a_session_is_final_and_ends_no_other(
    sessions: Sessions, database: Database
) -> None:
    token, other = sessions.begin(KEY, 60, ACME), sessions.begin(KEY, 60, ACME)
    end(sessions, token)
    assert sessions.find(token) is None
    assert sessions.find(other) is not None
    for unknown in (token, keys.session_token(), "x"):
        end(sessions, unknown)
    assert len(rows(database)) == 1
    assert [row["event"] for row in database.audited(event="session.ended")] == ["session.ended"]


def test_a_made_up_token_begins_no_change(
    sessions: Sessions, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "changing", None)
    end(sessions, keys.session_token())
    end(sessions, "\xff")


def test_session_events_are_audited_without_secrets(sessions: Sessions, database: Database) -> None:
    token = sessions.begin(KEY, 60, ACME)
    end(sessions, token)
    sessions.count_failed_sign_in("198.51.100.1", "KEY_UNKNOWN")
    sessions.write()
    events = database.audited()
    fields = ("event", "actor", "actor_key_id", "key_id", "address", "request_id", "detail")
    assert [tuple(event[name] for name in fields) for event in events] == [
        ("session.begun", "ACME", "key_1", "key_1", "192.0.2.7", "r-1", {}),
        ("session.ended", "ACME", "key_1", "key_1", "192.0.2.8", "r-2", {}),
        ("session.refused", "", "", "", "198.51.100.1", "", {"count": 1, "reason": "KEY_UNKNOWN"}),
    ]
    assert token not in str(events) and KEY not in str(events)


def test_failed_sign_ins_take_one_row_for_each_address(
    sessions: Sessions, database: Database
) -> None:
    counted = metrics.EVENTS.labels("session.refused")._value
    before = counted.get()
    for number in range(MAX_REFUSED + 7):
        for reason in ("KEY_UNKNOWN", "KEY_EXPIRED")[: 1 + (number < MAX_REFUSED)]:
            for _ in range(3):
                sessions.count_failed_sign_in(f"192.0.2.{number}", reason)
    sessions.write()
    sessions.write()
    *rows, others = database.audited(event="session.refused")
    assert {row["address"] for row in rows} == {f"192.0.2.{n}" for n in range(MAX_REFUSED)}
    assert len(rows) == MAX_REFUSED
    for row in rows:
        assert row["detail"] == {"count": 6, "reason": "KEY_EXPIRED, KEY_UNKNOWN"}
    # Beyond a number that only an attacker reaches, addresses share one row.
    assert others["address"] == ""
    assert others["detail"] == {"count": 21, "reason": "KEY_UNKNOWN", "addresses": 7}
    assert counted.get() - before == 6 * MAX_REFUSED + 21


def test_old_rows_can_be_deleted_as_documented(sessions: Sessions, database: Database) -> None:
    """The page's statements delete rows older than a year, and the table stays append-only."""
    with time_machine.travel(time.time() - 400 * 86400):
        sessions.count_failed_sign_in("192.0.2.1", "KEY_UNKNOWN")
        sessions.write()
    sessions.count_failed_sign_in("192.0.2.2", "KEY_UNKNOWN")
    sessions.write()
    page = (ROOT / "docs/operator/keys.md").read_text()
    kinds = re.findall(r"```sql\n-- (\w+)\n(.*?)```", page, re.DOTALL)
    (statements,) = (text for kind, text in kinds if kind.lower() == database.engine.dialect.name)
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        # A trigger of SQLite contains a statement with its own semicolon.
        for statement in re.split(r";\n(?!END)", statements.strip()):
            connection.exec_driver_sql(statement)
    assert [row["address"] for row in database.audited()] == ["192.0.2.2"]
    for change in ("DELETE FROM hokusai_auth_audit", "UPDATE hokusai_auth_audit SET at = 0"):
        with (
            pytest.raises(sa.exc.DatabaseError, match="append-only"),
            database.engine.begin() as connection,
        ):
            connection.exec_driver_sql(change)


def test_sign_in_does_not_change_the_generation(sessions: Sessions, database: Database) -> None:
    before = database.generation()
    end(sessions, sessions.begin(KEY, 60, ACME))
    assert database.generation() == before


def test_database_failure_does_not_end_a_session(tmp_path: Path) -> None:
    sessions = Sessions(Database(f"sqlite:///{tmp_path}/keys.db"))
    for ask in (
        lambda: sessions.find(keys.session_token()),
        lambda: sessions.begin(KEY, 60, ACME),
        lambda: end(sessions, keys.session_token()),
    ):
        with pytest.raises(AuthorityUnavailable) as refused:
            ask()
        assert KEY not in str(refused.value)

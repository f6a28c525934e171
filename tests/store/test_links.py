"""One-time links, in SQLite and in PostgreSQL."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa
import time_machine

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.errors import (
    AuthorityUnavailable,
    Conflict,
    KeyConflict,
    KeyNotFound,
    NotFound,
    StaffNarrowed,
)
from mlflow_hokusai_auth.core.lifetimes import Lifetimes
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.store import links as store_links
from mlflow_hokusai_auth.store.database import Actor
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.links import LinkRecord, Links, Opened, Refused
from mlflow_hokusai_auth.store.sweep import sweep
from mlflow_hokusai_auth.store.tables import KEYS, LINKS
from tests.store.conftest import LONG, START

OPERATOR = Actor("Operator", "key_op", "192.0.2.7", "r-1")
T = TypeVar("T")
U = TypeVar("U")
FIRST, SECOND = (Actor("", "", f"192.0.2.{n}", f"r-{n}") for n in (8, 9))


@pytest.fixture
def links(store: LocalStore) -> Links:
    return Links(store.database)


def create(links: Links, **fields: Any) -> tuple[LinkRecord, str]:
    given = {"owner": "ACME", "scopes": ("model:write",), "by": OPERATOR}
    return links.create(**{**given, **fields})


def opened(answer: Opened | Refused | None) -> Opened:
    assert isinstance(answer, Opened), answer
    return answer


def state(answer: Opened | Refused | None) -> str | None:
    return answer.state if isinstance(answer, Refused) else answer and "made"


def events(store: LocalStore) -> list[tuple[str, str, str, str]]:
    names = ("event", "actor", "address", "key_id")
    return [tuple(row[name] for name in names) for row in store.database.audited(limit=None)]


def test_link_makes_its_key_when_it_is_opened(
    store: LocalStore, links: Links, clock: time_machine.Traveller
) -> None:
    narrow = {"models": ("acme-*",), "no_delete": True, "networks": ("192.0.2.0/24",)}
    told = {"name": "training", "note": "for Ann", "rate_limit_per_hour": 9}
    link, code = create(links, lifetime=600.0, environment="test", **narrow, **told)
    assert code.startswith("hk_link_") and len(code) == 8 + 43
    assert (link.state(START), link.expires_at, link.created_by) == (
        "waiting",
        START + 86400,
        "Operator",
    )
    # No key exists before, and nothing in the store opens the link.
    assert list(store.each()) == []
    with store.database.reading() as connection:
        row = connection.execute(sa.select(LINKS)).one()
    assert code not in repr(row) and row.digest == keys.digest(code)
    clock.shift(3600)
    found = opened(links.open(code, by=FIRST))
    assert found.key.startswith("hk_test_") and keys.problem(found.key) is None
    # The key's lifetime begins when it is made.
    assert store.lookup(found.key) == Principal(
        found.record.key_id,
        "ACME",
        frozenset({"model:write"}),
        expires_at=START + 3600 + 600,
        owner_id="ACME",
        rate_limit_per_hour=9,
        **narrow,
    )
    assert store.get(found.record.key_id) == found.record
    assert (found.record.name, found.record.note) == ("training", "for Ann")
    (after,) = links.each()
    assert after.state(START) == "opened"
    assert (after.opened_at, after.opened_from, after.key_id) == (
        START + 3600,
        "192.0.2.8",
        found.record.key_id,
    )
    assert events(store) == [
        ("link.created", "Operator", "192.0.2.7", ""),
        ("key.created", f"link:{link.link_id}", "192.0.2.8", found.record.key_id),
        ("link.opened", f"link:{link.link_id}", "192.0.2.8", found.record.key_id),
    ]
    assert code not in repr(store.database.audited(limit=None))


def test_link_that_is_over_makes_no_key_and_the_attempt_is_told(
    store: LocalStore, links: Links, clock: time_machine.Traveller
) -> None:
    spent = create(links)
    key_id = opened(links.open(spent[1], by=FIRST)).record.key_id
    taken = create(links)
    links.revoke(taken[0].link_id, OPERATOR)
    assert events(store)[-1] == ("link.revoked", "Operator", "192.0.2.7", "")
    with pytest.raises(Conflict, match=r"is revoked already\.$"):
        links.revoke(taken[0].link_id, OPERATOR)
    late = create(links, expires_in=60.0)
    clock.shift(60)
    made = len(list(store.each()))
    for (link, code), expected in ((spent, "opened"), (taken, "revoked"), (late, "expired")):
        for attempt in (1, 2):
            refused = links.open(code, by=SECOND)
            assert state(refused) == expected
            event = store.database.audited(limit=1)[0]
            known = {"link_id": link.link_id, "owner": "ACME", "state": expected}
            if expected == "opened":
                known["opened_from"] = "192.0.2.8"
            assert (event["event"], event["address"]) == ("link.refused", "192.0.2.9")
            assert event["detail"] == known
            assert event["key_id"] == (key_id if expected == "opened" else "")
            after = {one.link_id: one for one in links.each()}[link.link_id]
            assert (after.refused, after.refused_at) == (attempt, START + 60)
    assert len(list(store.each())) == made
    assert links.counts() == (0, 3, 1)


def test_unknown_code_costs_no_write(store: LocalStore, links: Links) -> None:
    create(links)
    before = events(store)
    with store.database.changing():
        # Another change holds the lock, so that a write would wait.
        for code in (keys.link_code(), "hk_link_\0", ""):
            assert links.open(code, by=FIRST) is None
    assert events(store) == before


def test_of_replicas_that_open_a_link_at_once_one_makes_a_key(
    store: LocalStore, links: Links, database_uri: str
) -> None:
    replicas = [Links(LocalStore(database_uri).database) for _ in range(4)]
    with ThreadPoolExecutor(len(replicas)) as pool:
        for _ in range(5):
            code = create(links)[1]
            racing = [pool.submit(one.open, code, by=FIRST) for one in replicas]
            found = sorted(str(state(one.result(LONG))) for one in racing)
            assert found == ["made"] + ["opened"] * 3
    assert len(list(store.each())) == 5
    for replica in replicas:
        replica._database.engine.dispose()


def test_no_link_of_an_owner_that_leaves_makes_a_key(
    store: LocalStore, links: Links, database_uri: str
) -> None:
    replica = LocalStore(database_uri)
    other = create(links, owner="GLOBEX")[0]
    made = 0
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            old = store.create(owner="ACME", scopes=["model:read"])[0]
            waiting = [create(links) for _ in range(2)] + [links.create_rotation(old.key_id)]
            racing = [pool.submit(links.open, code, by=FIRST) for _, code in waiting]
            ended, kept, taken, _ = pool.submit(replica.revoke_owner, "ACME", OPERATOR).result(LONG)
            found = [state(one.result(LONG)) for one in racing]
            assert store.valid_of("ACME") == [] and not kept
            states = {one.link_id: one.state(time.time()) for one in links.each()}
            # A link that was opened first made a key, which ended with the others.
            for (link, _), answer in zip(waiting, found, strict=True):
                assert (states[link.link_id], link.link_id in taken) == (
                    ("opened", False) if answer == "made" else ("revoked", True)
                )
            assert len(ended) == 1 + found.count("made")
            made += found.count("made")
    assert links.waiting_of("ACME") == [] and links.waiting_of("GLOBEX") == [other]
    told = [row for row in events(store) if row[0] == "link.revoked"]
    assert told == [("link.revoked", "Operator", "192.0.2.7", "")] * (15 - made)
    assert store.revoke_owner("ACME") == ([], [], [], [])
    replica.database.engine.dispose()


class Overlap:
    """Two replicas. The transaction of the first stays open until that of the second waits for it."""

    def __init__(self, database_uri: str) -> None:
        self.first, self.second = LocalStore(database_uri), LocalStore(database_uri)
        self._is_open, self._waits = threading.Event(), threading.Event()
        sqlite = self.first.database.file is not None

        def stay_open(connection: object) -> None:
            self._is_open.set()
            assert self._waits.wait(LONG)

        def watch(connection: object, cursor: object, statement: str, *more: object) -> None:
            # SQLite has one lock, which the first write takes. PostgreSQL's is the row of generation.
            if "hokusai_auth_state" in statement or (sqlite and "SELECT" not in statement):
                self._waits.set()

        sa.event.listen(self.first.database.engine, "commit", stay_open)
        sa.event.listen(self.second.database.engine, "before_cursor_execute", watch)

    def run(self, first: Callable[[], T], second: Callable[[], U]) -> tuple[Future[T], Future[U]]:
        with ThreadPoolExecutor(2) as pool:
            began = pool.submit(first)
            began.add_done_callback(lambda _: self._is_open.set())
            assert self._is_open.wait(LONG)
            follows = pool.submit(second)
            # One that waits for nothing ends.
            follows.add_done_callback(lambda _: self._waits.set())
        for one in (self.first, self.second):
            one.database.engine.dispose()
        return began, follows


def make(store: LocalStore, replaces: str | None) -> tuple[LinkRecord, str]:
    links = Links(store.database)
    return create(links) if replaces is None else links.create_rotation(replaces)


def revoke(store: LocalStore, key_id: str, *, owner: bool) -> None:
    if owner:
        store.revoke_owner("ACME", OPERATOR)
    else:
        store.revoke(key_id, OPERATOR)


#: A link to a new key or to a replacement, and whether all of the owner is revoked or the key alone.
REVOCATIONS = pytest.mark.parametrize(
    ("replaces", "owner"), [(False, True), (True, True), (True, False)]
)


@REVOCATIONS
def test_revocation_ends_a_link_that_is_just_being_made(
    store: LocalStore, links: Links, database_uri: str, replaces: bool, owner: bool
) -> None:
    key_id = store.create(owner="ACME", scopes=["model:read"])[0].key_id
    both = Overlap(database_uri)
    made, ended = both.run(
        lambda: make(both.first, key_id if replaces else None),
        lambda: revoke(both.second, key_id, owner=owner),
    )
    ended.result()
    assert state(links.open(made.result()[1], by=FIRST)) == "revoked"
    assert store.valid_of("ACME") == [] and links.waiting_of("ACME") == []


@REVOCATIONS
def test_link_that_is_made_during_a_revocation_is_made_after_it(
    store: LocalStore, links: Links, database_uri: str, replaces: bool, owner: bool
) -> None:
    key_id = store.create(owner="ACME", scopes=["model:read"])[0].key_id
    both = Overlap(database_uri)
    ended, made = both.run(
        lambda: revoke(both.first, key_id, owner=owner),
        lambda: make(both.second, key_id if replaces else None),
    )
    ended.result()
    if replaces:
        with pytest.raises(KeyConflict, match="is revoked"):
            made.result()
        assert links.each() == []
    else:
        revoked_at = store.get(key_id).revoked_at
        assert revoked_at is not None and made.result()[0].created_at >= revoked_at


@REVOCATIONS
@pytest.mark.parametrize("first", ["opens", "revokes"])
def test_link_that_is_opened_during_a_revocation_leaves_no_key(
    store: LocalStore, links: Links, database_uri: str, first: str, replaces: bool, owner: bool
) -> None:
    key_id = store.create(owner="ACME", scopes=["model:read"])[0].key_id
    code = make(store, key_id if replaces else None)[1]
    both = Overlap(database_uri)
    if first == "opens":
        answer, ended = both.run(
            lambda: Links(both.first.database).open(code, by=FIRST),
            lambda: revoke(both.second, key_id, owner=owner),
        )
        made = opened(answer.result()).record
        # To revoke a key that was replaced has never ended its successor.
        left = [] if owner else [made.key_id]
    else:
        ended, answer = both.run(
            lambda: revoke(both.first, key_id, owner=owner),
            lambda: Links(both.second.database).open(code, by=FIRST),
        )
        assert state(answer.result()) == "revoked"
        left = []
    ended.result()
    assert [one.key_id for one in store.valid_of("ACME")] == left


def test_link_to_a_replacement_replaces_the_key_when_it_is_opened(
    store: LocalStore, links: Links, clock: time_machine.Traveller
) -> None:
    old, _ = store.create(
        owner="ACME", scopes=["model:write"], expires_at=START + 1000.0, models=("acme-*",)
    )
    link, code = links.create_rotation(old.key_id, overlap=30.0, by=OPERATOR)
    assert (link.owner, link.replaces) == ("ACME", old.key_id)
    assert store.get(old.key_id) == old
    clock.shift(500)
    generation = store.generation()
    found = opened(links.open(code, by=FIRST))
    # Caches hold the old key.
    assert store.generation() > generation
    assert found.replaced is not None
    assert (found.replaced.expires_at, found.replaced.replaced_by) == (
        START + 530,
        found.record.key_id,
    )
    assert (found.record.expires_at, found.record.models) == (START + 1500, ("acme-*",))
    assert isinstance(store.lookup(found.key), Principal)
    assert [row[:3] for row in events(store)[2:]] == [
        ("key.rotated", f"link:{link.link_id}", "192.0.2.8"),
        ("link.opened", f"link:{link.link_id}", "192.0.2.8"),
    ]


def test_link_to_a_replacement_of_a_key_that_has_ended_makes_none(
    store: LocalStore, links: Links, clock: time_machine.Traveller
) -> None:
    revoked, replaced, late = (
        store.create(owner="ACME", scopes=["model:read"], expires_at=ends)[0]
        for ends in (None, None, START + 9.0)
    )
    codes = [links.create_rotation(one.key_id)[1] for one in (revoked, replaced, late)]
    store.revoke(revoked.key_id)
    store.rotate(replaced.key_id)
    clock.shift(10)
    before = list(store.each())
    # Whoever revokes a key need not think of its links.
    assert state(links.open(codes.pop(0), by=SECOND)) == "revoked"
    for code, words in zip(codes, ("was replaced by", "is expired"), strict=True):
        refused = links.open(code, by=SECOND)
        assert isinstance(refused, Refused)
        assert refused.state == "waiting" and words in refused.conflict
        event = store.database.audited(limit=1)[0]
        assert event["event"] == "link.refused" and words in event["detail"]["conflict"]
    assert list(store.each()) == before
    for key_id in (revoked.key_id, replaced.key_id):
        with pytest.raises(KeyConflict):
            links.create_rotation(key_id)
    with pytest.raises(KeyNotFound):
        links.create_rotation("key_0")


def test_link_to_a_replacement_that_cannot_be_made_is_void(
    store: LocalStore, links: Links, clock: time_machine.Traveller
) -> None:
    ids = [
        store.create(owner="ACME", scopes=["model:read"], expires_at=ends)[0].key_id
        for ends in (None, None, None, START + 9.0, None)
    ]
    made = [links.create_rotation(key_id) for key_id in ids]
    # A replica of a version before links revokes a key without its link.
    with store.database.changing() as change:
        this = sa.update(KEYS).where(KEYS.c.key_id == ids[0])
        change.connection.execute(this.values(revoked_at=START))
    store.rotate(ids[1])
    store.edit(ids[2], {"owner": "GLOBEX"})
    clock.shift(10)
    states = {one.link_id: one.state(START + 10) for one in links.each()}
    assert [states[link.link_id] for link, _ in made] == ["void"] * 4 + ["waiting"]
    assert links.counts()[0] == 1
    before = list(store.each())
    for _, code in made[:4]:
        refused = links.open(code, by=FIRST)
        assert isinstance(refused, Refused) and refused.conflict
    assert list(store.each()) == before
    # An expiry can be moved.
    store.edit(ids[3], {"expires_at": START + 99.0})
    assert opened(links.open(made[3][1])).record.owner == "ACME"
    assert links.revoke(made[1][0].link_id).state(START + 10) == "revoked"
    owned = {made[n][0].link_id for n in (0, 2, 4)}
    assert {one.link_id for one in links.waiting_of("ACME")} == owned
    assert set(store.revoke_owner("ACME")[2]) == owned


def test_link_to_a_replacement_makes_no_key_of_another_owner(
    store: LocalStore, links: Links
) -> None:
    old = store.create(owner="ACME", scopes=["model:read"])[0]
    code = links.create_rotation(old.key_id)[1]
    after = store.edit(old.key_id, {"owner": "GLOBEX"})
    refused = links.open(code, by=FIRST)
    assert isinstance(refused, Refused)
    assert (refused.state, "somebody else" in refused.conflict) == ("waiting", True)
    assert "GLOBEX" not in refused.conflict and list(store.each()) == [after]


def test_old_link_does_not_fill_the_audit_log(
    store: LocalStore, links: Links, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_links, "MAX_AUDITED", 2)
    link, code = create(links)
    links.revoke(link.link_id)
    generation = store.generation()
    for _ in range(4):
        assert state(links.open(code, by=SECOND)) == "revoked"
    # Nor does it empty the caches.
    assert store.generation() == generation
    assert [row[0] for row in events(store)].count("link.refused") == 2
    assert links.each()[0].refused == 4


def test_store_that_fails_spends_no_link(store: LocalStore, links: Links) -> None:
    link, code = create(links)
    broken = "ALTER TABLE hokusai_auth_audit RENAME TO away"
    with store.database.engine.begin() as connection:
        connection.exec_driver_sql(broken)
    with pytest.raises(AuthorityUnavailable):
        links.open(code, by=FIRST)
    with store.database.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE away RENAME TO hokusai_auth_audit")
        assert connection.execute(sa.select(KEYS)).all() == []
    assert links.each() == [link]
    opened(links.open(code, by=FIRST))


def test_link_is_made_only_for_a_key_that_could_be(store: LocalStore, links: Links) -> None:
    with pytest.raises(StaffNarrowed):
        create(links, scopes=("mlflow:write",), models=("acme-*",))
    create(links, owner="Acme")
    for other in (
        lambda: create(links, owner="ACME"),
        lambda: store.create(owner="aCME", scopes=[]),
    ):
        with pytest.raises(KeyConflict, match="upper and lower case"):
            other()
    # A link that waits no more reserves no spelling of an owner.
    links.revoke(links.each()[0].link_id)
    _, code = create(links, owner="ACME")
    opened(links.open(code))


def test_lifetime_of_the_key_keeps_to_the_maximum_when_the_link_is_opened(
    links: Links, clock: time_machine.Traveller
) -> None:
    for lifetime, ends in ((None, 50.0), (100.0, 50.0), (20.0, 20.0)):
        found = opened(
            links.open(create(links, lifetime=lifetime)[1], lifetimes=Lifetimes(longest=50.0))
        )
        assert found.record.expires_at == START + ends


def test_revoking_a_link_that_is_over_says_what_it_made(
    links: Links, clock: time_machine.Traveller
) -> None:
    link, code = create(links)
    record = opened(links.open(code)).record
    with pytest.raises(Conflict, match=f"opened already. It made {record.key_id}"):
        links.revoke(link.link_id)
    late = create(links, expires_in=1.0)[0]
    clock.shift(1)
    with pytest.raises(Conflict, match="expired already"):
        links.revoke(late.link_id)
    for wrong in ("link_0", "\0", ""):
        with pytest.raises(NotFound):
            links.revoke(wrong)


def test_links_that_are_over_are_forgotten_after_a_month(
    store: LocalStore, links: Links, clock: time_machine.Traveller
) -> None:
    old, code = create(links)
    clock.shift(86400 + store_links.KEPT - 1)
    newest = create(links)[0]
    sweep(store.database)
    assert state(links.open(code)) == "expired"
    clock.shift(2)
    sweep(store.database)
    assert links.open(code) is None
    assert old.link_id not in {one.link_id for one in links.each()}
    assert links.each() == [newest]

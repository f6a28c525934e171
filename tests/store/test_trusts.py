"""Trusts and exchanges, in SQLite and in PostgreSQL."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import time_machine

from mlflow_hokusai_auth.authorities.cache import MAX_UNCONFIRMED
from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.errors import (
    AuthorityUnavailable,
    Conflict,
    Forbidden,
    InvalidRequest,
    KeyConflict,
    NotFound,
    StaffNarrowed,
)
from mlflow_hokusai_auth.core.lifetimes import Lifetimes
from mlflow_hokusai_auth.core.trust import Refused, Trust, workload
from mlflow_hokusai_auth.core.types import Principal, Rejected
from mlflow_hokusai_auth.store import trusts as store_trusts
from mlflow_hokusai_auth.store.database import Actor
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.records import KeyFilter, KeyRecord
from mlflow_hokusai_auth.store.sweep import sweep
from mlflow_hokusai_auth.store.tables import KEYS, TRUSTS, USED_TOKENS
from mlflow_hokusai_auth.store.trusts import TrustRecord, Trusts
from tests.core.test_trust import GITHUB, GITLAB
from tests.store.conftest import LONG, START

OPERATOR = Actor("Operator", "key_op", "192.0.2.7", "r-1")
CALLER = Actor("", "", "192.0.2.8", "r-2")
WORKLOAD = {"github": "acme/models", "workflow": "release.yml"}


@pytest.fixture
def trusts(store: LocalStore) -> Trusts:
    return Trusts(store.database)


def add(trusts: Trusts, given: dict[str, Any] = WORKLOAD, **more: Any) -> str:
    fields = {"owner": "ACME", "scopes": ("model:write",), "ttl": 900.0, **more}
    return trusts.add(workload(**given), **fields, by=OPERATOR).trust.trust_id


def exchange(
    trusts: Trusts,
    trust_id: str,
    claims: dict[str, Any] = GITHUB,
    *,
    token: str = "1",
    jwks: str | None = None,
) -> tuple[KeyRecord, str] | Refused:
    claims = {**claims, "exp": time.time() + 3000}
    return trusts.exchange(
        trust_id,
        claims,
        jwks=jwks,
        digest=token.rjust(64, "0"),
        token_id=token,
        ends_at=claims["exp"],
        by=CALLER,
    )


def key_of(answer: tuple[KeyRecord, str] | Refused) -> tuple[KeyRecord, str]:
    assert not isinstance(answer, Refused), answer
    return answer


def code(answer: tuple[KeyRecord, str] | Refused) -> str:
    return answer.code if isinstance(answer, Refused) else "ok"


def test_exchanged_key_is_a_key_with_the_rights_of_its_trust(
    store: LocalStore, trusts: Trusts, clock: time_machine.Traveller
) -> None:
    trust_id = add(trusts, models=("acme-*",), no_delete=True, ttl=600.0)
    record, key = key_of(exchange(trusts, trust_id))
    assert key.startswith("hk_ci_")
    assert keys.problem(key) is None
    assert not keys.importable(key)
    source = f"github:acme/models@{GITHUB['sha']}#{GITHUB['run_id']}"
    assert store.lookup(key) == Principal(
        record.key_id,
        "ACME",
        frozenset({"model:write"}),
        expires_at=START + 600,
        owner_id="ACME",
        models=("acme-*",),
        no_delete=True,
        source=source,
    )
    assert store.get(record.key_id) == store.find(key) == record
    assert (record.trust_id, record.source, record.environment) == (trust_id, source, "ci")
    event = store.database.audited(limit=1)[0]
    assert (event["event"], event["actor"], event["key_id"], event["address"]) == (
        "key.exchanged",
        source,
        record.key_id,
        "192.0.2.8",
    )
    assert event["detail"]["trust_id"] == trust_id
    listed = trusts.get(trust_id)
    assert (listed.exchanges, listed.last_used_at) == (1, START)
    assert store.revoke(record.key_id).revoked_at is not None


def test_exchanged_keys_do_not_crowd_lists_and_counts(store: LocalStore, trusts: Trusts) -> None:
    ordinary = store.create(owner="ACME", scopes=["model:read"])[0]
    record, _ = key_of(exchange(trusts, add(trusts)))
    assert [one.key_id for one in store.each()] == [ordinary.key_id]
    assert [one.key_id for one in store.each(KeyFilter(owner="ACME"))] == [ordinary.key_id]
    assert [one.key_id for one in store.each(KeyFilter(environment="ci"))] == [record.key_id]
    assert store.counts()["active"] == 1


def test_exchanged_key_is_neither_changed_nor_replaced(store: LocalStore, trusts: Trusts) -> None:
    record, key = key_of(exchange(trusts, add(trusts)))
    for change in (
        lambda: store.edit(record.key_id, {"expires_at": None}),
        lambda: store.rotate(record.key_id),
    ):
        with pytest.raises(KeyConflict, match="ends by itself"):
            change()
    with pytest.raises(InvalidRequest, match="not a key that can be imported"):
        store.add(keys.generate("ci"), owner="ACME", scopes=["model:read"])
    assert isinstance(store.lookup(key), Principal)


def test_token_is_used_once(store: LocalStore, trusts: Trusts) -> None:
    trust_id = add(trusts)
    assert code(exchange(trusts, trust_id)) == "ok"
    before = store.database.audited(limit=None)
    for _ in range(2):
        refused = exchange(trusts, trust_id)
        assert isinstance(refused, Refused)
        assert (refused.code, refused.claim) == ("TOKEN_USED", "jti")
    # A refusal leaves nothing behind.
    assert store.database.audited(limit=None) == before
    assert trusts.get(trust_id).exchanges == 1
    assert len(list(store.each(KeyFilter(environment="ci")))) == 1
    assert code(exchange(trusts, trust_id, token="2")) == "ok"


def test_of_two_replicas_exactly_one_wins(store: LocalStore, trusts: Trusts) -> None:
    trust_id = add(trusts)
    uri = store.database.engine.url.render_as_string(hide_password=False)
    replicas = [Trusts(LocalStore(uri).database) for _ in range(4)]
    together = threading.Barrier(len(replicas))

    def race(replica: Trusts, token: str) -> str:
        together.wait(LONG)
        return code(exchange(replica, trust_id, token=token))

    with ThreadPoolExecutor(len(replicas)) as pool:
        for token in "abcde":
            found = sorted(pool.map(race, replicas, [token] * len(replicas)))
            assert found == ["TOKEN_USED"] * 3 + ["ok"]
    assert len(list(store.each(KeyFilter(environment="ci")))) == 5
    for replica in replicas:
        replica._database.engine.dispose()


def test_token_that_may_be_exchanged_again_ends_the_key_before(
    store: LocalStore, trusts: Trusts, clock: time_machine.Traveller
) -> None:
    trust_id = add(trusts, {"gitlab": "acme/models"})
    first, key = key_of(exchange(trusts, trust_id, GITLAB))
    other, _ = key_of(exchange(trusts, trust_id, GITLAB, token="2"))
    generation = store.generation()
    clock.shift(10)
    second, _ = key_of(exchange(trusts, trust_id, GITLAB))
    assert store.generation() > generation
    assert store.get(first.key_id).expires_at == START + 10 + store_trusts.OVERLAP
    assert isinstance(store.lookup(key), Principal)
    # The key of another token, and the new one, stay.
    assert store.get(other.key_id) == other
    assert store.get(second.key_id) == second
    # An earlier end is not moved.
    clock.shift(30)
    exchange(trusts, trust_id, GITLAB)
    assert store.get(first.key_id).expires_at == START + 70


def test_no_key_of_a_trust_lives_longer_than_the_maximum(
    store: LocalStore, trusts: Trusts, clock: time_machine.Traveller
) -> None:
    """The setting may be lowered after the trust was added."""
    trust_id = add(trusts)
    lowered = Trusts(store.database, lifetimes=Lifetimes(longest=300.0))
    assert key_of(exchange(lowered, trust_id))[0].expires_at == START + 300
    assert key_of(exchange(trusts, trust_id, token="2"))[0].expires_at == START + 900
    for place in (lowered, lowered.of("ACME", lambda _: None)):
        with pytest.raises(InvalidRequest, match=r"^ttl: .*KEY_LIFETIME_MAX"):
            add(place, {"gitlab": "acme/models"}, ttl=301.0)
        with pytest.raises(InvalidRequest, match=r"^ttl: .*KEY_LIFETIME_MAX"):
            place.edit(trust_id, {"ttl": 301.0})
        add(place, {"gitlab": f"acme/{place is lowered}"}, ttl=300.0)
        # The trust's other fields can be changed without a word about its lifetime.
        place.edit(trust_id, {"scopes": ["model:read"]})
    assert trusts.get(trust_id).trust.ttl == 900.0
    assert key_of(exchange(lowered, trust_id, token="3"))[0].expires_at == START + 300


def test_exchange_leaves_caches_alone(store: LocalStore, trusts: Trusts) -> None:
    trust_id = add(trusts)
    generation = store.generation()
    key_of(exchange(trusts, trust_id))
    assert store.generation() == generation


def test_first_exchange_pins_the_numbers(trusts: Trusts) -> None:
    trust_id = add(trusts)
    assert trusts.get(trust_id).trust.pins == ()
    key_of(exchange(trusts, trust_id))
    assert dict(trusts.get(trust_id).trust.pins) == {
        "repository_id": "74",
        "repository_owner_id": "65",
    }
    again = {**GITHUB, "repository_id": "999"}
    assert code(exchange(trusts, trust_id, again, token="2")) == "REPOSITORY_CHANGED"
    trusts.edit(trust_id, {}, OPERATOR, forget_ids=True)
    assert code(exchange(trusts, trust_id, again, token="2")) == "ok"
    assert code(exchange(trusts, trust_id, GITHUB, token="3")) == "REPOSITORY_CHANGED"


def test_claims_are_judged_by_the_trust_as_it_is_now(trusts: Trusts) -> None:
    trust_id = add(trusts)
    claims = {**GITHUB, "event_name": "pull_request"}
    assert code(exchange(trusts, trust_id, claims)) == "PULL_REQUEST_REFUSED"
    trusts.remove(trust_id, OPERATOR)
    assert code(exchange(trusts, trust_id)) == "TOKEN_UNTRUSTED"


def test_removed_trust_ends_its_keys_within_a_second(store: LocalStore, trusts: Trusts) -> None:
    trust_id = add(trusts)
    other_id = add(trusts, {"gitlab": "acme/models"})
    _, key = key_of(exchange(trusts, trust_id))
    _, other = key_of(exchange(trusts, other_id, GITLAB))
    ordinary = store.create(owner="ACME", scopes=["model:read"])[1]

    def good(text: str) -> bool:
        found = store.lookup(text)
        return isinstance(found, Principal) and found.revoked_at is None

    assert good(key)
    generation = store.generation()
    assert trusts.remove(trust_id, OPERATOR).trust.trust_id == trust_id
    # That is what caches look at, so that none uses an entry from before for longer than this.
    assert store.generation() > generation
    assert MAX_UNCONFIRMED < 1
    assert not good(key)
    assert good(other)
    assert good(ordinary)
    event = store.database.audited(limit=1)[0]
    assert (event["event"], event["detail"]["ended"]) == ("trust.removed", 1)
    with pytest.raises(NotFound, match="trust list"):
        trusts.remove(trust_id)


def test_edit_changes_rights_for_new_keys_and_ends_the_old_ones(
    store: LocalStore, trusts: Trusts
) -> None:
    trust_id = add(trusts)
    _, key = key_of(exchange(trusts, trust_id))

    def revoked() -> bool:
        found = store.lookup(key)
        assert isinstance(found, Principal)
        return found.revoked_at is not None

    edited = trusts.edit(trust_id, {"ttl": 120.0}, OPERATOR)
    assert edited == trusts.get(trust_id)
    assert not revoked()
    detail = store.database.audited(limit=1)[0]["detail"]
    assert detail == {"trust_id": trust_id, "ttl": 120.0}
    generation = store.generation()
    edited = trusts.edit(trust_id, {"scopes": ["model:read"], "models": ("a-*",)}, OPERATOR)
    assert edited == trusts.get(trust_id)
    assert (edited.trust.scopes, edited.trust.models) == (("model:read",), ("a-*",))
    assert revoked()
    assert store.generation() > generation
    record, _ = key_of(exchange(trusts, trust_id, token="2"))
    assert (record.scopes, record.models) == (("model:read",), ("a-*",))
    for unknown in ("trust_0", "", "\0", "é"):
        with pytest.raises(NotFound):
            trusts.edit(unknown, {"ttl": 60.0})
        with pytest.raises(NotFound):
            trusts.get(unknown)


def test_edit_of_what_is_trusted_ends_the_keys_from_before(
    store: LocalStore, trusts: Trusts
) -> None:
    old, new = '{"keys": ["stolen"]}', '{"keys": []}'
    trust_id, other_id = add(trusts, jwks=old), add(trusts, {"gitlab": "acme/models"})
    bystander = key_of(exchange(trusts, other_id, GITLAB))[0].key_id
    now = old
    for number, (changes, forget, then) in enumerate(
        (({"jwks": new}, False, new), ({"jwks": None}, False, None), ({}, True, None))
    ):
        record, _ = key_of(exchange(trusts, trust_id, token=f"{number}", jwks=now))
        generation = store.generation()
        trusts.edit(trust_id, changes, OPERATOR, forget_ids=forget)
        assert store.get(record.key_id).revoked_at is not None, changes
        # Caches look at it, so that none uses an entry from before for longer than MAX_UNCONFIRMED.
        assert store.generation() > generation
        if changes:
            detail = store.database.audited(limit=1)[0]["detail"]
            assert detail == {"trust_id": trust_id, "jwks": then is not None}
        now = then
    assert store.get(bystander).revoked_at is None


def test_token_that_was_verified_right_before_an_edit_of_the_key_set_gets_no_key(
    store: LocalStore, trusts: Trusts
) -> None:
    trust_id = add(trusts, jwks="{}")
    for before, after in (("{}", '{"keys": []}'), ('{"keys": []}', None), (None, "{}")):
        trusts.edit(trust_id, {"jwks": after}, OPERATOR)
        assert code(exchange(trusts, trust_id, jwks=before)) == "TOKEN_UNTRUSTED"
    assert (count(store, KEYS), count(store, USED_TOKENS)) == (0, 0)
    assert code(exchange(trusts, trust_id, jwks="{}")) == "ok"


def test_what_no_trust_may_give(trusts: Trusts, store: LocalStore) -> None:
    store.create(owner="Globex", scopes=["model:read"])
    trust_id = add(trusts)
    for error, words, more in (
        (InvalidRequest, "outlive the trust", {"scopes": ("mlflow:admin",)}),
        (InvalidRequest, "outlive the trust", {"scopes": ("model:write", "registry:admin")}),
        (StaffNarrowed, "never narrowed", {"scopes": ("mlflow:write",), "no_delete": True}),
        (Conflict, "upper and lower case", {"owner": "globex"}),
        (Conflict, "upper and lower case", {"owner": "Acme"}),
    ):
        with pytest.raises(error, match=words):
            add(trusts, {"gitlab": "acme/other"}, **more)
    # A key's owner may not look like a trust's either, which has no key yet.
    with pytest.raises(KeyConflict, match="upper and lower case"):
        store.create(owner="Acme", scopes=["model:write"])
    store.create(owner="ACME", scopes=["model:write"])
    with pytest.raises(Conflict, match=trust_id):
        add(trusts)
    for changes in ({"scopes": ["admin"]}, {"scopes": ["mlflow:read"], "models": ("a",)}):
        with pytest.raises(InvalidRequest):
            trusts.edit(trust_id, changes)
    assert [one.trust.trust_id for one in trusts.each()] == [trust_id]


def test_no_trust_of_an_owner_that_leaves_gives_a_key(
    store: LocalStore, trusts: Trusts, database_uri: str
) -> None:
    """An exchange at the same moment gives a key that ends with the others, or none."""
    replica = LocalStore(database_uri)
    other = add(trusts, {"gitlab": "globex/models"}, owner="Globex")
    found: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            store.create(owner="ACME", scopes=["model:read"])
            its = [add(trusts, {"gitlab": f"acme/{name}"}) for name in "ab"]
            claims = [{**GITLAB, "project_path": f"acme/{name}"} for name in "ab"]
            racing = [
                pool.submit(exchange, trusts, trust_id, of_it, token=f"{len(found)}{trust_id}")
                for trust_id, of_it in zip(its, claims, strict=True)
            ]
            ended = pool.submit(replica.revoke_owner, "ACME", OPERATOR).result(LONG)
            answers = [code(one.result(LONG)) for one in racing]
            found += answers
            assert sorted(ended.trusts) == sorted(its)
            assert store.valid_of("ACME") == []
            assert len(ended.keys) == 1 + answers.count("ok")
            for trust_id, of_it in zip(its, claims, strict=True):
                assert code(exchange(trusts, trust_id, of_it, token="late")) == "TOKEN_UNTRUSTED"
    assert set(found) <= {"ok", "TOKEN_UNTRUSTED"}
    assert [one.trust.trust_id for one in trusts.each()] == [other]
    told = store.database.audited(event="trust.removed", limit=None)
    assert {(row["actor"], row["detail"]["owner"]) for row in told} == {("Operator", "ACME")}
    assert len(told) == 10
    assert store.revoke_owner("\0").trusts == []
    replica.database.engine.dispose()


@pytest.mark.parametrize("database_uri", ["postgresql"], indirect=True)
def test_trust_that_is_added_while_its_owner_leaves_goes_as_well(
    store: LocalStore, trusts: Trusts, database_uri: str
) -> None:
    """SQLite has one writer at a time, so nothing comes in between there."""
    replica, own = LocalStore(database_uri), store.create(owner="ACME", scopes=["model:write"])[0]
    first, late = add(trusts), list[str]()
    supplier = Trusts(store.database).of("ACME", lambda _: None)
    by = Actor("ACME", own.key_id)

    def new(name: str) -> str:
        job = workload(gitlab=f"acme/{name}")
        return supplier.add(
            job, owner="ACME", scopes=("model:write",), ttl=900.0, by=by
        ).trust.trust_id

    def add_one(_c: object, _cursor: object, text: str, *_: object) -> None:
        if text.startswith("DELETE FROM hokusai_auth_trusts") and not late:
            late.append(new("late"))

    sa.event.listen(replica.database.engine, "after_cursor_execute", add_one)
    assert replica.revoke_owner("ACME", OPERATOR).trusts == [first, *late]
    assert trusts.each() == []
    # A request that came before the revocation, and goes on after it.
    with pytest.raises(Forbidden, match="was revoked just now"):
        new("later")
    assert trusts.each() == []
    replica.database.engine.dispose()


def test_trusts_are_found_by_exactly_their_issuer(trusts: Trusts) -> None:
    first = add(trusts)
    second = add(trusts, {**WORKLOAD, "environment": "prod"})
    add(trusts, {"gitlab": "acme/models"})
    issuer = trusts.get(first).trust.issuer
    assert [one.trust_id for one in trusts.of_issuer(issuer)] == [first, second]
    assert trusts.of_issuer(issuer)[0] == trusts.get(first).trust
    for other in (issuer + "/", issuer.upper(), "", "%", "\0", "x" * 20_000):
        assert trusts.of_issuer(other) == [], other


def test_number_of_trusts_is_bounded(trusts: Trusts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_trusts, "MAX_TRUSTS", 2)
    for name in "ab":
        add(trusts, {"gitlab": f"acme/{name}"})
    with pytest.raises(Conflict, match="2 trusts already"):
        add(trusts, {"gitlab": "acme/c"})


def test_number_of_trusts_of_one_owner_is_bounded(
    trusts: Trusts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_trusts, "MAX_OF_OWNER", 2)
    for name in "ab":
        add(trusts, {"gitlab": f"acme/{name}"})
    with pytest.raises(Conflict, match="ACME has 2 trusts already"):
        add(trusts, {"gitlab": "acme/c"})
    add(trusts, {"gitlab": "acme/c"}, owner="Globex")


def test_numbers_of_trusts_are_those_that_operators_read() -> None:
    page = (Path(__file__).parents[2] / "docs/operator/trust.md").read_text("utf-8")
    most, in_all = store_trusts.MAX_OF_OWNER, store_trusts.MAX_TRUSTS
    assert f"An owner has at most {most} trusts, and a key store {in_all}." in page


def test_owner_sees_its_own_trusts_only(trusts: Trusts) -> None:
    mine, theirs = add(trusts), add(trusts, {"gitlab": "a/b"}, owner="Globex")
    seen: list[Trust] = []
    own = trusts.of("ACME", seen.append)
    assert [one.trust.trust_id for one in own.each()] == [mine]
    assert own.get(mine) == trusts.get(mine)
    before = trusts.get(theirs)
    for act in (own.get, own.remove, lambda one: own.edit(one, {"ttl": 60.0})):
        with pytest.raises(NotFound, match=f"no trust '{theirs}'"):
            act(theirs)
    assert trusts.get(theirs) == before
    assert seen == []
    with pytest.raises(Conflict, match="not free"):
        add(own, {"gitlab": "a/b", "environment": "prod"})
    add(own, {"gitlab": "a/c"})
    own.edit(mine, {"ttl": 60.0})
    assert [trust.ttl for trust in seen] == [900.0, 900.0, 60.0]

    def refuse(trust: Trust) -> None:
        raise Forbidden("no")

    with pytest.raises(Forbidden):
        trusts.of("ACME", refuse).edit(mine, {"ttl": 90.0})
    assert trusts.get(mine).trust.ttl == 60.0


def count(store: LocalStore, table: sa.Table) -> int:
    with store.database.reading() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


def test_what_is_over_is_swept(
    store: LocalStore, trusts: Trusts, clock: time_machine.Traveller
) -> None:
    trust_id = add(trusts)
    ordinary = store.create(owner="ACME", scopes=["model:read"], expires_at=START + 1)[0]
    for token in "abc":
        _, key = key_of(exchange(trusts, trust_id, token=token))
    clock.shift(3600)
    exchange(trusts, trust_id, token="d")
    sweep(store.database)
    # For a day, a client that comes late is told that its key has expired.
    found = store.lookup(key)
    assert isinstance(found, Principal)
    assert (count(store, KEYS), count(store, USED_TOKENS)) == (5, 4)
    clock.shift(store_trusts.KEPT + 3600)
    exchange(trusts, trust_id, token="e")
    sweep(store.database)
    assert store.lookup(key) == Rejected()
    assert (count(store, KEYS), count(store, USED_TOKENS)) == (2, 1)
    assert store.get(ordinary.key_id).state(time.time()) == "expired"


def test_exchange_makes_few_statements(
    store: LocalStore, trusts: Trusts, clock: time_machine.Traveller
) -> None:
    """PostgreSQL answers each after a round trip, while the trust's row is locked."""
    trust_id = add(trusts)
    exchange(trusts, trust_id)
    statements: list[str] = []

    def record(_c: object, _cursor: object, text: str, *_: object) -> None:
        statements.append(text.split()[0])

    sa.event.listen(store.database.engine, "before_cursor_execute", record)
    exchange(trusts, trust_id, token="2")
    own = ["UPDATE", "INSERT", "INSERT", "INSERT"]
    assert [word for word in statements if word != "SELECT"] == own
    # The lock's time limit, for PostgreSQL.
    assert statements.count("SELECT") == (store.database.file is None)


@pytest.mark.parametrize("database_uri", ["sqlite"], indirect=True)
def test_sweeping_and_ending_use_the_index(store: LocalStore, trusts: Trusts) -> None:
    statements: list[tuple[str, Any]] = []

    def record(_c: object, _cursor: object, text: str, parameters: Any, *_: object) -> None:
        statements.append((text, parameters))

    trust_id = add(trusts, {"gitlab": "acme/models"})
    sa.event.listen(store.database.engine, "before_cursor_execute", record)
    exchange(trusts, trust_id, GITLAB)
    exchange(trusts, trust_id, GITLAB)
    trusts.remove(trust_id)
    sweep(store.database)
    sa.event.remove(store.database.engine, "before_cursor_execute", record)
    about = [row for row in statements if "hokusai_auth_keys" in row[0] and "INSERT" not in row[0]]
    assert len(about) >= 5
    with store.database.engine.connect() as connection:
        for text, parameters in about:
            plan = str(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", parameters).all())
            assert "USING INDEX hokusai_auth_keys_exchanged" in plan, text


def test_store_that_is_down_makes_no_half_key(store: LocalStore, trusts: Trusts) -> None:
    trust_id = add(trusts)

    def fail(_c: object, _cursor: object, text: str, *_: object) -> None:
        if text.startswith("INSERT INTO hokusai_auth_audit"):
            raise sa.exc.OperationalError(text, {}, Exception("disk is full"))

    sa.event.listen(store.database.engine, "before_cursor_execute", fail)
    with pytest.raises(AuthorityUnavailable):
        exchange(trusts, trust_id)
    sa.event.remove(store.database.engine, "before_cursor_execute", fail)
    record: TrustRecord = trusts.get(trust_id)
    assert (record.exchanges, record.trust.pins) == (0, ())
    assert (count(store, KEYS), count(store, USED_TOKENS)) == (0, 0)
    # The token was not used up.
    assert code(exchange(trusts, trust_id)) == "ok"


def test_edits_and_exchanges_at_once_do_not_wait_for_each_other_for_ever(
    store: LocalStore, trusts: Trusts
) -> None:
    """The order of locks: with another one, PostgreSQL would find a deadlock."""
    trust_id = add(trusts, {"gitlab": "acme/models"})

    def exchanges(_: int) -> str:
        answer = exchange(trusts, trust_id, GITLAB)
        if not isinstance(answer, Refused):
            store.revoke(answer[0].key_id)
        return code(answer)

    def edits(number: int) -> str:
        trusts.edit(trust_id, {"no_delete": bool(number % 2)})
        return "ok"

    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(edits if n % 3 == 0 else exchanges, n) for n in range(30)]
        assert {one.result(LONG) for one in done} == {"ok"}
    with store.database.reading() as connection:
        assert connection.execute(sa.select(TRUSTS.c.exchanges)).scalar_one() == 20

"""The cost of 100 000 keys in the store: a lookup, a page of the list, an exchange of a token."""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import quantiles
from typing import Any

import sqlalchemy as sa

from mlflow_hokusai_auth.authorities.identity_tokens import Judged, Verifier
from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.trust import Refused, workload
from mlflow_hokusai_auth.server.web import keys_api
from mlflow_hokusai_auth.store import key_pages
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.records import KeyFilter
from mlflow_hokusai_auth.store.tables import KEYS, USES
from mlflow_hokusai_auth.store.trusts import Trusts
from tests.conftest import Postgresql
from tests.core.test_trust import GITHUB
from tests.issuer import jwk, rsa_key, signed

#: PostgreSQL's folders, the newest last; empty if it is not installed.
PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
KEY_COUNT = 100_000
#: Keys in use in each hour of the last day.
BUSY = 5_000
#: Milliseconds at the 99th percentile, from the issues on the store and on trusts.
GOALS = {"lookup": 1.0, "page": 100.0, "exchange": 5.0}
#: Tokens that are exchanged.
TOKENS = 300


def costs(key_count: int = KEY_COUNT) -> dict[str, tuple[float, float]]:
    """Return, for each database, the milliseconds of each query: median and 99th percentile."""
    found = {}
    for name, uri in _databases():
        with uri as where:
            store = LocalStore(where)
            store.migrate()
            known = fill(store, key_count)
            for question, taken in _questions(store, known).items():
                found[f"{name}, {question}"] = taken
    return found


def _databases() -> Iterator[tuple[str, contextlib.AbstractContextManager[str]]]:
    yield "SQLite", _sqlite()
    if PROGRAMS:
        yield "PostgreSQL", _postgresql()


@contextlib.contextmanager
def _sqlite() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield f"sqlite:///{folder}/keys.db"


@contextlib.contextmanager
def _postgresql() -> Iterator[str]:
    cluster = Postgresql(PROGRAMS[-1].parent)
    try:
        cluster.start()
        yield cluster.uri
    finally:
        cluster.remove()


def fill(store: LocalStore, key_count: int, first: int = 0) -> list[str]:
    """Write rows for `key_count` keys in all states in bulk, and return some of the keys.

    `first` is the number of keys from earlier calls.
    """
    now, known = time.time(), []
    numbers = range(first, first + key_count)
    rows = []
    for number in numbers:
        key = keys.generate()
        if number % 50 == 0:
            known.append(key)
        rows.append(row(number, key, now))
    hour = int(now) // 3600
    uses = [
        {"key_id": f"key_{number:016x}", "minute": (hour - ago) * 60, "uses": 1 + number % 9}
        for number in numbers[:BUSY]
        for ago in range(24)
    ]
    with store.database.changing() as change:
        change.connection.execute(sa.insert(KEYS), rows)
        change.connection.execute(sa.insert(USES), uses)
        change.connection.exec_driver_sql("ANALYZE")  # as PostgreSQL does by itself after a minute
    return known


def row(number: int, key: str, now: float) -> dict[str, Any]:
    """Return the row of `key` by column; every seventh is revoked, some expire."""
    return {
        "key_id": f"key_{number:016x}",
        "digest": keys.digest(key),
        "environment": "live",
        "owner": f"Supplier {number % 997}",
        "name": f"pipeline {number}",
        "scopes": ["model:write"],
        "created_at": now - number * 60,
        "expires_at": now + 86400 if number % 5 == 0 else None,
        "revoked_at": now if number % 7 == 0 else None,
        "note": "",
        "networks": [],
    }


def _questions(store: LocalStore, known: list[str]) -> dict[str, tuple[float, float]]:
    def page(which: KeyFilter, token: str | None = None) -> None:
        keys_api.with_uses(store, store.page(which, page_token=token)[0])

    middle = store.find(random.choice(known))
    assert middle is not None
    place = key_pages.Place(middle.created_at, middle.key_id)
    token = key_pages.token(key_pages.NEWEST_FIRST, place)
    unknown = keys.generate()
    return {
        "lookup": times(lambda: store.lookup(random.choice(known)), 5000),
        "lookup of an unknown key": times(lambda: store.lookup(unknown), 5000),
        "page, the first": times(lambda: page(KeyFilter()), 100),
        "page, in the middle": times(lambda: page(KeyFilter(), token), 100),
        "page, of one owner": times(lambda: page(KeyFilter(owner="Supplier 7")), 100),
        "page, active keys": times(lambda: page(KeyFilter(state="active")), 100),
        "page, a search that finds nothing": times(lambda: page(KeyFilter(query="nobody")), 100),
        "exchange of an identity token": times(_exchanges(store), TOKENS),
    }


def _exchanges(store: LocalStore) -> Callable[[], object]:
    """Return a function that verifies a token of GitHub's and makes its key, with a known key set."""
    here = "https://registry.example.com"
    trusts, verifier = Trusts(store.database), Verifier([here])
    trusts.add(
        workload(github="acme/models", workflow="release.yml"),
        owner="ACME",
        scopes=("model:write",),
        ttl=900.0,
        jwks=json.dumps({"keys": [jwk(rsa_key(), "bench")]}),
    )
    now = int(time.time())
    times_of_token = {"iat": now, "nbf": now, "exp": now + 3600, "aud": here}
    tokens = [
        signed(
            rsa_key(),
            {"kid": "bench"},
            json.dumps({**GITHUB, **times_of_token, "jti": f"id-{number}"}).encode(),
        )
        for number in range(TOKENS + 10)
    ]

    def exchange() -> None:
        judged = verifier.judge(tokens.pop(), trusts.of_issuer, time.time())
        assert isinstance(judged, Judged), judged
        made = trusts.exchange(
            judged.accepted.trust.trust_id,
            judged.claims,
            jwks=judged.accepted.trust.jwks,
            digest=judged.digest,
            token_id=judged.token_id,
            ends_at=judged.ends_at,
        )
        assert not isinstance(made, Refused), made

    return exchange


def times(call: Callable[[], object], calls: int) -> tuple[float, float]:
    """Return the milliseconds of `call`: median and 99th percentile of that many calls."""
    for _ in range(10):
        call()
    taken = []
    for _ in range(calls):
        begun = time.perf_counter()
        call()
        taken.append((time.perf_counter() - begun) * 1000)
    cuts = quantiles(taken, n=100)
    return cuts[49], cuts[98]


def goal(question: str) -> float:
    """Return the goal for `question`: milliseconds at the 99th percentile."""
    return next(most for kind, most in GOALS.items() if f", {kind}" in question)

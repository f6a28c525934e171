"""The chain: the first authority that knows a key decides, and none is skipped."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlflow_hokusai_auth.authorities.chain import Chain
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable, Throttled
from mlflow_hokusai_auth.core.types import Principal, Rejected
from tests.core.rows import agree, each

ALICE = Principal("key_a", "alice", frozenset({"mlflow:read"}))
BOB = Principal("key_b", "bob", frozenset({"mlflow:read"}))
HERE = "192.0.2.1"

Answer = Principal | Rejected


class Fixed:
    """An authority with one answer for every lookup, and perhaps another for every peek."""

    def __init__(self, answer: Answer | Exception, remembers: Answer | None = None) -> None:
        self.answer = answer
        self.remembers = remembers
        self.asked: list[tuple[str, str]] = []

    def peek(self, key: str, address: str) -> Answer | None:
        return self.remembers

    def lookup(self, key: str, address: str) -> Answer:
        self.asked.append((key, address))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_an_empty_chain_is_refused() -> None:
    with pytest.raises(ValueError, match="authority"):
        Chain([])


def test_peek() -> None:
    def peek(remembered: tuple[Answer | None, ...]) -> Answer | None:
        return Chain([Fixed(RuntimeError(), answer) for answer in remembered]).peek("key", HERE)

    rows = [
        ((ALICE, BOB), ALICE),
        ((ALICE, None), ALICE),
        ((None, BOB), None),
        ((None, None), None),
        ((Rejected("no"), BOB), BOB),
        ((Rejected("no"), None), None),
        ((None, Rejected("no")), None),
        ((Rejected("first"), Rejected("last")), Rejected("last")),
        ((Rejected("first"), Rejected()), Rejected("first")),
        ((Rejected(), Rejected()), Rejected()),
    ]
    agree(peek, rows)


def test_lookup() -> None:
    def check(answers: tuple[Answer, ...], expected: Answer, asked: int) -> None:
        links = [Fixed(answer) for answer in answers]
        assert Chain(links).lookup("key", HERE) == expected
        assert [link.asked for link in links] == [[("key", HERE)]] * asked + [[]] * (2 - asked)

    rows = [
        ((ALICE, BOB), ALICE, 1),
        ((replace(ALICE, revoked_at=1.0), ALICE), replace(ALICE, revoked_at=1.0), 1),
        ((replace(ALICE, expires_at=1.0), ALICE), replace(ALICE, expires_at=1.0), 1),
        ((Rejected("no"), BOB), BOB, 2),
        ((Rejected("first"), Rejected("last")), Rejected("last"), 2),
        ((Rejected("first"), Rejected()), Rejected("first"), 2),
        ((Rejected(), Rejected()), Rejected(), 2),
    ]
    each(check, rows)


def test_unavailable_authority_ends_the_lookup() -> None:
    for failure in (AuthorityUnavailable("down"), Throttled("429"), RuntimeError()):
        second = Fixed(ALICE)
        with pytest.raises(type(failure)):
            Chain([Fixed(failure), second]).lookup("key", HERE)
        assert not second.asked


def test_key_that_the_first_rejects_needs_an_answer_of_the_second() -> None:
    with pytest.raises(AuthorityUnavailable):
        Chain([Fixed(Rejected("no")), Fixed(AuthorityUnavailable("down"))]).lookup("key", HERE)

"""The lifetimes of keys."""

from __future__ import annotations

import pytest

from mlflow_hokusai_auth.core.errors import InvalidRequest
from mlflow_hokusai_auth.core.lifetimes import UNLIMITED, Lifetimes


def test_usual_lifetime_is_the_default_within_the_maximum() -> None:
    for default, longest, usual in (
        (None, None, None),
        (5.0, None, 5.0),
        (None, 7.0, 7.0),
        (5.0, 7.0, 5.0),
        (9.0, 7.0, 7.0),
    ):
        assert Lifetimes(default, longest).usual == usual


def test_only_a_maximum_refuses() -> None:
    for seconds in (None, 1.0, 1e12):
        UNLIMITED.check(seconds)
        Lifetimes(5.0).check(seconds)
    Lifetimes(5.0, 7200.0).check(7200.0)
    for seconds in (None, 7200.1):
        with pytest.raises(InvalidRequest, match=r"2 hours \(7200 s\) at most"):
            Lifetimes(5.0, 7200.0).check(seconds)


def test_successor_has_the_same_end_or_the_same_length() -> None:
    for longest, ends, renewed, expected in (
        (None, None, True, None),
        (None, None, False, None),
        (None, 150.0, True, 170.0),
        (None, 150.0, False, 150.0),
        (10.0, None, True, 130.0),
        (10.0, None, False, 130.0),
        (10.0, 150.0, True, 130.0),
        (10.0, 150.0, False, 130.0),
        (10.0, 125.0, False, 125.0),
    ):
        after = Lifetimes(None, longest).end_after_rotation(100.0, ends, 120.0, renewed=renewed)
        assert after == expected, (longest, ends, renewed)

"""Patterns of names: what is one, and the names in it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlflow_hokusai_auth.core import patterns

from .rows import agree

NAME = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=255)


def test_wrong_pattern_is_explained() -> None:
    for pattern, says in (
        ("", "empty"),
        ("a" * 257, "longer than 256"),
        ("a*b", "only at its end"),
        ("*a", "only at its end"),
        ("**", "only at its end"),
        *((f"a{character}b", "control character") for character in "\0\n\x1b\x7f\x9b\ud800"),
    ):
        assert says in (patterns.problem(pattern) or ""), ascii(pattern)


@given(NAME.filter(lambda name: "*" not in name))
def test_name_and_beginning_are_patterns(name: str) -> None:
    assert patterns.problem(name) is None and patterns.problem(f"{name}*") is None
    assert patterns.matches(name, name) and patterns.matches(f"{name}*", name)
    assert patterns.matches(f"{name}*", f"{name}x") and not patterns.matches(name, f"{name}x")
    assert not patterns.matches(f"{name}x*", name)


@given(st.text(), st.text())
def test_name_matches_if_it_begins_so(pattern: str, name: str) -> None:
    if patterns.problem(pattern) is None:
        beginning, star, _ = pattern.partition("*")
        expected = name[: len(beginning)] == beginning if star else name == pattern
        assert patterns.matches(pattern, name) is expected


def test_names_compare_exactly() -> None:
    agree(
        patterns.matches,
        [
            ("acme-*", "acme-x", True),
            ("acme-*", "acme-", True),
            ("acme-*", "acme", False),
            ("acme-*", "Acme-x", False),
            ("acme-*", " acme-x", False),
            ("acme-*", "xacme-", False),
            ("*", "", True),
            ("*", "anything", True),
            ("acme-a", "acme-a", True),
            ("acme-a", "acme-ab", False),
            ("acme-a", "ACME-A", False),
            ("acme-%", "acme-x", False),
            ("acme-_", "acme-x", False),
            ("caf\u00e9", "cafe\u0301", False),
        ],
    )

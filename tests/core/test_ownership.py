"""Levels, patterns, prefixes and owners that look alike, as properties of random names."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlflow_hokusai_auth.core import ownership

#: Few letters, so that beginnings meet; two that fold to others, and one of four bytes.
names = st.text("aAb-ßſ😀", min_size=1, max_size=6)
owners = st.sampled_from(["acme", "Acme", "ACME", "globex", "straße", "STRASSE"])


def test_levels_rise() -> None:
    assert ownership.LEVELS == ("read", "contribute")
    assert ownership.highest(["read", "contribute", "read"]) == "contribute"
    assert ownership.highest(["read"]) == "read"
    assert ownership.highest([]) is None


@given(names, names)
def test_pattern_is_a_name_or_a_beginning(one: str, other: str) -> None:
    assert ownership.problem(one) is None
    assert ownership.problem(one + "*") is None
    assert ownership.matches(one, other) is (one == other)
    assert ownership.matches(one + "*", other) is (other[: len(one)] == one)
    assert ownership.matches(one + "*", one + other)
    assert ownership.matches("*", other)


@given(names, names)
def test_star_stands_at_the_end_only(one: str, other: str) -> None:
    for pattern in (f"*{one}", f"{one}*{other}", f"{one}**", f"{one}*{other}*"):
        assert "only at its end" in str(ownership.problem(pattern))


def test_what_is_no_pattern_is_told_why() -> None:
    for pattern, why in (
        ("", "empty"),
        ("a" * 257, "longer than 256"),
        ("a" * 256 + "*", "longer than 256"),
        ("a\0", "control character"),
        ("a\n*", "control character"),
        ("\ud800", "half of a character"),
    ):
        assert why in str(ownership.problem(pattern)), pattern
    assert ownership.problem("a" * 256) is None
    # Characters that merely look odd are in names of MLflow's models.
    for pattern in ("*", "a b", "a%_b*", "name\u00a0with\u200bmarks", "😀*"):
        assert ownership.problem(pattern) is None, pattern


@given(names, names, names)
def test_prefixes_overlap_where_a_name_can_have_both(one: str, other: str, rest: str) -> None:
    assert ownership.overlaps(one, other) is ownership.overlaps(other, one)
    assert ownership.overlaps(one, one + rest)
    name = max(one, other, key=len)
    assert ownership.overlaps(one, other) is (name.startswith(one) and name.startswith(other))


@given(st.lists(st.tuples(names, owners)), names)
def test_name_belongs_to_the_prefix_that_it_begins_with(
    wanted: list[tuple[str, str]], name: str
) -> None:
    reserved: list[tuple[str, str]] = []
    for prefix, owner in wanted:
        if all(o == owner or not ownership.overlaps(prefix, p) for p, o in reserved):
            reserved.append((prefix, owner))
    expected = {owner for prefix, owner in reserved if name[: len(prefix)] == prefix}
    assert len(expected) <= 1
    assert ownership.prefix_owner(reserved, name) == next(iter(expected), None)


@given(st.lists(owners))
def test_owners_that_differ_in_case_only_are_named_together(listed: list[str]) -> None:
    groups = ownership.look_alikes(listed)
    assert all(len(set(group)) > 1 for group in groups)
    together = {owner for group in groups for owner in group}
    for owner in listed:
        alike = {other for other in listed if other.casefold() == owner.casefold()}
        assert (owner in together) is (len(alike) > 1)

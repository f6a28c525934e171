"""The owner of a name, and the reach of a grant: levels, patterns, prefixes and owners' names.

A pattern is a name, or a beginning followed by `*`, such as `acme-*`. Names compare exactly, by code
points: MLflow's databases do the same, so `Acme-x` is not within `acme-*`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable

#: Levels of a grant, in rising order; each level includes those before it.
LEVELS = ("read", "contribute")
#: Kinds of things whose names a prefix may reserve.
KINDS = ("model", "experiment")
#: Characters of a name in MLflow, and of a pattern or a prefix, at most.
MAX_NAME = 256
#: Characters of an owner, at most.
MAX_OWNER = 255


def problem(pattern: str) -> str | None:
    """Return why `pattern` is no pattern, for its author, or None if it is one."""
    if "*" in pattern[:-1]:
        return "`*` may stand only at its end: patterns are a name, or a beginning and `*`"
    return name_problem(pattern)


def name_problem(name: str, longest: int = MAX_NAME) -> str | None:
    """Return why `name` can't be a name, a beginning or an owner, for its author, or None if it can."""
    if not name:
        return "it is empty"
    if len(name) > longest:
        return f"it is longer than {longest} characters"
    if not is_storable(name):
        return "it has a control character, or half of a character"
    return None


def is_storable(text: str) -> bool:
    """Return whether each database can store `text`: PostgreSQL refuses NUL and lone surrogates."""
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def beginning(pattern: str) -> str | None:
    """Return the beginning that `pattern` asks for, or None if the pattern is a name."""
    return pattern[:-1] if pattern.endswith("*") else None


def matches(pattern: str, name: str) -> bool:
    """Return whether the name `name` is the pattern, or begins as the pattern does."""
    start = beginning(pattern)
    return name == pattern if start is None else name.startswith(start)


def within(pattern: str, patterns: Collection[str]) -> bool:
    """Return whether each name that matches `pattern` matches one of `patterns`."""
    start = beginning(pattern)
    if start is None:
        return any(matches(one, pattern) for one in patterns)
    return any(
        (limit := beginning(one)) is not None and start.startswith(limit) for one in patterns
    )


def overlaps(one: str, other: str) -> bool:
    """Return whether a name may begin with both prefixes: one of them begins with the other."""
    return one.startswith(other) or other.startswith(one)


def prefix_owner(prefixes: Iterable[tuple[str, str]], name: str) -> str | None:
    """Return the owner of the (prefix, owner) that `name` begins with, or None without one."""
    return next((owner for prefix, owner in prefixes if name.startswith(prefix)), None)


def highest(levels: Iterable[str]) -> str | None:
    """Return the highest of `levels`, each one of `LEVELS`, or None if there are none."""
    return max(levels, key=LEVELS.index, default=None)


def look_alikes(owners: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the groups of different owners that are equal under case folding, sorted."""
    groups: dict[str, set[str]] = {}
    for owner in owners:
        groups.setdefault(owner.casefold(), set()).add(owner)
    return sorted(tuple(sorted(group)) for group in groups.values() if len(group) > 1)

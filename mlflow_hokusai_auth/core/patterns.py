"""Patterns of names: a name, or a beginning followed by `*`, such as `acme-*`.

Names compare exactly, by code points, as MLflow's databases compare them: `Acme-x` is not in `acme-*`.
"""

from __future__ import annotations

import unicodedata

#: Characters of a name in MLflow, and of a pattern, at most.
MAX_NAME = 256


def problem(pattern: str) -> str | None:
    """Return why `pattern` is no pattern, for its author, or None if it is one."""
    if not pattern:
        return "it is empty"
    if len(pattern) > MAX_NAME:
        return f"it is longer than {MAX_NAME} characters"
    if "*" in pattern[:-1]:
        return "`*` may stand only at its end: a pattern is a name, or a beginning and `*`"
    # PostgreSQL can't store a NUL or half of a character.
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in pattern):
        return "it has a control character, or half of a character"
    return None


def matches(pattern: str, name: str) -> bool:
    """Return whether `name` is the name that `pattern` is, or begins as `pattern` does."""
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern

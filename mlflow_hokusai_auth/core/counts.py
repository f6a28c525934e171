"""Whole numbers as people read and write them."""

from __future__ import annotations


def counted(number: int, thing: str) -> str:
    """Return `number` and `thing`, in the plural unless there is one: `1 key`, `2 keys`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def whole_number(text: str, digits: int = 9) -> int | None:
    """Return the number that `text` writes with at most so many digits from 0 to 9, or None.

    Python's `int` also takes signs, spaces, underscores and digits of other alphabets, and raises
    ValueError for more than 4300 digits.
    """
    good = text.isascii() and text.isdigit() and len(text) <= digits
    return int(text) if good else None

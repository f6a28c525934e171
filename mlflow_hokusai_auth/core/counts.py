"""Numbers of things as people read them."""

from __future__ import annotations


def counted(number: int, thing: str) -> str:
    """Return `number` and `thing`, in the plural unless there is one: `1 key`, `2 keys`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"

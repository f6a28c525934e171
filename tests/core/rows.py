"""Tables in tests: every row is tried, and the message names all that are wrong, a line each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def agree(call: Callable[..., object], rows: Iterable[tuple[Any, ...]]) -> None:
    """Fail unless, for every row, `call` on all its values but the last returns the last."""

    def check(*row: Any) -> None:
        *given, expected = row
        got = call(*given)
        if got != expected:
            raise AssertionError(f"got {ascii(got)[:300]}")

    each(check, rows)


def each(check: Callable[..., object], rows: Iterable[tuple[Any, ...]]) -> None:
    """Fail unless `check` passes with the values of every row."""
    rows, wrong = list(rows), []
    assert rows, "the table is empty"
    for row in rows:
        try:
            check(*row)
        except (Exception, pytest.fail.Exception) as error:
            wrong.append(f"{ascii(row)[:300]}: {type(error).__name__}: {error}")
    if wrong:
        pytest.fail(f"{len(wrong)} of {len(rows)} rows:\n" + "\n".join(wrong), pytrace=False)

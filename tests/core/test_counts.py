"""Numbers as people write them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlflow_hokusai_auth.core.counts import whole_number


@given(st.integers(0, 10**9 - 1), st.integers(0, 3))
def test_whole_number_is_read(number: int, zeros: int) -> None:
    text = "0" * zeros + str(number)
    assert whole_number(text) == (number if len(text) <= 9 else None)
    assert whole_number(text, len(text)) == number


def test_nothing_else_is_a_whole_number() -> None:
    for text in ("", " 1", "1\n", "+1", "-1", "1_0", "1.0", "1e3", "٣", "²", "0" * 10, "9" * 5000):
        assert whole_number(text) is None, text

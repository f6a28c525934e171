"""The properties that `make fuzz` looks for exceptions to, for a moment each."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .corpus import WORDS, seeds
from .properties import PROPERTIES

PIECES = st.lists(st.sampled_from(WORDS) | st.binary(max_size=4), max_size=12).map(b"".join)


@pytest.mark.parametrize("name", PROPERTIES)
def test_seeds(name: str) -> None:
    found = seeds(name)
    assert len(found) > 50
    for data in found:
        PROPERTIES[name](data)


@pytest.mark.parametrize("name", PROPERTIES)
@settings(max_examples=500, deadline=None)
@given(data=PIECES)
def test_any_bytes(name: str, data: bytes) -> None:
    PROPERTIES[name](data)

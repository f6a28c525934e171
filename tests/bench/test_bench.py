"""That `make bench` still runs: how fast it is, it says itself."""

from __future__ import annotations

import pytest

from tests.bench import micro, store


@pytest.mark.slow
def test_every_cost_is_measured() -> None:
    assert len(micro.costs()) > 5  # differences, which noise may make negative
    for question, (middle, high) in store.costs(200).items():
        assert 0 < middle <= high and store.goal(question)

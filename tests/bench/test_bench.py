"""That `make bench` still runs: how fast it is, it says itself."""

from __future__ import annotations

import pytest

from tests.bench import micro


@pytest.mark.slow
def test_every_cost_is_measured() -> None:
    assert all(cost > 0 for cost in micro.costs().values())

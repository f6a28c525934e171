"""Work is done once an hour, and sooner after a failure."""

from __future__ import annotations

import pytest

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.store.hourly import INTERVAL, RETRY, Hourly


def test_work_is_done_once_an_hour_and_sooner_after_a_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 5.0
    times: list[float] = []
    results = [True, False, AuthorityUnavailable("down"), ValueError("x"), False]

    def work() -> bool:
        times.append(now)
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    hourly = Hourly(work, "It can't be done", lambda: now)
    for step in (0.0, 1, INTERVAL - 1, 1, RETRY - 1, 1, RETRY, 10):
        now += step
        hourly.look()
    assert times == [5, 6, 6 + INTERVAL, 6 + INTERVAL + RETRY, 6 + INTERVAL + 2 * RETRY]
    # The store's other users log an outage.
    (logged,) = caplog.records
    assert logged.exc_info and logged.exc_info[0] is ValueError
    assert logged.getMessage() == "It can't be done"

"""Times as people read them."""

from __future__ import annotations

from mlflow_hokusai_auth.core.times import date, moment, span


def test_times_are_in_utc() -> None:
    assert (date(1796047205.9), moment(1796047205.9)) == (
        "2026-11-30 14:00Z",
        "2026-11-30 14:00:05Z",
    )


def test_spans_have_one_unit() -> None:
    for seconds, text in (
        (30 * 86400 - 1, "30 days"),
        (86400, "1 day"),
        (86400 * 1.6, "2 days"),
        (7200, "2 hours"),
        (90, "2 minutes"),
        (61, "1 minute"),
        (1, "1 second"),
        (0.4, "0 seconds"),
        (-5, "0 seconds"),
    ):
        assert span(seconds) == text, seconds

"""The report on locations outside the artifact roots."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mlflow_hokusai_auth.core.locations import Roots
from mlflow_hokusai_auth.server.isolation import outside


def test_database_that_fails_on_the_way_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locations() -> Iterator[tuple[str, str]]:
        yield "experiment", "s3://elsewhere/1"
        raise OSError("connection lost")

    monkeypatch.setattr(outside.tables, "stored_locations", locations)
    outside._log_report(Roots(()), ())
    assert "could not be listed: connection lost" in caplog.text

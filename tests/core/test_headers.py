"""Limits on headers. Forms of Host and Origin are in vectors/requests.toml."""

from __future__ import annotations

from mlflow_hokusai_auth.core.headers import MAX_BYTES, MAX_HEADERS, too_many


def test_bounds() -> None:
    assert not too_many([(b"x", b"")] * MAX_HEADERS)
    assert too_many([(b"x", b"")] * (MAX_HEADERS + 1))
    assert not too_many([(b"x", b"a" * (MAX_BYTES - 1))])
    assert too_many([(b"x", b"a" * MAX_BYTES)])
    assert too_many([(b"x" * MAX_BYTES, b""), (b"y", b"")])

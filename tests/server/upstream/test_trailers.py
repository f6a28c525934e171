"""If uvicorn can't be patched to drop trailers, it serves with h11 or a worker does not start."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from mlflow_hokusai_auth.server.upstream import trailers


class Elsewhere:
    """A protocol of another uvicorn, which keeps a trailer although `headers` is replaced."""

    def __init__(self, **_: Any) -> None:
        self.cycle = self
        self.scope: dict[str, Any] = {"headers": [(b"host", b""), (b"x-trailer", b"1")]}

    def on_headers_complete(self) -> None: ...

    def data_received(self, data: bytes) -> None: ...


def test_httptools_drops_trailers_after_one_patch_or_more() -> None:
    assert trailers.ignore()
    protocol: Any = sys.modules[trailers.MODULE].HttpToolsProtocol
    patched = protocol.on_headers_complete
    assert trailers.ignore()
    assert protocol.on_headers_complete is patched
    trailers.check()


def test_uvicorn_that_can_not_be_patched_serves_with_h11(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UVICORN_HTTP", raising=False)
    trailers.prepare()
    assert "UVICORN_HTTP" not in os.environ
    for made_otherwise in (Elsewhere, object):
        monkeypatch.setattr(f"{trailers.MODULE}.HttpToolsProtocol", made_otherwise)
        trailers.prepare()
        assert os.environ.pop("UVICORN_HTTP") == "h11"
        # The operator's choice of httptools stays.
        with pytest.raises(ValueError, match="--http h11"):
            trailers.check()
    # A worker that serves with h11 does not import httptools.
    monkeypatch.delitem(sys.modules, trailers.MODULE)
    trailers.check()

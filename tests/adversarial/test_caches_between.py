"""Vector 40: what a cache or a browser on the way may keep, or pass on, of an answer to a key."""

from __future__ import annotations

from tests.server.gate.test_adapters import Adapter, both
from tests.server.sentinel import Wire, with_key


@both
def test_answer_to_a_key_is_cached_for_that_key_only(adapter: Adapter) -> None:
    # MLflow's own pages and files may be kept, so not `no-store`; but never for another key.
    for wire in (with_key("read"), with_key("write", "POST", "/api/2.0/mlflow/runs/create")):
        answer = adapter(wire)
        assert answer.code == "ALLOW"
        assert answer.header("vary") == ["Authorization, Cookie, X-API-Key"]
    assert adapter(Wire(target="/health")).header("vary") == []


@both
def test_refusals_are_not_cached(adapter: Adapter) -> None:
    for kind in ("nobody", "unknown", "typo", "scopeless"):
        for headers in ((), (("Accept", "text/html"),)):
            keyed = with_key(kind, "GET", "/", *headers) if kind != "nobody" else None
            answer = adapter(keyed or Wire(headers=headers))
            assert answer.status >= 300
            assert answer.header("cache-control") == ["no-store"], (kind, headers)

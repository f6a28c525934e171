"""What becomes of a verdict: by the mode, by how often an address failed, and whose address that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mlflow_hokusai_auth.core.addresses import networks
from mlflow_hokusai_auth.server.limits import Limits
from mlflow_hokusai_auth.server.switches import Mode
from tests.server.sentinel import (
    Answer,
    Memory,
    Wire,
    make_gate,
    through_asgi,
    through_wsgi,
    with_key,
)

CREATE = "/api/2.0/mlflow/experiments/create"
KEYS = "/api/2.0/hokusai/keys"
both = pytest.mark.parametrize("adapter", [through_asgi, through_wsgi])
Adapter = Callable[..., Answer]


@both
@pytest.mark.parametrize("mode", ["enforce", "observe", "off"])
def test_each_mode(adapter: Adapter, mode: str) -> None:
    gate = make_gate(mode=Mode(mode))
    refused = [
        (Wire("POST", CREATE), "KEY_MISSING"),
        (with_key("unknown", "POST", CREATE), "KEY_UNKNOWN"),
        (with_key("read", "POST", CREATE), "SCOPE_MISSING"),
    ]
    for wire, code in refused:
        answer = adapter(wire, gate)
        assert (answer.inner is None) == (mode == "enforce")
        assert mode != "enforce" or answer.code == code
        # What is made there outlives the mode.
        ours = Wire(wire.method, KEYS, wire.headers)
        assert adapter(ours, gate).code == code
    for answer in (adapter(with_key("read"), gate), adapter(Wire("POST", KEYS), gate)):
        assert answer.header("x-hokusai-auth-mode") == (["off"] if mode == "off" else [])


@both
def test_only_wrong_keys_are_counted_against_an_address(adapter: Adapter) -> None:
    gate = make_gate(limits=Limits(failures_per_minute=1))
    for _ in range(3):
        assert adapter(Wire(), gate).code == "KEY_MISSING"
        assert adapter(with_key("read", "POST", CREATE), gate).code == "SCOPE_MISSING"
    assert [adapter(with_key("unknown"), gate).status for _ in range(3)] == [401, 429, 429]
    assert adapter(Wire(), gate).code == "KEY_MISSING"
    assert adapter(with_key("read"), gate).status == 200


@both
@pytest.mark.parametrize(
    ("peer", "expected"), [("10.0.0.1", "198.51.100.7"), ("192.0.2.1", "192.0.2.1")]
)
def test_an_address_is_taken_from_a_trusted_proxy_s_header_alone(
    adapter: Adapter, peer: str, expected: str
) -> None:
    memory = Memory()
    others = [(name, "203.0.113.9") for name in ("X-Real-IP", "Forwarded", "X-Forwarded")]
    headers = (others[0], ("X-Forwarded-For", "203.0.113.8, 198.51.100.7"), *others[1:])
    came: dict[str, Any] = {"REMOTE_ADDR": peer}
    if adapter is through_asgi:
        came = {"client": (peer, 1)}
    gate = make_gate(memory, trusted=networks(["10.0.0.0/8"]))
    assert adapter(with_key("read", "GET", "/version", *headers), gate, **came).status == 200
    assert memory.addresses == [expected]

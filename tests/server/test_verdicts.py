"""What becomes of a verdict: by the mode, and by how often an address failed."""

from __future__ import annotations

import pytest

from mlflow_hokusai_auth.server.limits import Limits
from mlflow_hokusai_auth.server.switches import Mode
from tests.server.sentinel import Adapter, Wire, both, make_gate, with_key

CREATE = "/api/2.0/mlflow/experiments/create"
KEYS = "/api/2.0/hokusai/keys"


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

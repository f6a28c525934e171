"""What becomes of a verdict: by the mode, and by how often an address failed."""

from __future__ import annotations

import pytest

from mlflow_hokusai_auth.core.policy import Policy
from mlflow_hokusai_auth.server.limits import Limits
from mlflow_hokusai_auth.server.switches import Mode
from tests.server.sentinel import KEYS, Adapter, Wire, both, make_gate, with_key

CREATE = "/api/2.0/mlflow/experiments/create"
#: What stays closed, in spellings that some router may understand.
CLOSED = [
    f"{start}{path}"
    for path in ("/api/2.0/hokusai/keys", "/ajax-api/3.0/mlflow/assistant/message")
    for start in ("", "/", "//", "/mlflow", "/mlflow/")
]


@both
@pytest.mark.parametrize("mode", ["enforce", "observe", "off"])
def test_each_mode(adapter: Adapter, mode: str) -> None:
    gate = make_gate(mode=Mode(mode), policy=Policy())
    refused = [
        (Wire("POST", CREATE), "KEY_MISSING"),
        (with_key("unknown", "POST", CREATE), "KEY_UNKNOWN"),
        (with_key("read", "POST", CREATE), "SCOPE_MISSING"),
    ]
    for wire, code in refused:
        answer = adapter(wire, gate)
        assert (answer.inner is None) == (mode == "enforce")
        assert mode != "enforce" or answer.code == code
        for path in CLOSED:
            answer = adapter(Wire(wire.method, path, wire.headers), gate)
            assert (answer.inner, answer.code) == (None, code), path
    for answer in (adapter(with_key("read"), gate), adapter(Wire("POST", CLOSED[0]), gate)):
        assert answer.header("x-hokusai-auth-mode") == (["off"] if mode == "off" else [])


@both
@pytest.mark.parametrize("mode", ["observe", "off"])
def test_the_assistant_is_for_administrators_in_a_mode_for_all(adapter: Adapter, mode: str) -> None:
    gate = make_gate(mode=Mode(mode), policy=Policy(assistant=True))
    path = "/ajax-api/3.0/mlflow/assistant/message"
    assert adapter(with_key("admin", "POST", path), gate).inner is not None
    for wire in (Wire("POST", path), with_key("write", "POST", path)):
        assert adapter(wire, gate).inner is None


@both
@pytest.mark.parametrize("mode", ["observe", "off"])
@pytest.mark.parametrize(
    "headers",
    [
        (("X-API-Key", KEYS["read"]), ("Authorization", f"Bearer {KEYS['write']}")),
        (("X-API-Key", KEYS["read"]), ("X-API-Key", KEYS["read"])),
        (("X_API_Key", KEYS["read"]),),
    ],
)
def test_keys_that_nobody_could_tell_apart_do_not_go_on_to_a_provider(
    adapter: Adapter, mode: str, headers: tuple[tuple[str, str], ...]
) -> None:
    route = "/gateway/openai/v1/chat/completions"
    answer = adapter(Wire("POST", route, headers), make_gate(mode=Mode(mode)))
    assert answer.inner is not None
    assert "hk_" not in repr(answer.inner)


@both
def test_only_wrong_keys_are_counted_against_an_address(adapter: Adapter) -> None:
    gate = make_gate(limits=Limits(failures_per_minute=1))
    for _ in range(3):
        assert adapter(Wire(), gate).code == "KEY_MISSING"
        assert adapter(with_key("read", "POST", CREATE), gate).code == "SCOPE_MISSING"
    assert [adapter(with_key("unknown"), gate).status for _ in range(3)] == [401, 429, 429]
    assert adapter(Wire(), gate).code == "KEY_MISSING"
    assert adapter(with_key("read"), gate).status == 200

"""The mode, and the wrong keys of an address, change a verdict."""

from __future__ import annotations

from itertools import product

import pytest

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.addresses import networks
from mlflow_hokusai_auth.core.policy import SIGNED_OUT, Policy
from mlflow_hokusai_auth.core.types import MODES, Principal, Rejected
from mlflow_hokusai_auth.server.gate.limits import Limits
from mlflow_hokusai_auth.server.live_settings import Mode
from tests.server.sentinel import KEYS, Adapter, Memory, Wire, both, make_gate, with_key

CREATE = "/api/2.0/mlflow/experiments/create"
#: The closed operations, in spellings that some router may accept.
CLOSED = [
    f"{start}{path}"
    for path in ("/api/2.0/hokusai/keys", "/ajax-api/3.0/mlflow/assistant/message")
    for start in ("", "/", "//", "/mlflow", "/mlflow/")
]


@both
def test_each_mode_allows_and_refuses_what_it_says(adapter: Adapter) -> None:
    for mode in MODES:
        gate = make_gate(mode=Mode(mode), policy=Policy())
        for wire, code in (
            (Wire("POST", CREATE), "KEY_MISSING"),
            (with_key("unknown", "POST", CREATE), "KEY_UNKNOWN"),
            (with_key("read", "POST", CREATE), "SCOPE_MISSING"),
        ):
            answer = adapter(wire, gate)
            assert (answer.inner is None) == (mode == "enforce"), (mode, code)
            assert mode != "enforce" or answer.code == code
            for path in CLOSED:
                answer = adapter(Wire(wire.method, path, wire.headers), gate)
                assert (answer.inner, answer.code) == (None, code), (mode, path)
        for answer in (adapter(with_key("read"), gate), adapter(Wire("POST", CLOSED[0]), gate)):
            assert answer.header("x-hokusai-auth-mode") == (["off"] if mode == "off" else [])


@both
def test_assistant_needs_an_administrator_in_every_mode(adapter: Adapter) -> None:
    path = "/ajax-api/3.0/mlflow/assistant/message"
    for mode in ("observe", "off"):
        gate = make_gate(mode=Mode(mode), policy=Policy(assistant=True))
        assert adapter(with_key("admin", "POST", path), gate).inner is not None, mode
        for wire in (Wire("POST", path), with_key("write", "POST", path)):
            assert adapter(wire, gate).inner is None, mode


@both
def test_two_keys_at_once_do_not_reach_a_provider(adapter: Adapter) -> None:
    read = ("X-API-Key", KEYS["read"])
    others = (("Authorization", f"Bearer {KEYS['write']}"), read)
    sent = [*((read, other) for other in others), (("X_API_Key", KEYS["read"]),)]
    for mode, headers in product(("observe", "off"), sent):
        wire = Wire("POST", "/gateway/openai/v1/chat/completions", headers)
        answer = adapter(wire, make_gate(mode=Mode(mode)))
        assert answer.inner is not None, (mode, headers)
        assert "hk_" not in repr(answer.inner), (mode, headers)


@pytest.mark.usefixtures("one_minute")
@both
def test_only_wrong_keys_are_counted_against_an_address(adapter: Adapter) -> None:
    gate = make_gate(limits=Limits(failures_per_minute=1))
    for _ in range(3):
        assert adapter(Wire(), gate).code == "KEY_MISSING"
        assert adapter(with_key("read", "POST", CREATE), gate).code == "SCOPE_MISSING"
    assert [adapter(with_key("unknown"), gate).status for _ in range(3)] == [401, 429, 429]
    assert adapter(Wire(), gate).code == "KEY_MISSING"
    assert adapter(with_key("read"), gate).status == 200


@pytest.mark.usefixtures("one_minute")
@both
def test_page_whose_session_has_ended_says_so_among_too_many_wrong_keys(adapter: Adapter) -> None:
    gate = make_gate(limits=Limits(failures_per_minute=1))
    cookie = ("Cookie", f"hokusai_session={keys.session_token()}")
    wire = Wire("GET", "/version", (("Host", "localhost"), cookie))
    for status, said in ((401, SIGNED_OUT), (429, "may be signed out"), (429, "may be signed out")):
        answer = adapter(wire, gate)
        assert answer.status == status and said.encode() in answer.body


class Forgetful(Memory):
    """An authority without a cache, which counts its lookups."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def peek(self, key: str, address: str) -> None:
        return None

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        self.asked.append(key)
        return super().lookup(key, address)


@pytest.mark.usefixtures("one_minute")
@both
def test_new_keys_of_an_address_with_too_many_wrong_keys_are_not_looked_up(
    adapter: Adapter,
) -> None:
    authority = Forgetful()
    gate = make_gate(authority=authority, limits=Limits(failures_per_minute=2))
    assert adapter(with_key("read"), gate).status == 200
    wrong = [Wire(headers=(("X-API-Key", keys.generate()),)) for _ in range(9)]
    assert [adapter(wire, gate).status for wire in wrong] == [401, 401] + [429] * 7
    assert len(authority.asked) == 3
    # A good key that is new to this process waits; one that was good lately is looked up.
    for _ in range(3):
        answer = adapter(with_key("other"), gate)
        (wait,) = answer.header("retry-after")
        assert answer.status == 429 and 1 <= int(wait) <= 60
        assert adapter(with_key("read"), gate).status == 200
    assert authority.asked[3:] == [KEYS["read"]] * 3
    # A refusal for a missing scope does not change whether a key is remembered.
    assert adapter(with_key("read", "POST", CREATE), gate).code == "SCOPE_MISSING"


@pytest.mark.usefixtures("one_minute")
@both
def test_ended_key_is_not_remembered_as_good(adapter: Adapter) -> None:
    gate = make_gate(authority=Forgetful(), limits=Limits(failures_per_minute=2))
    assert [adapter(with_key("revoked"), gate).status for _ in range(3)] == [401, 401, 429]
    assert KEYS["revoked"] not in gate.recent


@both
def test_untrusted_proxy_is_warned_of_once(
    adapter: Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    wire = Wire(headers=(("X-API-Key", KEYS["read"]), ("X-Forwarded-For", "203.0.113.7")))
    for trusted, times in (((), 1), (networks(("198.51.100.1",)), 0)):
        gate = make_gate(authority=Forgetful(), trusted=trusted)
        adapter(with_key("read"), gate)
        assert "TRUSTED_PROXIES" not in caplog.text
        for _ in range(3):
            assert adapter(wire, gate).status == 200
        assert caplog.text.count("HOKUSAI_AUTH_TRUSTED_PROXIES is empty") == times
        caplog.clear()

"""HOKUSAI_AUTH_FORWARD_HEADERS and _REMOVE_HEADERS, from the setting to the headers MLflow gets."""

from __future__ import annotations

import pytest

from mlflow_hokusai_auth.core.errors import SettingsError
from mlflow_hokusai_auth.server import settings
from tests.server.gate.test_adapters import (
    KEYS,
    Adapter,
    Wire,
    both,
    identity_of,
    inner_headers,
    make_gate,
)

SENT = {
    "Host": "mlflow.example",
    "X-API-Key": KEYS["read"],
    "User-Agent": "test",
    "X-Tenant": "one",
    "X_Tenant_Id": "two",
    "X-Forwarded-For": "192.0.2.1",
    "X-Hokusai-User-Id": "somebody else",
}
WIRE = Wire("GET", "/version", tuple(SENT.items()))


ALL = {"host", "x-api-key", "user-agent", "x-tenant", "x-forwarded-for"}
#: A setting, its value, and the headers that reach MLflow.
REACHES = [
    ("FORWARD_HEADERS", "*", ALL),
    ("FORWARD_HEADERS", "X-Tenant, User-*", {"host", "x-tenant", "user-agent"}),
    ("FORWARD_HEADERS", "x-*", ALL - {"user-agent"}),
    ("REMOVE_HEADERS", "X-*", {"host", "user-agent"}),
    ("REMOVE_HEADERS", "x-api-key,X-Forwarded-*", {"host", "user-agent", "x-tenant"}),
    ("REMOVE_HEADERS", "", ALL),
]


@both
def test_mlflow_gets_the_headers_that_the_setting_names(adapter: Adapter) -> None:
    for setting, value, reaches in REACHES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(f"HOKUSAI_AUTH_{setting}", value)
            gate = make_gate(header_policy=settings.header_policy_of(settings.load()))
        answer = adapter(WIRE, gate)
        assert answer.status == 200
        got = inner_headers(answer)
        # Only the gate gives MLflow the identity headers.
        assert [item for item in got if item[0].startswith("x-hokusai-")] == identity_of("read")
        names = {name.replace("_", "-") for name, _ in got if not name.startswith("x-hokusai-")}
        assert names - {"x-tenant-id"} == reaches, (setting, value)
        with_id = "x-tenant" in reaches and "tenant," not in value.lower()
        assert ("x-tenant-id" in names) == with_id, (setting, value)


@both
def test_key_is_checked_although_mlflow_does_not_get_it(adapter: Adapter) -> None:
    gate = make_gate(header_policy=settings.HeaderPolicy(remove=("x-api-key",)))
    answer = adapter(WIRE, gate)
    assert answer.status == 200
    assert KEYS["read"] not in str(inner_headers(answer))
    refused = adapter(Wire("GET", "/version", (("X-API-Key", KEYS["unknown"]),)), gate)
    assert refused.verdict == (401, "KEY_UNKNOWN")


def test_impossible_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, value in (
        ("FORWARD_HEADERS", "x-*-y"),
        ("FORWARD_HEADERS", "X-Hokusai-*"),
        ("REMOVE_HEADERS", "Host"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(f"HOKUSAI_AUTH_{setting}", value)
            with pytest.raises(SettingsError, match="HEADERS"):
                settings.load()

"""HOKUSAI_AUTH_FORWARD_HEADERS and _REMOVE_HEADERS, from the setting to what MLflow is called with."""

from __future__ import annotations

import pytest

from mlflow_hokusai_auth.server import settings
from tests.server.test_adapters import (
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


@both
@pytest.mark.parametrize(
    ("setting", "value", "reaches"),
    [
        (
            "FORWARD_HEADERS",
            "*",
            {"host", "x-api-key", "user-agent", "x-tenant", "x-forwarded-for"},
        ),
        ("FORWARD_HEADERS", "X-Tenant, User-*", {"host", "x-tenant", "user-agent"}),
        ("FORWARD_HEADERS", "x-*", {"host", "x-api-key", "x-tenant", "x-forwarded-for"}),
        ("REMOVE_HEADERS", "X-*", {"host", "user-agent"}),
        (
            "REMOVE_HEADERS",
            "x-api-key,X-Forwarded-*",
            {"host", "user-agent", "x-tenant"},
        ),
        ("REMOVE_HEADERS", "", {"host", "x-api-key", "user-agent", "x-tenant", "x-forwarded-for"}),
    ],
)
def test_mlflow_gets_what_the_setting_says(
    adapter: Adapter,
    setting: str,
    value: str,
    reaches: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(f"HOKUSAI_AUTH_{setting}", value)
    gate = make_gate(headers=settings.header_policy_of(settings.load()))
    answer = adapter(WIRE, gate)
    assert answer.status == 200
    got = inner_headers(answer)
    # Whoever the caller is, MLflow is told, and by the gate alone.
    assert [item for item in got if item[0].startswith("x-hokusai-")] == identity_of("read")
    names = {name.replace("_", "-") for name, _ in got if not name.startswith("x-hokusai-")}
    assert names - {"x-tenant-id"} == reaches
    assert ("x-tenant-id" in names) == ("x-tenant" in reaches and "tenant," not in value.lower())


@both
def test_the_key_counts_although_mlflow_does_not_get_it(adapter: Adapter) -> None:
    gate = make_gate(headers=settings.HeaderPolicy(remove=("x-api-key",)))
    answer = adapter(WIRE, gate)
    assert answer.status == 200
    assert KEYS["read"] not in str(inner_headers(answer))
    refused = adapter(Wire("GET", "/version", (("X-API-Key", KEYS["unknown"]),)), gate)
    assert refused.verdict == (401, "KEY_UNKNOWN")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("FORWARD_HEADERS", "x-*-y"), ("FORWARD_HEADERS", "X-Hokusai-*"), ("REMOVE_HEADERS", "Host")],
)
def test_a_setting_that_can_t_be_is_refused(
    setting: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"HOKUSAI_AUTH_{setting}", value)
    with pytest.raises(settings.SettingsError, match="HEADERS"):
        settings.load()

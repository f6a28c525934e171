"""Which scope may do what, and when a key counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_hokusai_auth.core.policy import GRANTS, Policy, granted, plan, settle
from mlflow_hokusai_auth.core.types import (
    Access,
    Allow,
    Credential,
    Deny,
    NeedKey,
    Operation,
    Principal,
    Request,
)

NOW = 1000.0
KEY = "hk_live_" + "a" * 32
LEVELS = {
    Access.READ: ["mlflow:read", "read", "model:read"],
    Access.WRITE: ["mlflow:write", "write", "model:write", "mlflow:access", "full_access"],
    Access.ADMIN: ["mlflow:admin", "admin", "registry:admin", "model-registry:admin"],
}
NO_SCOPES = [
    "",
    "Admin",
    "ADMIN",
    " admin",
    "admin ",
    "mlflow",
    "mlflow:*",
    "*",
    "adm",
    "mlflow:owner",
]


def need(access: Access) -> NeedKey:
    return NeedKey(Credential(KEY, ("X-API-Key",)), Operation(access, "runs", "POST /x"))


def whose(*scopes: str, **times: float) -> Principal:
    return Principal("key_1", "somebody", frozenset(scopes), **times)


def test_access_is_in_order() -> None:
    assert Access.PUBLIC < Access.READ < Access.WRITE < Access.ADMIN


def test_every_scope_is_at_its_level() -> None:
    levels = {scope: access for access, scopes in LEVELS.items() for scope in scopes}
    assert levels == GRANTS


@pytest.mark.parametrize("access", list(LEVELS))
@pytest.mark.parametrize("scope", [*GRANTS, *NO_SCOPES])
def test_scope_against_access(scope: str, access: Access) -> None:
    verdict = settle(need(access), whose(scope), NOW)
    if GRANTS.get(scope, Access.PUBLIC) >= access:
        assert verdict == Allow(need(access).operation, whose(scope), need(access).credential)
    else:
        assert isinstance(verdict, Deny)
        assert verdict.code == "SCOPE_MISSING"
        assert verdict.required_scope == f"mlflow:{access.name.lower()}"
        assert verdict.current_scopes == (scope,)


@given(
    st.frozensets(st.sampled_from([*GRANTS, *NO_SCOPES])), st.sampled_from([*GRANTS, *NO_SCOPES])
)
def test_a_scope_more_never_grants_less(scopes: frozenset[str], more: str) -> None:
    assert granted(scopes) <= granted(scopes | {more})
    assert granted(scopes | {more}) == max(granted(scopes), granted(frozenset({more})))


@given(st.frozensets(st.text()))
def test_unknown_scopes_grant_nothing(scopes: frozenset[str]) -> None:
    assert granted(scopes - set(GRANTS)) is Access.PUBLIC


@pytest.mark.parametrize("access", list(LEVELS))
def test_no_scope_is_no_access(access: Access) -> None:
    assert isinstance(settle(need(access), whose(), NOW), Deny)


@pytest.mark.parametrize(
    ("times", "code"),
    [
        ({}, None),
        ({"expires_at": NOW + 1}, None),
        ({"expires_at": NOW}, "KEY_EXPIRED"),
        ({"expires_at": NOW - 1}, "KEY_EXPIRED"),
        ({"expires_at": 0.0}, "KEY_EXPIRED"),
        ({"revoked_at": NOW + 1}, None),
        ({"revoked_at": NOW}, "KEY_REVOKED"),
        ({"revoked_at": NOW - 1}, "KEY_REVOKED"),
        ({"revoked_at": 0.0}, "KEY_REVOKED"),
        ({"revoked_at": NOW - 1, "expires_at": NOW + 1}, "KEY_REVOKED"),
        ({"revoked_at": NOW + 1, "expires_at": NOW - 1}, "KEY_EXPIRED"),
    ],
)
def test_when_a_key_counts(times: dict[str, float], code: str | None) -> None:
    verdict = settle(need(Access.READ), whose("admin", **times), NOW)
    assert (verdict.code if isinstance(verdict, Deny) else None) == code


def test_a_key_that_nobody_knows() -> None:
    verdict = settle(need(Access.READ), None, NOW)
    assert isinstance(verdict, Deny)
    assert verdict.code == "KEY_UNKNOWN"


def test_a_dead_key_is_told_nothing_of_scopes() -> None:
    verdict = settle(need(Access.ADMIN), whose("read", expires_at=NOW), NOW)
    assert isinstance(verdict, Deny)
    assert (verdict.required_scope, verdict.current_scopes) == (None, None)


# plan


def request(
    method: str = "GET", path: str = "/version", query: bytes = b"", **headers: str
) -> Request:
    fields = [(n.replace("_", "-").encode(), v.encode("latin-1")) for n, v in headers.items()]
    return Request(method, path, query, tuple(fields))


def test_health_needs_no_key_and_looks_at_none() -> None:
    for method in ("GET", "HEAD", "get"):
        verdict = plan(request(method, "/health", x_api_key="a b"), Policy())
        assert isinstance(verdict, Allow)
        assert (verdict.principal, verdict.credential) == (None, None)


def test_a_key_is_asked_for_with_what_it_is_to_do() -> None:
    step = plan(request("POST", "/api/2.0/mlflow/runs/create", x_api_key=KEY), Policy())
    assert isinstance(step, NeedKey)
    assert step.operation.access is Access.WRITE
    assert step.credential == Credential(KEY, ("X-API-Key",))


def test_the_setting_for_the_query_is_kept() -> None:
    asked = request(query=f"api_key={KEY}".encode())
    assert isinstance(plan(asked, Policy()), NeedKey)
    refused = plan(asked, Policy(query_key=False))
    assert isinstance(refused, Deny)
    assert refused.code == "KEY_MISSING"


def test_a_malformed_key_is_named_by_its_place_only() -> None:
    verdict = plan(request(authorization="Bearer secret words"), Policy())
    assert isinstance(verdict, Deny)
    assert verdict.code == "KEY_MALFORMED"
    assert "Authorization" in verdict.message
    assert "secret" not in verdict.message


@given(
    st.text(max_size=9),
    st.text(max_size=30),
    st.binary(max_size=30),
    st.lists(st.tuples(st.binary(max_size=9).map(bytes.lower), st.binary(max_size=30)), max_size=3),
)
def test_any_request_has_a_plan(
    method: str, path: str, query: bytes, headers: list[tuple[bytes, bytes]]
) -> None:
    step = plan(Request(method, path, query, tuple(headers)), Policy())
    if isinstance(step, Allow):
        assert (method.upper(), path) in {("GET", "/health"), ("HEAD", "/health")}

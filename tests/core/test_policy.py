"""Which scope may do what, and when a key counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_hokusai_auth.core import browser, scopes
from mlflow_hokusai_auth.core.operations import classify, rules
from mlflow_hokusai_auth.core.policy import Policy, abilities, access, plan, settle
from mlflow_hokusai_auth.core.types import (
    Access,
    Allow,
    Credential,
    Deny,
    NeedKey,
    Operation,
    Principal,
    Rejected,
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


def need(level: Access) -> NeedKey:
    return NeedKey(Credential(KEY, ("X-API-Key",)), Operation(level, "runs", "POST /x"))


def whose(*names: str, **times: float) -> Principal:
    return Principal("key_1", "somebody", frozenset(names), **times)


def test_access_is_in_order() -> None:
    assert Access.PUBLIC < Access.READ < Access.WRITE < Access.ADMIN


def test_every_scope_is_at_its_level() -> None:
    levels = {scope: access for access, scopes in LEVELS.items() for scope in scopes}
    general = {**scopes.GENERAL, **scopes.REGISTRY, **dict.fromkeys(scopes.ADMIN, Access.ADMIN)}
    assert levels == general
    assert set(levels) | {scopes.METRICS} == scopes.KNOWN


def test_metrics_are_for_their_scope_and_nothing_else_is() -> None:
    metrics = NeedKey(need(Access.READ).credential, classify("GET", "/hokusai/metrics"))
    assert isinstance(settle(metrics, whose("metrics:read"), NOW, Policy()), Allow)
    for scope in scopes.KNOWN - scopes.ADMIN - {"metrics:read"}:
        refused = settle(metrics, whose(scope), NOW, Policy())
        assert isinstance(refused, Deny) and refused.required_scope == "metrics:read", scope
    for kind in ("authenticated", "admin"):
        refused = settle(metrics, whose("metrics:read"), NOW, Policy(kind=kind))
        assert isinstance(refused, Deny) and refused.required_scope == "mlflow:admin", kind


@pytest.mark.parametrize(
    ("has", "route", "scope"),
    [
        ("model:read", ("POST", "/api/2.0/mlflow/registered-models/create"), "model:write"),
        ("model:read", ("POST", "/api/2.0/mlflow/experiments/delete"), "mlflow:write"),
        ("model:write", ("GET", "/api/2.0/mlflow/webhooks"), "mlflow:admin"),
        ("mlflow:read", ("POST", "/api/2.0/mlflow/registered-models/create"), "mlflow:write"),
    ],
)
def test_a_supplier_is_told_to_ask_for_no_more_than_it_takes(
    has: str, route: tuple[str, str], scope: str
) -> None:
    asked = NeedKey(need(Access.READ).credential, classify(*route))
    refused = settle(asked, whose(has), NOW, Policy())
    assert isinstance(refused, Deny)
    assert refused.required_scope == scope and f"needs the scope {scope}" in refused.message


def test_a_refusal_says_what_was_asked_with_which_key_and_from_where() -> None:
    asked = need(Access.WRITE)
    nowhere = replace(asked, operation=classify("GET", "/nowhere"))
    abroad = replace(whose("mlflow:write"), networks=("192.0.2.0/24",))
    for found, needed, said in (
        (whose(), nowhere, "A route that MLflow is not known to have (is the path"),
        (whose(), asked, "POST /x needs"),
        (whose("predict", "a"), asked, "has a, predict."),
        (replace(whose("predict"), scopes=frozenset()), nowhere, "has none."),
        (abroad, replace(asked, address="203.0.113.1"), "from 203.0.113.1."),
        (abroad, asked, "from where this came from."),
    ):
        refused = settle(needed, found, NOW, Policy())
        assert isinstance(refused, Deny) and said in refused.message
    unknown = settle(asked, Rejected(), NOW, Policy())
    assert isinstance(unknown, Deny) and "()" not in unknown.message


@pytest.mark.parametrize("needed", list(LEVELS))
@pytest.mark.parametrize("scope", sorted([*scopes.KNOWN, *NO_SCOPES]))
def test_scope_against_access(scope: str, needed: Access) -> None:
    verdict = settle(need(needed), whose(scope), NOW, Policy())
    level = next((level for level, names in LEVELS.items() if scope in names), Access.PUBLIC)
    if level >= needed:
        assert verdict == Allow(need(needed).operation, whose(scope), need(needed).credential)
    else:
        assert isinstance(verdict, Deny)
        assert verdict.code == "SCOPE_MISSING"
        assert str(verdict.required_scope).endswith(f":{needed.name.lower()}")
        assert verdict.current_scopes == (scope,)


ANY_SCOPE = st.sampled_from(sorted([*scopes.KNOWN, *NO_SCOPES]))


@given(st.frozensets(ANY_SCOPE, min_size=1), ANY_SCOPE, st.sampled_from(list(rules())))
def test_a_scope_more_never_grants_less(
    some: frozenset[str], more: str, operation: Operation
) -> None:
    def may(names: frozenset[str]) -> Access:
        return access(whose(*names), operation, Policy())

    assert may(some | {more}) == max(may(some), may(frozenset({more})))


@given(st.frozensets(st.text()), st.sampled_from(list(rules())))
def test_unknown_scopes_grant_nothing(names: frozenset[str], operation: Operation) -> None:
    names -= scopes.KNOWN
    may = access(whose(*names), operation, Policy(empty_scopes=Access.PUBLIC))
    assert may is Access.PUBLIC


# What suppliers' scopes reach


@pytest.mark.parametrize("rule", list(rules()), ids=lambda operation: operation.rule)
def test_registry_scopes_stay_with_the_registry(rule: Operation) -> None:
    read = access(whose("model:read"), rule, Policy())
    write = access(whose("model:write"), rule, Policy())
    whole = {"registered-models", "model-versions", "logged-models", "runs", "artifacts"}
    looked_at = {"experiments", "server", "ui", "hokusai"}
    if rule.kind in whole or rule.rule.endswith("/mlflow/experiments/create"):
        assert (read, write) == (Access.READ, Access.WRITE)
    elif rule.kind in looked_at:
        assert (read, write) == (Access.READ, Access.READ)
    else:
        assert (read, write) == (Access.PUBLIC, Access.PUBLIC)


@pytest.mark.parametrize(
    "rule",
    [
        ("POST", "/api/2.0/mlflow/experiments/delete"),
        ("POST", "/api/2.0/mlflow/experiments/update"),
        ("POST", "/api/2.0/mlflow/webhooks"),
        ("GET", "/api/2.0/mlflow/webhooks"),
        ("POST", "/graphql"),
        ("POST", "/v1/traces"),
        ("GET", "/api/2.0/hokusai/keys"),
        ("POST", "/api/2.0/mlflow/of/a/version/to/come"),
    ],
)
def test_what_a_supplier_may_not(rule: tuple[str, str]) -> None:
    asked = NeedKey(Credential(KEY, ("X-API-Key",)), classify(*rule))
    verdict = settle(asked, whose("model:write"), NOW, Policy())
    assert isinstance(verdict, Deny)
    assert verdict.code == "SCOPE_MISSING"


@pytest.mark.parametrize(
    "policy", [Policy(), Policy(kind="admin"), Policy(empty_scopes=Access.PUBLIC)]
)
def test_any_good_key_may_ask_about_itself(policy: Policy) -> None:
    assert isinstance(settle(need(Access.KEY), whose("nothing here"), NOW, policy), Allow)
    assert isinstance(settle(need(Access.KEY), whose(), NOW, policy), Allow)
    assert isinstance(settle(need(Access.KEY), whose(expires_at=NOW), NOW, policy), Deny)


# The policies


def may(policy: Policy, who: Principal) -> Access:
    levels = [Access.PUBLIC, *LEVELS]
    return max(
        level
        for level in levels
        if level is Access.PUBLIC or isinstance(settle(need(level), who, NOW, policy), Allow)
    )


@pytest.mark.parametrize("setting", [Access.PUBLIC, Access.READ, Access.WRITE])
def test_a_key_without_scopes_may_what_the_setting_says(setting: Access) -> None:
    assert may(Policy(empty_scopes=setting), whose()) is setting


def test_authenticated_lets_every_good_key_write_and_none_administrate() -> None:
    policy = Policy(kind="authenticated")
    assert may(policy, whose("predict")) is Access.WRITE
    assert may(policy, whose()) is Access.WRITE
    assert may(policy, whose("mlflow:admin")) is Access.ADMIN


def test_admin_lets_administrators_only() -> None:
    policy = Policy(kind="admin")
    for names in (["mlflow:write"], ["model:write"], ["read"], []):
        assert may(policy, whose(*names)) is Access.PUBLIC
    refused = settle(need(Access.READ), whose("mlflow:write"), NOW, policy)
    assert isinstance(refused, Deny)
    assert refused.required_scope == "mlflow:admin"
    assert may(policy, whose("registry:admin")) is Access.ADMIN


def test_regression_24_there_is_no_administrator_by_default() -> None:
    user = Principal("key_1", "x", frozenset(), email="somebody@example.com")
    assert may(Policy(), user) is Access.READ
    named = Policy(admin_emails=frozenset({"somebody@example.com"}))
    assert may(named, user) is Access.ADMIN
    assert may(named, replace(user, email="SomeBody@Example.com")) is Access.ADMIN
    assert may(named, replace(user, email="")) is Access.READ


def test_regression_25_a_role_makes_no_administrator_unless_a_setting_says_so() -> None:
    user = Principal("key_1", "x", frozenset(), roles=frozenset({"admin", "Owner"}))
    assert may(Policy(), user) is Access.READ
    assert may(Policy(admin_roles=frozenset({"Owner"})), user) is Access.ADMIN


def test_regression_26_no_right_comes_from_the_text_of_a_key() -> None:
    asked = replace(need(Access.ADMIN), credential=Credential("hk_live_admin_" + "a" * 20, ("x",)))
    assert isinstance(settle(asked, whose("read"), NOW, Policy()), Deny)


def test_the_auth_service_may_name_an_administrator() -> None:
    user = Principal("key_1", "x", frozenset(), is_admin=True)
    assert may(Policy(), user) is Access.ADMIN
    assert may(Policy(admin_scopes=frozenset({"ops"})), whose("ops")) is Access.ADMIN


def test_the_assistant_is_off_even_for_administrators() -> None:
    operation = next(rule for rule in rules() if rule.kind == "assistant")
    asked = NeedKey(Credential(KEY, ("X-API-Key",)), operation)
    refused = settle(asked, whose("mlflow:admin"), NOW, Policy())
    assert isinstance(refused, Deny)
    assert "HOKUSAI_AUTH_ASSISTANT" in refused.message
    on = Policy(assistant=True)
    assert isinstance(settle(asked, whose("mlflow:admin"), NOW, on), Allow)
    assert isinstance(settle(asked, whose("mlflow:write"), NOW, on), Deny)


@pytest.mark.parametrize(
    ("times", "code"),
    [
        ({}, None),
        ({"expires_at": NOW + 1}, None),
        ({"expires_at": NOW}, "KEY_EXPIRED"),
        ({"expires_at": NOW - 1}, "KEY_EXPIRED"),
        ({"expires_at": 0.0}, "KEY_EXPIRED"),
        ({"revoked_at": NOW + 1}, "KEY_REVOKED"),
        ({"revoked_at": NOW}, "KEY_REVOKED"),
        ({"revoked_at": NOW - 1}, "KEY_REVOKED"),
        ({"revoked_at": 0.0}, "KEY_REVOKED"),
        ({"revoked_at": NOW - 1, "expires_at": NOW + 1}, "KEY_REVOKED"),
        ({"revoked_at": NOW + 1, "expires_at": NOW - 1}, "KEY_REVOKED"),
    ],
)
def test_when_a_key_counts(times: dict[str, float], code: str | None) -> None:
    verdict = settle(need(Access.READ), whose("admin", **times), NOW, Policy())
    assert (verdict.code if isinstance(verdict, Deny) else None) == code


def test_a_key_that_nobody_knows() -> None:
    verdict = settle(
        need(Access.READ), Rejected("hk_live_abcdefgh expired\nyesterday"), NOW, Policy()
    )
    assert isinstance(verdict, Deny)
    assert verdict.code == "KEY_UNKNOWN"
    assert "(hk_live_*** expired yesterday)" in verdict.message


def test_a_dead_key_is_told_nothing_of_scopes() -> None:
    verdict = settle(need(Access.ADMIN), whose("read", expires_at=NOW), NOW, Policy())
    assert isinstance(verdict, Deny)
    assert (verdict.required_scope, verdict.current_scopes) == (None, None)


def test_a_session_that_is_over_says_so_whatever_ended_it() -> None:
    session = replace(
        need(Access.READ), credential=Credential("hk_session_a", (browser.PLACE,), session=True)
    )
    for ended in (
        Rejected("hk_live_abcdefgh"),
        whose("admin", revoked_at=NOW),
        whose("admin", expires_at=NOW),
        whose("admin", expires_at=NOW - 1, revoked_at=NOW + 1),
    ):
        refused = settle(session, ended, NOW, Policy())
        assert isinstance(refused, Deny)
        assert (refused.code, "hk_live" in refused.message) == ("SESSION_ENDED", False)
    going_on = whose("read", expires_at=NOW + 1)
    assert isinstance(settle(session, going_on, NOW, Policy()), Allow)
    write = replace(session, operation=need(Access.WRITE).operation)
    refused = settle(write, whose("read"), NOW, Policy())
    assert isinstance(refused, Deny) and refused.code == "SCOPE_MISSING"


# Networks


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("192.0.2.7", None),
        ("2001:db8::7", None),
        ("192.0.3.7", "ADDRESS_REFUSED"),
        ("2001:db9::7", "ADDRESS_REFUSED"),
        ("", "ADDRESS_REFUSED"),
    ],
)
def test_a_key_counts_in_its_networks_only(address: str, code: str | None) -> None:
    who = replace(whose("admin"), networks=("192.0.2.0/24", "2001:db8::/32"))
    verdict = settle(replace(need(Access.READ), address=address), who, NOW, Policy())
    assert (verdict.code if isinstance(verdict, Deny) else None) == code
    everywhere = settle(replace(need(Access.READ), address=address), whose("read"), NOW, Policy())
    assert isinstance(everywhere, Allow)


def test_another_server_may_ask_about_a_key_from_anywhere() -> None:
    # It asks for its own client, whose address is in the body.
    who = replace(whose("read"), networks=("192.0.2.0/24",))
    asked = replace(need(Access.READ), address="198.51.100.1")
    validate = replace(asked, operation=classify("POST", "/api/v1/keys/validate"))
    assert isinstance(settle(validate, who, NOW, Policy()), Allow)
    for method, path in (("GET", "/api/2.0/hokusai/whoami"), ("GET", "/api/v1/keys/validate")):
        other = replace(asked, operation=classify(method, path))
        refused = settle(other, who, NOW, Policy())
        assert isinstance(refused, Deny) and refused.code == "ADDRESS_REFUSED"


def test_a_dead_key_is_told_nothing_of_networks() -> None:
    who = replace(whose("read", revoked_at=NOW), networks=("192.0.2.0/24",))
    refused = settle(need(Access.READ), who, NOW, Policy())
    assert isinstance(refused, Deny) and refused.code == "KEY_REVOKED"


# Replaced keys


@pytest.mark.parametrize(
    ("times", "headers"),
    [
        (
            {"deprecated_at": 1688169599.9, "expires_at": 1893456000.0},
            # The example of RFC 9745, and the first second of 2030.
            (("Deprecation", "@1688169599"), ("Sunset", "Tue, 01 Jan 2030 00:00:00 GMT")),
        ),
        ({"expires_at": 1893456000.0}, ()),
        ({"deprecated_at": 1688169599.0}, ()),
        ({}, ()),
    ],
)
def test_a_client_is_told_that_its_key_was_replaced(
    times: dict[str, float], headers: tuple[tuple[str, str], ...]
) -> None:
    verdict = settle(need(Access.READ), whose("read", **times), NOW, Policy())
    assert isinstance(verdict, Allow)
    assert verdict.headers == headers


@pytest.mark.parametrize(
    ("who", "policy", "words"),
    [
        (whose("mlflow:read"), Policy(), ["read"]),
        (whose("model:read"), Policy(), ["read"]),
        (whose("model:write"), Policy(), ["read", "register"]),
        (whose("mlflow:write"), Policy(), ["read", "register", "write"]),
        (whose("registry:admin"), Policy(), ["read", "register", "write", "admin"]),
        (whose("predict"), Policy(), []),
        (whose(), Policy(), ["read"]),
        (whose(), Policy(empty_scopes=Access.PUBLIC), []),
        (whose("mlflow:write"), Policy(kind="admin"), []),
        (whose("predict"), Policy(kind="authenticated"), ["read", "register", "write"]),
        (replace(whose(), is_admin=True), Policy(), ["read", "register", "write", "admin"]),
    ],
)
def test_what_a_key_may_do_in_four_words(who: Principal, policy: Policy, words: list[str]) -> None:
    assert abilities(who, policy) == words


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


COOKIE = "__Host-hokusai_session=hk_session_" + "a" * 43


def test_regression_42_a_page_of_another_site_gets_nothing_for_the_cookie() -> None:
    post = request("POST", "/api/2.0/mlflow/runs/create", cookie=COOKIE)
    refused = plan(post, Policy())
    assert isinstance(refused, Deny)
    assert refused.code == "CROSS_SITE"
    assert "hk_session" not in refused.message
    own = replace(post, headers=(*post.headers, (b"sec-fetch-site", b"same-origin")))
    step = plan(own, Policy())
    assert isinstance(step, NeedKey) and step.credential.session
    # What sends a key of its own needs no browser's word.
    program = request("POST", "/api/2.0/mlflow/runs/create", x_api_key=KEY, origin="http://evil")
    assert isinstance(plan(program, Policy()), NeedKey)


def test_what_manages_keys_takes_the_page_s_token_as_well() -> None:
    post = request("POST", "/api/2.0/hokusai/keys", cookie=COOKIE, sec_fetch_site="same-origin")
    refused = plan(post, Policy())
    assert isinstance(refused, Deny) and refused.code == "CROSS_SITE"
    token = browser.csrf_token(COOKIE.partition("=")[2])
    sent = replace(post, headers=(*post.headers, (b"x-csrf-token", token.encode())))
    assert isinstance(plan(sent, Policy()), NeedKey)


def test_the_address_is_asked_about_too() -> None:
    step = plan(replace(request(x_api_key=KEY), address="192.0.2.7"), Policy())
    assert isinstance(step, NeedKey) and step.address == "192.0.2.7"


def test_a_refusal_without_a_key_names_the_variables_of_who_asks_there() -> None:
    hints = {}
    for method, path in (
        ("POST", "/v1/traces"),
        ("POST", "/gateway/mlflow/v1/chat/completions"),
        ("POST", "/gateway/chat/mlflow/invocations"),
        ("GET", "/version"),
        ("POST", "/v1/tracesx"),
    ):
        refused = plan(Request(method, path, b"", ()), Policy())
        assert isinstance(refused, Deny) and refused.code == "KEY_MISSING"
        words = ("HOKUSAI_API_KEY", "OTEL_EXPORTER_OTLP_HEADERS", "MLFLOW_TRACKING_USERNAME")
        hints[path] = [word for word in words if word in refused.message]
    assert hints == {
        "/v1/traces": ["HOKUSAI_API_KEY", "OTEL_EXPORTER_OTLP_HEADERS"],
        "/gateway/mlflow/v1/chat/completions": ["HOKUSAI_API_KEY", "MLFLOW_TRACKING_USERNAME"],
        "/gateway/chat/mlflow/invocations": ["HOKUSAI_API_KEY", "MLFLOW_TRACKING_USERNAME"],
        "/version": ["HOKUSAI_API_KEY"],
        "/v1/tracesx": ["HOKUSAI_API_KEY"],
    }

"""The access of each scope, and the states in which a key counts."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from mlflow_hokusai_auth.core import browser, job_rules, scopes
from mlflow_hokusai_auth.core.operations import classify, rules
from mlflow_hokusai_auth.core.policy import (
    SIGNED_OUT,
    Policy,
    abilities,
    access,
    is_confined,
    operation_of,
    plan,
    settle,
)
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

from .rows import agree, each

NOW = 1000.0
USUAL = Policy()
KEY = "hk_live_" + "a" * 32
LEVELS = {
    Access.READ: ["mlflow:read", "read", "model:read"],
    Access.WRITE: ["mlflow:write", "write", "model:write", "mlflow:access", "full_access"],
    Access.ADMIN: ["mlflow:admin", "admin", "registry:admin", "model-registry:admin"],
}
NO_SCOPES = ["", "Admin", "ADMIN", " admin", "admin ", "mlflow", "mlflow:*", "*", "adm"]
NO_SCOPES += ["mlflow:owner"]


def need(level: Access) -> NeedKey:
    return NeedKey(Credential(KEY, ("X-API-Key",)), Operation(level, "runs", "POST /x"))


def whose(*names: str, **times: float) -> Principal:
    return Principal("key_1", "somebody", frozenset(names), **times)


def asking(method: str, path: str) -> NeedKey:
    """Return what `method` on `path` needs."""
    return NeedKey(Credential(KEY, ("X-API-Key",)), classify(method, path))


def refusal(asked: NeedKey, who: Principal | Rejected, policy: Policy = USUAL) -> Deny:
    """Return the refusal of `who` for `asked`; fail if there is none."""
    verdict = settle(asked, who, NOW, policy)
    assert isinstance(verdict, Deny)
    return verdict


def allowed(asked: NeedKey, who: Principal | Rejected, policy: Policy = USUAL) -> bool:
    return isinstance(settle(asked, who, NOW, policy), Allow)


def code(asked: NeedKey, who: Principal | Rejected) -> str | None:
    """Return the code with which `who` is refused, or None."""
    return getattr(settle(asked, who, NOW, USUAL), "code", None)


def test_access_is_in_order() -> None:
    assert Access.PUBLIC < Access.READ < Access.WRITE < Access.ADMIN


def test_every_scope_is_at_its_level() -> None:
    levels = {scope: access for access, scopes in LEVELS.items() for scope in scopes}
    general = {**scopes.GENERAL, **scopes.REGISTRY, **dict.fromkeys(scopes.ADMIN, Access.ADMIN)}
    assert levels == general
    assert set(levels) | {scopes.METRICS} == scopes.KNOWN


def test_metrics_are_for_their_scope_and_nothing_else_is() -> None:
    metrics = asking("GET", "/hokusai/metrics")
    assert allowed(metrics, whose("metrics:read"))
    for scope in scopes.KNOWN - scopes.ADMIN - {"metrics:read"}:
        assert refusal(metrics, whose(scope)).required_scope == "metrics:read", scope
    for kind in ("authenticated", "admin"):
        refused = refusal(metrics, whose("metrics:read"), Policy(kind=kind))
        assert refused.required_scope == "mlflow:admin", kind


def test_refusal_names_the_smallest_scope_that_is_enough() -> None:
    for has, method, route, scope in (
        ("model:read", "POST", "registered-models/create", "model:write"),
        ("model:read", "POST", "experiments/delete", "mlflow:write"),
        ("model:write", "GET", "webhooks", "mlflow:admin"),
        ("mlflow:read", "POST", "registered-models/create", "mlflow:write"),
    ):
        refused = refusal(asking(method, f"/api/2.0/mlflow/{route}"), whose(has))
        assert refused.required_scope == scope and f"needs the scope {scope}" in refused.message


def test_refusal_names_the_route_the_key_and_the_address() -> None:
    asked, nowhere = need(Access.WRITE), asking("GET", "/nowhere")
    abroad = replace(whose("mlflow:write"), networks=("192.0.2.0/24",))
    for found, needed, said in (
        (whose(), nowhere, "MLflow is not known to have this route: is the path"),
        (whose(), asked, "POST /x needs"),
        (whose("predict", "a"), asked, "has a, predict."),
        (replace(whose("predict"), scopes=frozenset()), asked, "has none."),
        (abroad, asked._replace(address="203.0.113.1"), "from 203.0.113.1."),
        (abroad, asked, "from an unknown address."),
    ):
        assert said in refusal(needed, found).message
    assert "()" not in refusal(asked, Rejected()).message
    # A wrong path is no reason to ask for an administrator's key.
    for supplier in (whose("model:write"), whose("mlflow:write")):
        assert "Ask the server's operator" not in refusal(nowhere, supplier).message


def test_scope_grants_its_access() -> None:
    def check(scope: str, needed: Access) -> None:
        verdict = settle(need(needed), whose(scope), NOW, USUAL)
        level = next((level for level, names in LEVELS.items() if scope in names), Access.PUBLIC)
        if level >= needed:
            assert verdict == Allow(need(needed).operation, whose(scope), need(needed).credential)
        else:
            assert isinstance(verdict, Deny)
            assert verdict.code == "SCOPE_MISSING"
            assert str(verdict.required_scope).endswith(f":{needed.name.lower()}")
            assert verdict.current_scopes == (scope,)

    each(check, product([*scopes.KNOWN, *NO_SCOPES], LEVELS))


ANY_SCOPE = st.sampled_from(sorted([*scopes.KNOWN, *NO_SCOPES]))


@given(st.frozensets(ANY_SCOPE, min_size=1), ANY_SCOPE, st.sampled_from(list(rules())))
def test_another_scope_never_grants_less(
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


# The reach of suppliers' scopes


def test_registry_scopes_stay_with_the_registry() -> None:
    whole = {"registered-models", "model-versions", "logged-models", "runs", "artifacts"}
    looked_at = {"experiments", "server", "ui", "hokusai"}

    shared = ("/mlflow/experiments/create", "/hokusai/grants", "/hokusai/grants/{grant_id}")
    shared += ("/hokusai/models/share", "/hokusai/models/unshare")
    shared += ("/hokusai/trust", "/hokusai/trust/{trust_id}")
    shared += ("/hokusai/trusts/add", "/hokusai/trusts/remove", "/hokusai/trusts/{trust_id}/edit")

    def expected(rule: Operation) -> tuple[Access, Access]:
        if rule.kind in whole or rule.rule.endswith(shared):
            return Access.READ, Access.WRITE
        return (Access.READ if rule.kind in looked_at else Access.PUBLIC,) * 2

    def granted(rule: Operation) -> tuple[Access, ...]:
        return tuple(access(whose(name), rule, Policy()) for name in ("model:read", "model:write"))

    agree(granted, ((rule, expected(rule)) for rule in rules()))


def test_trusts_are_for_administrators_unless_a_setting_opens_them_to_suppliers() -> None:
    path = "/api/2.0/hokusai/trust"
    one = f"{path}/trust_1"
    page = "/hokusai/trusts"
    writes = [("POST", path), ("PATCH", one), ("DELETE", one)]
    writes += [("POST", f"{page}/add"), ("POST", f"{page}/remove")]
    # A form is for those who may send it.
    writes += [(method, f"{page}/trust_1/edit") for method in ("GET", "POST")]
    reads = [("GET", path), ("HEAD", path), ("GET", page)]
    for isolated in (False, True):
        shut = Policy(isolated=isolated)
        opened = replace(shut, supplier_trust=True)
        for method, at in (*reads, *writes):
            operation = operation_of(method, at, opened)
            assert operation.access is not Access.PUBLIC
            for scope, may in (("model:write", True), ("model:read", (method, at) in reads)):
                for policy, allowed in ((opened, may), (shut, False)):
                    need = NeedKey(
                        Credential(KEY, ("X-API-Key",)), operation_of(method, at, policy)
                    )
                    verdict = settle(need, whose(scope), NOW, policy)
                    assert isinstance(verdict, Allow) is allowed, (method, at, scope, policy)
                    if isinstance(verdict, Deny) and verdict.code == "ISOLATED":
                        # Nobody is to ask for an administrator's key.
                        assert "HOKUSAI_AUTH_SUPPLIER_TRUST" in verdict.message
            assert operation.rule == operation_of(method, at, shut).rule
        for other in (
            "/api/2.0/hokusai/trust/",
            "/api/2.0/hokusai/keys",
            "/api/2.0//hokusai/trust",
        ):
            assert operation_of("POST", other, opened).access is Access.ADMIN


def test_supplier_s_scopes_do_not_reach_other_resources() -> None:
    for method, path in (
        ("POST", "/api/2.0/mlflow/experiments/delete"),
        ("POST", "/api/2.0/mlflow/experiments/update"),
        ("POST", "/api/2.0/mlflow/webhooks"),
        ("GET", "/api/2.0/mlflow/webhooks"),
        ("POST", "/graphql"),
        ("POST", "/v1/traces"),
        ("GET", "/api/2.0/hokusai/keys"),
        ("POST", "/api/2.0/mlflow/of/a/version/to/come"),
    ):
        assert refusal(asking(method, path), whose("model:write")).code == "SCOPE_MISSING", path


def test_any_good_key_may_ask_about_itself() -> None:
    for policy in (Policy(), Policy(kind="admin"), Policy(empty_scopes=Access.PUBLIC)):
        assert allowed(need(Access.KEY), whose("nothing here"), policy)
        assert allowed(need(Access.KEY), whose(), policy)
        assert not allowed(need(Access.KEY), whose(expires_at=NOW), policy)


# The policies


def may(policy: Policy, who: Principal) -> Access:
    """Return the highest access of `who`."""
    levels = [level for level in LEVELS if allowed(need(level), who, policy)]
    return max(levels, default=Access.PUBLIC)


def test_key_without_scopes_has_the_access_of_the_setting() -> None:
    for setting in (Access.PUBLIC, Access.READ, Access.WRITE):
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
    refused = refusal(need(Access.READ), whose("mlflow:write"), policy)
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
    asked = need(Access.ADMIN)._replace(credential=Credential("hk_live_admin_" + "a" * 20, ("x",)))
    assert code(asked, whose("read")) == "SCOPE_MISSING"


def test_the_auth_service_may_name_an_administrator() -> None:
    user = Principal("key_1", "x", frozenset(), is_admin=True)
    assert may(Policy(), user) is Access.ADMIN
    assert may(Policy(admin_scopes=frozenset({"ops"})), whose("ops")) is Access.ADMIN


def test_the_assistant_is_off_even_for_administrators() -> None:
    operation = next(rule for rule in rules() if rule.kind == "assistant")
    asked = NeedKey(Credential(KEY, ("X-API-Key",)), operation)
    assert "HOKUSAI_AUTH_ASSISTANT" in refusal(asked, whose("mlflow:admin")).message
    on = Policy(assistant=True)
    assert allowed(asked, whose("mlflow:admin"), on)
    assert not allowed(asked, whose("mlflow:write"), on)


def test_key_counts_until_it_ends() -> None:
    agree(
        lambda times: code(need(Access.READ), whose("admin", **times)),
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


def test_unknown_key_is_refused() -> None:
    refused = refusal(need(Access.READ), Rejected("hk_live_abcdefgh expired\nyesterday"))
    assert refused.code == "KEY_UNKNOWN"
    assert "(hk_live_*** expired yesterday)" in refused.message


def test_refusal_of_an_ended_key_does_not_mention_scopes() -> None:
    refused = refusal(need(Access.ADMIN), whose("read", expires_at=NOW))
    assert (refused.required_scope, refused.current_scopes) == (None, None)


def test_ended_session_has_one_code_for_every_reason() -> None:
    session = need(Access.READ)._replace(
        credential=Credential("hk_session_a", (browser.PLACE,), session=True)
    )
    for ended in (
        Rejected("hk_live_abcdefgh"),
        whose("admin", revoked_at=NOW),
        whose("admin", expires_at=NOW),
        whose("admin", expires_at=NOW - 1, revoked_at=NOW + 1),
    ):
        refused = refusal(session, ended)
        assert (refused.code, "hk_live" in refused.message) == ("SESSION_ENDED", False)
    assert allowed(session, whose("read", expires_at=NOW + 1))
    write = session._replace(operation=need(Access.WRITE).operation)
    assert code(write, whose("read")) == "SCOPE_MISSING"


# Networks


def test_a_key_counts_in_its_networks_only() -> None:
    who = replace(whose("admin"), networks=("192.0.2.0/24", "2001:db8::/32"))
    for address, there in (
        ("192.0.2.7", True),
        ("2001:db8::7", True),
        ("192.0.3.7", False),
        ("2001:db9::7", False),
        ("", False),
    ):
        asked = need(Access.READ)._replace(address=address)
        assert code(asked, who) == (None if there else "ADDRESS_REFUSED"), address
        assert allowed(asked, whose("read")), address


def test_another_server_may_ask_about_a_key_from_anywhere() -> None:
    # The address of the other server's client is in the body.
    who = replace(whose("read"), networks=("192.0.2.0/24",))
    for method, path, expected in (
        ("POST", "/api/v1/keys/validate", None),
        ("GET", "/api/2.0/hokusai/whoami", "ADDRESS_REFUSED"),
        ("GET", "/api/v1/keys/validate", "ADDRESS_REFUSED"),
    ):
        assert code(asking(method, path)._replace(address="198.51.100.1"), who) == expected


def test_refusal_of_an_ended_key_does_not_mention_networks() -> None:
    who = replace(whose("read", revoked_at=NOW), networks=("192.0.2.0/24",))
    assert code(need(Access.READ), who) == "KEY_REVOKED"


# Replaced keys


def test_response_warns_about_a_replaced_key() -> None:
    # The values are the example of RFC 9745, and the first second of 2030.
    told = (("Deprecation", "@1688169599"), ("Sunset", "Tue, 01 Jan 2030 00:00:00 GMT"))
    replaced, ends = {"deprecated_at": 1688169599.9}, {"expires_at": 1893456000.0}
    for times, headers in (({**replaced, **ends}, told), (ends, ()), (replaced, ()), ({}, ())):
        verdict = settle(need(Access.READ), whose("read", **times), NOW, USUAL)
        assert isinstance(verdict, Allow) and verdict.headers == headers


def test_abilities_of_a_key() -> None:
    four = ["read", "register", "write", "admin"]
    agree(
        abilities,
        [
            (whose("mlflow:read"), Policy(), four[:1]),
            (whose("model:read"), Policy(), four[:1]),
            (whose("model:write"), Policy(), four[:2]),
            (whose("mlflow:write"), Policy(), four[:3]),
            (whose("registry:admin"), Policy(), four),
            (whose("predict"), Policy(), []),
            (whose(), Policy(), four[:1]),
            (whose(), Policy(empty_scopes=Access.PUBLIC), []),
            (whose("mlflow:write"), Policy(kind="admin"), []),
            (whose("predict"), Policy(kind="authenticated"), four[:3]),
            (replace(whose(), is_admin=True), Policy(), four),
        ],
    )


# Confined keys


def test_only_staff_and_the_jobs_are_not_confined() -> None:
    admins = Policy(
        admin_emails=frozenset({"ops@example.com"}),
        admin_scopes=frozenset({"ops"}),
        admin_roles=frozenset({"Owner"}),
    )
    agree(
        is_confined,
        [
            *((whose(scope), USUAL, False) for scope in [*scopes.GENERAL, *scopes.ADMIN]),
            *((whose(scope), USUAL, True) for scope in [*scopes.REGISTRY, scopes.METRICS]),
            (whose("mlflow:access", "predict", "metrics:read"), USUAL, False),
            # Hokusai's command line gives every key these.
            (whose("model:read", "model:write", "mlflow:access"), USUAL, True),
            (whose("model:write", "mlflow:access"), USUAL, True),
            (whose("mlflow:write", "model:read"), USUAL, True),
            (whose("mlflow:write", "model:delete"), USUAL, True),
            (whose("model:write", "mlflow:admin"), USUAL, False),
            # A scope of another service, and one that this version does not know, make no staff.
            (whose("predict"), USUAL, True),
            (whose("mlflow:owner"), USUAL, True),
            (whose(), USUAL, True),
            (whose(), Policy(empty_scopes=Access.WRITE), True),
            (whose("predict"), Policy(kind="authenticated"), True),
            (whose("model:write"), Policy(kind="admin"), True),
            (whose("mlflow:read"), Policy(kind="admin"), False),
            # Administrators who have no admin scope.
            (replace(whose("model:write"), is_admin=True), USUAL, False),
            *(
                (who, policy, policy is USUAL)
                for policy in (USUAL, admins)
                for who in (
                    whose("model:write", "ops"),
                    replace(whose("model:write"), roles=frozenset({"Owner"})),
                    replace(whose("model:write"), email="Ops@Example.com"),
                )
            ),
            (replace(whose("mlflow:write"), owner_id="x"), USUAL, False),
            # The credential of the jobs is not a matter of its scope or its names.
            (job_rules.PRINCIPAL, USUAL, False),
            (replace(job_rules.PRINCIPAL), USUAL, True),
        ],
    )


def test_narrowed_key_is_a_supplier_s_whatever_makes_others_staff() -> None:
    """The key store refuses such keys, but it does not know the settings, and no auth service does."""
    admins = Policy(
        admin_emails=frozenset({"ops@example.com"}),
        admin_scopes=frozenset({"ops"}),
        admin_roles=frozenset({"Owner"}),
    )

    def check(staff: Principal) -> None:
        for policy in (
            admins,
            replace(admins, kind="authenticated"),
            replace(admins, kind="admin"),
        ):
            assert not is_confined(staff, policy)
            for narrowed in (replace(staff, models=("acme-*",)), replace(staff, no_delete=True)):
                assert is_confined(narrowed, policy)
                manage = asking("POST", "/api/2.0/hokusai/keys")
                assert refusal(manage, narrowed, policy).code == "SCOPE_MISSING"

    each(
        check,
        [
            (whose("mlflow:admin"),),
            (whose("mlflow:write"),),
            (whose("model:write", "ops"),),
            (replace(whose("model:write"), is_admin=True),),
            (replace(whose("model:write"), roles=frozenset({"Owner"})),),
            (replace(whose("model:write"), email="Ops@Example.com"),),
        ],
    )


def test_isolation_closes_what_no_supplier_needs() -> None:
    isolated = Policy(isolated=True)
    supplier, staff = whose("model:write", "mlflow:access"), whose("mlflow:write")

    def check(method: str, path: str, closed: bool) -> None:
        asked = asking(method, path)
        assert isinstance(settle(asked, supplier, NOW, USUAL), Allow)
        assert isinstance(settle(asked, staff, NOW, isolated), Allow)
        if closed:
            assert refusal(asked, supplier, isolated).code == "ISOLATED"
        else:
            assert isinstance(settle(asked, supplier, NOW, isolated), Allow)

    each(
        check,
        [
            ("POST", "/api/2.0/mlflow/model-versions/create", False),
            ("POST", "/api/2.0/mlflow/runs/log-batch", False),
            ("POST", "/api/2.0/mlflow/experiments/create", False),
            ("GET", "/api/2.0/mlflow/experiments/get", False),
            ("GET", "/api/2.0/hokusai/whoami", False),
            ("POST", "/api/2.0/hokusai/grants", False),
            ("POST", "/api/2.0/mlflow/experiments/delete", True),
            ("POST", "/api/3.0/mlflow/traces", True),
            ("POST", "/v1/traces", True),
            ("POST", "/ajax-api/3.0/jobs/", True),
            ("POST", "/gateway/openai/v1/chat/completions", True),
        ],
    )
    # The advice names a scope that is enough, but sends nobody for an administrator's key.
    traces = asking("POST", "/v1/traces")
    said = refusal(traces, supplier, isolated).message
    assert "a scope such as mlflow:write, and without model:write" in said
    assert isinstance(settle(traces, whose("mlflow:write"), NOW, isolated), Allow)
    said = refusal(asking("GET", "/hokusai/keys/new"), supplier, isolated).message
    assert "administrators only" in said and "scope" not in said
    metrics = asking("GET", "/hokusai/metrics")
    assert isinstance(settle(metrics, whose("metrics:read"), NOW, isolated), Allow)
    every = Policy(kind="authenticated", isolated=True)
    assert refusal(asking("POST", "/v1/traces"), whose("predict"), every).code == "ISOLATED"


def test_supplier_waits_while_the_server_does_not_know_owners() -> None:
    for method, path, needs in (
        ("POST", "/api/2.0/mlflow/registered-models/create", Access.WRITE),
        ("DELETE", "/api/2.0/mlflow/model-versions/delete", Access.WRITE),
        ("PUT", "/api/2.0/mlflow-artifacts/artifacts/1/a/artifacts/x", Access.WRITE),
        ("GET", "/api/2.0/mlflow-artifacts/artifacts/1/a/artifacts/x", Access.READ),
        ("POST", "/api/2.0/mlflow/runs/search", Access.READ),
        ("GET", "/api/2.0/mlflow/registered-models/get", Access.READ),
        ("GET", "/api/2.0/hokusai/whoami", Access.KEY),
        ("POST", "/api/2.0/hokusai/keys/key_1/rotate", Access.KEY),
    ):
        asked = asking(method, path)
        for closed_from in (Access.READ, Access.WRITE):
            closed = Policy(isolated=True, closed_from=closed_from)
            assert isinstance(settle(asked, whose("mlflow:write"), NOW, closed), Allow)
            if needs < closed_from:
                assert isinstance(settle(asked, whose("model:write"), NOW, closed), Allow), path
            else:
                denied = refusal(asked, whose("model:write"), closed)
                assert (denied.code, "does not know whose" in denied.message) == ("ISOLATED", True)


@given(
    st.frozensets(st.one_of(ANY_SCOPE, st.text())),
    st.sampled_from(["scopes", "authenticated", "admin"]),
    st.sampled_from([Access.PUBLIC, Access.READ, Access.WRITE]),
)
def test_what_a_policy_lets_a_key_do_does_not_confine_it(
    names: frozenset[str], kind: str, empty: Access
) -> None:
    policy = Policy(kind=kind, empty_scopes=empty)
    expected = scopes.ADMIN.isdisjoint(names) and (
        names.isdisjoint(scopes.GENERAL) or not names.isdisjoint(scopes.REGISTRY)
    )
    known = whose(*(names & scopes.KNOWN))
    assert is_confined(known, policy) is is_confined(known, USUAL) is expected
    # Scopes that this version does not know free no key, and an administrator's scope frees each.
    assert is_confined(whose(*names), policy) >= expected
    assert not is_confined(whose(*names, "mlflow:admin"), policy)


@given(st.frozensets(ANY_SCOPE), st.sampled_from(sorted(scopes.REGISTRY)))
def test_registry_scope_confines_every_key_but_an_administrators(
    names: frozenset[str], registry: str
) -> None:
    confined = is_confined(whose(*names, registry), USUAL)
    assert confined is scopes.ADMIN.isdisjoint(names)


# plan


def request(
    method: str = "GET", path: str = "/version", query: bytes = b"", **headers: str
) -> Request:
    fields = [(n.replace("_", "-").encode(), v.encode("latin-1")) for n, v in headers.items()]
    return Request(method, path, query, tuple(fields))


def refused(asked: Request, policy: Policy = USUAL) -> Deny:
    """Return the refusal before any lookup; fail if there is none."""
    step = plan(asked, policy)
    assert isinstance(step, Deny)
    return step


def test_health_needs_no_key_and_reads_none() -> None:
    for method in ("GET", "HEAD", "get"):
        verdict = plan(request(method, "/health", x_api_key="a b"), Policy())
        assert isinstance(verdict, Allow)
        assert (verdict.principal, verdict.credential) == (None, None)


def test_plan_names_the_key_and_the_operation() -> None:
    step = plan(request("POST", "/api/2.0/mlflow/runs/create", x_api_key=KEY), Policy())
    assert isinstance(step, NeedKey)
    assert step.operation.access is Access.WRITE
    assert step.credential == Credential(KEY, ("X-API-Key",))


def test_setting_can_exclude_the_query_s_key() -> None:
    asked = request(query=f"api_key={KEY}".encode())
    assert isinstance(plan(asked, Policy()), NeedKey)
    assert refused(asked, Policy(query_key=False)).code == "KEY_MISSING"


def test_refusal_of_a_malformed_key_names_its_place_only() -> None:
    verdict = refused(request(authorization="Bearer secret words"))
    assert verdict.code == "KEY_MALFORMED"
    assert "Authorization" in verdict.message and "secret" not in verdict.message


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


def test_regression_42_cookie_does_not_count_for_another_site_s_page() -> None:
    post = request("POST", "/api/2.0/mlflow/runs/create", cookie=COOKIE)
    verdict = refused(post)
    assert verdict.code == "CROSS_SITE" and "hk_session" not in verdict.message
    own = replace(post, headers=(*post.headers, (b"sec-fetch-site", b"same-origin")))
    step = plan(own, Policy())
    assert isinstance(step, NeedKey) and step.credential.session
    # A request with a key needs no Sec-Fetch-Site.
    program = request("POST", "/api/2.0/mlflow/runs/create", x_api_key=KEY, origin="http://evil")
    assert isinstance(plan(program, Policy()), NeedKey)


def test_managing_keys_needs_the_page_s_token() -> None:
    post = request("POST", "/api/2.0/hokusai/keys", cookie=COOKIE, sec_fetch_site="same-origin")
    assert refused(post).code == "CROSS_SITE"
    token = browser.csrf_token(COOKIE.partition("=")[2])
    sent = replace(post, headers=(*post.headers, (b"x-csrf-token", token.encode())))
    assert isinstance(plan(sent, Policy()), NeedKey)


def test_plan_names_the_address() -> None:
    step = plan(replace(request(x_api_key=KEY), address="192.0.2.7"), Policy())
    assert isinstance(step, NeedKey) and step.address == "192.0.2.7"


def test_refusal_without_a_key_names_the_variables_of_the_route_s_clients() -> None:
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


def test_listed_static_files_need_no_key() -> None:
    own = Policy(static_files=frozenset({"/static-files/main.js", "/static-files/a b.js"}))

    def public(method: str, path: str, policy: Policy) -> bool:
        step = plan(Request(method, path, b"", ()), policy)
        return isinstance(step, Allow) and step.operation.access is Access.PUBLIC

    agree(
        public,
        [
            ("GET", "/static-files/main.js", own, True),
            ("HEAD", "/static-files/main.js", own, True),
            ("OPTIONS", "/static-files/main.js", own, True),
            ("get", "/static-files/a b.js", own, True),
            ("GET", "/static-files/main.js", USUAL, False),
            ("POST", "/static-files/main.js", own, False),
            ("GET", "/static-files/other.js", own, False),
            ("GET", "/static-files/main.js/", own, False),
            ("GET", "/static-files//main.js", own, False),
            ("GET", "/static-files/x/../main.js", own, False),
            ("GET", "/static-files/MAIN.js", own, False),
            ("GET", "/static-files/a%20b.js", own, False),
            ("GET", "/build/main.js", own, False),
            ("OPTIONS", "/static-files/other.js", own, False),
        ],
    )


def test_only_our_pages_get_the_advice_to_reload() -> None:
    def told(*headers: tuple[bytes, bytes]) -> tuple[str, bool, bool]:
        verdict = plan(Request("GET", "/api/2.0/mlflow/runs/get", b"", headers), USUAL)
        assert isinstance(verdict, Deny)
        return verdict.code, SIGNED_OUT in verdict.message, "HOKUSAI_API_KEY" in verdict.message

    site = b"sec-fetch-site"
    agree(
        told,
        [
            ((site, b"same-origin"), ("KEY_MISSING", True, False)),
            ((site, b"same-origin"), (b"cookie", b"other=1"), ("KEY_MISSING", True, False)),
            ((site, b"cross-site"), ("KEY_MISSING", False, True)),
            ((site, b"none"), ("KEY_MISSING", False, True)),
            # Node's fetch sends these.
            ((b"sec-fetch-mode", b"cors"), ("KEY_MISSING", False, True)),
            (("KEY_MISSING", False, True),),
        ],
    )

"""A supplier's trust gives no more than the supplier's key has."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from mlflow_hokusai_auth.core import scopes, supplier_trust
from mlflow_hokusai_auth.core.operations import rules
from mlflow_hokusai_auth.core.policy import Policy, access, is_admin, is_confined
from mlflow_hokusai_auth.core.trust import Trust, repository, workload
from mlflow_hokusai_auth.core.types import Principal

from .rows import agree

POLICY = Policy(supplier_trust=True)
CALLER = Principal("key_1", "ACME", frozenset({"model:write"}), owner_id="ACME")


def trust(*names: str, **more: object) -> Trust:
    given = Trust("trust_1", "ACME", "github", "https://i", (("repository", "a/b"),), names)
    return replace(given, **more)  # type: ignore[arg-type]


def caller(*names: str, **more: object) -> Principal:
    return replace(CALLER, scopes=frozenset(names), **more)  # type: ignore[arg-type]


def test_what_a_supplier_may_give() -> None:
    both = ("mlflow:access", "model:write")
    narrowed = caller("model:write", models=("acme-*", "lead"))
    rows = {
        (caller("model:write"), trust("model:write")): "",
        (caller("model:write"), trust("model:read", "model:write")): "",
        (caller("model:read"), trust("model:write")): "does not have the scopes model:write",
        (caller("model:write"), trust("metrics:read")): "does not have the scopes metrics:read",
        (caller("model:write"), trust("mlflow:read")): "does not have the scopes mlflow:read",
        (caller("mlflow:write"), trust("model:write")): "",
        (caller("mlflow:write"), trust("mlflow:write")): "",
        (caller("mlflow:read"), trust("model:write")): "does not have the scopes model:write",
        # Hokusai's command line gives suppliers both, and one of them alone is staff's.
        (caller(*both), trust(*both)): "",
        (caller(*both), trust("mlflow:access")): "server's staff",
        (caller(*both), trust("mlflow:read")): "server's staff",
        (narrowed, trust("model:write")): "acme-* or lead",
        (narrowed, trust("model:write", models=("acme-x", "acme-y-*", "lead"))): "",
        (narrowed, trust("model:write", models=("acme-x", "other"))): "acme-* or lead",
        (narrowed, trust("model:write", models=("acme*",))): "acme-* or lead",
        (caller("model:write", no_delete=True), trust("model:write")): "no_delete",
        (caller("model:write", no_delete=True), trust("model:write", no_delete=True)): "",
        (caller("model:write", networks=("192.0.2.0/24",)), trust("model:write")): "networks",
        (caller("model:write", rate_limit_per_hour=9), trust("model:write")): "requests per hour",
        # A general or registry scope does not include it: only the key that has it gives it.
        (
            caller("model:write", "metrics:read"),
            trust("model:write", "metrics:read"),
        ): "",
    }

    def problem(row: tuple[Principal, Trust]) -> str:
        found = supplier_trust.problem(row[1], row[0], POLICY)
        wanted = rows[row]
        return wanted if (found is None) == (not wanted) and wanted in (found or "") else str(found)

    agree(problem, rows.items())


def test_no_trust_of_a_supplier_makes_administrators_by_a_setting() -> None:
    """The setting may name a scope that a supplier's key covers, but does not have."""
    policy = Policy(supplier_trust=True, admin_scopes=frozenset({"model:read"}))
    mine = caller("model:write")
    assert "server's staff" in (supplier_trust.problem(trust("model:read"), mine, policy) or "")
    # A key of the staff that is no administrator's may not, either.
    general = Policy(supplier_trust=True, admin_scopes=frozenset({"mlflow:read"}))
    staff = caller("mlflow:write")
    assert "server's staff" in (supplier_trust.problem(trust("mlflow:read"), staff, general) or "")
    assert supplier_trust.problem(trust("model:write"), mine, policy) is None
    # Keys that are narrowed are no administrators', whatever their scopes.
    for more in ({"models": ("acme-*",)}, {"no_delete": True}):
        given = trust("model:read", **more)
        assert supplier_trust.problem(given, mine, policy) is None, more


_SCOPES = st.frozensets(st.sampled_from(sorted(scopes.KNOWN - scopes.ADMIN)), min_size=1)
_MODELS = st.lists(st.sampled_from(["a", "a*", "ab*", "b"]), max_size=2).map(tuple)


@given(_SCOPES, _MODELS, st.booleans(), _SCOPES, _MODELS, st.booleans())
def test_no_key_of_a_trust_is_above_the_supplier_s(
    has: frozenset[str],
    its_models: tuple[str, ...],
    kept: bool,
    wanted: frozenset[str],
    models: tuple[str, ...],
    no_delete: bool,
) -> None:
    for policy in (POLICY, Policy(admin_scopes=frozenset({"mlflow:write"}))):
        mine = caller(*has, models=its_models, no_delete=kept)
        if is_admin(mine, policy):
            continue
        if supplier_trust.problem(trust(*wanted, models=models, no_delete=no_delete), mine, policy):
            continue
        made = Principal("", "ACME", wanted, owner_id="ACME", models=models, no_delete=no_delete)
        assert not is_admin(made, policy)
        assert is_confined(made, policy) or not is_confined(mine, policy)
        for rule in rules():
            assert access(made, rule, policy) <= access(mine, rule, policy)


def test_repository_of_a_trust() -> None:
    made = workload(gitlab="A/b", workflow="c.yml", environment="prod")
    found = repository(trust("model:read", kind="gitlab", issuer=made.issuer, claims=made.claims))
    assert found == ("https://gitlab.com", "a/b")
    assert repository(trust("model:read", kind="issuer")) is None

"""The table of scopes and the resources on which each grants access, for the policy `scopes`.

There are three groups. MLflow's scopes grant their class of access on every kind of resource.
Suppliers get the registry's scopes (`model:read`, `model:write`), which reach the model registry and
the runs, logged models and artifacts that registering a model needs. They may also create and look up
an experiment for the run, but not change or delete one, and share their own models. They don't reach
traces, datasets, prompt optimisation, the gateway, jobs or webhooks, and they reach a GraphQL query
only if they reach every kind that its root fields read. Administrators' scopes reach everything.

Unknown scopes (`predict`, `train`, …) belong to other Hokusai services and grant nothing here.
"""

from __future__ import annotations

from functools import lru_cache

from .types import Access, Operation

#: Scopes for everything, keys and webhooks included.
ADMIN = frozenset({"mlflow:admin", "admin", "registry:admin", "model-registry:admin"})

#: Scopes for everything but administration. The names without `mlflow:` are those that Hokusai's keys
#: carry today: the ones that its middleware lets write, and `read` from its documentation.
GENERAL = {
    "mlflow:read": Access.READ,
    "read": Access.READ,
    "mlflow:write": Access.WRITE,
    "write": Access.WRITE,
    "mlflow:access": Access.WRITE,
    "full_access": Access.WRITE,
}

#: Scopes for registering models.
REGISTRY = {"model:read": Access.READ, "model:write": Access.WRITE}

#: Kinds of resource on which a registry scope grants its whole class.
REGISTRY_KINDS = frozenset(
    {"registered-models", "model-versions", "logged-models", "runs", "artifacts"}
)
#: Kinds that a registry scope may only read: experiments by name, the server's version, its pages.
REGISTRY_READS = frozenset({"experiments", "server", "ui", "hokusai"})
#: The rules beyond those kinds that a registry scope may write to: a first run needs an experiment,
#: owners of models share them, and manage trusts where `Policy.supplier_trust` opens the routes.
_REGISTRY_WRITES = (
    "/mlflow/experiments/create",
    "/hokusai/grants",
    "/hokusai/grants/{grant_id}",
    "/hokusai/models/share",
    "/hokusai/models/unshare",
    "/hokusai/trust",
    "/hokusai/trust/{trust_id}",
    "/hokusai/trusts/add",
    "/hokusai/trusts/remove",
    "/hokusai/trusts/{trust_id}/edit",
)

#: The scope for a Prometheus: it reads the server's metrics, and nothing else.
METRICS = "metrics:read"
METRICS_RULE = "GET /hokusai/metrics"

KNOWN = frozenset({*GENERAL, *REGISTRY, *ADMIN, METRICS})


def are_staff(scopes: frozenset[str]) -> bool:
    """Return whether `scopes` are those of the server's staff: an administrator's, or a general one.

    A registry scope beside a general one makes a supplier, since Hokusai's command line gives every key
    `mlflow:access` as well. So does a name like theirs that this version does not know.
    """
    if not scopes.isdisjoint(ADMIN):
        return True
    registry = any(scope.startswith("model:") for scope in scopes)
    return not registry and not scopes.isdisjoint(GENERAL)


@lru_cache(maxsize=4096)
def granted(scopes: frozenset[str], operation: Operation) -> Access:
    """Return the highest access that `scopes`, none of them in `ADMIN`, grant for `operation`."""
    if METRICS in scopes and operation.rule == METRICS_RULE:
        return operation.access
    general = max((GENERAL.get(scope, Access.PUBLIC) for scope in scopes), default=Access.PUBLIC)
    registry = max((REGISTRY.get(scope, Access.PUBLIC) for scope in scopes), default=Access.PUBLIC)
    return max(general, min(registry, for_suppliers(operation)))


def for_suppliers(operation: Operation) -> Access:
    """Return the highest access that any registry scope grants for `operation`."""
    kinds = operation.reads or {operation.kind}
    if not kinds <= REGISTRY_KINDS | REGISTRY_READS:
        return Access.PUBLIC
    if kinds <= REGISTRY_KINDS or operation.rule.endswith(_REGISTRY_WRITES):
        return Access.WRITE
    return Access.READ

"""What each scope grants, on which resources: the table behind the `scopes` policy.

Three groups. MLflow's scopes reach everything of their class. The registry's scopes (`model:read`,
`model:write`) are what suppliers get: they reach the model registry, and what registering a model
touches on the way: runs, logged models, artifacts and the experiment that the run is in, of which they
may make one and look one up, but not change or delete others. They do not reach traces, datasets,
prompts' optimisation, the gateway, jobs or webhooks. A GraphQL query reads what its root fields hold,
so they reach it where they reach all of that. Administrators' scopes reach everything.

Unknown scopes (`predict`, `train`, …) belong to other Hokusai services and grant nothing here.
"""

from __future__ import annotations

from functools import lru_cache

from .types import Access, Operation

#: Everything, keys and webhooks included.
ADMIN = frozenset({"mlflow:admin", "admin", "registry:admin", "model-registry:admin"})

#: Everything but administration. The names after the first are what Hokusai's keys carry today: the
#: write set of its middleware, and `read` of its documentation.
GENERAL = {
    "mlflow:read": Access.READ,
    "read": Access.READ,
    "mlflow:write": Access.WRITE,
    "write": Access.WRITE,
    "mlflow:access": Access.WRITE,
    "full_access": Access.WRITE,
}

#: What registering a model takes.
REGISTRY = {"model:read": Access.READ, "model:write": Access.WRITE}

#: Kinds of resource on which a registry scope grants its whole class.
REGISTRY_KINDS = frozenset(
    {"registered-models", "model-versions", "logged-models", "runs", "artifacts"}
)
#: Kinds that a registry scope may look at: experiments by name, the server's version, its pages.
REGISTRY_READS = frozenset({"experiments", "server", "ui", "hokusai"})
#: The one change beyond those kinds: the experiment that a first run needs.
_REGISTRY_WRITES = "/mlflow/experiments/create"

#: The server's metrics, and nothing else: for a Prometheus.
METRICS = "metrics:read"
METRICS_RULE = "GET /hokusai/metrics"

KNOWN = frozenset({*GENERAL, *REGISTRY, *ADMIN, METRICS})


@lru_cache(maxsize=4096)
def granted(scopes: frozenset[str], operation: Operation) -> Access:
    """The most that `scopes` (none of them an administrator's) allow on what `operation` is about."""
    if METRICS in scopes and operation.rule == METRICS_RULE:
        return operation.access
    general = max((GENERAL.get(scope, Access.PUBLIC) for scope in scopes), default=Access.PUBLIC)
    registry = max((REGISTRY.get(scope, Access.PUBLIC) for scope in scopes), default=Access.PUBLIC)
    kinds = operation.reads or {operation.kind}
    if not kinds <= REGISTRY_KINDS | REGISTRY_READS:
        registry = Access.PUBLIC
    elif not kinds <= REGISTRY_KINDS and not operation.rule.endswith(_REGISTRY_WRITES):
        registry = min(registry, Access.READ)
    return max(general, registry)

"""The caller whom isolation keeps to what is theirs, and the refusal that they get."""

from __future__ import annotations

from mlflow_hokusai_auth.core.isolation import Problem
from mlflow_hokusai_auth.core.locations import Location
from mlflow_hokusai_auth.core.policy import Policy, is_confined
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server import metrics
from mlflow_hokusai_auth.server.upstream.artifact_roots import Watch


def confined(watch: Watch, policy: Policy) -> Principal | None:
    """Return the caller if `watch` looks and isolation confines them."""
    principal = callers.current.get().principal
    if principal is None or not watch.looks:
        return None
    return principal if is_confined(principal, policy) else None


def refuse(watch: Watch, problem: Problem | None, place: Location | None = None) -> None:
    """Raise MlflowException for `problem`, or only count it; do nothing without one."""
    if problem is not None:
        uri = None if place is None else str(place)
        watch.refuse(problem.code, problem.code.lower(), uri, problem.message, metrics.ISOLATION)

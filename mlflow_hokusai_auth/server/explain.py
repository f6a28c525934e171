"""`hokusai-auth explain`: the gate's decision about a request, in words, without a request."""

from __future__ import annotations

from collections.abc import Sequence

from mlflow_hokusai_auth.core import scopes as table
from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.core.policy import access, settle
from mlflow_hokusai_auth.core.types import Access, Credential, Deny, NeedKey, Principal

from .aliases import Prefixes
from .settings import Settings, policy_of


def explain(method: str, path: str, scopes: Sequence[str], settings: Settings) -> dict[str, object]:
    """What decides on `method` `path` under `settings`, and the verdict on a key with `scopes`.

    `path` may carry one of the configured prefixes and a query, as in a URL.
    """
    bare = Prefixes(settings.prefixes).split(path.partition("?")[0])[1] or "/"
    operation = classify(method, bare)
    policy = policy_of(settings)
    answer: dict[str, object] = {
        "rule": operation.rule or _no_rule(bare),
        "kind": operation.kind,
        "needs": operation.access.name.lower(),
        "policy": policy.kind,
    }
    if operation.access is Access.PUBLIC:
        return {**answer, "verdict": "allowed to everybody"}
    answer["scopes"] = [
        scope
        for scope in sorted(table.KNOWN)
        if access(_holder([scope]), operation, policy) >= operation.access
    ]
    need = NeedKey(Credential("", ("X-API-Key",)), operation)
    verdict = settle(need, _holder(scopes), 0.0, policy)
    whose = f"a key with {', '.join(scopes)}" if scopes else "a key without scopes (see --scope)"
    refused = isinstance(verdict, Deny)
    return {**answer, "verdict": f"{whose} is {'refused' if refused else 'allowed'}"}


def _no_rule(path: str) -> str:
    known = [m for m in ("GET", "POST", "PUT", "PATCH", "DELETE") if classify(m, path).rule]
    if known:
        return f"none: MLflow is known to have this route with {', '.join(known)} only"
    return "none: MLflow is not known to have this route"


def _holder(scopes: Sequence[str]) -> Principal:
    return Principal("key", "somebody", frozenset(scopes))

"""`hokusai-auth explain`: the gate's decision about a request, in words, without a request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mlflow_hokusai_auth.core import scopes as table
from mlflow_hokusai_auth.core.operations import classify, graphql
from mlflow_hokusai_auth.core.policy import Policy, access, operation_of, settle
from mlflow_hokusai_auth.core.prefixes import Prefixes
from mlflow_hokusai_auth.core.routes import QUERY_FIELDS
from mlflow_hokusai_auth.core.types import (
    Access,
    Allow,
    Credential,
    NeedKey,
    Operation,
    Principal,
)

from .settings import Settings, policy_of
from .upstream import static_files


def explain(method: str, path: str, scopes: Sequence[str], settings: Settings) -> dict[str, object]:
    """What decides on `method` `path` under `settings`, and the verdict on a key with `scopes`.

    `path` may carry one of the configured prefixes and a query, as in a URL.
    """
    bare = Prefixes(settings.prefixes).split(path.partition("?")[0])[1] or "/"
    policy = policy_of(settings, static_files.public_paths())
    operation = operation_of(method, bare, policy)
    answer: dict[str, object] = {
        "rule": operation.rule or _no_rule(bare),
        "kind": operation.kind,
        "needs": operation.access.name.lower(),
        "policy": policy.kind,
    }
    if operation.access is Access.PUBLIC:
        return {**answer, "verdict": "allowed to everybody"}
    whose = f"a key with {', '.join(scopes)}" if scopes else "a key without scopes (see --scope)"
    if operation.kind == "graphql" and operation.access is Access.WRITE:
        return {**answer, **_graphql(operation, scopes, whose, policy)}
    verdict = "allowed" if _may(scopes, operation, policy) else "refused"
    return {**answer, "scopes": _enough(operation, policy), "verdict": f"{whose} is {verdict}"}


#: What a GraphQL request may be by its body, and the root fields that stand for it.
_GRAPHQL: dict[str, Iterable[str] | None] = {
    "queries of MLflow's pages": QUERY_FIELDS,
    "other queries": ("",),
    "mutations": None,
}


def _graphql(
    operation: Operation, scopes: Sequence[str], whose: str, policy: Policy
) -> dict[str, object]:
    """The part of the answer that depends on the body of a GraphQL request."""
    bodies = {what: graphql(operation, fields) for what, fields in _GRAPHQL.items()}
    enough = [_enough(one, policy) for one in bodies.values()]
    opened = [what for what, one in bodies.items() if _may(scopes, one, policy)]
    refused = [what for what in bodies if what not in opened]
    verdicts = [("allowed", opened), ("refused", refused)]
    said = "; ".join(f"{verb} {', '.join(which)}" for verb, which in verdicts if which)
    return {
        "needs": "read for queries, write for mutations and what can't be read as a query",
        "scopes": enough[0],
        "scopes_for_other_queries": enough[1],
        "scopes_for_mutations": enough[2],
        "verdict": f"{whose} is {said}",
    }


def _may(scopes: Sequence[str], operation: Operation, policy: Policy) -> bool:
    need = NeedKey(Credential("", ("X-API-Key",)), operation)
    return isinstance(settle(need, _holder(scopes), 0.0, policy), Allow)


def _enough(operation: Operation, policy: Policy) -> list[str]:
    """The scopes of which each is enough for `operation`."""
    return [
        scope
        for scope in sorted(table.KNOWN)
        if access(_holder([scope]), operation, policy) >= operation.access
    ]


def _no_rule(path: str) -> str:
    known = [m for m in ("GET", "POST", "PUT", "PATCH", "DELETE") if classify(m, path).rule]
    if known:
        return f"none: MLflow is known to have this route with {', '.join(known)} only"
    return "none: MLflow is not known to have this route"


def _holder(scopes: Sequence[str]) -> Principal:
    return Principal("key", "somebody", frozenset(scopes))

"""`hokusai-auth explain`: decisions of the gate and of isolation, in words, without a request."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import sqlalchemy as sa

from mlflow_hokusai_auth.core import scopes as table
from mlflow_hokusai_auth.core.errors import StoreError
from mlflow_hokusai_auth.core.operations import classify, graphql
from mlflow_hokusai_auth.core.policy import Policy, access, operation_of, settle
from mlflow_hokusai_auth.core.prefixes import Prefixes
from mlflow_hokusai_auth.core.routes import QUERY_FIELDS
from mlflow_hokusai_auth.core.sight import judge
from mlflow_hokusai_auth.core.types import (
    Access,
    Allow,
    Credential,
    NeedKey,
    Operation,
    Principal,
)
from mlflow_hokusai_auth.store import ownership, sight
from mlflow_hokusai_auth.store.keys import LocalStore

from .live_settings import Isolation, Mode
from .settings import Settings, policy_of
from .upstream import static_files


def explain(method: str, path: str, scopes: Sequence[str], settings: Settings) -> dict[str, object]:
    """Return what decides on `method` `path` under `settings`, and the verdict for a key with `scopes`.

    `path` may have a configured prefix and a query, as in a URL.
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
        return {**answer, "allowed": True, "verdict": "allowed to everybody"}
    key = f"a key with {', '.join(scopes)}" if scopes else "a key without scopes (see --scope)"
    if operation.kind == "graphql" and operation.access is Access.WRITE:
        return {**answer, **_graphql(operation, scopes, key, policy)}
    allowed = _may(scopes, operation, policy)
    verdict = f"{key} is {'allowed' if allowed else 'refused'}"
    return {
        **answer,
        "scopes": _enough(operation, policy),
        "allowed": allowed,
        "verdict": verdict,
    }


def explain_sight(
    kind: str, name: str, key_id: str, store: LocalStore, engine: sa.Engine, settings: Settings
) -> dict[str, object]:
    """Return whether a key of `store` sees a "model", "run" or "experiment", and the rule for that.

    `engine` is on MLflow's database. Mode and isolation are those of a server with `settings`. Raises
    KeyNotFound, StoreError and AuthorityUnavailable.
    """
    principal, now = store.principal(key_id), time.time()
    if (decided := ownership.decided(engine)) is None:
        raise StoreError(
            "This database has no owners yet: start a server with the gate on it once."
        )
    mode, kept = Mode(settings.mode, settings.force_mode), store.database.states()
    isolation = Isolation(mode, settings.isolation, decided)
    mode.follow(kept)
    isolation.follow(kept)
    thing = sight.find(engine, kind, name, principal.owner_id)
    found = judge(
        thing, principal, policy_of(settings), mode=mode.now, level=isolation.level, now=now
    )
    return {
        "key_id": principal.key_id,
        "key_owner": principal.owner_id,
        "kind": kind,
        "name": name,
        "owner": thing.owner,
        "isolation": isolation.in_effect,
        "allowed": found.allowed,
        "verdict": found.verdict,
    }


#: Each kind of GraphQL request, with root fields of that kind (None for a mutation).
_GRAPHQL: dict[str, Iterable[str] | None] = {
    "queries of MLflow's pages": QUERY_FIELDS,
    "other queries": ("",),
    "mutations": None,
}


#: Names of these kinds, in the answer.
_NAMES = ("queries_of_pages", "other_queries", "mutations")


def _graphql(
    operation: Operation, scopes: Sequence[str], key: str, policy: Policy
) -> dict[str, object]:
    """Return the part of the answer that depends on the body of a GraphQL request."""
    kinds = {kind: graphql(operation, fields) for kind, fields in _GRAPHQL.items()}
    enough = [_enough(by_body, policy) for by_body in kinds.values()]
    allowed = [kind for kind, by_body in kinds.items() if _may(scopes, by_body, policy)]
    refused = [kind for kind in kinds if kind not in allowed]
    verdicts = [("allowed", allowed), ("refused", refused)]
    text = "; ".join(f"{verdict} {', '.join(which)}" for verdict, which in verdicts if which)
    return {
        "needs": "read for queries; write for mutations and for bodies that can't be read as a query",
        "scopes": enough[0],
        "scopes_for_other_queries": enough[1],
        "scopes_for_mutations": enough[2],
        "allowed": not refused,
        **{f"allowed_{name}": kind in allowed for kind, name in zip(kinds, _NAMES, strict=True)},
        "verdict": f"{key} is {text}",
    }


def _may(scopes: Sequence[str], operation: Operation, policy: Policy) -> bool:
    need = NeedKey(Credential("", ("X-API-Key",)), operation)
    return isinstance(settle(need, _holder(scopes), 0.0, policy), Allow)


def _enough(operation: Operation, policy: Policy) -> list[str]:
    """Return the scopes that permit `operation`, each by itself."""
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

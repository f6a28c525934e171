"""GraphQL requests: only the body says what a request reads or changes, so the gate reads it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import replace

from graphql import (
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLError,
    InlineFragmentNode,
    OperationDefinitionNode,
    OperationType,
    SelectionNode,
    parse,
)

from mlflow_hokusai_auth.core import operations
from mlflow_hokusai_auth.core.policy import Policy, settle
from mlflow_hokusai_auth.core.types import Access, Allow, Deny, NeedKey

#: The largest body (bytes) and query (characters, tokens) that are parsed. Parsing takes time on the
#: event loop, at most 10 ms with these limits. MLflow's pages send 3 kB and 300 tokens.
MAX_BODY = 256 * 1024
MAX_QUERY = 16 * 1024
MAX_TOKENS = 1000


def any_query(need: NeedKey) -> NeedKey | None:
    """Return `need` for the GraphQL query that needs the least scope; None for another kind of request.

    A key that may not send that query may send nothing, so its body need not be read. For any other
    key only the body tells a query from a mutation: see `read_graphql`.
    """
    operation = need.operation
    if operation.kind != "graphql" or operation.access is not Access.WRITE:
        return None
    return need._replace(operation=operations.graphql(operation, ("__typename",)))


def read_graphql(need: NeedKey, allow: Allow, body: bytes | None, policy: Policy) -> Allow | Deny:
    """Return the verdict on the GraphQL request `need` with this `body`; None stands for one too large.

    `allow` is the verdict on `any_query`, which has counted the request already.
    """
    assert allow.principal is not None
    fields = None if body is None else query_fields(body)
    operation = operations.graphql(need.operation, fields)
    verdict = settle(need._replace(operation=operation), allow.principal, time.time(), policy)
    if isinstance(verdict, Allow):
        return allow._replace(operation=operation)
    return replace(verdict, principal=allow.principal, operation=operation)


def query_fields(body: bytes) -> frozenset[str] | None:
    """Return the names of all root fields of the queries in `body`, the JSON of a GraphQL request.

    The fields of every operation count, because MLflow chooses which one it executes. Return None if
    an operation is not a query, or if `body` can't be parsed: such a request may change something.
    """
    try:
        query = json.loads(body)["query"]
        if len(query) > MAX_QUERY:
            return None
        definitions = parse(query, max_tokens=MAX_TOKENS).definitions
    except (ValueError, KeyError, TypeError, GraphQLError, RecursionError):
        return None
    queries = [node for node in definitions if isinstance(node, OperationDefinitionNode)]
    if not queries or any(node.operation is not OperationType.QUERY for node in queries):
        return None
    fragments: dict[str, list[SelectionNode]] = {}
    for node in definitions:
        if isinstance(node, FragmentDefinitionNode):
            fragments.setdefault(node.name.value, []).extend(node.selection_set.selections)
    return _fields([root for node in queries for root in node.selection_set.selections], fragments)


def _fields(
    selections: Iterable[SelectionNode], fragments: dict[str, list[SelectionNode]]
) -> frozenset[str] | None:
    """Return the names, not the aliases, of the fields in `selections`; None for an unknown fragment.

    Each fragment is read once, so that a cycle of fragments ends.
    """
    names, waiting, seen = set(), [*selections], set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, FieldNode):
            names.add(node.name.value)
        elif isinstance(node, InlineFragmentNode):
            waiting += node.selection_set.selections
        elif isinstance(node, FragmentSpreadNode):
            name = node.name.value
            if name not in fragments:
                return None
            if name not in seen:
                seen.add(name)
                waiting += fragments[name]
    return frozenset(names)

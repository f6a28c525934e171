"""The root fields of a GraphQL request: its body says what it reads or changes, its route does not."""

from __future__ import annotations

import json
from collections.abc import Iterable

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

#: Bytes of a body, and characters of the query in it, beyond which neither is looked into: parsing
#: takes time on the event loop (10 ms at most with these). MLflow's pages send 3 kB and 300 tokens.
MAX_BODY = 256 * 1024
MAX_QUERY = 16 * 1024
MAX_TOKENS = 1000


def query_fields(body: bytes) -> frozenset[str] | None:
    """The names of all root fields of the queries in `body`, the JSON of a GraphQL request.

    Those of every operation, because MLflow chooses which one it carries out. None if one of them is
    no query, or if `body` can't be parsed: then it may change something.
    """
    try:
        query = json.loads(body)["query"]
        if len(query) > MAX_QUERY:
            return None
        definitions = parse(query, max_tokens=MAX_TOKENS).definitions
    except (ValueError, KeyError, TypeError, GraphQLError, RecursionError):
        return None
    operations = [node for node in definitions if isinstance(node, OperationDefinitionNode)]
    if not operations or any(node.operation is not OperationType.QUERY for node in operations):
        return None
    fragments: dict[str, list[SelectionNode]] = {}
    for node in definitions:
        if isinstance(node, FragmentDefinitionNode):
            fragments.setdefault(node.name.value, []).extend(node.selection_set.selections)
    return _fields([one for node in operations for one in node.selection_set.selections], fragments)


def _fields(
    selections: Iterable[SelectionNode], fragments: dict[str, list[SelectionNode]]
) -> frozenset[str] | None:
    """The names of the fields in `selections`, whatever their aliases; None for an unknown fragment.

    Each fragment is looked into once, so that a cycle of them ends.
    """
    found, waiting, seen = set(), [*selections], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, FieldNode):
            found.add(one.name.value)
        elif isinstance(one, InlineFragmentNode):
            waiting += one.selection_set.selections
        elif isinstance(one, FragmentSpreadNode):
            name = one.name.value
            if name not in fragments:
                return None
            if name not in seen:
                seen.add(name)
                waiting += fragments[name]
    return frozenset(found)

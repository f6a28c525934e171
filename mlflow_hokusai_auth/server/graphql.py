"""Whether a GraphQL request only reads, which its body says and its route does not."""

from __future__ import annotations

import json

from graphql import GraphQLError, OperationDefinitionNode, OperationType, parse

#: Bytes. A larger body is not looked into, and so counts as a change; MLflow's pages send a few KB.
MAX_BODY = 256 * 1024


def only_reads(body: bytes) -> bool:
    """Whether every operation in `body`, the JSON of a GraphQL request, is a query.

    All of them, although only one is carried out: which one is for MLflow to choose. False for what
    can't be parsed.
    """
    try:
        query = json.loads(body)["query"]
        operations = [
            node
            for node in parse(query, max_tokens=10_000).definitions
            if isinstance(node, OperationDefinitionNode)
        ]
    except (ValueError, KeyError, TypeError, GraphQLError, RecursionError):
        return False
    return bool(operations) and all(node.operation is OperationType.QUERY for node in operations)

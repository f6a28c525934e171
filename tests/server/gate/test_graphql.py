"""The root fields that a GraphQL body reads, and the keys that may read them."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from mlflow_hokusai_auth.core import operations
from mlflow_hokusai_auth.core.routes import QUERY_FIELDS
from mlflow_hokusai_auth.core.scopes import granted
from mlflow_hokusai_auth.core.types import Access
from mlflow_hokusai_auth.server.gate import graphql
from mlflow_hokusai_auth.server.gate.graphql import query_fields
from tests.core.rows import agree


def body(query: object, **more: object) -> bytes:
    return json.dumps({"query": query, **more}).encode()


def fields(text: str) -> set[str] | None:
    found = query_fields(body(text))
    return None if found is None else set(found)


def test_root_fields_of_queries() -> None:
    agree(
        fields,
        [
            ("{ mlflowGetExperiment { experiment { name } } }", {"mlflowGetExperiment"}),
            ("query One { a } query Two { b }", {"a", "b"}),
            ("query ($mutation: String) { a(mutation: $mutation) { m } }", {"a"}),
            ("# mutation\n{ a }", {"a"}),
            # An alias is a name that the client chose.
            ("{ mlflowGetRun: b { c } }", {"b"}),
            ("{ ...F } fragment F on Query { a ...G } fragment G on Query { b }", {"a", "b"}),
            ("{ x: a { ...F } } fragment F on T { inside }", {"a"}),
            ("{ ... on Query { a ... @include(if: true) { b } } }", {"a", "b"}),
            ("{ a @skip(if: true) }", {"a"}),
            # MLflow refuses these two; the parser only has to end.
            ("{ ...F } fragment F on Query { a ...G } fragment G on Query { b ...F }", {"a", "b"}),
            ("{ ...F } fragment F on Query { a } fragment F on Query { b }", {"a", "b"}),
            ("{ __schema { types { name } } __typename }", {"__schema", "__typename"}),
            ("{ " + "a { " * 50 + "b" + " }" * 51, {"a"}),
        ],
    )


def test_everything_else_counts_as_a_change() -> None:
    others = (
        body('mutation { testMutation(inputString: "x") { output } }'),
        # MLflow chooses by operationName which of the two it executes.
        body("query A { a } mutation B { b }", operationName="A"),
        body("subscription { a }"),
        body("fragment F on T { a }"),
        body("{ ...F }"),
        body("{ a"),
        body(""),
        body(None),
        body(7),
        body(["{ a }"]),
        body({"query": "{ a }"}),
        b'{"query": "{ a }", "query": "mutation { b }"}',
        b'[{"query": "{ a }"}]',
        b"[]",
        b"null",
        b"",
        b"\xff",
        b"query={a}",
        b'"{\\"query\\": \\"{ a }\\"}"',
        b'{"query":' + b"[" * 100_000,
        body("{" * 10_000),
        body("{ a }" + " " * graphql.MAX_QUERY),
        body("{ " + "a " * graphql.MAX_TOKENS + "}"),
        body("{ a(x: " + "[" * 5_000 + ") }"),
    )
    assert [text[:100] for text in others if query_fields(text) is not None] == []


@given(st.binary(max_size=200))
def test_every_body_has_an_answer(text: bytes) -> None:
    assert query_fields(text) is None or json.loads(text)["query"]


def test_scope_decides_which_queries_a_key_may_send() -> None:
    route = operations.classify("POST", "/graphql")

    def may(scope: str, *names: str) -> bool:
        operation = operations.graphql(route, names)
        return granted(frozenset({scope}), operation) >= operation.access

    rows: list[tuple[object, ...]] = []
    for scope in ("model:read", "model:write", "mlflow:read", "mlflow:write"):
        every = scope.startswith("mlflow:")
        rows += [(scope, name, True) for name in QUERY_FIELDS]
        rows += [
            (scope, *QUERY_FIELDS, True),
            (scope, "__schema", every),
            (scope, "mlflowSearchTraces", every),
            (scope, "mlflowGetRun", "mlflowSearchTraces", every),
        ]
    rows += [(scope, name, False) for name in QUERY_FIELDS for scope in ("predict", "metrics:read")]
    agree(may, rows)
    mutation = operations.graphql(route, None)
    assert (mutation.access, mutation.reads) == (Access.WRITE, frozenset())
    assert [
        s for s in ("model:write", "mlflow:read") if granted(frozenset({s}), mutation) > 2
    ] == []


def test_graphql_fields_read_what_rest_gives_to_the_same_key() -> None:
    """A field's kinds come from the table of routes, so that a typo opens nothing."""
    kinds = {operation.kind for operation in operations.rules()}
    assert {kind for found in QUERY_FIELDS.values() for kind in found} <= kinds

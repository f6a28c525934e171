"""Which GraphQL bodies a key that may only read gets through."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from mlflow_hokusai_auth.server.graphql import only_reads


def body(query: object, **more: object) -> bytes:
    return json.dumps({"query": query, **more}).encode()


def test_queries_only_read() -> None:
    queries = (
        "{ mlflowGetExperiment { experiment { name } } }",
        "query One { a } query Two { b }",
        "query ($mutation: String) { a(mutation: $mutation) } fragment F on T { mutation }",
        "# mutation\n{ a }",
    )
    assert [query for query in queries if not only_reads(body(query))] == []


def test_everything_else_counts_as_a_change() -> None:
    others = (
        body('mutation { testMutation(inputString: "x") { output } }'),
        # Which of the two is carried out, operationName says, in a way that is MLflow's to decide.
        body("query A { a } mutation B { b }", operationName="A"),
        body("subscription { a }"),
        body("fragment F on T { a }"),
        body("{ a"),
        body(""),
        body(None),
        body(["{ a }"]),
        b'{"query": "{ a }", "query": "mutation { b }"}',
        b"[]",
        b"null",
        b"",
        b"\xff",
        b"query={a}",
        b'{"query":' + b"[" * 100_000,
        body("{" * 10_000),
    )
    assert [text[:100] for text in others if only_reads(text)] == []


@given(st.binary(max_size=200))
def test_every_body_has_an_answer(text: bytes) -> None:
    assert only_reads(text) in (True, False)

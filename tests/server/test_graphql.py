"""Which GraphQL bodies a key that may only read gets through."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_hokusai_auth.server.graphql import only_reads


def body(query: object, **more: object) -> bytes:
    return json.dumps({"query": query, **more}).encode()


@pytest.mark.parametrize(
    "query",
    [
        "{ mlflowGetExperiment { experiment { name } } }",
        "query One { a } query Two { b }",
        "query ($mutation: String) { a(mutation: $mutation) } fragment F on T { mutation }",
        "# mutation\n{ a }",
    ],
)
def test_queries_read(query: str) -> None:
    assert only_reads(body(query))


@pytest.mark.parametrize(
    "text",
    [
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
    ],
)
def test_everything_else_counts_as_a_change(text: bytes) -> None:
    assert not only_reads(text)


@given(st.binary(max_size=200))
def test_any_body_has_an_answer(text: bytes) -> None:
    assert only_reads(text) in (True, False)

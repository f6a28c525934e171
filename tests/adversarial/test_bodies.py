"""What is read of a body before MLflow has it, and what its content may open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.adversarial.grammar import GRAPHQL_LARGE, GRAPHQL_READ, GRAPHQL_WRITE, KEYS, Attack
from tests.adversarial.test_grammar import CHUNK, Sent, through_asgi, through_wsgi

both = pytest.mark.parametrize("through", [through_asgi, through_wsgi])


def send(
    through: Callable[..., Any],
    path: str,
    body: bytes,
    *headers: tuple[str, str],
    method: str = "POST",
) -> Sent:
    attack = Attack(method, path, (*headers, ("Content-Length", str(len(body)))), body)
    (sent,) = through((), [attack])
    return sent


@both
@pytest.mark.parametrize(
    ("path", "limit"),
    [
        ("/hokusai/login", 4096),
        ("/hokusai/logout", 4096),
        ("/api/2.0/hokusai/keys/leaked", 2**20),
    ],
)
def test_of_somebody_without_a_key_no_more_than_has_a_use(
    through: Callable[..., Any], path: str, limit: int
) -> None:
    answer, _ = send(through, path, b"x" * limit)
    assert answer.status == 200 and answer.inner is not None
    answer, body = send(through, path, b"x" * (limit + CHUNK * 2))
    assert answer.status == 413 and answer.inner is None
    assert body.read_by_gate <= limit + CHUNK


@both
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "path", ["/health", "/api/health/mlflow", "/hokusai/login", "/hokusai/static/login.js"]
)
def test_what_is_open_to_all_takes_no_body(
    through: Callable[..., Any], path: str, method: str
) -> None:
    answer, _ = send(through, path, b"", method=method)
    assert answer.status == 200 and answer.inner is not None
    answer, body = send(through, path, b"x" * CHUNK * 3, method=method)
    assert answer.status == 413 and answer.inner is None
    assert not body.read_by_gate


@both
@pytest.mark.parametrize(
    ("kind", "content", "opens"),
    [
        ("read", GRAPHQL_READ, True),
        ("read", GRAPHQL_WRITE, False),
        ("read", GRAPHQL_LARGE, False),
        ("scopeless", GRAPHQL_READ, False),
        ("write", GRAPHQL_WRITE, True),
        ("write", GRAPHQL_LARGE, True),
    ],
)
def test_graphql_opens_to_a_key_that_may_read_for_queries_alone(
    through: Callable[..., Any], kind: str, content: bytes, opens: bool
) -> None:
    answer, body = send(through, "/graphql", content, ("X-API-Key", KEYS[kind]))
    assert (answer.status, answer.inner is not None) == ((200, True) if opens else (403, False))
    # Nobody else's is looked into.
    assert kind == "read" or not body.read_by_gate


@pytest.mark.parametrize(
    "header",
    [("Transfer-Encoding", "chunked"), ("Content-Length", "x"), ("Content-Length", "9" * 5000)],
)
def test_wsgi_reads_nothing_of_unknown_length(header: tuple[str, str]) -> None:
    ((answer, body),) = through_wsgi((), [Attack("POST", "/hokusai/login", (header,), b"x")])
    assert answer.status == 413 and answer.inner is None
    assert not body.read_by_gate

"""What is read of a body before MLflow has it, and what its content may open."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
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
def test_body_without_a_key_is_read_up_to_its_limit(through: Callable[..., Any]) -> None:
    for path, limit in (
        ("/hokusai/login", 4096),
        ("/hokusai/logout", 4096),
        ("/hokusai/link", 4096),
        ("/api/2.0/hokusai/keys/leaked", 2**20),
        ("/api/2.0/hokusai/token", 20_480),
    ):
        answer, _ = send(through, path, b"x" * limit)
        assert answer.status == 200 and answer.inner is not None, path
        answer, body = send(through, path, b"x" * (limit + CHUNK * 2))
        assert answer.status == 413 and answer.inner is None, path
        assert body.read_by_gate <= limit + CHUNK, path


@both
def test_public_route_takes_no_body(through: Callable[..., Any]) -> None:
    pages = ("/hokusai/login", "/hokusai/link", "/hokusai/static/login.js")
    paths = ("/health", "/api/health/mlflow", *pages)
    for path, method in product(paths, ("GET", "HEAD")):
        answer, _ = send(through, path, b"", method=method)
        assert answer.status == 200 and answer.inner is not None, (method, path)
        answer, body = send(through, path, b"x" * CHUNK * 3, method=method)
        assert answer.status == 413 and answer.inner is None, (method, path)
        assert not body.read_by_gate, (method, path)


@both
def test_read_key_may_send_graphql_queries_only(
    through: Callable[..., Any],
) -> None:
    for kind, content, opens in (
        ("read", GRAPHQL_READ, True),
        ("read", GRAPHQL_WRITE, False),
        ("read", GRAPHQL_LARGE, False),
        ("scopeless", GRAPHQL_READ, False),
        ("write", GRAPHQL_WRITE, True),
        ("write", GRAPHQL_LARGE, True),
    ):
        answer, body = send(through, "/graphql", content, ("X-API-Key", KEYS[kind]))
        verdict = (answer.status, answer.inner is not None)
        assert verdict == ((200, True) if opens else (403, False)), (kind, content[:60])
        # The body of a key that may read nothing is not looked into.
        assert kind != "scopeless" or not body.read_by_gate, (kind, content[:60])


def test_wsgi_reads_nothing_of_unknown_length() -> None:
    for header in (
        ("Transfer-Encoding", "chunked"),
        ("Content-Length", "x"),
        ("Content-Length", "9" * 5000),
    ):
        ((answer, body),) = through_wsgi((), [Attack("POST", "/hokusai/login", (header,), b"x")])
        assert answer.status == 413 and answer.inner is None, header[1][:9]
        assert not body.read_by_gate, header[1][:9]

"""A forked server answers as one that `mlflow server` started: most tests ask forks for that reason."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.server.upstream.routes import installed_routes, template
from tests.e2e.test_every_route import FETCHES, body_for
from tests.harness import PREFIXES, SERVERS, Server, serve

pytestmark = pytest.mark.servers

#: What differs from answer to answer.
VARYING = re.compile(
    rb"[0-9a-f]{16,32}|\b\d{10,13}\b|127\.0\.0\.1:\d+|/[\w/-]*/(?:forked|started)\b"
    rb"|\[SQL:.*"
)
#: Routes of the package, in which a row for each answers a question of its own.
OURS = (
    "GET /hokusai/keys",
    "GET /hokusai/models",
    "GET /hokusai/login",
    "GET /api/2.0/hokusai/whoami",
    "GET /health",
)
OURS += ("GET /api/2.0/hokusai/keys", "GET /api/health/mlflow/detailed", "GET /hokusai/metrics")
OURS += ("POST /api/v1/keys/validate", "OPTIONS /version", "GET /", "GET /no/such/route")


@pytest.fixture(scope="module")
def sample() -> list[tuple[str, str]]:
    """Two routes of each kind, class and method, and all that are ours."""
    found: dict[tuple[object, ...], list[tuple[str, str]]] = {}
    for method, rule, _ in sorted(installed_routes(), key=lambda route: route[:2]):
        path = re.sub(r"\{\w+(:path)?\}", "1", template(rule))
        operation = classify(method, path)
        if path not in FETCHES:
            found.setdefault((operation.kind, operation.access, method), []).append((method, path))
    chosen = [route for routes in found.values() for route in routes[:2]]
    return chosen + [(method, path) for method, path in (one.split() for one in OURS)]


def answers(server: Server, sample: list[tuple[str, str]]) -> Iterator[tuple[str, object]]:
    for scope in ("", "model:write", "mlflow:admin"):
        key = server.key(scope) if scope else None
        # Without a key the answer is the same for each route that is MLflow's.
        asked = sample if key else [route for route in sample if " ".join(route) in OURS]
        for number, (method, path) in enumerate(asked):
            prefix = PREFIXES[number % len(PREFIXES)]
            headers = {"Content-Type": "application/json"}
            status, sent, body = server.request(
                method, prefix + path, key=key, headers=headers, body=body_for(path)
            )
            names = sorted(set(sent) - {"content-length", "date"})
            yield f"{method} {prefix}{path} ({scope})", (status, names, shape(body))


def shape(body: bytes) -> object:
    """What a body is made of: the words of an error, the fields of an object, the names of metrics."""
    try:
        told = json.loads(body)
    except ValueError:
        return sorted(set(re.findall(rb"^hokusai_auth_\w+", body, re.MULTILINE))) or len(body) > 0
    if isinstance(told, dict) and "message" in told:
        return VARYING.sub(b"*", json.dumps(told, sort_keys=True).encode())
    return sorted(told) if isinstance(told, dict) else type(told).__name__


@pytest.mark.parametrize("kind", ["uvicorn", "gunicorn", "waitress"])
def test_forked_server_answers_as_a_started_one(
    kind: str, tmp_path: Path, sample: list[tuple[str, str]]
) -> None:
    with (
        serve(tmp_path / "forked", SERVERS[kind]) as forked,
        serve(tmp_path / "started", SERVERS[kind], started=True) as started,
    ):
        # The command and its server, in two processes, and gunicorn's workers.
        assert len(forked.workers()) == len(started.workers())
        expected = dict(answers(started, sample))
        differing = {
            question: (answer, expected[question])
            for question, answer in answers(forked, sample)
            if answer != expected[question]
        }
    assert len(expected) > 200
    assert not differing, "\n".join(f"{q}: {a} instead of {b}" for q, (a, b) in differing.items())

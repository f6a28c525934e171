"""The description of our endpoints holds: whatever is sent, the answer is one that it names."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.operations import rules
from mlflow_hokusai_auth.server.web import openapi
from tests.harness import Server, serve

pytestmark = pytest.mark.servers

_turns = itertools.count()
_PATH = "/api/2.0/hokusai/openapi.json"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that nobody else uses: its keys come and go."""
    with serve(
        tmp_path_factory.mktemp("described"),
        HOKUSAI_AUTH_PUBLIC_URLS="https://registry.example.com",
    ) as running:
        yield running


# As the server gives it, which a test below compares.
schema = schemathesis.openapi.from_dict(openapi.document())


@schema.parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_described(case: schemathesis.Case, server: Server) -> None:
    turn = next(_turns)
    # What no generator would guess, most of the time.
    if "key_id" in (case.path_parameters or {}) and turn % 4:
        made = server.store.create(owner="described", scopes=["model:read"])[0]
        case.path_parameters["key_id"] = made.key_id
    if isinstance(case.body, dict) and "key" in case.body and turn % 4:
        case.body["key"] = keys.generate()
    scope = "mlflow:admin" if turn % 10 else "model:read"
    response = case.call(
        headers={"X-API-Key": server.key(scope)}, base_url=server.origin, timeout=60
    )
    case.validate_response(response, checks=CHECKS)


def test_the_server_gives_the_description_to_every_key(server: Server) -> None:
    status, _, body = server.request("GET", _PATH, key=server.key("model:read"))
    assert status == 200 and json.loads(body) == json.loads(json.dumps(openapi.document()))


def test_every_route_for_programs_is_described() -> None:
    described = {
        f"{method.upper()} {path}"
        for path, operations in openapi.document()["paths"].items()
        for method in operations
        if method != "parameters"
    }
    base = "/api/2.0/hokusai/"
    routes = {rule.rule for rule in rules() if rule.rule.partition(" ")[2].startswith(base)}
    assert described == routes - {f"GET {_PATH}"}

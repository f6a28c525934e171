"""The flow of a request without an adapter; and adapters decide nothing."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlflow_hokusai_auth.core.denials import CODES
from mlflow_hokusai_auth.core.types import MODES, Allow, Deny
from mlflow_hokusai_auth.server.gate import (
    asgi,
    flow,
    graphql,
    wsgi,
)
from mlflow_hokusai_auth.server.gate.flow import (
    Answer,
    Arrival,
    Forward,
    ReadBody,
    ShowQuery,
    Unread,
    Wait,
)
from mlflow_hokusai_auth.server.gate.gate import Gate
from mlflow_hokusai_auth.server.live_settings import Mode
from mlflow_hokusai_auth.server.web import leak_reports
from tests.adversarial.grammar import GRAPHQL_READ, GRAPHQL_WRITE
from tests.harness import wait_until
from tests.server.sentinel import KEYS, Wire, clock_at_now, make_gate, scope_of, with_key

READ = with_key("read")
LOGIN = Wire("POST", "/hokusai/login", (("Content-Length", "9"),))
QUERY = with_key("read", "POST", "/graphql", ("Content-Length", "9"))


@pytest.fixture(autouse=True, scope="module")
def clock() -> Iterator[None]:
    with clock_at_now():
        yield


def take(wire: Wire, gate: Gate, *bodies: bytes | Unread) -> tuple[list[Any], Forward | Answer]:
    """Drive the flow of `wire`, with `bodies` as results. Return its steps and its outcome."""
    scope, left = scope_of(wire), list(bodies)
    driven = flow.flow(
        gate,
        Arrival(
            wire.method,
            scope["path"],
            scope["query_string"],
            tuple(scope["headers"]),
            "192.0.2.1",
            0.0,
        ),
    )
    steps: list[Any] = []
    reply: Any = None
    while True:
        try:
            step = driven.send(reply)
        except StopIteration as done:
            assert not left, "the flow read less than it should"
            return steps, done.value
        steps.append(step)
        reply = None
        if isinstance(step, ReadBody):
            reply = left.pop(0)
        elif isinstance(step, Wait):
            reply = step.future.result(60)


def outcome(found: Forward | Answer) -> object:
    return "forward" if isinstance(found, Forward) else found.status


def test_each_request_takes_the_steps_that_it_needs_and_no_more() -> None:
    gate = make_gate()
    assert [type(step) for step in take(READ, gate)[0]] == [Wait]
    wait_until(lambda: take(READ, gate)[0] == [])
    wrong = []
    for wire, bodies, steps, expected in (
        # Neither a known key nor the refusal of a request without one needs I/O.
        (READ, [], [], "forward"),
        (Wire(), [], [], 401),
        (Wire("GET", "/health"), [], [], "forward"),
        (Wire("GET", "/health", (("Content-Length", "9"),)), [], [], 413),
        (with_key("read", "GET", "/mlflow"), [], [], 308),
        (LOGIN, [b"key=x"], [ReadBody(4096, 10.0)], "forward"),
        (LOGIN, [Unread.TOO_LARGE], [ReadBody(4096, 10.0)], 413),
        (LOGIN, [Unread.INCOMPLETE], [ReadBody(4096, 10.0)], 408),
        (QUERY, [GRAPHQL_READ], [ReadBody(graphql.MAX_BODY, 10.0)], "forward"),
        (QUERY, [GRAPHQL_WRITE], [ReadBody(graphql.MAX_BODY, 10.0)], 403),
        (QUERY, [Unread.TOO_LARGE], [ReadBody(graphql.MAX_BODY, 10.0)], 403),
        (QUERY, [Unread.INCOMPLETE], [ReadBody(graphql.MAX_BODY, 10.0)], 408),
        (Wire("GET", f"/version?a=b&api_key={KEYS['read']}"), [], [ShowQuery(b"a=b")], "forward"),
        (Wire("GET", f"/x?api_key={KEYS['typo']}"), [], [ShowQuery(b"")], 401),
    ):
        got, found = take(wire, gate, *bodies)
        if (got, outcome(found)) != (steps, expected):
            wrong.append(f"{wire}: {got}, {outcome(found)}")
    assert not wrong, "\n".join(wrong)


def test_some_refusals_hold_in_every_mode() -> None:
    large = Wire(headers=tuple((f"X-{number}", "") for number in range(101)))
    large_sign_in = Wire("GET", "/hokusai/keys", large.headers)
    malformed = Wire(headers=(("Host", "["),))
    report = Wire("POST", leak_reports.RULE.split()[1], (("Content-Length", "9"),))
    wrong = []
    for mode in MODES:
        gate = make_gate(mode=Mode(mode), absent={leak_reports.RULE: leak_reports.ABSENT})
        for wire, expected in (
            # Mode off and observe leave it to MLflow, but our own routes stay closed.
            (large, 431 if mode == "enforce" else "forward"),
            (large_sign_in, 401 if mode == "off" else 431),
            (malformed, 400),
            # Its body is not read.
            (report, 404),
        ):
            steps, found = take(wire, gate)
            if steps or outcome(found) != expected:
                wrong.append(f"{mode}, {wire!r:.80}: {steps}, {outcome(found)}, not {expected}")
    assert not wrong, "\n".join(wrong)


def test_lookup_that_takes_too_long_is_503() -> None:
    scope = scope_of(READ)
    arrival = Arrival("GET", "/version", b"", tuple(scope["headers"]), "192.0.2.1", 0.0)
    driven = flow.flow(make_gate(), arrival)
    assert isinstance(driven.send(None), Wait)
    with pytest.raises(StopIteration) as done:
        driven.send(None)
    assert done.value.value.status == 503


def test_every_refusal_knows_its_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision log needs the operation, and every mode does, to keep closed ones closed."""
    concluded: list[Allow | Deny] = []
    conclude = Gate.conclude

    def noting(self: Gate, exchange: Any, verdict: Allow | Deny) -> Allow | Deny:
        concluded.append(verdict)
        return conclude(self, exchange, verdict)

    monkeypatch.setattr(Gate, "conclude", noting)
    gate = make_gate()
    for kind in KEYS:
        take(with_key(kind, "POST", "/api/2.0/hokusai/keys"), gate)
    take(Wire("POST", "/api/2.0/hokusai/keys"), gate)
    take(with_key("admin", "GET", "/version", ("X_API_Key", "x")), gate)
    take(LOGIN, gate, Unread.TOO_LARGE)
    refused = [verdict for verdict in concluded if isinstance(verdict, Deny)]
    assert len({deny.code for deny in refused}) >= 7
    assert [deny for deny in refused if deny.operation is None] == []
    assert {deny.code for deny in refused} <= CODES.keys()


def imports(module: Any) -> set[str]:
    tree = ast.parse(Path(module.__file__).read_text("utf-8"))
    return {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_adapters_decide_nothing() -> None:
    for module in (asgi, wsgi):
        found = imports(module)
        # The path's bytes without the prefix are the exception.
        of_core = {name for name in found if "mlflow_hokusai_auth.core" in name}
        assert of_core <= {"mlflow_hokusai_auth.core.prefixes.raw_without"}, module
        assert {name for name in found if name.startswith("gate.")} == {"gate.Gate"}, module


def length(function: Callable[..., Any]) -> int:
    lines: Sequence[str] = inspect.getsource(function).splitlines()
    return len(lines)


def test_flow_is_one_short_function() -> None:
    assert length(flow.flow) <= 60

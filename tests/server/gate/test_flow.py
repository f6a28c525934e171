"""The flow of a request without an adapter; and adapters decide nothing."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlflow_hokusai_auth.core.denials import CODES
from mlflow_hokusai_auth.core.policy import Policy
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


def test_browser_with_another_key_gets_a_page_and_a_program_json() -> None:
    html = ("Accept", "text/html,application/xhtml+xml,*/*;q=0.8")
    locked = make_gate(policy=Policy(kind="admin"), contact="<ops@registry.example>")
    # The path, and the relative way from it to /hokusai/.
    for gate, path, root in (
        (locked, "/", "hokusai/"),
        (locked, "/mlflow", "mlflow/hokusai/"),
        (locked, "/api/mlflow/", "hokusai/"),
        (make_gate(), "/hokusai/keys/new", "../../hokusai/"),
        (make_gate(), "/mlflow/api/2.0/hokusai/audit", "../../../hokusai/"),
    ):
        page = take(with_key("write", "GET", path, html), gate)[1]
        assert isinstance(page, Answer) and page.status == 403, path
        headers, text = dict(page.headers), page.body.decode()
        assert headers["Content-Type"] == "text/html; charset=utf-8", path
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["Content-Length"] == str(len(page.body)) and "X-Request-Id" in headers
        assert "needs the scope mlflow:admin" in text and "Ask the server" in text
        assert f'href="{root}static/hokusai.css"' in text and f'href="{root}login?next=' in text
        assert ("&lt;ops@" in text) == (gate is locked) and "<ops" not in text
        program = take(with_key("write", "GET", path, ("Accept", "*/*")), gate)[1]
        assert isinstance(program, Answer) and program.status == 403
        assert json.loads(program.body)["error"] == "SCOPE_MISSING", path
    # A page's script asks for no page, and nor does any request that is no navigation.
    sent = take(with_key("read", "POST", "/api/2.0/mlflow/runs/create", html), make_gate())[1]
    assert isinstance(sent, Answer) and json.loads(sent.body)["error"] == "SCOPE_MISSING"
    assert take(with_key("read", "POST", "/hokusai/keys/new", html), make_gate())[1].body[:9] == (
        b"<!doctype"
    )


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

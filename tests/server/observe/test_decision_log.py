"""The report about a request that is over."""

from __future__ import annotations

import json
import logging
import re
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.operations import UNKNOWN, classify
from mlflow_hokusai_auth.core.types import Allow, Credential, Deny, Principal, Request
from mlflow_hokusai_auth.server.exchange import Exchange, RequestView, request_id
from mlflow_hokusai_auth.server.observe.decision_log import (
    DecisionLog,
    line,
    outcome_of,
)
from mlflow_hokusai_auth.store.dry_run import WouldRefuse

READ = classify("GET", "/api/2.0/mlflow/experiments/get")
WRITE = classify("POST", "/api/2.0/mlflow/runs/create")
PUBLIC = classify("GET", "/health")
OURS = classify("GET", "/api/2.0/hokusai/whoami")
SOMEBODY = Principal("key_1", "somebody", frozenset({"mlflow:read"}))
KEY = keys.generate()
UNAVAILABLE = Deny("AUTHORITY_UNAVAILABLE", "")
MISSING = Deny("KEY_MISSING", "")


def exchange(
    verdict: Allow | Deny | None, status: int = 200, passed: bool = True, **fields: Any
) -> Exchange:
    """Return a request with this verdict: the gate took 0.2 s, and MLflow another 0.3 s."""
    request = Request("GET", "/api/2.0/mlflow/experiments/get", b"", (), "192.0.2.1")
    operation = verdict.operation if isinstance(verdict, Allow) else READ
    began = time.perf_counter() - 0.5
    made = Exchange(request, "/mlflow", "id-1", began, operation, verdict, began + 0.2)
    made.status, made.passed, made.sent = status, passed, 7
    made.answered = began + 0.5 if passed else 0.0
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def allow(operation: Any = READ, principal: Principal | None = SOMEBODY) -> Allow:
    return Allow(operation, principal)


def test_every_exchange_has_one_outcome() -> None:
    wrong = []
    for made, outcome in (
        (exchange(allow()), "allowed"),
        (exchange(allow(), 404), "allowed"),
        (exchange(allow(PUBLIC, None)), "public"),
        (exchange(allow(READ, None)), "unchecked"),
        (exchange(MISSING, 401, False), "refused"),
        (exchange(MISSING, 303, False), "refused"),
        (exchange(Deny("RATE_LIMITED", ""), 429, False), "refused"),
        (exchange(UNAVAILABLE, 503, False), "unavailable"),
        (exchange(Deny("INTERCEPTOR_FAILED", ""), 503, False), "unavailable"),
        (exchange(MISSING, 200), "would_refuse"),
        (exchange(UNAVAILABLE, 200), "would_refuse"),
        (exchange(MISSING, 500), "mlflow_error"),
        (exchange(allow(), 500), "mlflow_error"),
        (exchange(allow(), 503), "mlflow_error"),
        (exchange(allow(), 200, broke_off=True), "mlflow_error"),
        (exchange(allow(), 0, broke_off=True), "mlflow_error"),
        (exchange(allow(PUBLIC, None), 500), "mlflow_error"),
        (exchange(allow(OURS), 503), "unavailable"),
        (exchange(allow(OURS), 400), "allowed"),
        (exchange(allow(), 500, False), "mlflow_error"),
        (exchange(None, 500, False, operation=None), "mlflow_error"),
        (exchange(allow(), 403, host_refusal=True), "host"),
        (exchange(allow(PUBLIC, None), 403, host_refusal=True), "host"),
    ):
        if outcome_of(made) != outcome:
            wrong.append(f"{made}: {outcome_of(made)}, not {outcome}")
    assert not wrong, "\n".join(wrong)


def test_line_of_a_request_that_mlflow_answered() -> None:
    fields = line(exchange(allow()), "allowed")
    assert abs(fields.pop("at") - time.time()) < 60
    assert fields.pop("gate_ms") == pytest.approx(200, abs=0.01)
    assert fields.pop("mlflow_ms") == pytest.approx(300, abs=0.01)
    assert fields == {
        "event": "request",
        "request_id": "id-1",
        "outcome": "allowed",
        "reason": "ok",
        "status": 200,
        "method": "GET",
        "prefix": "/mlflow",
        "rule": "GET /api/2.0/mlflow/experiments/get",
        "kind": "experiments",
        "access": "read",
        "key_id": "key_1",
        "owner": "somebody",
        "address": "192.0.2.1",
        "bytes": 7,
    }


def test_line_of_a_refusal_has_the_reason_and_the_owner() -> None:
    fields = line(exchange(MISSING, 401, False), "refused")
    assert (fields["reason"], fields["mlflow_ms"]) == ("KEY_MISSING", None)
    assert (fields["key_id"], fields["owner"]) == ("", "")
    known = line(exchange(replace(MISSING, principal=SOMEBODY), 403, False), "refused")
    assert (known["key_id"], known["owner"]) == ("key_1", "somebody")


@given(st.text(), st.text(max_size=8))
def test_path_of_an_unknown_route_is_logged_without_keys(path: str, method: str) -> None:
    for operation in (None, UNKNOWN):
        made = exchange(MISSING, 401, False, operation=operation)
        made.request = Request(method + KEY, f"{path}/{KEY}", f"x={KEY}".encode(), ())
        text = json.dumps(line(made, "refused"))
        assert "path" in json.loads(text) and len(json.loads(text)["path"]) <= 200
        assert KEY[8:14] not in text


def test_neither_path_nor_query_nor_header_of_a_known_route_is_logged() -> None:
    made = exchange(allow())
    made.request = Request("GET", "/canary", b"canary", ((b"canary", b"canary"),))
    assert "canary" not in json.dumps(line(made, "allowed"))


# Which requests are logged


def logged(caplog: pytest.LogCaptureFixture, observer: DecisionLog, *made: Exchange) -> list[Any]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "mlflow_hokusai_auth.decisions"):
        for one in made:
            observer.report(one)
    return [
        (one.levelname, json.loads(one.getMessage())["outcome"])
        for one in caplog.records
        if one.name == "mlflow_hokusai_auth.decisions"
    ]


def test_failures_and_changes_are_always_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = (
        exchange(MISSING, 401, False),
        exchange(allow(), 500),
        exchange(MISSING),
        exchange(allow(), 403, host_refusal=True),
        exchange(allow(WRITE)),
    )
    assert logged(caplog, DecisionLog(sample=0), *made) == [
        ("WARNING", "refused"),
        ("WARNING", "mlflow_error"),
        ("WARNING", "would_refuse"),
        ("WARNING", "host"),
        ("INFO", "allowed"),
    ]


def test_sample_of_reading_requests_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    kinds = (allow(PUBLIC, None), allow(), allow(READ, None))
    reads = [exchange(kinds[number % 3]) for number in range(400)]
    for sample, least, most in ((0, 0, 0), (1, 400, 400), (0.5, 120, 280)):
        count = len(logged(caplog, DecisionLog(sample=sample), *reads))
        assert least <= count <= most, sample


def test_log_level_of_the_operator_is_respected(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "mlflow_hokusai_auth.decisions"):
        DecisionLog(sample=1).report(exchange(MISSING, 401, False))
    assert not caplog.records


def test_request_without_an_operation_is_logged_as_well(caplog: pytest.LogCaptureFixture) -> None:
    made = exchange(allow(PUBLIC, None), operation=None)
    assert logged(caplog, DecisionLog(sample=1), made) == [("INFO", "public")]
    none = line(exchange(None, 500, False, operation=None), "mlflow_error")
    assert (none["rule"], none["access"], none["key_id"], none["reason"]) == ("", "", "", "ok")


def test_request_that_mode_observe_lets_pass_is_recorded() -> None:
    found: list[WouldRefuse] = []
    observer = DecisionLog(observed=found.append)
    for made in (
        exchange(replace(MISSING, principal=SOMEBODY)),
        exchange(MISSING, operation=None),
        exchange(MISSING, 401, False),
        exchange(allow()),
    ):
        observer.report(made)
    assert [one._replace(minute=0) for one in found] == [
        WouldRefuse("KEY_MISSING", READ.rule, "key_1", "192.0.2.1", "somebody", 0),
        WouldRefuse("KEY_MISSING", "", "", "192.0.2.1", "", 0),
    ]
    assert abs(found[0].minute - time.time() / 60) < 2


def test_over_never_raises(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("verdict", "operation", "decided", "request", "sent", "prefix"):
        caplog.clear()
        observer = DecisionLog(sample=1)
        made = exchange(MISSING, 401, False)
        setattr(made, name, None if name in ("decided", "request") else object())
        observer.report(made)
        observer.flush()
        assert any(one.levelno == logging.ERROR for one in caplog.records), name
        assert logged(caplog, observer, exchange(allow())) == [("INFO", "allowed")], name


def test_failing_logger_breaks_no_request() -> None:
    class Broken(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise RuntimeError

    log, broken = logging.getLogger("mlflow_hokusai_auth.decisions"), Broken()
    log.addFilter(broken)
    try:
        DecisionLog(sample=1).report(exchange(MISSING, 401, False))
    finally:
        log.removeFilter(broken)


# Ids


def id_of(headers: list[tuple[bytes, bytes]]) -> str:
    return request_id(Request("GET", "/", b"", tuple(headers)))


def test_plain_id_is_kept() -> None:
    for plain in ("a", "x" * 64, "A-b_c.d:9", "hk_live_", "hk"):
        assert id_of([(b"x-other", b"y"), (b"x-request-id", plain.encode())]) == plain
    # The first well-formed id is used.
    sent = [(b"x-request-id", b"not plain"), (b"x-request-id", b"one"), (b"x-request-id", b"two")]
    assert id_of(sent) == "one"


def test_other_ids_are_replaced() -> None:
    secrets = (KEY, KEY[:30], keys.session_token())
    for other in ("", " ", "x" * 65, "a b", "a\n", "a,b", "é", "a/b", *secrets):
        made = [id_of([(b"x-request-id", other.encode())]) for _ in range(2)]
        assert all(re.fullmatch("[0-9a-f]{16}", one) for one in made), other
        assert made[0] != made[1] != id_of([]), other


# Headers


def shown(caplog: pytest.LogCaptureFixture, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    made = exchange(allow())
    made.request = replace(made.request, headers=headers)
    caplog.clear()
    with caplog.at_level(logging.INFO, "mlflow_hokusai_auth.headers"):
        DecisionLog().show_headers(made, headers[:1])
    (record,) = caplog.records
    found: dict[str, Any] = json.loads(record.getMessage())
    return found


def test_names_of_headers_are_shown(caplog: pytest.LogCaptureFixture) -> None:
    fields = shown(caplog, (b"accept", b"canary"), (b"x-tenant", b"canary"), (b"x\xe4", b""))
    assert fields == {
        "event": "headers",
        "request_id": "id-1",
        "before": ["accept", "x-tenant", "xä"],
        "after": ["accept"],
    }


def test_credentials_are_logged_by_fingerprint(caplog: pytest.LogCaptureFixture) -> None:
    value = f"Bearer {KEY}".encode()
    names = ("authorization", "x-api-key", "x_api_key", "x-mlflow-authorization", "cookie")
    for name in (*names, "proxy-authorization"):
        sent = [(name.encode(), text) for text in (value, value, value + b"x")]
        one, same, other = shown(caplog, *sent)["before"]
        assert one == same != other, name
        assert re.fullmatch(rf"{name}: sha256 [0-9a-f]{{8}}, {len(value)} bytes", one)


def test_key_in_a_header_s_name_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert shown(caplog, (KEY.lower().encode(), b""))["before"] == ["hk_live_***"]


def test_exchange_knows_that_the_key_was_in_the_query() -> None:
    for places, expected in ((("X-API-Key", "?api_key="), True), (("X-API-Key",), False)):
        made = exchange(Allow(READ, SOMEBODY, Credential(KEY, places)))
        assert made.query_key is expected
    assert not exchange(MISSING).query_key and not exchange(None).query_key


def test_view_has_the_gate_s_knowledge_of_a_request() -> None:
    assert exchange(allow()).view() == RequestView(
        "GET",
        "/api/2.0/mlflow/experiments/get",
        "/mlflow",
        "id-1",
        READ.rule,
        "key_1",
        "somebody",
        "192.0.2.1",
    )
    for verdict in (allow(PUBLIC, None), None):
        view = exchange(verdict, operation=None).view()
        assert (view.rule, view.key_id, view.owner) == ("", "", "")

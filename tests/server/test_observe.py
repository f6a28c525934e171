"""What is told of a request that is over."""

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

from mlflow_hokusai_auth.backends.observed import WouldRefuse
from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.operations import UNKNOWN, classify
from mlflow_hokusai_auth.core.types import Allow, Credential, Deny, Principal, Request
from mlflow_hokusai_auth.server.interceptors import RequestView
from mlflow_hokusai_auth.server.observe import (
    Exchange,
    Observer,
    line,
    outcome_of,
    request_id,
    show_headers,
)

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
    """A request with this verdict, which took 0.2 s, and MLflow another 0.3 s."""
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


@pytest.mark.parametrize(
    ("made", "outcome"),
    [
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
    ],
)
def test_one_word_says_how_it_ended(made: Exchange, outcome: str) -> None:
    assert outcome_of(made) == outcome


@pytest.mark.parametrize(
    ("status", "content_type", "host"),
    [
        (403, "text/plain; charset=utf-8", True),
        (403, "application/json", False),
        (403, "", False),
        (404, "text/plain", False),
    ],
)
def test_mlflow_s_refusal_of_a_host_is_told_by_its_form(
    status: int, content_type: str, host: bool
) -> None:
    made = exchange(allow())
    made.started(status, content_type)
    assert (made.host_refusal, made.status) == (host, status)


def test_the_line_of_a_request_that_mlflow_answered() -> None:
    told = line(exchange(allow()), "allowed")
    assert abs(told.pop("at") - time.time()) < 5
    assert told.pop("gate_ms") == pytest.approx(200, abs=0.01)
    assert told.pop("mlflow_ms") == pytest.approx(300, abs=0.01)
    assert told == {
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


def test_the_line_of_a_refusal_says_why_and_whose() -> None:
    told = line(exchange(MISSING, 401, False), "refused")
    assert (told["reason"], told["mlflow_ms"]) == ("KEY_MISSING", None)
    assert (told["key_id"], told["owner"]) == ("", "")
    known = line(exchange(replace(MISSING, principal=SOMEBODY), 403, False), "refused")
    assert (known["key_id"], known["owner"]) == ("key_1", "somebody")


@given(st.text(), st.text(max_size=8))
def test_of_a_route_that_nobody_knows_the_path_is_told_without_keys(path: str, method: str) -> None:
    for operation in (None, UNKNOWN):
        made = exchange(MISSING, 401, False, operation=operation)
        made.request = Request(method + KEY, f"{path}/{KEY}", f"x={KEY}".encode(), ())
        text = json.dumps(line(made, "refused"))
        assert "path" in json.loads(text) and len(json.loads(text)["path"]) <= 200
        assert KEY[8:14] not in text


def test_of_a_known_route_neither_path_nor_query_nor_header_is_told() -> None:
    made = exchange(allow())
    made.request = Request("GET", "/canary", b"canary", ((b"canary", b"canary"),))
    assert "canary" not in json.dumps(line(made, "allowed"))


# Who is told of


def told(caplog: pytest.LogCaptureFixture, observer: Observer, *made: Exchange) -> list[Any]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "mlflow_hokusai_auth.decisions"):
        for one in made:
            observer.over(one)
    return [
        (one.levelname, json.loads(one.getMessage())["outcome"])
        for one in caplog.records
        if one.name == "mlflow_hokusai_auth.decisions"
    ]


def test_what_fails_or_changes_something_is_always_told(caplog: pytest.LogCaptureFixture) -> None:
    made = (
        exchange(MISSING, 401, False),
        exchange(allow(), 500),
        exchange(MISSING),
        exchange(allow(), 403, host_refusal=True),
        exchange(allow(WRITE)),
    )
    assert told(caplog, Observer(sample=0), *made) == [
        ("WARNING", "refused"),
        ("WARNING", "mlflow_error"),
        ("WARNING", "would_refuse"),
        ("WARNING", "host"),
        ("INFO", "allowed"),
    ]


@pytest.mark.parametrize(("sample", "least", "most"), [(0, 0, 0), (1, 400, 400), (0.5, 120, 280)])
def test_of_what_only_reads_a_sample_is_told(
    sample: float, least: int, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = (allow(PUBLIC, None), allow(), allow(READ, None))
    reads = [exchange(kinds[number % 3]) for number in range(400)]
    assert least <= len(told(caplog, Observer(sample=sample), *reads)) <= most


def test_a_level_above_is_respected(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "mlflow_hokusai_auth.decisions"):
        Observer(sample=1).over(exchange(MISSING, 401, False))
    assert not caplog.records


def test_what_has_no_operation_is_told_as_well(caplog: pytest.LogCaptureFixture) -> None:
    made = exchange(allow(PUBLIC, None), operation=None)
    assert told(caplog, Observer(sample=1), made) == [("INFO", "public")]
    none = line(exchange(None, 500, False, operation=None), "mlflow_error")
    assert (none["rule"], none["access"], none["key_id"], none["reason"]) == ("", "", "", "ok")


def test_what_mode_observe_lets_pass_is_handed_on() -> None:
    found: list[WouldRefuse] = []
    observer = Observer(observed=found.append)
    for made in (
        exchange(replace(MISSING, principal=SOMEBODY)),
        exchange(MISSING, operation=None),
        exchange(MISSING, 401, False),
        exchange(allow()),
    ):
        observer.over(made)
    assert [one._replace(minute=0) for one in found] == [
        WouldRefuse("KEY_MISSING", READ.rule, "key_1", "192.0.2.1", "somebody", 0),
        WouldRefuse("KEY_MISSING", "", "", "192.0.2.1", "", 0),
    ]
    assert abs(found[0].minute - time.time() / 60) < 2


@pytest.mark.parametrize(
    "broken",
    [
        {"verdict": object()},
        {"operation": object()},
        {"decided": None},
        {"request": None},
        {"sent": object()},
        {"prefix": object()},
    ],
    ids=lambda broken: next(iter(broken)),
)
def test_over_never_raises(broken: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    observer = Observer(sample=1)
    made = exchange(MISSING, 401, False)
    for name, value in broken.items():
        setattr(made, name, value)
    observer.over(made)
    observer.settle()
    assert any(one.levelno == logging.ERROR for one in caplog.records)
    assert told(caplog, observer, exchange(allow())) == [("INFO", "allowed")]


def test_a_logger_that_fails_breaks_no_request() -> None:
    class Broken(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise RuntimeError

    log, broken = logging.getLogger("mlflow_hokusai_auth.decisions"), Broken()
    log.addFilter(broken)
    try:
        Observer(sample=1).over(exchange(MISSING, 401, False))
    finally:
        log.removeFilter(broken)


# Ids


@pytest.mark.parametrize("plain", ["a", "x" * 64, "A-b_c.d:9", "hk_live_", "hk"])
def test_a_plain_id_is_kept(plain: str) -> None:
    assert request_id([(b"x-other", b"y"), (b"x-request-id", plain.encode())]) == plain


@pytest.mark.parametrize(
    "other",
    ["", " ", "x" * 65, "a b", "a\n", "a,b", "é", "a/b", KEY, KEY[:30], keys.session_token()],
    ids=[*"0123456", "7", "key", "cut", "session"],
)
def test_another_is_replaced(other: str) -> None:
    made = [request_id([(b"x-request-id", other.encode())]) for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{16}", one) for one in made)
    assert made[0] != made[1] != request_id([])


def test_the_first_plain_id_counts() -> None:
    sent = [(b"x-request-id", b"not plain"), (b"x-request-id", b"one"), (b"x-request-id", b"two")]
    assert request_id(sent) == "one"


# Headers


def shown(caplog: pytest.LogCaptureFixture, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    made = exchange(allow())
    made.request = replace(made.request, headers=headers)
    caplog.clear()
    with caplog.at_level(logging.INFO, "mlflow_hokusai_auth.headers"):
        show_headers(made, headers[:1])
    (record,) = caplog.records
    found: dict[str, Any] = json.loads(record.getMessage())
    return found


def test_of_headers_the_names_are_shown(caplog: pytest.LogCaptureFixture) -> None:
    told = shown(caplog, (b"accept", b"canary"), (b"x-tenant", b"canary"), (b"x\xe4", b""))
    assert told == {
        "event": "headers",
        "request_id": "id-1",
        "before": ["accept", "x-tenant", "xä"],
        "after": ["accept"],
    }


@pytest.mark.parametrize(
    "name",
    [
        b"authorization",
        b"x-api-key",
        b"x_api_key",
        b"x-mlflow-authorization",
        b"cookie",
        b"proxy-authorization",
    ],
)
def test_credentials_are_told_apart_but_not_told(
    name: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    value = f"Bearer {KEY}".encode()
    one, same, other = shown(caplog, (name, value), (name, value), (name, value + b"x"))["before"]
    assert one == same != other
    assert re.fullmatch(rf"{name.decode()}: sha256 [0-9a-f]{{8}}, {len(value)} bytes", one)


def test_a_key_in_place_of_a_name_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    assert shown(caplog, (KEY.lower().encode(), b""))["before"] == ["hk_live_***"]


def test_whose_key_was_in_the_query_is_known() -> None:
    for places, expected in ((("X-API-Key", "?api_key="), True), (("X-API-Key",), False)):
        made = exchange(Allow(READ, SOMEBODY, Credential(KEY, places)))
        assert made.query_key is expected
    assert not exchange(MISSING).query_key and not exchange(None).query_key


def test_what_interceptors_see_of_a_request() -> None:
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

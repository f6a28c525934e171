"""Both adapters give the same verdict on each request, and call MLflow for ALLOW only."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from mlflow_hokusai_auth.authorities.cache import CachedBackend
from mlflow_hokusai_auth.core import browser, credentials, keys, policy, scopes
from mlflow_hokusai_auth.core import prefixes as prefix_paths
from mlflow_hokusai_auth.core.addresses import networks
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable, Throttled
from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.core.policy import Policy
from mlflow_hokusai_auth.core.prefixes import Prefixes
from mlflow_hokusai_auth.core.types import MODES, Principal, Rejected
from mlflow_hokusai_auth.server.gate import (
    asgi,
    flow,
    gate,
    wsgi,
)
from mlflow_hokusai_auth.server.gate.asgi import AsgiGate
from mlflow_hokusai_auth.server.gate.cors import Cors
from mlflow_hokusai_auth.server.gate.gate import Gate
from mlflow_hokusai_auth.server.gate.limits import Limits
from mlflow_hokusai_auth.server.live_settings import Mode
from tests.server.sentinel import (
    ADAPTERS,
    GATE,
    KEYS,
    PRINCIPALS,
    READ,
    UI,
    Adapter,
    Answer,
    Memory,
    Wire,
    both,
    clock_at_now,
    make_gate,
    owner,
    scope_of,
    through_asgi,
    through_wsgi,
    unread,
    with_key,
)

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest installs tomli
    import tomli as tomllib

VECTORS = tomllib.loads(
    (Path(__file__).parents[2] / "vectors" / "requests.toml").read_text(encoding="utf-8")
)


class Failing(Memory):
    """An authority that answers with `error`."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        raise self._error


@pytest.fixture(autouse=True, scope="module")
def clock() -> Iterator[None]:
    with clock_at_now():
        yield


def inner_headers(answer: Answer) -> list[tuple[str, str]]:
    """The headers that MLflow got, with names in lower case; sorted for WSGI, which has no order."""
    if "headers" in answer.inner:
        return [(n.decode("latin-1"), v.decode("latin-1")) for n, v in answer.inner["headers"]]
    return sorted(
        (name.removeprefix("HTTP_").replace("_", "-").lower(), value)
        for name, value in answer.inner.items()
        if name.startswith("HTTP_") or name in ("CONTENT_LENGTH", "CONTENT_TYPE")
    )


def identity_of(kind: str) -> list[tuple[str, str]]:
    return [("x-hokusai-api-key-id", f"key_{kind}"), ("x-hokusai-user-id", owner(kind))]


# The vector file


@dataclass(frozen=True)
class Case:
    wire: Wire
    status: int
    code: str
    #: The caller that MLflow gets.
    kind: str | None
    lost: tuple[str, ...]
    adapters: tuple[Adapter, ...]


def fill(text: str) -> str:
    """Return `text` with keys, letters and base64 in place of its marks."""
    text = re.sub(r"\{a\*(\d+)\}", lambda match: "a" * int(match[1]), text)
    text = re.sub(r"\{(\w+)\}", lambda match: KEYS[match[1]], text)
    return re.sub(
        r"<b64 (.*?)>",
        lambda match: base64.b64encode(match[1].encode("latin-1")).decode(),
        text,
        flags=re.DOTALL,
    )


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def expand(case: dict[str, Any]) -> Iterator[Case]:
    codes = case["code"] if isinstance(case["code"], dict) else {"": case["code"]}
    methods, targets = listed(case.get("method", "GET")), listed(case.get("target", "/version"))
    variants = case.get("variants", [case.get("headers", [])])
    for method, target, headers, (kind, code) in product(methods, targets, variants, codes.items()):
        sent = tuple((name, fill(value)) for name, value in headers)
        if kind not in ("", "nobody"):
            sent = (*sent, ("X-API-Key", KEYS[kind]))
        yield Case(
            Wire(method, fill(target), sent),
            VECTORS["status"][code],
            code,
            case.get("as") or (kind if kind in PRINCIPALS else None),
            tuple(case.get("lost", ())),
            (through_asgi,) if "asgi_only" in case else tuple(ADAPTERS.values()),
        )


def test_vectors() -> None:
    wrong = []
    for case in VECTORS["case"]:
        for one in expand(case):
            for adapter in one.adapters:
                try:
                    check(one, adapter(one.wire))
                except (AssertionError, pytest.fail.Exception) as error:
                    wire = f"{one.wire.method} {one.wire.target[:99]!r} {one.wire.headers!r:.300}"
                    wrong.append(f"{case['id']}, {adapter.__name__}: {wire}\n{error}")
    assert not wrong, "\n".join(wrong)


def check(case: Case, answer: Answer) -> None:
    assert answer.status == case.status
    if case.code == "ALLOW":
        assert answer.inner is not None
        check_forwarding(case, answer)
        return
    assert answer.inner is None
    if case.wire.method.upper() != "HEAD":
        assert answer.code == case.code
    challenge = " ".join(answer.header("www-authenticate")).lower()
    assert ("bearer realm" in challenge) == (case.status in (401, 403))
    for secret in KEYS.values():
        assert secret.encode() not in answer.body


def check_forwarding(case: Case, answer: Answer) -> None:
    path = answer.inner.get("path") or (
        answer.inner["PATH_INFO"].encode("latin-1").decode("utf-8", "replace")
    )
    # MLflow might forward the headers of an unknown route to another host.
    unlisted = not classify(case.wire.method, path).rule
    lost = ("x-api-key", "authorization") if unlisted else case.lost
    expected = [
        (name.lower(), value)
        for name, value in case.wire.headers
        if name.lower() not in lost and not name.lower().replace("_", "-").startswith("x-hokusai-")
    ]
    if case.kind is not None and not unlisted:
        expected += identity_of(case.kind)
    if "headers" in answer.inner:
        assert inner_headers(answer) == expected
    else:
        merged: dict[str, str] = {}
        for name, value in expected:
            value = value.strip(" \t")
            merged[name] = f"{merged[name]},{value}" if name in merged else value
        assert inner_headers(answer) == sorted(merged.items())


def test_every_vector_that_a_request_can_express_has_a_case() -> None:
    # Vectors 15 and 17 are about bytes on a connection, 24 about time. They have tests of their own.
    numbers = {int(case["id"][:2]) for case in VECTORS["case"]}
    assert numbers == set(range(1, 28)) - {15, 17, 24}


# Refusals


@both
def test_refusal_says_what_kind_of_key_to_send(adapter: Adapter) -> None:
    answer = adapter(Wire())
    assert answer.status == 401
    assert [value.split()[0] for value in answer.header("www-authenticate")] == ["Bearer"]
    assert answer.header("content-type") == ["application/json"]
    assert answer.header("x-content-type-options") == ["nosniff"]
    assert answer.header("cache-control") == ["no-store"]
    assert answer.header("content-length") == [str(len(answer.body))]


@both
def test_refusal_of_head_has_no_body(adapter: Adapter) -> None:
    answer = adapter(Wire("HEAD"))
    assert (answer.status, answer.body) == (401, b"")
    assert answer.header("content-length") == adapter(Wire("GET")).header("content-length")
    # A server frames the answer by the exact method, and breaks off one that is too short.
    answer = adapter(Wire("head"))
    assert answer.body and answer.header("content-length") == [str(len(answer.body))]


@both
def test_authority_that_fails_never_allows(adapter: Adapter) -> None:
    for error in (AuthorityUnavailable("down"), RuntimeError("bug"), KeyError("x")):
        failing = make_gate(Failing(error))
        for kind in ("read", "admin", "unknown"):
            answer = adapter(with_key(kind), failing)
            assert answer.verdict == (503, "AUTHORITY_UNAVAILABLE"), (error, kind)
            assert answer.header("retry-after") in [["1"], ["2"], ["3"], ["4"]]
        assert adapter(Wire(target="/health"), failing).code == "ALLOW"


@both
def test_only_allowed_origins_can_read_refusals(adapter: Adapter) -> None:
    allowed = (UI, "http://localhost:5173", "http://localhost")
    others = (
        "http://localhost.evil.example",
        "https://ui.example.evil.example",
        "https://evil.example",
        "null",
        "",
    )
    wrong = []
    for origin in allowed + others:
        refused = adapter(Wire(headers=(("Origin", origin),)))
        found = [
            refused.header(f"access-control-allow-{name}") for name in ("origin", "credentials")
        ]
        found.append(refused.header("vary"))
        expected = [[origin], ["true"], ["Origin"]] if origin in allowed else [[], [], []]
        if (refused.status, found) != (401, expected):
            wrong.append(f"{origin!r}: {refused.status} {found}, not 401 {expected}")
    assert not wrong, "\n".join(wrong)


@both
def test_cors_can_be_for_all_or_for_none(adapter: Adapter) -> None:
    wire = Wire(headers=(("Origin", "https://evil.example"),))
    everybody = adapter(wire, make_gate(cors=Cors(("*",), "")))
    assert everybody.header("access-control-allow-origin") == ["*"]
    assert everybody.header("access-control-allow-credentials") == []
    nobody = adapter(wire, make_gate(cors=Cors(("*",), "", enabled=False)))
    assert nobody.header("access-control-allow-origin") == []


@both
def test_query_key_can_be_switched_off_and_still_reaches_nobody(adapter: Adapter) -> None:
    off = make_gate(policy=Policy(query_key=False))
    wire = Wire(target=f"/version?api_key={READ}&x=1")
    assert adapter(wire, off).code == "KEY_MISSING"
    answer = adapter(replace(wire, headers=(("X-API-Key", READ),)), off)
    assert answer.code == "ALLOW"
    assert READ not in str(answer.inner.get("query_string", answer.inner.get("QUERY_STRING")))


# Forwarding


#: A query, and the same query without its key.
QUERIES = {
    "api_key=@KEY@": "",
    "x=%2F+1&api_key=@KEY@&&y=\u00e9&x": "x=%2F+1&&y=%E9&x",
    "x=1&api%5Fkey=@KEY@": "x=1",
    "api_key=@KEY@&": "",
    "x=a?b&y=%zz": "x=a?b&y=%zz",
    "xapi_key=1&api_keys=2&API_KEY=3": "xapi_key=1&api_keys=2&API_KEY=3",
    "": "",
}


@both
def test_mlflow_and_the_log_get_the_query_without_its_key(adapter: Adapter) -> None:
    wrong = []
    for (query, scrubbed), method in product(QUERIES.items(), ("GET", "POST")):
        target = "/mlflow/version?" + query.replace("@KEY@", READ)
        answer = adapter(Wire(method, target, (("X-API-Key", READ),)))
        assert (answer.inner is not None) == (method == "GET")
        for seen in filter(None, (answer.inner, answer.outer)):
            if "query_string" in seen:
                found = {seen["query_string"].decode("latin-1")}
            else:
                raw = [seen[name].partition("?") for name in ("RAW_URI", "REQUEST_URI")]
                assert {path for path, _, _ in raw} == {"/mlflow/version"}
                found = {seen["QUERY_STRING"], *(left for _, _, left in raw)}
            if found != {scrubbed}:
                wrong.append(f"{method} {query}: {found}, not {scrubbed!r}")
    assert not wrong, "\n".join(wrong)


def test_asgi_removes_the_prefix_from_path_and_raw_path_once() -> None:
    cases = {
        "/version": ("/version", b"/version"),
        "/mlflow/version": ("/version", b"/version"),
        "/api/mlflow/version": ("/version", b"/version"),
        "/mlflow/static-files/a%20b": ("/static-files/a b", b"/static-files/a%20b"),
        "/mlflow%2Fversion": ("/version", b"%2Fversion"),
        "/%6dlflow/static-files/a%20b": ("/static-files/a b", b"/static-files/a%20b"),
        "/mlflow/static-files/mlflow/x": ("/static-files/mlflow/x", b"/static-files/mlflow/x"),
    }
    for target, (path, raw) in cases.items():
        inner = through_asgi(with_key("read", "GET", target)).inner
        assert (inner["path"], inner["raw_path"], inner["root_path"]) == (path, raw, "")


def test_asgi_works_without_raw_path() -> None:
    inner = through_asgi(with_key("read", "GET", "/mlflow/static-files/a%20b"), raw_path=None).inner
    assert (inner["path"], inner["raw_path"]) == ("/static-files/a b", b"/static-files/a%20b")


def test_asgi_changes_nothing_but_the_query_in_the_server_s_scope() -> None:
    wire = with_key("read", "GET", f"/mlflow/version?api_key={READ}", ("X-Hokusai-User-Id", "root"))
    expected = {**scope_of(wire), "query_string": b""}
    assert through_asgi(wire).outer == expected


@both
def test_page_with_a_wrong_key_says_so_instead_of_asking_for_one(adapter: Adapter) -> None:
    page = ("Accept", "text/html")
    assert adapter(Wire(headers=(page,))).status == 303
    for kind, code in (("unknown", "KEY_UNKNOWN"), ("expired", "KEY_EXPIRED")):
        answer = adapter(with_key(kind, "GET", "/version", page))
        assert answer.verdict == (401, code) and answer.body.startswith(b"<!doctype")
        assert answer.header("www-authenticate")


@pytest.mark.usefixtures("one_minute")
@both
def test_refusal_that_will_end_is_a_page_in_a_browser_and_json_in_a_program(
    adapter: Adapter,
) -> None:
    page = ("Accept", "text/html,*/*;q=0.8")
    throttled = Failing(Throttled("busy", retry_after=42.0))
    down = Failing(AuthorityUnavailable("down", retry_after=7.0))
    often = make_gate(limits=Limits(failures_per_minute=1))
    adapter(with_key("unknown"), often)
    for gate_, kind, verdict, title, wait in (
        (make_gate(down), "read", (503, "AUTHORITY_UNAVAILABLE"), "Not available", "7 seconds"),
        (make_gate(throttled), "read", (429, "RATE_LIMITED"), "Too many requests", "42 seconds"),
        (often, "unknown", (429, "RATE_LIMITED"), "Too many requests", ""),
    ):
        target = f"/mlflow/hokusai/keys/find?q=1&api_key={KEYS[kind]}"
        answer = adapter(Wire("GET", target, (page,)), gate_)
        text, (after,) = answer.body.decode(), answer.header("retry-after")
        assert answer.verdict == verdict and answer.header("content-type")[0][:9] == "text/html"
        assert f"<h1>{title}" in text and f" Try again in {wait or f'{after} seconds'}.</p>" in text
        # The message does not say it as well.
        assert len(re.findall(r"[0-9] s\b|second|later", text)) == 1
        assert 'href="../../hokusai/keys/find?q=1">Try again' in text
        assert answer.header("content-security-policy") == [
            browser.PAGE_HEADERS["Content-Security-Policy"]
        ]
        assert KEYS[kind][8:] not in text
        for wire in (
            with_key(kind),
            with_key(kind, "GET", "/version", ("Accept", "application/json")),
            with_key(kind, "POST", "/api/2.0/mlflow/runs/create", page),
        ):
            assert adapter(wire, gate_).body.startswith(b"{"), wire


def test_asgi_refuses_a_root_path() -> None:
    shown = through_asgi(Wire(headers=(("Accept", "text/html"),)), root_path="/mlflow")
    assert shown.verdict == (503, "MISCONFIGURED") and b"<h1>This server is set" in shown.body
    for mode, wire in product(MODES, (Wire(target="/health"), with_key("admin"))):
        answer = through_asgi(wire, make_gate(mode=Mode(mode)), root_path="/mlflow")
        assert answer.verdict == (503, "MISCONFIGURED"), (mode, wire)
        assert answer.header("retry-after")


def test_wsgi_removes_the_prefix_once() -> None:
    for target, script, path in [
        ("/version", "", "/version"),
        ("/mlflow/version", "/mlflow", "/version"),
        ("/api/mlflow/version", "/api/mlflow", "/version"),
        ("/mlflow/static-files/mlflow/x", "/mlflow", "/static-files/mlflow/x"),
    ]:
        inner = through_wsgi(with_key("read", "GET", target)).inner
        assert (inner["SCRIPT_NAME"], inner["PATH_INFO"]) == (script, path)


def test_wsgi_decides_on_script_name_and_path_together() -> None:
    expected = {
        ("/x", "/health"): "KEY_MISSING",
        ("/health", ""): "ALLOW",
        ("/health", "/x"): "KEY_MISSING",
        ("/mlflow", "/health"): "ALLOW",
        ("/mlflow", "/mlflow/health"): "KEY_MISSING",
        ("/mlf", "low/health"): "ALLOW",
    }
    found = {
        (script, path): through_wsgi(Wire(), SCRIPT_NAME=script, PATH_INFO=path).code
        for script, path in expected
    }
    assert found == expected


@both
def test_bare_prefix_redirects_to_its_slash(adapter: Adapter) -> None:
    for target, location in {
        "/mlflow": "mlflow/",
        "/api/mlflow": "mlflow/",
        "/api/mlflow?a=b%20c&d": "mlflow/?a=b%20c&d",
        f"/mlflow?api_key={READ}&a=b": "mlflow/?a=b",
        f"/mlflow?api_key={READ}": "mlflow/",
    }.items():
        answer = adapter(with_key("read", "GET", target))
        assert (answer.status, answer.body, answer.inner) == (308, b"", None), target
        assert answer.header("location") == [location], target
        assert answer.header("content-length") == ["0"], target


@both
def test_headers_arrive_as_they_were_sent(adapter: Adapter) -> None:
    headers = (
        ("Accept", "a, b;q=0.5"),
        ("X-API-Key", KEYS["read"]),
        ("X-Odd", "\u00e9\u00ff\t "),
        ("Cookie", "a=b"),
        ("X-Twice", "2"),
        ("Content-Length", "7"),
        ("X-Twice", "1"),
        ("Authorization", f"Bearer {KEYS['read']}"),
    )
    wire = Wire("GET", "/version", headers)
    check_forwarding(Case(wire, 200, "ALLOW", "read", (), (adapter,)), adapter(wire))


@both
def test_identity_headers_are_ascii_for_every_owner(adapter: Adapter) -> None:
    odd = Principal("key_read", "Zoë\r\nX-Evil: 1 %", frozenset({"mlflow:read"}))
    answer = adapter(with_key("read"), make_gate(Memory({"read": odd})))
    assert dict(inner_headers(answer))["x-hokusai-user-id"] == "Zo%C3%AB%0D%0AX-Evil: 1 %25"


@both
def test_provider_gets_its_own_credential_and_none_of_ours(adapter: Adapter) -> None:
    for method, target, kind in [
        ("POST", "/gateway/mlflow/v1/chat/completions", "write"),
        ("POST", "/mlflow/gateway/proxy/openai/v1/models", "write"),
        ("GET", "/ajax-api/3.0/mlflow/assistant/config", "admin"),
    ]:
        provider = ("Authorization", "Bearer sk-provider")
        answer = adapter(with_key(kind, method, target, provider, ("X-Hokusai-User-Id", "root")))
        assert inner_headers(answer) == [("authorization", "Bearer sk-provider")]
        assert KEYS[kind] not in repr(answer.inner)


def test_asgi_gives_mlflow_the_owner() -> None:
    inner = through_asgi(with_key("read"), state={"shared": 1}).inner
    assert inner["state"] == {"shared": 1, "username": owner("read")}
    assert through_asgi(Wire(target="/health"), state={}).inner["state"] == {}


@both
def test_caller_of_one_request_is_not_the_caller_of_the_next(adapter: Adapter) -> None:
    seen = []

    original = asgi.callers.current

    class Recorder:
        def set(self, caller: Any) -> None:
            seen.append(caller)
            original.set(caller)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asgi.callers, "current", Recorder())
        adapter(with_key("admin"))
        adapter(Wire(target="/health"))
    # The WSGI adapter also says when a request is over.
    callers = [caller for caller in seen if caller is not asgi.callers.NOBODY]
    assert [caller.principal for caller in callers] == [PRINCIPALS["admin"], None]


# Scopes other than HTTP


def websocket(wire: Wire) -> tuple[list[Any], list[Any]]:
    """The messages that the server got, and the scopes that MLflow got, for a websocket."""
    called: list[Any] = []
    sent: list[Any] = []

    async def mlflow(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = scope_of(wire)
    del scope["method"]
    asyncio.run(AsgiGate(mlflow, GATE)({**scope, "type": "websocket"}, unread, send))
    return sent, called


def test_websocket_needs_admin() -> None:
    closed = [{"type": "websocket.close", "code": 1008}]
    for target in ("/health", "/version", "/", "/mlflow/health", "/mlflow"):
        for kind in ("read", "write", "typo"):
            assert websocket(with_key(kind, "", target)) == (closed, []), (target, kind)
        assert websocket(Wire("", target)) == (closed, []), target
    # A handshake that looks like a preflight is refused, too.
    headers = (("Origin", UI), ("Access-Control-Request-Method", "GET"))
    assert websocket(Wire("", "/x", headers))[1] == []


def test_websocket_with_an_admin_key_is_forwarded() -> None:
    sent, called = websocket(with_key("admin", "", "/mlflow/x"))
    assert sent == []
    assert [(scope["type"], scope["path"]) for scope in called] == [("websocket", "/x")]
    # The bare prefix gets no redirect, because that would be HTTP.
    sent, _ = websocket(with_key("admin", "", "/mlflow"))
    assert [message for message in sent if message["type"].startswith("http")] == []


def test_lifespan_is_forwarded_and_ends_after_the_last_writes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    happened: list[object] = []
    scope = {"type": "lifespan"}
    words = ["startup.complete", "startup.failed", "shutdown.complete", "shutdown.failed"]

    async def mlflow(given: Any, receive: Any, send: Any) -> None:
        assert (given, receive) == (scope, unread)
        for word in words:
            await send({"type": f"lifespan.{word}"})

    async def send(message: Any) -> None:
        happened.append(message["type"].removeprefix("lifespan."))

    def fails() -> None:
        raise OSError("disk full")

    gate = AsgiGate(mlflow, GATE, at_end=(fails, lambda: happened.append("at end")))
    asyncio.run(gate(scope, unread, send))
    assert happened == [*words[:2], "at end", words[2], "at end", words[3]]
    assert caplog.text.count("OSError: disk full") == 2


def test_process_ends_although_the_last_writes_stall(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(asgi, "MAX_END", 0.1)
    free = threading.Event()
    told: list[str] = []

    async def mlflow(given: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.shutdown.complete"})

    async def send(message: Any) -> None:
        told.append(message["type"])

    gate = AsgiGate(mlflow, GATE, at_end=(lambda: free.wait(30),))
    asyncio.run(gate({"type": "lifespan"}, unread, send))
    assert told == ["lifespan.shutdown.complete"] and not free.is_set()
    assert "counts are lost" in caplog.text
    free.set()


def test_unknown_scope_type_is_refused() -> None:
    async def unreachable(*_: Any) -> None:
        pytest.fail("the gate let it pass")

    for kind in ("", "http2", "HTTP", "webtransport", "tcp"):
        scope = scope_of(with_key("admin"), type=kind)
        with pytest.raises(RuntimeError, match="scope type"):
            asyncio.run(AsgiGate(unreachable, GATE)(scope, unread, unreachable))


# Faults


SHARED_FAULTS = [
    (Gate, "plan"),
    (Gate, "peek"),
    (Gate, "look_up"),
    (Gate, "conclude"),
    (gate, "plan"),
    (gate, "settle"),
    (policy, "classify"),
    (scopes, "granted"),
    (credentials, "find"),
    (keys, "problem"),
    (CachedBackend, "peek"),
    (CachedBackend, "lookup"),
    (Cors, "headers"),
    (prefix_paths.Prefixes, "split"),
    (flow, "without_query_key"),
    (flow, "dropped"),
    (flow, "identity_headers"),
    (flow, "Caller"),
    (flow, "slash_location"),
    (flow, "Request"),
    (flow, "render"),
    (flow, "Forward"),
    (flow, "Answer"),
]
#: The same names in each module.
ADAPTER_FAULTS = {
    "asgi": [(asgi, "flow"), (asgi, "raw_without"), (asgi, "callers")],
    "wsgi": [(wsgi, "flow"), (wsgi, "_headers"), (wsgi, "_set_query"), (wsgi, "caller")],
}


class Fault(Exception):
    pass


class _Broken:
    """Takes the place of a function or an object, and raises when it is used."""

    def __init__(self) -> None:
        self.used = 0

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.used += 1
        raise Fault

    def __getattr__(self, name: str) -> Any:
        return self()


def test_mlflow_is_not_called_whatever_fails() -> None:
    wires = (
        with_key("read", "GET", "/mlflow/version?a%5Fb=1"),
        with_key("read", "GET", f"/mlflow?api_key={READ}"),
        with_key("read", "POST", "/api/2.0/mlflow/experiments/create"),
        with_key("unknown"),
        Wire(headers=(("Origin", UI),)),
    )
    wrong = []
    for name, own in ADAPTER_FAULTS.items():
        for where, attribute in SHARED_FAULTS + own:
            what = f"{name} with a broken {where.__name__}.{attribute}"
            broken = _Broken()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(where, attribute, broken)
                fresh = make_gate()
                for wire in wires:
                    used, answer = broken.used, None
                    with contextlib.suppress(Fault):
                        answer = ADAPTERS[name](wire, fresh)
                    passed = answer and (answer.inner is not None or answer.status < 400)
                    if broken.used > used and passed:
                        wrong.append(f"{what}: {wire}")
            if not broken.used:
                wrong.append(f"{what}: no request came this way, so this proves nothing")
    assert not wrong, "\n".join(wrong)


# tests/adversarial/test_grammar.py has all kinds of requests; here is the query that a server logs


@both
def test_query_key_reaches_neither_mlflow_nor_the_log(adapter: Adapter) -> None:
    wrong = []
    for wire in {one.wire for case in VECTORS["case"] for one in expand(case)}:
        # A key in a path is not a credential, and stays.
        path = wire.target.partition("?")[0].replace(READ, "x")
        answer = adapter(replace(wire, target=f"{path}?a=1&api_key={READ}&%61pi_key=x"))
        for seen in filter(None, (answer.inner, answer.outer)):
            queries = [seen.get(name) for name in ("query_string", "QUERY_STRING", "RAW_URI")]
            if READ in str(queries):
                wrong.append(f"{wire}: {queries}")
        if READ in str(answer.header("location")):
            wrong.append(f"{wire}: {answer.header('location')}")
    assert not wrong, "\n".join(wrong)


@settings(max_examples=500)
@given(
    st.lists(
        st.sampled_from(["/mlflow", "/api/mlflow", "/api", "/mlflow/x", "/a/b/c", "/mlflo", "/x"]),
        unique=True,
    ),
    st.lists(
        st.sampled_from(["/", "//", "mlflow", "mlflo", "api", "a", "b", "c", "x", ";", "é"]),
        max_size=9,
    ).map(lambda parts: "/" + "".join(parts)),
)
def test_prefixes_split_as_werkzeugs_dispatcher_does(prefixes: list[str], path: str) -> None:
    def app(environ: Any, start_response: Any) -> list[Any]:
        return [environ["SCRIPT_NAME"], environ["PATH_INFO"]]

    dispatcher = DispatcherMiddleware(app, dict.fromkeys(prefixes, app))
    environ = {"PATH_INFO": path, "SCRIPT_NAME": ""}
    assert list(Prefixes(prefixes).split(path)) == dispatcher(environ, lambda *_: None)


# Answers from the cache


@both
def test_cached_principal_gets_a_new_verdict(adapter: Adapter) -> None:
    cached = make_gate()
    deadline = time.monotonic() + 30
    while cached.authority.peek(READ, "") is None:
        assert time.monotonic() < deadline
        assert adapter(with_key("read"), cached).code == "ALLOW"
    create = with_key("read", "POST", "/api/2.0/mlflow/experiments/create")
    assert adapter(create, cached).verdict == (403, "SCOPE_MISSING")
    assert adapter(with_key("other"), cached).code == "ALLOW"


@both
def test_authority_gets_the_client_s_address(adapter: Adapter) -> None:
    others = [(name, "203.0.113.9") for name in ("X-Real-IP", "Forwarded", "X-Forwarded")]
    forwarded = (others[0], ("X-Forwarded-For", "203.0.113.1, 198.51.100.7"), *others[1:])
    wire = with_key("read", "GET", "/version", *forwarded)
    for trusted, peer, address in (
        ([], "10.0.0.9", "10.0.0.9"),
        (["10.0.0.0/8"], "10.0.0.9", "198.51.100.7"),
        (["10.0.0.0/8"], "192.0.2.1", "192.0.2.1"),
    ):
        backend = Memory()
        gate = make_gate(backend, trusted=networks(trusted))
        # Each adapter reads one of the two.
        adapter(wire, gate, client=(peer, 1234), REMOTE_ADDR=peer)
        assert backend.addresses == [address], (trusted, peer)

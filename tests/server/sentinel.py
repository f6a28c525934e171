"""The gate around a sentinel in MLflow's place, driven in process as its servers drive it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest

from mlflow_hokusai_auth.authorities.cache import CachedBackend
from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.policy import Policy
from mlflow_hokusai_auth.core.prefixes import Prefixes
from mlflow_hokusai_auth.core.types import Access, Principal, Rejected
from mlflow_hokusai_auth.server.gate import gate as gate_module
from mlflow_hokusai_auth.server.gate.asgi import AsgiGate
from mlflow_hokusai_auth.server.gate.cors import Cors
from mlflow_hokusai_auth.server.gate.gate import Gate
from mlflow_hokusai_auth.server.gate.wsgi import wsgi_gate
from mlflow_hokusai_auth.server.observe.decision_log import DecisionLog

NOW = 2_000_000_000.0
PREFIXES = ("/mlflow", "/api/mlflow")
UI = "https://ui.example"


# The keys


def owner(kind: str) -> str:
    return f"{kind}@example.com"


def principal(kind: str, *scopes: str, **times: float) -> Principal:
    return Principal(f"key_{kind}", owner(kind), frozenset(scopes), **times)


PRINCIPALS = {
    "read": principal("read", "mlflow:read"),
    "other": principal("other", "mlflow:read"),
    "legacy": principal("legacy", "mlflow:read"),
    "write": principal("write", "mlflow:write"),
    "admin": principal("admin", "mlflow:admin"),
    "scopeless": principal("scopeless"),
    "expiring": principal("expiring", "mlflow:read", expires_at=NOW + 1),
    "ending": principal("ending", "mlflow:admin", expires_at=NOW),
    "expired": principal("expired", "mlflow:admin", expires_at=NOW - 1),
    "revoking": principal("revoking", "mlflow:read", revoked_at=NOW + 1),
    "revoked": principal("revoked", "mlflow:admin", revoked_at=NOW),
}
KEYS = {kind: keys.generate() for kind in (*PRINCIPALS, "unknown")}
KEYS["legacy"] = "hk_live_" + keys.generate()[8:40]
READ = KEYS["read"]
_body = READ[8:]
_turn = next(i for i in range(39) if _body[i] != _body[i + 1])
KEYS |= {
    "typo": READ[:20] + ("a" if READ[20] != "a" else "b") + READ[21:],
    "turned": f"hk_live_{_body[:_turn]}{_body[_turn + 1]}{_body[_turn]}{_body[_turn + 2 :]}",
    "cut": READ[:-1],
    "padded": READ + "0",
    "upper": READ.upper(),
}


class Memory:
    """An authority that keeps its keys in a dictionary."""

    name = "memory"
    by_address = False
    watched = True

    def __init__(self, principals: dict[str, Principal] | None = None) -> None:
        chosen = PRINCIPALS if principals is None else principals
        self.addresses: list[str] = []
        self.known = {KEYS[kind]: principal for kind, principal in chosen.items()}

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        self.addresses.append(address)
        return self.known.get(key) or Rejected()

    def generation(self) -> int:
        return 1


def make_gate(backend: Memory | None = None, **parts: Any) -> Gate:
    built = Gate(
        authority=CachedBackend(backend or Memory(), ttl=60, secret=b"s" * 32),
        policy=Policy(empty_scopes=Access.PUBLIC, assistant=True),
        prefixes=Prefixes(PREFIXES),
        cors=Cors((UI,), r"http://localhost(:\d+)?"),
        observer=DecisionLog(),
    )
    return replace(built, **parts)


GATE = make_gate()


@contextlib.contextmanager
def clock_at_now() -> Iterator[None]:
    """Stop the gate's clock at `NOW`."""
    with pytest.MonkeyPatch.context() as patch:
        still = SimpleNamespace(time=lambda: NOW, perf_counter=time.perf_counter)
        patch.setattr(gate_module, "time", still)
        yield


# The adapters, driven as their servers drive them


@dataclass(frozen=True)
class Wire:
    """A request in the form of the wire; each character up to U+00FF is a byte."""

    method: str = "GET"
    target: str = "/version"
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def split(self) -> tuple[bytes, bytes]:
        path, _, query = self.target.encode("latin-1").partition(b"?")
        return path, query


def with_key(kind: str, method: str = "GET", target: str = "/version", *more: Any) -> Wire:
    return Wire(method, target, (("X-API-Key", KEYS[kind]), *more))


@dataclass(frozen=True)
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    #: The scope or the environ that MLflow was called with, or None if it was not.
    inner: Any
    #: The scope or the environ that the server keeps, and logs from.
    outer: Any

    def header(self, name: str) -> list[str]:
        return [value for header, value in self.headers if header == name]

    @property
    def code(self) -> str:
        if self.inner is not None:
            return "ALLOW"
        return "REDIRECT" if self.status == 308 else code_of(self.body)

    @property
    def verdict(self) -> tuple[int, str]:
        if self.inner is None and not self.body and self.status != 308:
            return self.status, "(no body)"
        return self.status, self.code


def code_of(body: bytes) -> str:
    """The code in a refusal's body, which is JSON, or a page. Raises ValueError and KeyError."""
    if body.startswith(b"<!doctype") and (found := re.search(rb'"quiet">\d{3} ([A-Z_]+)', body)):
        return found[1].decode()
    return str(json.loads(body)["error"])


async def unread() -> Any:
    pytest.fail("the gate read from the request")


class _Unread:
    def __getattr__(self, name: str) -> Any:
        pytest.fail("the gate read from the request")


def scope_of(wire: Wire, **extra: Any) -> dict[str, Any]:
    path, query = wire.split
    return {
        "type": "http",
        "method": wire.method,
        "path": unquote_to_bytes(path).decode("utf-8", "replace"),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in wire.headers
        ],
        **extra,
    }


#: One for all requests: to make a loop takes longer than to answer.
_LOOP = asyncio.new_event_loop()


def through_asgi(wire: Wire, gate: Gate = GATE, **extra: Any) -> Answer:
    called: list[Any] = []
    sent: list[Any] = []

    async def mlflow(scope: Any, receive: Any, send: Any) -> None:
        assert receive is unread
        called.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"MLflow"})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = scope_of(wire, **extra)
    _LOOP.run_until_complete(AsgiGate(mlflow, gate)(scope, unread, send))
    assert len(called) <= 1
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    headers = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in sent[0]["headers"]]
    assert all(name == name.lower() for name, _ in headers)
    inner = called[0] if called else None
    return Answer(sent[0]["status"], headers, sent[1]["body"], inner, scope)


def environ_of(wire: Wire, **extra: Any) -> dict[str, Any]:
    path, query = wire.split
    environ: dict[str, Any] = {
        "REQUEST_METHOD": wire.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
        "QUERY_STRING": query.decode("latin-1"),
        "RAW_URI": wire.target,
        "REQUEST_URI": wire.target,
        "wsgi.input": _Unread(),
        **extra,
    }
    for name, value in wire.headers:
        variable = name.upper().replace("-", "_")
        if variable not in ("CONTENT_LENGTH", "CONTENT_TYPE"):
            variable = f"HTTP_{variable}"
        value = value.strip(" \t")
        environ[variable] = f"{environ[variable]},{value}" if variable in environ else value
    return environ


def through_wsgi(wire: Wire, gate: Gate = GATE, **extra: Any) -> Answer:
    called: list[Any] = []
    started: list[Any] = []

    def mlflow(environ: Any, start_response: Any) -> list[bytes]:
        called.append(dict(environ))
        start_response("200 OK", [])
        return [b"MLflow"]

    environ = environ_of(wire, **extra)
    answer = wsgi_gate(mlflow, gate)(
        environ, lambda status, headers: started.append((status, headers))
    )
    body = b"".join(answer)
    if close := getattr(answer, "close", None):
        close()
    assert len(called) <= 1
    ((status, headers),) = started
    lower = [(name.lower(), value) for name, value in headers]
    return Answer(int(status[:3]), lower, body, called[0] if called else None, environ)


Adapter = Callable[..., Answer]
ADAPTERS: dict[str, Adapter] = {"asgi": through_asgi, "wsgi": through_wsgi}


def both(test: Callable[..., None]) -> Callable[..., None]:
    """Run `test` with each adapter in turn, as one case, and report each adapter that fails.

    Fixtures are shared between the adapters.
    """

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        failures: dict[str, BaseException] = {}
        for name, adapter in ADAPTERS.items():
            try:
                test(adapter=adapter, **fixtures)
            except (Exception, pytest.fail.Exception) as error:
                failures[name] = error
        if failures:
            told = [f"{name}: {type(error).__name__}: {error}" for name, error in failures.items()]
            raise AssertionError("\n".join(told)) from next(iter(failures.values()))

    # pytest passes a fixture for each name in the signature, and there is none for adapters.
    signature = inspect.signature(test)
    others = [one for name, one in signature.parameters.items() if name != "adapter"]
    run.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
    return run

"""The cost of single steps in this process: medians in microseconds."""

from __future__ import annotations

import asyncio
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from statistics import median
from typing import Any
from unittest import mock

from mlflow_hokusai_auth.authorities.cache import CachedBackend
from mlflow_hokusai_auth.core import credentials, keys
from mlflow_hokusai_auth.core.policy import Policy, plan, settle
from mlflow_hokusai_auth.core.prefixes import Prefixes
from mlflow_hokusai_auth.core.types import NeedKey, Principal, Rejected, Request
from mlflow_hokusai_auth.server.gate.asgi import AsgiGate
from mlflow_hokusai_auth.server.gate.cors import Cors
from mlflow_hokusai_auth.server.gate.gate import Gate
from mlflow_hokusai_auth.server.observe.decision_log import DecisionLog

STATIC = "/api/2.0/mlflow/experiments/get"
PARAMETER = "/api/2.0/mlflow/logged-models/m-0123456789abcdef0123456789abcdef"
ALIAS = "/api/mlflow"

_BATCHES = 41
_BATCH_SECONDS = 0.008
_KEY = keys.generate()
#: The key of a CI job, from the exchange of its identity token.
_EXCHANGED = keys.generate(keys.EPHEMERAL)
_PRINCIPAL = Principal("key_0123456789abcdef", "bench", frozenset({"mlflow:write"}))
_PRINCIPALS = {
    _KEY: _PRINCIPAL,
    _EXCHANGED: replace(
        _PRINCIPAL, key_id="key_1", expires_at=4e9, source="github:acme/models@0#1"
    ),
}
#: 12 headers, about what a browser or the Python client behind a load balancer sends.
HEADERS = (
    (b"host", b"registry.example.com"),
    (b"user-agent", b"mlflow-python-client/3.17.2"),
    (b"accept-encoding", b"gzip, deflate, br, zstd"),
    (b"accept", b"*/*"),
    (b"connection", b"keep-alive"),
    (b"content-type", b"application/json"),
    (b"x-forwarded-for", b"203.0.113.7"),
    (b"x-forwarded-proto", b"https"),
    (b"x-forwarded-port", b"443"),
    (b"x-amzn-trace-id", b"Root=1-67891233-abcdef012345678912345678"),
    (b"x-api-key", _KEY.encode()),
    (b"content-length", b"0"),
)
_QUERY = b"experiment_id=0"
_POLICY = Policy()


class _Store:
    """A backend that knows two keys and never changes."""

    name = "bench"
    by_address = False
    watched = True

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        return _PRINCIPALS.get(key) or Rejected()

    def generation(self) -> int:
        return 1


def costs() -> dict[str, float]:
    """Return the microseconds of each step."""
    static, parameter = (Request("GET", path, _QUERY, HEADERS) for path in (STATIC, PARAMETER))
    cache = _filled_cache()
    found = {
        "plan + settle, static route": _each(lambda: _decide(static)),
        "plan + settle, route with a parameter": _each(lambda: _decide(parameter)),
        "plan, no key (401)": _each(lambda: plan(Request("GET", STATIC, _QUERY, ()), _POLICY)),
        "find the key among 12 headers": _each(
            lambda: credentials.find(static, outbound=False, query_key=True)
        ),
        "keys.digest": _each(lambda: keys.digest(_KEY)),
        "CachedBackend.peek, hit": _each(lambda: cache.peek(_KEY, "")),
    }
    gate = Gate(cache, _POLICY, Prefixes(("/mlflow", ALIAS)), Cors((), ""), DecisionLog())
    ordinary, exchanged = asyncio.run(_added(gate, STATIC, _KEY, _EXCHANGED))
    found["AsgiGate, cache hit"] = ordinary
    found["AsgiGate, cache hit, exchanged key (hk_ci_)"] = exchanged
    (found["AsgiGate, cache hit, under /api/mlflow"],) = asyncio.run(
        _added(gate, ALIAS + STATIC, _KEY)
    )
    found.update(_header_provider())
    for module in ("mlflow_hokusai_auth", "mlflow_hokusai_auth.client.header_provider"):
        found[f"import {module}, after mlflow"] = median(_imported(module) for _ in range(3))
    return found


def _imported(module: str) -> float:
    """Measure imports in a new process that has already imported MLflow."""
    program = f"""
import mlflow.tracking, re, sys, time
for name in [name for name in sys.modules if name.startswith("mlflow_hokusai_auth")]:
    del sys.modules[name]  # An entry point that MLflow has loaded.
re.purge()
begun = time.perf_counter()
import {module}
print((time.perf_counter() - begun) * 1e6)
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    return float(done.stdout)


def _decide(request: Request) -> None:
    need = plan(request, _POLICY)
    assert isinstance(need, NeedKey)
    settle(need, _PRINCIPAL, 1.7e9, _POLICY)


def _filled_cache() -> CachedBackend:
    cache = CachedBackend(_Store(), ttl=3600, secret=b"s" * 32)
    deadline = time.monotonic() + 5
    while None in [cache.peek(key, "") for key in _PRINCIPALS] and time.monotonic() < deadline:
        for key in _PRINCIPALS:
            cache.lookup(key, "")
        time.sleep(0.01)
    assert [cache.peek(key, "") for key in _PRINCIPALS] == [*_PRINCIPALS.values()]
    return cache


async def _added(gate: Gate, path: str, *keys_sent: str) -> list[float]:
    """Measure what the gate adds to a call of an empty application, with each key in turns."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 5000),
        "client": ("127.0.0.1", 40000),
        "scheme": "http",
        "method": "GET",
        "root_path": "",
        "path": path,
        "raw_path": path.encode(),
        "query_string": _QUERY,
        "state": {},
    }
    scopes = [{**scope, "headers": _headers(key)} for key in keys_sent]
    reached = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal reached
        reached += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def nothing(*_: Any) -> None: ...

    async def batch(
        application: Callable[..., Awaitable[None]], scope: dict[str, Any], calls: int
    ) -> float:
        begun = time.perf_counter()
        for _ in range(calls):
            await application(dict(scope), nothing, nothing)
        return (time.perf_counter() - begun) / calls * 1e6

    guarded = AsgiGate(app, gate)
    turns = [
        [await batch(guarded, one, 300) for one in scopes] + [await batch(app, scopes[0], 300)]
        for _ in range(_BATCHES)
    ]
    assert reached == 300 * (len(scopes) + 1) * _BATCHES
    *those, bare = (median(column) for column in zip(*turns, strict=True))
    return [one - bare for one in those]


def _headers(key: str) -> list[tuple[bytes, bytes]]:
    return [(name, key.encode() if name == b"x-api-key" else value) for name, value in HEADERS]


def _header_provider() -> dict[str, float]:
    """Measure what the provider adds to MLflow's `http_request`, without the sending itself."""
    try:
        module = importlib.import_module("mlflow_hokusai_auth.client.header_provider")
    except ImportError:
        return {}
    from mlflow.tracking.request_header import registry
    from mlflow.utils import rest_utils

    origin = "http://127.0.0.1:5000"
    creds = rest_utils.MlflowHostCreds(origin)
    provider = module.HokusaiHeaderProvider()
    known = registry._request_header_provider_registry._registry
    others = [one for one in known if type(one) is not type(provider)]
    sent: list[dict[str, str]] = []

    def call() -> None:
        rest_utils.http_request(creds, STATIC, "GET", params={"experiment_id": "0"})

    def batch(providers: list[Any]) -> float:
        with mock.patch.object(registry._request_header_provider_registry, "_registry", providers):
            begun = time.perf_counter()
            for _ in range(100):
                call()
            return (time.perf_counter() - begun) * 1e4

    def answer(*_: Any, headers: dict[str, str], **__: Any) -> None:
        sent[:] = [headers]

    settings = {"HOKUSAI_API_KEY": _KEY, "MLFLOW_TRACKING_URI": origin}
    with (
        mock.patch.dict(os.environ, settings),
        mock.patch.object(rest_utils, "_get_http_response_with_retries", answer),
    ):
        pairs = [(batch([*others, provider]), batch(others)) for _ in range(_BATCHES)]
        batch([*others, provider])
        added = sent[0].get("X-API-Key") == _KEY
    if not added:
        return {"header provider (it added no key)": float("nan")}
    return {
        "header provider, per http_request": median(a for a, _ in pairs)
        - median(b for _, b in pairs),
    }


def _each(call: Callable[[], object]) -> float:
    """Return the median microseconds of one call, in batches that are long enough to time."""
    calls = 64
    while (one := _batch(call, calls)) < _BATCH_SECONDS:
        calls = max(calls * 2, int(calls * _BATCH_SECONDS / max(one, 1e-9)))
    return median(_batch(call, calls) for _ in range(_BATCHES)) / calls * 1e6


def _batch(call: Callable[[], object], calls: int) -> float:
    begun = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - begun

"""The third oracle: a key, sent as raw bytes in every place to each kind of server, shows nowhere.

Not in a log at DEBUG, an answer, a metric, the audit log, or the bytes of the key database. What goes
wrong meanwhile, and the ways that need no raw bytes, are in `tests/e2e/test_secrets.py`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlflow_hokusai_auth.core import keys
from tests.adversarial.test_spelling import CREATE, NAMES, THEIRS, spell
from tests.e2e.test_secrets import Told, wait_until
from tests.harness import SERVERS, serve
from tests.standin import Standin

pytestmark = pytest.mark.servers

#: Each kind of server, to say as much as it can be told to.
LOUD = {
    "uvicorn": (*SERVERS["uvicorn"][:-1], "--http h11 --log-level debug"),
    "httptools": (*SERVERS["httptools"][:-1], "--http httptools --log-level debug"),
    "gunicorn": ("--workers", "2", "--gunicorn-opts", "--log-level debug --access-logfile -"),
    "waitress": SERVERS["waitress"],
}


@pytest.fixture(params=NAMES)
def told(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Told]:
    with (
        Standin() as service,
        serve(
            tmp_path,
            LOUD[request.param],
            MLFLOW_LOGGING_LEVEL="DEBUG",
            HOKUSAI_AUTH_TRUSTED_PROXIES="127.0.0.1",
            HOKUSAI_AUTH_DEBUG_HEADERS="true",
            HOKUSAI_AUTH_LOG_READS="1",
        ) as server,
    ):
        told = Told(server, service)
        told.run("log-level", "debug")
        wait_until(lambda: "The log level is now DEBUG" in server.log)
        yield told


def basic(text: str) -> str:
    return f"Authorization: Basic {base64.b64encode(text.encode()).decode()}"


#: Where a key is put, and in which headers; none of these is answered by MLflow unless the key is good.
HEADERS: dict[str, Callable[[str], str]] = {
    "header": lambda key: f"X-API-Key: {key}",
    "header in capitals": lambda key: f"X-API-KEY:{key}",
    "Bearer": lambda key: f"Authorization: Bearer {key}",
    "no scheme": lambda key: f"Authorization: {key}",
    "ApiKey": lambda key: f"Authorization: ApiKey {key}",
    "Basic": lambda key: basic(f"u:{key}"),
    "Basic, as the user": lambda key: basic(f"{key}:"),
    "Digest": lambda key: f'Authorization: Digest username="{key}"',
    "proxy": lambda key: f"Proxy-Authorization: Bearer {key}",
    "X_API_Key": lambda key: f"X_API_Key: {key}",
    "X-API_Key": lambda key: f"X-API_Key: {key}",
    "twice": lambda key: f"X-API-Key: {key}\r\nX-API-Key: {key}",
    "twice in one": lambda key: f"X-API-Key: {key}, {key}",
    "cookie": lambda key: f"Cookie: api_key={key}; session={key}",
    "session": lambda key: f"Cookie: hokusai_session={key}",
    "Referer": lambda key: f"Referer: http://localhost/?api_key={key}",
    "User-Agent": lambda key: f"User-Agent: {key}/1.0",
    "X-Request-Id": lambda key: f"X-Request-Id: {key}",
    "X-Forwarded-For": lambda key: f"X-Forwarded-For: {key}",
    "traceparent": lambda key: f"traceparent: {key}",
    "Origin": lambda key: f"Origin: http://{key}",
    "MLflow's own": lambda key: f"X-MLflow-Authorization: Bearer {key}",
    "Host": lambda key: f"Host: {key}",
    "Accept": lambda key: f"Accept: text/html, {key}",
    "Expect": lambda key: f"Expect: {key}",
    "Content-Type": lambda key: f"Content-Type: {key}",
    "a name": lambda key: f"{key}: x",
    # What a server refuses by itself.
    "space before the colon": lambda key: f"X-API-Key : {key}",
    "no colon": lambda key: f"X-API-Key {key}",
    "folded": lambda key: f"X-API-Key: x\r\n {key}",
    "NUL": lambda key: f"X-API-Key: {key}\0",
    "length": lambda key: f"Content-Length: {key}",
    "encoding": lambda key: f"Transfer-Encoding: {key}",
    "too long": lambda key: f"X-API-Key: {key}{'a' * 70_000}",
}
TARGETS = {
    "query": "/version?api_key={}",
    "query below the prefix": "/mlflow/version?x=1&api_key={}&y=2",
    "query, encoded": "/version?%61pi%5Fkey={}",
    "query, another name": "/version?token={}",
    "query, no name": "/version?{}",
    "query of health": "/health?api_key={}",
    "query of the prefix": "/mlflow?api_key={}",
    "query of a page": "/?next=/%3Fapi_key={}",
    "path": "/{}",
    "path below the prefix": "/api/mlflow/{}/x",
    "path of a route": "/api/2.0/mlflow/runs/{}",
    "path of our own": "/api/2.0/hokusai/keys/{}",
    "path of a file": "/static-files/{}",
    "parameter": "/version;key={}",
    "fragment": "/version#{}",
    "absolute form": "http://localhost/{}",
    "host of absolute form": "http://{}/version",
    "user of absolute form": "http://u:{}@localhost/version",
    "no slash": "{}",
}


def requests(make: Callable[[str], str]) -> Iterator[tuple[str, bytes]]:
    """Where a key is, and what is sent."""
    for place, header in HEADERS.items():
        for line in (
            "GET /version HTTP/1.1",
            f"POST {CREATE} HTTP/1.1",
            "POST /gateway/x/y HTTP/1.1",
        ):
            yield place, spell(line, header(make(place)))
    for place, target in TARGETS.items():
        for method in ("GET", "POST", "OPTIONS"):
            yield place, spell(f"{method} {target.format(make(place))} HTTP/1.1")
            line = f"{method} {target.format(make(place))} HTTP/1.1"
            yield place, spell(line, "Accept: text/html")
    yield "method", spell(f"{make('method')} /version HTTP/1.1")
    yield "version", spell(f"GET /version {make('version')}")
    for place, kind, text in (
        ("body of JSON", "application/json", '{{"name": "{0}", "api_key": "{0}"}}'),
        ("body of a form", "application/x-www-form-urlencoded", "key={0}&api_key={0}"),
        ("body of bytes", "application/octet-stream", "{0}"),
        ("body that is cut", "application/json", '{{"name": "{0}'),
    ):
        for line in (f"POST {CREATE}", "POST /hokusai/login", "POST /graphql", "GET /version"):
            body = text.format(make(place))
            headers = (f"Content-Type: {kind}", f"Content-Length: {len(body)}")
            yield place, spell(f"{line} HTTP/1.1", *headers, body=body)


def test_canary_appears_nowhere(told: Told) -> None:
    server, sent = told.server, 0
    canaries: dict[str, Callable[[str], str]] = {
        "good": told.made,
        "unknown": told.secret,
        "damaged": lambda at: told.secret(at, keys.generate()[:-1] + "?"),
    }
    for kind, make in canaries.items():
        for place, data in requests(lambda at, k=kind, m=make: m(f"{k}, {at}")):
            answer = server.raw(data).decode("latin-1")
            sent += 1
            # What a server refuses by itself it may repeat, to whoever sent it.
            if not answer.partition("\r\n\r\n")[2].encode("latin-1").startswith(THEIRS):
                told.texts.append((f"the answer to {kind}, {place}", answer))
    admin = told.made("the administrator")
    # MLflow repeats to an administrator what was asked for; its log must not.
    for place, body in (("filter", '{{"filter": "{}"}}'), ("broken", "{{{}")):
        text = body.format(told.secret(place)).encode()
        told.ask(place, "POST", "/api/2.0/mlflow/runs/search", {"X-API-Key": admin}, text, True)
    metrics = told.ask("metrics", "GET", "/hokusai/metrics", {"X-API-Key": admin})
    assert b"hokusai_auth_requests_total" in metrics[2]
    told.run("audit", "--json", "--limit", "100000")
    told.run("keys", "list", "--json")

    # All this was told of, or nothing could have been in it.
    assert server.log.count('"event": "request"') > sent / 2
    assert server.log.count("hk_live_***") > 50
    leaks = told.leaks()
    assert not leaks, f"{len(leaks)} leaks:\n" + "\n".join(leaks[:40])

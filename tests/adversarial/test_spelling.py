"""Bytes on a socket, to real servers: however a request is spelt, none is answered without a key.

uvicorn with h11 and with httptools, gunicorn and waitress read bytes differently, so every case
goes to each of them. What comes back must be a refusal of ours or the server's own; anything else
was made by MLflow.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import pytest
from mlflow.version import VERSION

from mlflow_hokusai_auth.core import keys
from tests.e2e.test_running import wait_until
from tests.harness import Server
from tests.server.sentinel import code_of

NAMES = ("uvicorn", "httptools", "gunicorn", "waitress")
#: How the bodies of the servers' own refusals begin.
THEIRS = (
    b"Invalid HTTP request received.",
    b"<html>\n  <head>\n    <title>",
    b"Bad Request\r\n\r\n",
    b"Not Implemented\r\n\r\n",
)
CREATE = "/api/2.0/mlflow/experiments/create"
PREFLIGHT = ("Origin: https://evil.example", "Access-Control-Request-Method: POST")


@pytest.fixture(params=NAMES)
def server(request: pytest.FixtureRequest, servers: dict[str, Server]) -> Iterator[Server]:
    """Each kind of server, in which nothing may break meanwhile."""
    server = servers[request.param]
    before = len(server.log)
    yield server
    logged = server.log[before:]
    assert "Traceback" not in logged
    assert "Exception in ASGI application" not in logged


@pytest.fixture(params=NAMES[:3])
def unbuffered(request: pytest.FixtureRequest, servers: dict[str, Server]) -> Server:
    # Not waitress, which takes in a whole body before it calls the app.
    return servers[request.param]


@dataclass(frozen=True)
class Answer:
    status: int
    head: bytes
    body: bytes

    @property
    def ours(self) -> str | None:
        """The code of our refusal, if that is what this is."""
        try:
            return code_of(self.body)
        except (ValueError, KeyError, TypeError):
            return None

    @property
    def theirs(self) -> bool:
        return 400 <= self.status < 506 and self.body.startswith(THEIRS)

    @property
    def whole(self) -> bool:
        length = re.search(rb"\r\ncontent-length: *(\d+)", self.head, re.IGNORECASE)
        return length is None or int(length[1]) == len(self.body)


def spell(request_line: str, *headers: str, body: str = "") -> bytes:
    lines = [request_line, "Host: localhost", *headers, "Connection: close", "", body]
    return "\r\n".join(lines).encode("latin-1")


def ask(server: Server, data: bytes) -> Answer:
    """The one answer to `data`, which must have the server close the connection."""
    answer = server.raw(data)
    assert answer.startswith(b"HTTP/1."), (data[:200], answer[:200])
    head, _, body = answer.partition(b"\r\n\r\n")
    assert not re.search(rb"HTTP/1\.[01] \d\d\d ", body), f"more than one answer to {data[:200]!r}"
    return Answer(int(head.split()[1]), head, body)


def first_bytes(server: Server, data: bytes) -> bytes:
    """What the server says first, on a connection that both leave open."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(data)
        return connection.recv(65536)


# Nobody's requests

METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "get", "PoSt", "post", "head", "FOO"]
METHODS += ["TRACE", "CONNECT", "PROPFIND", "G\tET", "GET\0", "\u00ff"]
TARGETS = [
    "/", "//", "////", "*", "/version", "//version", "/version/", "/mlflow", "/mlflow/",
    "/api/mlflow", "/mlflow//version", "//mlflow/version", "/mlflow/mlflow/version",
    "/mlflow/mlflow/health",
    CREATE, f"/{CREATE}", f"///{CREATE}", f"/mlflow{CREATE}", f"/api/mlflow/{CREATE}", f"{CREATE}/",
    "/%61pi/2.0/mlflow/experiments/search", "/%2561pi/2.0/mlflow/experiments/search",
    "/%2Fapi/2.0/mlflow/experiments/search", "%2Fapi%2F2.0%2Fmlflow%2Fexperiments%2Fsearch",
    "/mlflow%2Fapi/2.0/mlflow/experiments/search", "/%2Fmlflow%2Fversion", "/%c1%a8ealth",
    "/./health", "/health/../version", "/health/%2e%2e/version", "/x/../health", "/../health",
    "/static-files/%2e%2e/version", "/static-files/../health", "/mlflow/../version",
    "/health;x=1", "/;/health", "/version;/health", "/health/", "/health%20", "/health%00",
    "/health%0a", "/health%0d%0aX:%20y", "/health\\", "\\health", "/HEALTH", "/healthz",
    "/health/x", "/health%23", "/health%3f", "/health%3Fx", "/version#/health", "/version?/health",
    "/%",
    "/health%", "/%zz", "/health\u00ff", "/\u00ff", "/health\0", "/version\x0b",
    "x/health", "health", "x", "version", "http://localhost/version", "http://localhost",
    "http://localhost/health/../version", "http:///version", "https://a:b@localhost/version#/health",
    "//localhost/health/x", "localhost:80", "/ajax-api/2.0/mlflow/experiments/search",
    "/get-artifact?path=x", "/graphql", "/metrics", "/docs", "/openapi.json", "/static-files/x",
    "/gateway/mlflow/v1/models", "/v1/traces", "/api/2.0/hokusai/keys", "/api/2.0/hokusai/whoami",
    "/ajax-api/3.0/mlflow/assistant/config", "/ajax-api/3.0/jobs/search",
]  # fmt: skip


class Wrong(list[str]):
    """What was answered otherwise than it has to be."""

    def unless(self, as_it_should_be: object, *what: object) -> None:
        if not as_it_should_be:
            self.append(repr(what))

    def unless_refused(self, answer: Answer, *what: object) -> None:
        self.unless(answer.ours == "KEY_MISSING" or answer.theirs, *what, answer)
        self.unless(answer.whole, "cut", *what, answer)


@pytest.fixture
def wrong() -> Iterator[Wrong]:
    wrong = Wrong()
    yield wrong
    assert not wrong, "\n".join(wrong)


def test_no_spelling_of_a_path_is_answered(server: Server, wrong: Wrong) -> None:
    for method, target in product(("GET", "POST"), TARGETS):
        wrong.unless_refused(ask(server, spell(f"{method} {target} HTTP/1.1")), method, target)


def test_no_spelling_of_a_method_is_answered(server: Server, wrong: Wrong) -> None:
    for method, target in product(METHODS, ("/version", f"//{CREATE}")):
        wrong.unless_refused(ask(server, spell(f"{method} {target} HTTP/1.1")), method, target)


def test_no_version_of_http_is_answered(server: Server, wrong: Wrong) -> None:
    for version in ("HTTP/1.0", "HTTP/2.0", "HTTP/0.9", "HTTP/1.2", "http/1.1", "X"):
        wrong.unless_refused(ask(server, spell(f"GET /version {version}")), version)


def test_only_health_is_public(server: Server, wrong: Wrong) -> None:
    for target in ("/health", "/mlflow/health", "/api/mlflow/health", "/%68ealth", "/health?x=1"):
        answer = ask(server, spell(f"GET {target} HTTP/1.1"))
        wrong.unless((answer.status, answer.body) == (200, b"OK"), target, answer)
    # Some servers make /health of these; all there is to learn from them is that.
    for target in ("/health#/x", "/health\t", "http://localhost/health", "http:/health"):
        answer = ask(server, spell(f"GET {target} HTTP/1.1"))
        if answer.body != b"OK":
            wrong.unless_refused(answer, target)
    # HAProxy asks so by default.
    answer = ask(server, spell("OPTIONS /health HTTP/1.0"))
    wrong.unless(answer.status == 200, "OPTIONS", answer)
    for method in ("POST", "PUT", "DELETE", "FOO", "TRACE"):
        wrong.unless_refused(ask(server, spell(f"{method} /health HTTP/1.1")), method)


HEADERS = [
    "SCRIPT_NAME: /x",
    "Script-Name: /x",
    "PATH_INFO: /health",
    "X-Script-Name: /x",
    "X-Forwarded-Prefix: /x",
    "X-Forwarded-Uri: /health",
    "X-Original-URL: /health",
    "X-Rewrite-URL: /health",
    "X-HTTP-Method-Override: GET",
    "REMOTE_USER: root",
    "X-Forwarded-User: root",
    "X-Hokusai-User-Id: root",
    "X-Hokusai-API-Key-Id: key_1",
    "Host: a/health?",
    "Host: localhost/health#",
    "Host:",
    "Forwarded: for=127.0.0.1;host=localhost",
    "X-Forwarded-For: 127.0.0.1",
    "Authorization: Basic OnBhc3N3b3Jk",
    "Cookie: session=x",
    "Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__",
    "Transfer-Encoding: identity",
    "Transfer-Encoding : chunked",
    "Content-Length: -1",
    "Content-Length: +1",
    "Content-Length: 0x1",
    "Content-Length: 1\r\nContent-Length: 2",
    "Content-Length: 1, 2",
    ": x",
    "no colon",
    " folded: x",
    "X: a\r\n /health HTTP/1.1",
    "X: a\0b",
    "X: a\rb",
    "X\u00ff: a",
]


def test_no_header_opens_anything(server: Server, wrong: Wrong) -> None:
    codes = ("KEY_MISSING", "KEY_MALFORMED", "KEY_UNKNOWN")
    lines = ("GET /x/health HTTP/1.1", "GET /version HTTP/1.1", f"POST {CREATE} HTTP/1.1")
    for header, line in product(HEADERS, lines):
        answer = ask(server, spell(line, header))
        refused = answer.status == 401 and answer.ours in codes
        # A Host that is none, which a line folded into it makes of it, too.
        refused = refused or (answer.status, answer.ours) == (400, "HEADER_MALFORMED")
        wrong.unless(refused or answer.theirs, line, header, answer)


ANY_ORIGIN = VERSION.startswith("3.9.")


def test_preflight_reveals_nothing(server: Server, wrong: Wrong) -> None:
    targets = (CREATE, "/version", "/mlflow/version", "/x", "*", "x")
    for method, target in product(("OPTIONS", "options"), targets):
        answer = ask(server, spell(f"{method} {target} HTTP/1.1", *PREFLIGHT))
        short = len(answer.body) < 100 or answer.theirs or answer.ours or answer.status == 404
        # MLflow 3.9 by itself lets every origin read its answers. A session's cookie is refused
        # from other sites all the same (core/browser.py).
        told = not ANY_ORIGIN and b"access-control-allow-origin" in answer.head.lower()
        wrong.unless(answer.status < 500 and short and not told, method, target, answer)


# Requests with a key that may only read


def created(server: Server) -> set[str]:
    query = json.dumps({"max_results": 1000}).encode()
    status, _, body = server.request(
        "POST", "/api/2.0/mlflow/experiments/search", key=server.key("mlflow:admin"), body=query,
        headers={"Content-Type": "application/json"},
    )  # fmt: skip
    assert status == 200
    return {experiment["name"] for experiment in json.loads(body)["experiments"]}


def create(server: Server, line: str, name: str, *headers: str) -> Answer:
    body = json.dumps({"name": name})
    length = f"Content-Length: {len(body)}"
    return ask(server, spell(line, "Content-Type: application/json", length, *headers, body=body))


def test_no_spelling_lets_a_read_key_write(server: Server, wrong: Wrong) -> None:
    may_write = f"X-API-Key: {server.key('mlflow:write')}"
    may_read = f"X-API-Key: {server.key('mlflow:read')}"
    answer = create(server, f"POST {CREATE} HTTP/1.1", "spelled-well", may_write)
    assert answer.status == 200 or b"already exists" in answer.body
    targets = [target for target in TARGETS if "create" in target]
    targets += [f"{CREATE}?_method=GET", "/%61pi/2.0/mlflow/experiments/create", CREATE.upper()]
    targets += [CREATE.replace("/", "//"), CREATE[1:], f"http://localhost{CREATE}"]
    targets += [f"{CREATE}#/version", CREATE.replace("/api", "/ajax-api")]
    targets += [f"/version/..{CREATE}", f"/version;{CREATE}"]
    for method, target in product(("POST", "post", "PoSt", "GET"), targets):
        answer = create(server, f"{method} {target} HTTP/1.1", "smuggled", may_read)
        wrong.unless(answer.ours == "SCOPE_MISSING" or answer.theirs, method, target, answer)
    for override in ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"):
        for line in (f"POST {CREATE}", "GET /api/2.0/mlflow/experiments/search"):
            value = f"{override}: {'GET' if line.startswith('POST') else 'POST'}"
            create(server, f"{line} HTTP/1.1", "smuggled", may_read, value)
    assert "smuggled" not in created(server)
    assert "spelled-well" in created(server)


BAD_HEADERS = [
    ["X-API-Key: {key}", "X-API-Key: {other}"],
    ["X-API-Key: {other}", "x-api-key: {key}"],
    ["X-API-Key: {key}, {other}"],
    ["X-API-Key: {key}", "Authorization: Bearer {other}"],
    ["X-API-Key: {key}", " {other}"],
    ["X-API-Key: {key}", "\tx"],
    ["X-API-Key:", " x", " {key}"],
    ["X-API-Key : {key}"],
    ["X-API-Key\t: {key}"],
    [" X-API-Key: {key}"],
    ["X_API_Key: {key}"],
    ["X-API_Key: {key}"],
    ["X-API-Key: {key}\0"],
    ["X-API-Key: {key}\0, x"],
    ["X-API-Key: {key}\u00e9"],
    ["X-API-Key: \u00a0{key}"],
    ["X-API-Key: {key}\x0b"],
    ["X-API-Key: {key}\rX: y"],
    ["X-API-Key: {key}" + "a" * 300],
    ["X-API-Key: {key}" + "a" * 65000],
    ["Authorization: Bearer {key} {other}"],
    ["Authorization: {key}"],
    ["Cookie: X-API-Key={key}"],
    ["X: y\0", "X-API-Key: {key}\x85"],
]


def test_a_good_key_in_a_bad_header_is_refused(server: Server, wrong: Wrong) -> None:
    keys = {"key": server.key("mlflow:read"), "other": server.key("mlflow:admin")}
    for lines in BAD_HEADERS:
        headers = [line.format_map(keys) for line in lines]
        answer = ask(server, spell("GET /version HTTP/1.1", *headers))
        ours = str(answer.ours).startswith(("KEY_", "HEADER_")) and answer.status in (400, 401)
        wrong.unless(ours or answer.theirs or answer.status == 431, str(lines)[:60], answer)


def test_one_header_twice(server: Server) -> None:
    header, other = (f"X-API-Key: {server.key(scope)}" for scope in ("mlflow:read", "mlflow:admin"))
    answer = ask(server, spell("GET /version HTTP/1.1", header, header))
    assert answer.status == 200
    answer = ask(server, spell("GET /version HTTP/1.1", header, other))
    assert (answer.status, answer.ours) == (400, "KEY_CONFLICT")


# Bodies that nobody reads


def test_refusal_does_not_wait_for_the_body(unbuffered: Server, wrong: Wrong) -> None:
    for line, framing in product(
        (f"POST {CREATE}", "PUT /api/2.0/mlflow-artifacts/artifacts/x", "GET /"),
        ("Content-Length: 300000000", "Transfer-Encoding: chunked"),
    ):
        head = f"{line} HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n"
        answer = first_bytes(unbuffered, head.encode())
        wrong.unless(answer.startswith(b"HTTP/1.1 401 "), line, framing, answer)


@pytest.mark.parametrize("name", ["uvicorn", "httptools"])
def test_refused_client_is_not_asked_for_its_body(servers: dict[str, Server], name: str) -> None:
    # gunicorn and waitress say 100 Continue themselves, before they call the app.
    head = f"POST {CREATE} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n"
    answer = first_bytes(servers[name], head.encode())
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"100 Continue" not in answer


def test_no_second_request_hides_in_a_body(server: Server, wrong: Wrong) -> None:
    may_read = f"X-API-Key: {server.key('mlflow:read')}"
    hidden = f"GET /version HTTP/1.1\r\nHost: a\r\n{may_read}\r\n\r\n"
    for framing in (
        [f"Content-Length: {len(hidden) + 5}", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Content-Length: 5"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: identity"],
        ["Transfer-Encoding: chunked, chunked"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding:\x0bchunked"],
        ["Content-Length: 5", f"Content-Length: {len(hidden) + 5}"],
        [f"Content-Length: {len(hidden) + 5}", f"Content-Length: {len(hidden) + 5}"],
        ["Content-Length : 5"],
        ["Content-Length: 5 "],
    ):
        # `ask` fails if there is a second answer.
        data = spell(f"POST {CREATE} HTTP/1.1", *framing, body=f"0\r\n\r\n{hidden}")
        answer = ask(server, data)
        refused = answer.ours == "KEY_MISSING" or answer.theirs or answer.status == 501
        wrong.unless(refused, framing, answer)


def test_a_websocket_is_not_opened(unbuffered: Server) -> None:
    upgrade = (
        "Upgrade: websocket", "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    )  # fmt: skip
    for target in ("/", "/health/x", "/version", "/mlflow/ws", "/gateway/ws"):
        lines = [f"GET {target} HTTP/1.1", "Host: localhost", "Connection: Upgrade", *upgrade]
        answer = first_bytes(unbuffered, "\r\n".join([*lines, "", ""]).encode())
        assert re.match(rb"HTTP/1.1 40[13] ", answer), answer


# Secrets


def test_no_key_is_left_in_the_servers_log(server: Server) -> None:
    _, good = server.store.create(owner="canary", scopes=["mlflow:read"])
    for key in (good, keys.generate(), "hk_live_" + keys.generate()[8:40]):
        for method, target in [
            ("GET", f"/version?api_key={key}"),
            ("GET", f"/mlflow/version?x=1&api_key={key}&y=2"),
            ("GET", f"/version?api%5Fkey={key}"),
            ("GET", f"/version?%61%70i_key={key}"),
            ("GET", f"/version?x={key}&API_KEY={key}"),
            ("GET", f"/mlflow?api_key={key}"),
            ("GET", f"/version?api_key={key}&api_key={key}x"),
            ("POST", f"{CREATE}?api_key={key}"),
            ("GET", f"/nowhere?api_key={key}"),
            ("GET", f"/health?api_key={key}"),
            ("OPTIONS", f"/version?api_key={key}"),
            ("GET", f"/version?api\t_key={key[:4]}\t{key[4:]}"),
            ("GET", f"/{key}"),
            ("GET", f"/mlflow/{key}/x"),
            ("GET", f"/static-files/{key}?{key}"),
            ("GET", f"/version#{key}"),
            ("GET", f"http://localhost/version?api_key={key}"),
            ("GET", f"http://{key}/version"),
        ]:
            data = spell(f"{method} {target} HTTP/1.1", f"Referer: http://a/?api_key={key}")
            assert key.encode() not in ask(server, data).head
        # With the key in a header as well, so that MLflow itself sees the request.
        for target in ("static-files/", "api/2.0/mlflow/experiments/get?experiment_id="):
            ask(server, spell(f"GET /{target}{key} HTTP/1.1", f"X-API-Key: {good}"))
        assert key[8:] not in server.log


@pytest.mark.parametrize("name", ["uvicorn", "httptools", "gunicorn"])
def test_log_still_has_the_requests(servers: dict[str, Server], name: str) -> None:
    key = keys.generate()
    ask(servers[name], spell(f"GET /version?a={name}&api_key={key}&b=%2F HTTP/1.1"))
    wait_until(lambda: f"/version?a={name}&b=%2F" in servers[name].log, 60)

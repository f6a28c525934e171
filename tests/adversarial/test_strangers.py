"""Bytes from somebody without a key, to real servers: what they cost, and what the log says."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.harness import SERVERS, Server, serve

pytestmark = pytest.mark.servers

NAMES = ("uvicorn", "httptools", "gunicorn", "waitress")
LOGIN = "POST /hokusai/login HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n"
FORM = "Content-Type: application/x-www-form-urlencoded\r\n"
PREFLIGHT = "Origin: http://localhost:3000\r\nAccess-Control-Request-Method: POST\r\n"
CREATE = "/api/2.0/mlflow/experiments/create"
#: Seconds until a server must have answered, however busy the machine is.
PATIENCE = 120


@pytest.fixture(params=NAMES)
def server(request: pytest.FixtureRequest, servers: dict[str, Server]) -> Iterator[Server]:
    server = servers[request.param]
    before = len(server.log)
    yield server
    logged = server.log[before:]
    for said in ("Traceback", "Exception in ASGI application", "ASGI callable", "Internal Server"):
        assert said not in logged, logged[-3000:]


def rest_of(connection: socket.socket) -> bytes:
    """Everything that the server still sends."""
    answer = b""
    try:
        while data := connection.recv(65536):
            answer += data
    except ConnectionResetError:
        pass  # what we sent was not read
    return answer


def ask(server: Server, *parts: bytes, half: bool = False) -> bytes:
    """All that the server answers to `parts`; `half` closes our half of the connection first."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as connection:
        for part in parts:
            connection.sendall(part)
        if half:
            connection.shutdown(socket.SHUT_WR)
        return rest_of(connection)


def verdict(answer: bytes) -> tuple[int, str]:
    """The status, and the code where it is a refusal of ours."""
    head, _, body = answer.partition(b"\r\n\r\n")
    try:
        code = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        code = ""
    return int(head.split()[1]) if head else 0, code


def get(path: str, *headers: str, method: str = "GET", host: str = "Host: localhost") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *([host] if host else []), *headers, "Connection: close"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def test_too_many_headers_are_refused_before_they_are_read(server: Server) -> None:
    wrong = []
    for path in ("/health", "/version", "/hokusai/login"):
        for headers in (
            [f"X-{number}: a" for number in range(101)],
            ["X-API-Key: " + "," * 6000, *(f"X-{number}: {'a' * 6000}" for number in range(5))],
        ):
            found = verdict(ask(server, get(path, *headers)))
            # gunicorn has limits of its own, and waitress one for all of the head.
            if found not in ((431, "HEADERS_TOO_LARGE"), (431, ""), (400, "")):
                wrong.append(f"{path}: {found}")
    assert not wrong, "\n".join(wrong)


def test_host_or_origin_that_can_not_be_read_is_400(server: Server) -> None:
    wrong = []
    for path in ("/health", "/version", "/hokusai/login", "/", "/mlflow/health", "/nowhere"):
        for host, *headers in (
            ("Host: [",),
            ("Host: [::1",),
            ("Host: a:99999",),
            ("Host: \xff",),
            ("Host: a/b",),
            ("Host: localhost", "Origin: \xff"),
            ("Host: localhost", "Origin: http://["),
            ("Host: localhost", "Origin: http://a:99999"),
        ):
            found = verdict(ask(server, get(path, *headers, host=host)))
            # h11 and gunicorn refuse some of them before they call the app.
            if found not in ((400, "HEADER_MALFORMED"), (400, "")):
                wrong.append(f"{path} {host!r} {headers}: {found}")
    assert not wrong, "\n".join(wrong)


def test_query_that_is_no_text_makes_no_failure(server: Server) -> None:
    """gunicorn and waitress take any byte of it; the log is checked by `server`."""
    wrong = []
    for path in ("/health", "/hokusai/login", "/mlflow/hokusai/login", "/nowhere"):
        for query in ("\xff", "next=\xff", "next=/\xc3", "api_key=\xff&a=\xff"):
            found = verdict(ask(server, get(f"{path}?{query}")))
            if found[0] not in (200, 400, 401):
                wrong.append(f"{path}?{query!r}: {found}")
    assert not wrong, "\n".join(wrong)


def test_public_answer_does_not_depend_on_headers(server: Server) -> None:
    wrong = []
    for method, path in (
        ("GET", "/health"),
        ("OPTIONS", "/health"),
        ("GET", "/api/health/mlflow"),
        ("GET", "/hokusai/login"),
        ("GET", "/hokusai/static/hokusai.css"),
        ("OPTIONS", CREATE),
    ):
        more = PREFLIGHT.split("\r\n")[:2] if path == CREATE else []
        expected = verdict(ask(server, get(path, *more, method=method)))
        for header in (
            "X-MLFLOW-WORKSPACE: x",
            "X_MLFLOW_WORKSPACE: x",
            "x-mlflow_workspace: x",
            "Range: bytes=0-0,1-1",
            "Forwarded: host=[",
            "X-Forwarded-Host: [",
        ):
            found = verdict(ask(server, get(path, *more, header, method=method)))
            if found != expected or expected[0] >= 400:
                wrong.append(f"{method} {path}, {header}: {found}, not {expected}")
    assert not wrong, "\n".join(wrong)


def test_report_of_leaks_is_404_before_its_body_where_it_is_not_configured(
    servers: dict[str, Server],
) -> None:
    head = (
        "POST /api/2.0/hokusai/keys/leaked HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
    )
    for name in NAMES[:3]:  # waitress takes in a body before it calls the app
        with socket.create_connection(("127.0.0.1", servers[name].port), PATIENCE) as connection:
            connection.sendall(head.encode())
            answer = b""
            while not answer.endswith(b"}") and (data := connection.recv(65536)):
                answer += data
            assert verdict(answer) == (404, "NOT_CONFIGURED"), name


def test_body_that_breaks_off_or_is_malformed_leaves_no_traceback(server: Server) -> None:
    """The log is checked by `server`. An answer is a refusal, or none."""
    chunked = "Transfer-Encoding: chunked\r\n\r\n"
    wrong = []
    for start in (
        LOGIN + FORM,
        f"POST {CREATE} HTTP/1.1\r\nHost: localhost\r\n",
        "GET /health HTTP/1.1\r\nHost: localhost\r\n",
        "GET /nowhere HTTP/1.1\r\nHost: localhost\r\n",
        f"OPTIONS {CREATE} HTTP/1.1\r\nHost: localhost\r\n{PREFLIGHT}",
    ):
        for framing, *rest in (
            (chunked + "zz\r\n",),
            (chunked, "zz\r\n"),
            (chunked + "3\r\nkey\r\n", "zz\r\n"),
            (chunked + "3\r\nkeyzz\r\n",),
            (chunked + "5\r\nke",),
            ("Content-Length: 10\r\n\r\nkey",),
            ("Content-Length: 10\r\n\r\n", "key"),
        ):
            answer = ask(
                server, (start + framing).encode(), *(one.encode() for one in rest), half=True
            )
            if answer and not re.match(rb"HTTP/1.1 4\d\d ", answer):
                wrong.append(f"{start[:40]!r} {framing[-30:]!r}: {answer[:80]!r}")
            # The same, and nobody is there for the answer.
            with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as connection:
                connection.sendall((start + framing).encode())
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert not wrong, "\n".join(wrong)
    assert verdict(ask(server, get("/health"))) == (200, "")


def drip(server: Server, stop: threading.Event) -> bytes:
    """Send a form byte by byte until there is an answer."""
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as connection:
        connection.sendall(f"{LOGIN}{FORM}Content-Length: 4000\r\n\r\n".encode())
        connection.settimeout(0.25)
        while not stop.is_set():
            try:
                first = connection.recv(65536)
            except TimeoutError:
                connection.sendall(b"x")
            else:
                connection.settimeout(PATIENCE)
                return first + rest_of(connection)
    return b""


def test_dripped_form_is_ended(servers: dict[str, Server]) -> None:
    # waitress reads bodies without a thread, ends a connection that is silent, and calls nobody.
    names = NAMES[:3]
    answers: dict[str, bytes] = {}
    stop = threading.Event()

    def run(name: str) -> None:
        answers[name] = drip(servers[name], stop)

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    stop.set()
    assert {name: verdict(answer) for name, answer in answers.items()} == dict.fromkeys(
        names, (408, "BODY_TIMEOUT")
    )


def test_malformed_host_is_refused_in_every_mode(tmp_path_factory: pytest.TempPathFactory) -> None:
    for mode in ("observe", "off"):
        folder = tmp_path_factory.mktemp(mode)
        with serve(folder, SERVERS["uvicorn"], HOKUSAI_AUTH_MODE=mode) as server:
            found = verdict(ask(server, get("/version", host="Host: [")))
            assert found == (400, "HEADER_MALFORMED"), mode
            assert verdict(ask(server, get("/health", "X-MLFLOW-WORKSPACE: x")))[0] == 200, mode
            # A request of MLflow's own clients reaches MLflow.
            assert verdict(ask(server, get("/version")))[0] == 200, mode
            assert "Traceback" not in server.log

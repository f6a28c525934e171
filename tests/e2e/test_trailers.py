"""Trailers, fields after a chunked body, change nothing: keys and addresses count from the head."""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path

import pytest

from tests.harness import SERVERS, Server, serve

pytestmark = pytest.mark.servers

#: One whose application is Flask's, and one whose is FastAPI's under uvicorn.
ROUTES = ("GET /api/2.0/mlflow/experiments/get?experiment_id=0", "POST /v1/traces")
FORM = "application/x-www-form-urlencoded"
KINDS = [kind for kind in SERVERS if kind != "workers"]
#: waitress removes X-Forwarded-For itself unless it is told not to.
OPTIONS = {**SERVERS, "waitress": ("--waitress-opts", "--no-clear-untrusted-proxy-headers")}


def ask(
    server: Server,
    route: str,
    *,
    head: tuple[str, ...] = (),
    body: str = "",
    trailers: tuple[str, ...] = (),
    apart: bool = False,
) -> tuple[int, bytes]:
    """The answer to a chunked request; the trailers come `apart`, or in one segment with the rest."""
    fields = ("Host: localhost", "Transfer-Encoding: chunked", "Connection: close", *head)
    lines = [f"{route} HTTP/1.1", *fields, ""]
    lines += [f"{len(body):x}", body] if body else []
    first = "\r\n".join([*lines, "0", ""]).encode()
    last = "\r\n".join([*trailers, "", ""]).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if apart:
            connection.sendall(first)
        # A server may have answered, and closed, before it read the trailers.
        with contextlib.suppress(ConnectionError):
            connection.sendall(last if apart else first + last)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(65536):
                answer += chunk
    return int(answer.split()[1]), answer


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_in_a_trailer_is_no_key(kind: str, servers: dict[str, Server]) -> None:
    server = servers[kind]
    key = server.key("mlflow:admin")
    wrong = []
    for route in ROUTES:
        good, _ = ask(server, route, head=(f"X-API-Key: {key}",))
        if good == 401:
            wrong.append(f"{route} with the key in the head: {good}")
        for trailer in (
            f"X-API-Key: {key}",
            f"Authorization: Bearer {key}",
            f"X_API_Key: {key}",
        ):
            for apart in (False, True):
                status, answer = ask(server, route, trailers=(trailer,), apart=apart)
                if (status, b"KEY_MISSING" in answer) != (401, True):
                    wrong.append(f"{route}, {trailer.partition(':')[0]}, {apart=}: {status}")
    assert wrong == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_trailer_replaces_no_header(kind: str, tmp_path: Path) -> None:
    with serve(tmp_path, OPTIONS[kind], HOKUSAI_AUTH_TRUSTED_PROXIES="127.0.0.1") as server:
        key = server.store.create(
            owner="test", scopes=("mlflow:read",), networks=("203.0.113.0/24",)
        )[1]

        def status(address: str, *trailers: str) -> int:
            head = (f"X-API-Key: {key}", f"X-Forwarded-For: {address}")
            return ask(server, ROUTES[0], head=head, trailers=trailers)[0]

        assert status("203.0.113.7") == 200
        assert status("198.51.100.1") == 403
        assert status("198.51.100.1", "X-Forwarded-For: 203.0.113.7") == 403
        assert status("203.0.113.7", "X-Forwarded-For: 198.51.100.1") == 200
        # A browser's headers on the origin of a request, on a route that needs no key.
        form, sign_in = "key=hk_live_x", "POST /hokusai/login"
        foreign = (f"Content-Type: {FORM}", "Sec-Fetch-Site: cross-site")
        own = ("Sec-Fetch-Site: same-origin",)
        found = ask(server, sign_in, head=foreign, body=form, trailers=own)[0]
        # Under gunicorn a stranger's body of unknown length is refused before it is read.
        assert found == (413 if kind == "gunicorn" else 403)


def test_a_trailer_stays_with_its_request(servers: dict[str, Server]) -> None:
    server = servers["httptools"]
    key = server.key("mlflow:read")
    first = (
        f"{ROUTES[0]} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        f"X-API-Key: {key}\r\n\r\n0\r\nX-API-Key: {key}\r\nX-Other: 1\r\n\r\n"
    )
    second = f"{ROUTES[0]} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = server.raw((first + second).encode())
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"401"], answer

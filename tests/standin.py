"""A strict stand-in for the Hokusai auth service, as a real HTTP server that can be told to fail.

In a test:  `with Standin() as service: key = service.add(...); AuthService(service.url).lookup(key)`
On its own: `python -m tests.standin --port 8000 --key-file keys.json`, where the file holds an object
of keys and their grants, `{"hk_test_…": {"user_id": "acme", "scopes": ["mlflow:write"]}}`, and is read
again for every call. `POST /standin {"kind": "status", "status": 503}` there sets the behaviour, and
`GET /standin` tells the counts.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mlflow_hokusai_auth.core import keys

PATH = "/api/v1/keys/validate"
#: What the pattern in the service's OpenAPI document allows.
SERVICES = ("platform", "prediction", "website")


@dataclass
class Grant:
    """What the service knows of a key."""

    user_id: str = "standin-user"
    scopes: list[str] = field(default_factory=lambda: ["mlflow:write"])
    key_id: str = "key_standin"
    service_id: str = "platform"
    #: "active", "expired" or "revoked".
    state: str = "active"
    #: Networks that the key may be sent from; any when empty.
    addresses: list[str] = field(default_factory=list)
    #: Fields that the reply has besides, such as email or roles.
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Behaviour:
    """How the service answers: `kind` names one of `_KINDS`, the rest is for the kinds that use it."""

    kind: str = "strict"
    seconds: float = 0.0
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | str = b""


@dataclass
class Call:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    body: bytes


class Standin:
    """The service on 127.0.0.1 and a port of its own, while the context lasts."""

    def __init__(
        self,
        port: int = 0,
        key_file: Path | None = None,
        tls: Any = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.grants: dict[str, Grant] = {}
        self.behaviour = Behaviour()
        self.calls: list[Call] = []
        self.connections = 0
        self._key_file = key_file
        self._host = host
        self._port = port
        self._tls = tls
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        return f"http{'s' if self._tls else ''}://{self._host}:{self._port}"

    def __enter__(self) -> Standin:
        self.come_back()
        return self

    def __exit__(self, *_: object) -> None:
        self.go()

    def add(self, **grant: Any) -> str:
        """A new key, with this grant."""
        key = keys.generate("test")
        self.grants[key] = Grant(**grant)
        return key

    def behave(self, kind: str, **details: Any) -> None:
        """Answer like this from now on; "strict" is the contract."""
        self.behaviour = Behaviour(kind, **details)

    def go(self) -> None:
        """Be gone: nothing listens, and connections that are open end."""
        if self._server is not None:
            self._server.end()
            self._server = None

    def come_back(self) -> None:
        """Listen (again), on the same port as before."""
        self._server = _Server(self, (self._host, self._port), self._tls)
        self._port = self._server.server_address[1]

    def verdict(self, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, Any]]:
        """The contract: status and JSON of the answer to these headers (names in lower case)."""
        if self._key_file is not None:
            kept = json.loads(self._key_file.read_text())
            self.grants = {key: Grant(**grant) for key, grant in kept.items()}
        try:
            fields = json.loads(body or b"{}")
        except ValueError:
            return 422, {"detail": [{"msg": "JSON decode error", "type": "json_invalid"}]}
        if not isinstance(fields, dict):
            return 422, {"detail": [{"msg": "not a dictionary", "type": "dict_type"}]}
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        key = bearer if scheme == "Bearer" and bearer else headers.get("x-api-key", "")
        if not key:
            if "api_key" in fields:
                return _refused("API key required")
            return 400, {"detail": "No API key provided"}
        grant = self.grants.get(key)
        if grant is None:
            return _refused("Invalid API key")
        if grant.state != "active":
            return _refused(f"API key {grant.state}")
        wanted = fields.get("service_id", grant.service_id)
        if wanted not in SERVICES or wanted != grant.service_id:
            return _refused("API key not valid for this service")
        address = ipaddress.ip_address(fields.get("client_ip", "127.0.0.1"))
        allowed = [ipaddress.ip_network(text) for text in grant.addresses]
        if allowed and not any(address in network for network in allowed):
            return _refused("IP address not allowed")
        return 200, {
            "is_valid": True,
            "key_id": grant.key_id,
            "user_id": grant.user_id,
            "service_id": grant.service_id,
            "scopes": grant.scopes,
            "rate_limit_per_hour": 1_000_000,
            "billing_plan": "free",
            "monthly_prediction_limit": None,
            "error": None,
            **grant.extra,
        }


def _refused(error: str) -> tuple[int, dict[str, Any]]:
    return 401, {"is_valid": False, "error": error}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    # As large as a test's crowd: a connection that waits for its first SYN again is slow.
    request_queue_size = 256

    def __init__(self, standin: Standin, address: tuple[str, int], tls: Any) -> None:
        self.standin = standin
        self.ending = threading.Event()
        self._tls = tls
        self._open: set[socket.socket] = set()
        super().__init__(address, _Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        connection.settimeout(30)
        self.standin.connections += 1
        if self._tls is not None:
            connection = self._tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, *_: object) -> None:
        """Say nothing: that clients hang up is what many tests are about."""

    def end(self) -> None:
        self.ending.set()
        self.shutdown()
        self.server_close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes; without this the second waits for the first one's ACK.
    disable_nagle_algorithm = True
    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/standin":
            self.server.standin.behave(**json.loads(body))
            return self.answer(200, b"{}")
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.standin.calls.append(Call(self.path, headers, body))
        if self.path != PATH:
            return self.answer(404, b'{"detail":"Not Found"}')
        self.strict = self.server.standin.verdict(headers, body)
        behaviour = self.server.standin.behaviour
        _KINDS[behaviour.kind](self, behaviour)

    def do_GET(self) -> None:
        if self.path != "/standin":
            self.server.standin.calls.append(Call(self.path, dict(self.headers), b""))
            return self.answer(405, b'{"detail":"Method Not Allowed"}')
        standin = self.server.standin
        counts = {"calls": len(standin.calls), "connections": standin.connections}
        self.answer(200, json.dumps(counts).encode())

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def drip(self, data: bytes, seconds: float) -> None:
        """`data`, a byte every `seconds`, for as long as the client listens."""
        with contextlib.suppress(OSError):
            for byte in data:
                if self.server.ending.wait(seconds):
                    break
                self.wfile.write(bytes([byte]))
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing, as pytest's output is for failures."""


def _strict(handler: _Handler, _: Behaviour) -> None:
    status, content = handler.strict
    handler.answer(status, json.dumps(content).encode())


def _slow(handler: _Handler, behaviour: Behaviour) -> None:
    """The right answer, `seconds` late; a black hole if that is longer than the client waits."""
    handler.server.ending.wait(behaviour.seconds)
    with contextlib.suppress(OSError):
        _strict(handler, behaviour)


def _broken(handler: _Handler, _: Behaviour) -> None:
    handler.answer(500, b'{"detail":"Internal Server Error"}')


def _html(handler: _Handler, behaviour: Behaviour) -> None:
    """A page with status 200 (or another), as a captive portal or a wrong load balancer has."""
    page = b"<html><body>Welcome, is_valid: true</body></html>"
    handler.answer(behaviour.status, page, **{"Content-Type": "text/html"})


def _status(handler: _Handler, behaviour: Behaviour) -> None:
    """`status`, `headers` and `body` as they are."""
    body = behaviour.body
    handler.answer(
        behaviour.status, body.encode() if isinstance(body, str) else body, **behaviour.headers
    )


def _truncate(handler: _Handler, _: Behaviour) -> None:
    """A whole JSON object of which the headers say that more will come, and an end."""
    body = json.dumps(handler.strict[1]).encode()
    handler.answer(handler.strict[0], body, **{"Content-Length": str(len(body) + 100)})
    handler.close_connection = True


def _cut(handler: _Handler, _: Behaviour) -> None:
    """Half of a JSON object, with the length of that half."""
    body = json.dumps(handler.strict[1]).encode()
    handler.answer(handler.strict[0], body[: len(body) // 2])


def _drip(handler: _Handler, behaviour: Behaviour) -> None:
    """The right answer, a byte of the body every `seconds`."""
    body = json.dumps(handler.strict[1]).encode()
    handler.answer(handler.strict[0], b"", **{"Content-Length": str(len(body))})
    handler.drip(body, behaviour.seconds)


def _drip_headers(handler: _Handler, behaviour: Behaviour) -> None:
    """A header without end, a byte every `seconds`."""
    handler.drip(b"HTTP/1.1 200 OK\r\nX-Filler: " + b"x" * 60_000, behaviour.seconds)


def _chunked(handler: _Handler, _: Behaviour) -> None:
    """The right answer in chunks of ten bytes, as servers send what has no known length."""
    body = json.dumps(handler.strict[1]).encode()
    parts = [body[start : start + 10] for start in range(0, len(body), 10)]
    handler.send_response(handler.strict[0])
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""]))


def _oversize(handler: _Handler, _: Behaviour) -> None:
    """The right answer, padded to 10 MB with spaces, which JSON allows."""
    body = json.dumps(handler.strict[1]).encode()
    handler.answer(handler.strict[0], body + b" " * 10_000_000)
    handler.close_connection = True


def _reset(handler: _Handler, _: Behaviour) -> None:
    """A TCP reset instead of an answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.rfile.close()
    handler.wfile.close()
    handler.connection.close()
    handler.close_connection = True


def _hang_up(handler: _Handler, _: Behaviour) -> None:
    """A connection that ends without an answer."""
    handler.close_connection = True


def _garbage(handler: _Handler, _: Behaviour) -> None:
    """Bytes that are no HTTP."""
    handler.wfile.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
    handler.close_connection = True


_KINDS: dict[str, Callable[[_Handler, Behaviour], None]] = {
    "strict": _strict,
    "slow": _slow,
    "broken": _broken,
    "html": _html,
    "status": _status,
    "truncate": _truncate,
    "cut": _cut,
    "drip": _drip,
    "drip_headers": _drip_headers,
    "chunked": _chunked,
    "oversize": _oversize,
    "reset": _reset,
    "hang_up": _hang_up,
    "garbage": _garbage,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for the Hokusai auth service.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--key-file", type=Path, required=True)
    options = parser.parse_args()
    standin = Standin(options.port, options.key_file, host=options.host)
    with standin, contextlib.suppress(KeyboardInterrupt):
        print(f"The stand-in answers at {standin.url}", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()

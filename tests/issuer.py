"""An issuer of identity tokens as a local HTTP server: its keys rotate, and it fails on demand."""

from __future__ import annotations

import base64
import json
import secrets
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

DISCOVERY = "/.well-known/openid-configuration"
#: Where a job of GitHub's asks its runner for a token.
RUNNER = "/runner/token"
#: A job's own credential for its runner.
REQUEST_TOKEN = secrets.token_hex(16)
#: Making an RSA key takes a tenth of a second and more, so there are few.
_RSA = [rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2)]


def rsa_key(number: int = 0) -> rsa.RSAPrivateKey:
    """Return one of two keys; `number` 1 is somebody else's."""
    return _RSA[number]


def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def jwk(key: Any, key_id: str, **more: object) -> dict[str, Any]:
    """Return the public half of `key`."""
    algorithm = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
    public: dict[str, Any] = algorithm.to_jwk(key.public_key(), as_dict=True)
    return {**public, "kid": key_id, "use": "sig", **more}


def signed(key: Any, header: Mapping[str, object], claims: bytes, algorithm: str = "") -> str:
    """Return a token of exactly these bytes of claims, whatever they say."""
    algorithm = algorithm or ("RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256")
    head = json.dumps({"typ": "JWT", "alg": algorithm, **header}).encode()
    text = f"{_part(head)}.{_part(claims)}"
    method = jwt.get_algorithm_by_name(algorithm)
    return f"{text}.{_part(method.sign(text.encode(), method.prepare_key(key)))}"


def _part(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Issuer:
    """A running issuer. Use it as a context manager, or call `close`."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {"rsa-1": rsa_key(), "ec-1": ec_key()}
        #: The claims of the job that asks the runner for tokens.
        self.job: dict[str, object] = {}
        #: The paths that were asked for, in this order.
        self.asked: list[str] = []
        #: Path -> (status, headers, body), in place of the usual answer.
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        #: Seconds before each answer.
        self.delay = threading.Event()
        self.delay.set()
        self._ids = 0
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked.append(self.path)
                issuer.delay.wait(30)
                if self.path.startswith(RUNNER):
                    status, headers, body = issuer.as_runner(self.path, self.headers)
                else:
                    status, headers, body = issuer.answer(self.path)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                try:
                    self.wfile.write(body)
                except OSError:
                    return

            def log_message(self, *_: object) -> None:
                return

        self._handler = Handler
        self._open(0)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def _open(self, port: int) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if path in self.answers:
            return self.answers[path]
        if path == DISCOVERY:
            content: object = {"issuer": self.url, "jwks_uri": f"{self.url}/jwks"}
        elif path == "/jwks":
            content = self.key_set()
        else:
            return 404, {}, b""
        return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()

    def as_runner(self, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        """Answer as GitHub's runner: a token of `job`'s claims for the audience that was asked for."""
        if headers.get("Authorization") != f"bearer {REQUEST_TOKEN}":
            return 401, {}, b""
        audience = parse_qs(urlsplit(path).query)["audience"][0]
        body = json.dumps({"value": self.token({**self.job, "aud": audience})}).encode()
        return 200, {"Content-Type": "application/json"}, body

    def runner(self) -> dict[str, str]:
        """Return the variables that GitHub's runner sets for a job that may have tokens."""
        return {
            "GITHUB_ACTIONS": "true",
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"{self.url}{RUNNER}?api-version=2.0",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": REQUEST_TOKEN,
        }

    def key_set(self) -> dict[str, Any]:
        return {"keys": [jwk(key, key_id) for key_id, key in self.keys.items()]}

    def rotate(self) -> None:
        """Replace both keys by others with new ids."""
        number = 1 + max(int(key_id.rpartition("-")[2]) for key_id in self.keys)
        self.keys = {f"rsa-{number}": rsa_key(1), f"ec-{number}": ec_key()}

    def token(self, claims: Mapping[str, object], key_id: str = "rsa-1", **header: object) -> str:
        """Return a token with `claims` besides the usual ones, which they may replace."""
        self._ids += 1
        now = int(time.time())
        usual = {
            "iss": self.url,
            "iat": now,
            "nbf": now,
            "exp": now + 300,
            "jti": f"id-{self._ids}",
        }
        content = {name: value for name, value in {**usual, **claims}.items() if value is not ...}
        return signed(self.keys[key_id], {"kid": key_id, **header}, json.dumps(content).encode())

    def stop(self) -> None:
        """Answer nobody, as a machine that is down."""
        self._server.shutdown()
        self._server.server_close()

    def start(self) -> None:
        """Answer again after `stop`, at the same address."""
        self._open(int(self.url.rpartition(":")[2]))

    def close(self) -> None:
        self.delay.set()
        self.stop()

    def __enter__(self) -> Issuer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

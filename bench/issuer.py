"""An OpenID Connect issuer: its discovery document, its key, and access tokens signed with it."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256

AUDIENCE = "bench"
_KEY_ID = "bench"


class Issuer:
    """Signs tokens with RS256, for the server that answers at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.discovery_url = f"{url}/.well-known/openid-configuration"
        self._key = generate_private_key(public_exponent=65537, key_size=2048)

    def token(self, *, seconds: int) -> str:
        """Return an administrator's access token; `seconds` until it expires may be negative."""
        now = int(time.time())
        claims = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": "bench",
            "email": "bench@example.com",
            "name": "bench",
            "groups": ["mlflow-admin"],
            "iat": now + min(0, seconds) - 60,
            "exp": now + seconds,
        }
        header = {"alg": "RS256", "typ": "JWT", "kid": _KEY_ID}
        parts = [_encoded(json.dumps(part).encode()) for part in (header, claims)]
        signature = self._key.sign(".".join(parts).encode(), PKCS1v15(), SHA256())
        return ".".join([*parts, _encoded(signature)])

    def documents(self) -> dict[str, Any]:
        """Return the JSON documents by their path."""
        numbers = self._key.public_key().public_numbers()
        jwk = {
            "kty": "RSA",
            "use": "sig",
            "alg": "RS256",
            "kid": _KEY_ID,
            "n": _encoded(numbers.n.to_bytes(256, "big")),
            "e": _encoded(numbers.e.to_bytes(3, "big")),
        }
        discovery = {
            "issuer": self.url,
            "jwks_uri": f"{self.url}/jwks",
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "id_token_signing_alg_values_supported": ["RS256"],
        }
        return {"/.well-known/openid-configuration": discovery, "/jwks": {"keys": [jwk]}}


@contextlib.contextmanager
def running() -> Iterator[Issuer]:
    """Yield an issuer that answers, on a thread of this process."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            document = documents.get(self.path)
            answer = json.dumps(document).encode()
            self.send_response(404 if document is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        issuer = Issuer(f"http://127.0.0.1:{server.server_port}")
        documents = issuer.documents()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield issuer
        finally:
            server.shutdown()
            thread.join()


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

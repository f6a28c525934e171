"""Two real servers, MLflow's real client, and an environment without personal settings."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
import pytest
from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry
from mlflow.tracking.default_experiment.registry import _default_experiment_provider_registry
from mlflow.tracking.request_auth.registry import _request_auth_provider_registry
from mlflow.tracking.request_header.registry import _request_header_provider_registry

from mlflow_hokusai_auth.client import ci_key, default_experiment, profile
from mlflow_hokusai_auth.client.artifacts import HokusaiArtifactRepository
from mlflow_hokusai_auth.client.auth_provider import HokusaiAuthProvider
from mlflow_hokusai_auth.client.default_experiment import HokusaiDefaultExperimentProvider
from mlflow_hokusai_auth.client.header_provider import HokusaiHeaderProvider
from mlflow_hokusai_auth.core import keys

FILE = b"content of the artifact"


@dataclass
class Seen:
    """One received request."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def keys(self) -> list[str]:
        return [value for name, value in self.headers if name.lower() == "x-api-key"]

    @property
    def text(self) -> str:
        return f"{self.method} {self.path} {self.headers} {self.body!r}"


@dataclass
class Server:
    """A server that answers like an empty MLflow server and records every request."""

    port: int = 0
    seen: list[Seen] = field(default_factory=list)
    #: path (without query) -> status and Location to answer with
    redirects: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def saw(self, secret: str) -> bool:
        return any(secret in request.text for request in self.seen)


class Handler(BaseHTTPRequestHandler):
    """A handler that reads the whole request, then answers with `answer`."""

    def answer(self, body: bytes) -> tuple[int, dict[str, str | None], bytes] | None:
        """Return status, headers (None: omitted) and body; or None to hang up without an answer."""
        raise NotImplementedError

    def _answer(self) -> None:
        answer = self.answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        if answer is None:
            return
        status, headers, content = answer
        with contextlib.suppress(OSError):
            self.send_response_only(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def listening(handler: type[BaseHTTPRequestHandler], **attributes: Any) -> Iterator[int]:
    """The port of a server with `handler`, on which these attributes are set."""
    made = type("Handler", (handler,), attributes)
    server = ThreadingHTTPServer(("127.0.0.1", 0), made)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


class _MLflow(Handler):
    state: Server

    def answer(self, body: bytes) -> tuple[int, dict[str, str | None], bytes]:
        state = self.state
        state.seen.append(Seen(self.command, self.path, list(self.headers.items()), body))
        path = urlsplit(self.path).path
        if path in state.redirects:
            status, location = state.redirects[path]
            return status, {"Location": location}, b""
        answer, kind = self._content(path, self.path.endswith(".txt"))
        return 200, {"Content-Type": kind, "ETag": "etag"}, answer

    def _content(self, path: str, names_a_file: bool) -> tuple[bytes, str]:
        answer: dict[str, Any] = {}
        if path.endswith("/mlflow-artifacts/artifacts"):
            files = [{"path": "a.txt", "is_dir": False, "file_size": len(FILE)}]
            answer = {"files": [] if names_a_file else files}
        elif "/mlflow-artifacts/mpu/create" in path:
            part = {"url": f"{self.state.origin}/bucket/part", "part_number": 1, "headers": {}}
            answer = {"upload_id": "upload", "credentials": [part]}
        elif "/mlflow-artifacts/presigned" in path:
            answer = {
                "url": f"{self.state.origin}/bucket/file",
                "headers": {},
                "file_size": len(FILE),
            }
        elif self.command == "GET" and (path.endswith(".txt") or path == "/bucket/file"):
            return FILE, "application/octet-stream"
        return json.dumps(answer).encode(), "application/json"


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()
    with listening(_MLflow, state=state) as state.port:
        yield state


other = server


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A new home directory, and none of the variables that the client reads."""
    for name in list(os.environ):
        if name.startswith(("HOKUSAI_", "MLFLOW_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setattr(profile, "_warned", set())
    profile._files.clear()
    ci_key.forget()
    profile._parse_origins.cache_clear()
    default_experiment._answers = default_experiment._Answers()
    yield home
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)
    # Both setters write to the environment without monkeypatch's knowledge.
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True, scope="session")
def providers() -> None:
    """Register the providers as the entry points do, unless the package is installed."""
    for registry, provider in (
        (_request_header_provider_registry, HokusaiHeaderProvider),
        (_request_auth_provider_registry, HokusaiAuthProvider),
        (_default_experiment_provider_registry, HokusaiDefaultExperimentProvider),
    ):
        if not any(isinstance(known, provider) for known in registry):
            registry.register(provider)
    _artifact_repository_registry.register("mlflow-artifacts", HokusaiArtifactRepository)


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    made = keys.generate("test")
    monkeypatch.setenv("HOKUSAI_API_KEY", made)
    return made


@pytest.fixture
def tracking(server: Server, key: str) -> Server:
    """`server`, as MLflow's tracking server under a prefix, with a key configured."""
    mlflow.set_tracking_uri(f"{server.origin}/api/mlflow")
    return server

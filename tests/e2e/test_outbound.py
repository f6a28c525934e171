"""What leaves the server for a provider: never our key, our cookies or whom we took the caller for.

The provider is an HTTP server of the test's own, which keeps every request that it gets. MLflow is
told of it as an administrator would, through its REST API.
"""

from __future__ import annotations

import base64
import itertools
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.parts import post, python_path
from tests.harness import Server, serve

pytestmark = pytest.mark.servers

#: What a server takes to accept a provider at a plain http:// address on this machine.
ENVIRON = {
    "MLFLOW_GATEWAY_API_BASE_ALLOWED_SCHEMES": "http,https",
    "MLFLOW_GATEWAY_API_BASE_ALLOW_PRIVATE_IPS": "true",
    "MLFLOW_CRYPTO_KEK_PASSPHRASE": "a passphrase of the tests",
}
PROVIDERS = ("openai", "groq", "anthropic", "gemini", "typesafe")
#: What a provider's own key looks like in the tests, with the provider's name.
PROVIDER_KEY = "the-own-key-of-{}"
USER_AGENTS = ("python-requests/2", "claude-cli/1.0", "codex_cli_rs/0.1", "geminicli/1.0")
SESSION = "the-text-of-a-session"
#: Another's than ours: one of ours beside a key is refused, as nobody knows whose request that is.
COOKIES = f"the_session_of_a_proxy={SESSION}; other=x"

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
GEMINI = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}
#: Each route that calls out: path and body, for the endpoint named NAME.
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("mlflow/v1/chat/completions", {"model": "NAME", **CHAT}),
    "chat-stream": ("mlflow/v1/chat/completions", {"model": "NAME", "stream": True, **CHAT}),
    "invocations": ("NAME/mlflow/invocations", CHAT),
    "openai-chat": ("openai/v1/chat/completions", {"model": "NAME", **CHAT}),
    "openai-chat-stream": (
        "openai/v1/chat/completions",
        {"model": "NAME", "stream": True, **CHAT},
    ),
    "openai-embeddings": ("openai/v1/embeddings", {"model": "NAME", "input": "hi"}),
    "openai-responses": ("openai/v1/responses", {"model": "NAME", "input": "hi"}),
    "openai-compact": ("openai/v1/responses/compact", {"model": "NAME", "input": "hi"}),
    "anthropic": ("anthropic/v1/messages", {"model": "NAME", "max_tokens": 9, **CHAT}),
    "gemini": ("gemini/v1beta/models/NAME:generateContent", GEMINI),
    "gemini-stream": ("gemini/v1beta/models/NAME:streamGenerateContent", GEMINI),
    "systemone": ("typesafe/v1/systemone", {"model": "NAME", "input": "hi"}),
    "proxy": ("proxy/NAME/chat/completions", {"model": "m", **CHAT}),
}
#: Route and provider, wherever the provider of this MLflow has the route.
CALLS = [
    *((route, "openai") for route in ROUTES if route.startswith(("chat", "openai", "invo"))),
    *((route, "groq") for route in ROUTES if route.startswith(("chat", "openai-chat", "invo"))),
    ("anthropic", "anthropic"),
    ("gemini", "gemini"),
    ("gemini-stream", "gemini"),
    ("systemone", "typesafe"),
    *(("proxy", name) for name in ("openai", "groq", "anthropic", "gemini")),
]
PLACES = {
    "X-API-Key": "{}",
    "Authorization": "Bearer {}",
    "X-MLflow-Authorization": "Bearer {}",
}


@dataclass
class Upstream:
    """A provider, and what it got: (path, headers with lower-case names, body) of each request."""

    origin: str
    seen: list[tuple[str, list[tuple[str, str]], bytes]] = field(default_factory=list)

    def of(self, marker: str) -> list[tuple[str, list[tuple[str, str]], bytes]]:
        """The requests with `marker` somewhere in their headers."""
        return [one for one in self.seen if any(marker in value for _, value in one[1])]


def provider() -> Iterator[Upstream]:
    """A running `Upstream`, which answers in the form that each path asks for."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            headers = [(name.lower(), value) for name, value in self.headers.items()]
            upstream.seen.append((self.path, headers, body))
            kind, answer = _answer(self.path, body)
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    upstream = Upstream(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield upstream
    server.shutdown()
    server.server_close()


def _answer(path: str, body: bytes) -> tuple[str, bytes]:
    # Also what a judge is to say.
    text = json.dumps({"result": "yes", "rationale": "It reads well."})
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    base = {"id": "x", "created": 1, "model": "m", "usage": usage}
    if "streamGenerateContent" in path:
        return "text/event-stream", _events([_gemini(text)])
    if "generateContent" in path:
        return "application/json", json.dumps(_gemini(text)).encode()
    if path.endswith("/embeddings"):
        data = [{"object": "embedding", "index": 0, "embedding": [0.5]}]
        return "application/json", json.dumps({**base, "object": "list", "data": data}).encode()
    if path.endswith("/messages"):
        content = [{"type": "text", "text": text}]
        message = {"id": "x", "type": "message", "role": "assistant", "model": "m"}
        tokens = {"input_tokens": 1, "output_tokens": 1}
        answer = {**message, "content": content, "stop_reason": "end_turn", "usage": tokens}
        return "application/json", json.dumps(answer).encode()
    if json.loads(body or b"{}").get("stream"):
        delta = {"index": 0, "delta": {"role": "assistant", "content": text}}
        chunk = {**base, "object": "chat.completion.chunk", "choices": [delta]}
        return "text/event-stream", _events([chunk]) + b"data: [DONE]\n\n"
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    answer = {**base, "object": "chat.completion", "choices": [choice], "output": []}
    return "application/json", json.dumps(answer).encode()


def _gemini(text: str) -> dict[str, Any]:
    content = {"role": "model", "parts": [{"text": text}]}
    return {"candidates": [{"content": content, "finishReason": "STOP"}], "usageMetadata": {}}


def _events(chunks: list[dict[str, Any]]) -> bytes:
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)


def add_endpoint(server: Server, name: str, upstream: Upstream) -> None:
    """A gateway endpoint called like its provider, `name`, whose provider is `upstream`."""
    key, base = server.key("mlflow:admin"), "/api/3.0/mlflow/gateway"
    secret = post(
        server,
        f"{base}/secrets/create",
        key,
        {
            "secret_name": name,
            "secret_value": {"api_key": PROVIDER_KEY.format(name)},
            "provider": name,
            "auth_config": {"api_base": f"{upstream.origin}/v1"},
        },
    )["secret"]
    definition = {"name": name, "secret_id": secret["secret_id"], "provider": name}
    model = post(
        server, f"{base}/model-definitions/create", key, {**definition, "model_name": "m"}
    )["model_definition"]
    models = [
        {
            "model_definition_id": model["model_definition_id"],
            "linkage_type": "PRIMARY",
            "weight": 1,
        }
    ]
    post(server, f"{base}/endpoints/create", key, {"name": name, "model_configs": models})


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    yield from provider()


#: MLflow knows one host for Gemini, whatever it is told, so the server is led astray below it.
SITECUSTOMIZE = """
import aiohttp

_request = aiohttp.ClientSession._request


def _elsewhere(self, method, url, **kwargs):
    url = str(url).replace("https://generativelanguage.googleapis.com", "ORIGIN")
    return _request(self, method, url, **kwargs)


aiohttp.ClientSession._request = _elsewhere
"""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE.replace("ORIGIN", upstream.origin))
    with serve(folder, **ENVIRON, PYTHONPATH=python_path(folder)) as server:
        for name in PROVIDERS:
            add_endpoint(server, name, upstream)
        yield server


def call(
    server: Server, route: str, name: str, headers: dict[str, str]
) -> tuple[int, dict[str, str], bytes]:
    path, body = ROUTES[route]
    return server.request(
        "POST",
        "/gateway/" + path.replace("NAME", name),
        headers={"Content-Type": "application/json", **headers},
        body=json.dumps(body).replace("NAME", name).encode(),
    )


def lines(found: list[object]) -> str:
    return "\n".join(map(str, found))


def test_nothing_of_ours_reaches_a_provider(gateway: Server, upstream: Upstream) -> None:
    key = gateway.key("mlflow:write")
    ours = (key, SESSION, "hokusai", "somebody", "another", "underscored")
    wrong: list[object] = []
    for (route, name), place, agent in itertools.product(CALLS, PLACES, USER_AGENTS):
        upstream.seen.clear()
        headers = {
            place: PLACES[place].format(key),
            "User-Agent": agent,
            "Cookie": COOKIES,
            "X-Hokusai-User-Id": "somebody",
            "X-Hokusai-Api-Key-Id": "another",
            "x_hokusai_user_id": "underscored",
        }
        status, _, answer = call(gateway, route, name, headers)
        if (status, len(upstream.seen)) != (200, 1):
            wrong.append((route, name, place, agent, status, len(upstream.seen), answer))
            continue
        _, sent, body = upstream.seen[0]
        everything = json.dumps(sent) + body.decode()
        leaked = [secret for secret in ours if secret in everything]
        # The provider's key arrives, and is the only one: the caller brought none of its own.
        own = [value for _, value in sent if PROVIDER_KEY.format(name) in value]
        logins = [value for header, value in sent if header == "authorization"]
        if leaked or not own or len(logins) > 1:
            wrong.append((route, name, place, agent, leaked, own, logins))
    assert not wrong, lines(wrong)


def test_a_tools_own_credential_still_reaches_its_provider(
    gateway: Server, upstream: Upstream
) -> None:
    # Claude Code and its like log in at the provider themselves; our key has another header then.
    key = gateway.key("mlflow:write")
    login = "Bearer the-tools-own-login"
    for route, name in (("openai-chat", "openai"), ("openai-chat", "groq"), ("anthropic",) * 2):
        upstream.seen.clear()
        headers = {"X-MLflow-Authorization": f"Bearer {key}", "Authorization": login}
        headers["User-Agent"] = "claude-cli/1.0"
        status, _, answer = call(gateway, route, name, headers)
        assert status == 200, (name, answer)
        sent = dict(upstream.seen[0][1])
        assert sent["authorization"] == login, name
        assert key not in json.dumps(sent), name


def test_the_basic_form_and_the_query_stay_here_too(gateway: Server, upstream: Upstream) -> None:
    key = gateway.key("mlflow:write")
    basic = base64.b64encode(f"me:{key}".encode()).decode()
    upstream.seen.clear()
    for agent in USER_AGENTS:
        headers = {"Authorization": f"Basic {basic}", "User-Agent": agent}
        assert call(gateway, "openai-chat", "groq", headers)[0] == 200
        body = json.dumps({"model": "m", **CHAT}).encode()
        json_headers = {"Content-Type": "application/json", "User-Agent": agent}
        # The proxy passes the query on as well.
        path = f"/gateway/proxy/groq/chat/completions?api_key={key}&a=1"
        assert gateway.request("POST", path, headers=json_headers, body=body)[0] == 200
    assert len(upstream.seen) == 2 * len(USER_AGENTS)
    assert {path.rpartition("?")[2] for path, _, _ in upstream.seen[1::2]} == {"a=1"}
    assert key not in repr(upstream.seen)
    assert basic not in repr(upstream.seen)


def test_a_provider_is_not_called_for_who_may_not_write(
    gateway: Server, upstream: Upstream
) -> None:
    upstream.seen.clear()
    reader = {"X-API-Key": gateway.key("mlflow:read")}
    wrong: list[object] = []
    for route, name in CALLS:
        statuses = [call(gateway, route, name, headers)[0] for headers in ({}, reader)]
        if statuses != [401, 403] or upstream.seen:
            wrong.append((route, name, statuses, len(upstream.seen)))
            upstream.seen.clear()
    assert not wrong, lines(wrong)


ASSISTANT = [
    ("GET", "config"),
    ("PUT", "config"),
    ("GET", "providers"),
    ("GET", "providers/claude_code/health"),
    ("GET", "sessions/x/stream"),
    ("PATCH", "sessions/x"),
    ("POST", "message"),
    ("POST", "skills/install"),
    ("POST", "sessions/x/permission"),
    ("POST", "sessions/x/tool-result"),
]


def not_refused(server: Server, *scopes: str) -> list[object]:
    """What of the assistant is open to a key with one of these scopes."""
    found: list[object] = []
    for (method, path), scope in itertools.product(ASSISTANT, scopes):
        url = f"/ajax-api/3.0/mlflow/assistant/{path}"
        status, _, answer = server.request(method, url, key=server.key(scope), body=b"{}")
        if status != 403 or json.loads(answer)["error"] != "SCOPE_MISSING":
            found.append((method, path, scope, status, answer))
    return found


def test_the_assistant_is_off_unless_it_is_switched_on(gateway: Server) -> None:
    wrong = not_refused(gateway, "mlflow:write", "mlflow:admin")
    assert not wrong, lines(wrong)


def test_the_assistant_that_is_on_answers_administrators_only(tmp_path: Path) -> None:
    with serve(tmp_path, HOKUSAI_AUTH_ASSISTANT="true") as server:
        wrong = not_refused(server, "mlflow:write")
        assert not wrong, lines(wrong)
        url = "/ajax-api/3.0/mlflow/assistant/providers"
        assert server.request("GET", url, key=server.key("mlflow:admin"))[0] == 200

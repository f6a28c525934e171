"""Thousands of requests, drawn from a grammar: none gets more than its keys open, or shows a key.

In process to both adapters, of which `make test` sends 5,000 and `make test-long` 200,000; and as bytes
to real servers.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mlflow_hokusai_auth.core.prefixes import Prefixes
from mlflow_hokusai_auth.core.types import Access
from mlflow_hokusai_auth.server.gate import graphql
from mlflow_hokusai_auth.server.gate.asgi import AsgiGate
from mlflow_hokusai_auth.server.gate.bodies import BODY_LIMITS
from mlflow_hokusai_auth.server.gate.wsgi import wsgi_gate
from mlflow_hokusai_auth.server.observe.decision_log import DecisionLog
from tests.adversarial import grammar
from tests.adversarial.grammar import GRAPHQL_READ, KEYS, Attack, authority, takes
from tests.adversarial.test_spelling import NAMES, ask, spell
from tests.core.test_operations import PUBLIC
from tests.harness import Server
from tests.server.sentinel import PREFIXES, Answer, clock_at_now, environ_of, make_gate, scope_of

BATCH = 100
#: Bytes in one message of a body.
CHUNK = 2**16
#: Headers that make the server wait for more, or speak first.
FRAMING = ("Transfer-Encoding", "Expect")
#: The part of each key that must not show: all but what tells its kind.
SECRETS = {kind: key.split("_", 2)[2] for kind, key in KEYS.items()}
#: Every request is logged, and the headers of every request.
GATE = make_gate(authority(), observer=DecisionLog(sample=1.0, debug_headers=True))


@pytest.fixture(autouse=True, scope="module")
def clock() -> Iterator[None]:
    with clock_at_now():
        yield


@pytest.fixture(scope="module")
def lines() -> Iterator[list[str]]:
    """What was logged, at every level."""
    written: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(self.format(record))

    log, handler = logging.getLogger("mlflow_hokusai_auth"), Handler()
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield written
    log.removeHandler(handler)
    log.setLevel(before)


# The adapters, with a sentinel that reads the whole body


class Body:
    """The body of a request; knows how much of it the gate has read, and not MLflow."""

    def __init__(self, attack: Attack) -> None:
        self._left = attack.body
        self.read_by_gate = 0
        self.in_mlflow = False

    def read(self, size: int = -1) -> bytes:
        size = len(self._left) if size < 0 else size
        data, self._left = self._left[:size], self._left[size:]
        if not self.in_mlflow:
            # To ask is to read, even if nothing is left.
            self.read_by_gate += max(len(data), 1)
        return data

    async def receive(self) -> dict[str, Any]:
        data = self.read(CHUNK)
        return {"type": "http.request", "body": data, "more_body": bool(self._left)}


async def all_of(receive: Any) -> bytes:
    body = b""
    while (message := await receive())["more_body"]:
        body += message["body"]
    return body + bytes(message["body"])


Sent = tuple[Answer, Body]


def through_asgi(prefixes: Sequence[str], attacks: Sequence[Attack]) -> list[Sent]:
    called: list[Any] = []
    body: Body
    attack: Attack

    async def mlflow(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope)
        body.in_mlflow = True
        assert await all_of(receive) == attack.body
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"MLflow"})

    async def one() -> Answer:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        called.clear()
        scope = scope_of(attack)
        await app(scope, body.receive, send)
        assert len(called) <= 1
        head, rest = sent
        headers = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in head["headers"]]
        return Answer(head["status"], headers, rest["body"], called[0] if called else None, scope)

    async def every() -> list[Sent]:
        nonlocal body, attack
        answers = []
        for attack in attacks:
            body = Body(attack)
            answers.append((await one(), body))
        return answers

    app = AsgiGate(mlflow, replace(GATE, prefixes=Prefixes(prefixes)))
    return asyncio.run(every())


def through_wsgi(prefixes: Sequence[str], attacks: Sequence[Attack]) -> Iterator[Sent]:
    called: list[Any] = []

    def mlflow(environ: Any, start_response: Any) -> list[bytes]:
        called.append(dict(environ))
        body.in_mlflow = True
        assert environ["wsgi.input"].read() == attack.body
        start_response("200 OK", [])
        return [b"MLflow"]

    app = wsgi_gate(mlflow, replace(GATE, prefixes=Prefixes(prefixes)))
    for attack in attacks:
        body = Body(attack)
        started: list[Any] = []
        called.clear()
        environ = environ_of(attack, **{"wsgi.input": body})
        content = b"".join(app(environ, lambda *said, started=started: started.append(said)))
        assert len(called) <= 1
        ((status, headers),) = started
        lower = [(name.lower(), value) for name, value in headers]
        inner = called[0] if called else None
        yield Answer(int(status[:3]), lower, content, inner, environ), body


# What is to hold of every answer


def split(prefixes: Sequence[str], attack: Attack) -> tuple[str, str]:
    """The prefix, and the path without it: what MLflow must route, if it is to see the request."""
    path = unquote_to_bytes(attack.split[0]).decode("utf-8", "replace")
    under = [prefix for prefix in prefixes if path == prefix or path.startswith(f"{prefix}/")]
    prefix = max(under, key=len, default="")
    return prefix, path[len(prefix) :]


def seen_by_mlflow(inner: dict[str, Any]) -> tuple[str, str]:
    """Method and path as MLflow reads them."""
    if "path" in inner:
        raw = unquote_to_bytes(inner["raw_path"]).decode("utf-8", "replace")
        assert raw == inner["path"]
        return inner["method"], inner["path"]
    path = inner["PATH_INFO"].encode("latin-1").decode("utf-8", "replace")
    return inner["REQUEST_METHOD"], path


def is_public(method: str, path: str) -> bool:
    method = {"HEAD": "GET"}.get(method.upper(), method.upper())
    if method == "OPTIONS":
        return any(rule.partition(" ")[2] == path for rule in PUBLIC)
    return f"{method} {path}" in PUBLIC


def check(prefixes: Sequence[str], attack: Attack, answer: Answer, body: Body) -> None:
    prefix, path = split(prefixes, attack)
    public = is_public(attack.method, path)
    if answer.inner is not None:
        assert seen_by_mlflow(answer.inner) == (attack.method, path)
        needed = max(takes(attack.method, path or "/"), Access.KEY)
        if path == "/graphql" and attack.body == GRAPHQL_READ:
            needed = Access.READ
        assert public or attack.is_preflight or attack.grants >= needed
        assert answer.status == 200
    elif answer.status == 308:
        assert prefix and not path and (attack.grants >= Access.READ or attack.is_preflight)
    elif answer.status == 303:
        page = attack.method in ("GET", "HEAD") or (path or "").startswith("/hokusai/")
        assert not answer.body and page
    else:
        assert answer.status in (400, 401, 403, 413, 431), "a request can't make the gate fail"
        assert not public or answer.status in (400, 413)
    limit = BODY_LIMITS.get(f"{attack.method.upper()} {path}", 0)
    if path == "/graphql" and attack.grants >= Access.READ:
        limit = graphql.MAX_BODY
    assert body.read_by_gate <= (limit + CHUNK if limit else 0)
    if answer.inner is not None and limit and public:
        assert len(attack.body) <= limit


def check_both(attack: Attack, asgi: Answer, wsgi: Answer) -> None:
    assert asgi.verdict == wsgi.verdict
    assert asgi.header("location") == wsgi.header("location")


def check_secrets(texts: Sequence[str]) -> None:
    everything = "\n".join(texts)
    for text in (everything, unquote(everything)):
        for kind, secret in SECRETS.items():
            if secret in text:
                shown = next(line for line in text.splitlines() if secret in line)
                pytest.fail(f"the key {kind!r} shows in {shown!r}")


def send_all(random: Random, count: int, lines: list[str]) -> None:
    prefixes = grammar.prefixes(random)
    attacks = grammar.attacks(random, count, prefixes)
    lines.clear()
    pairs = zip(through_asgi(prefixes, attacks), through_wsgi(prefixes, attacks), strict=True)
    answers = []
    for attack, (asgi, wsgi) in zip(attacks, pairs, strict=True):
        try:
            for answer, body in (asgi, wsgi):
                check(prefixes, attack, answer, body)
                answers.append(answer)
            if attack.is_same_in_wsgi:
                check_both(attack, asgi[0], wsgi[0])
        except AssertionError as error:
            told = f"{prefixes} {attack!r:.2000}\n{asgi[0]!r:.2000}\n{wsgi[0]!r:.2000}"
            raise AssertionError(told) from error
    # But for the way to the slash of a prefix, which keeps all of the query that is not `api_key`.
    shown = [str(answer.headers) for answer in answers if answer.status != 308]
    check_secrets([*lines, *shown, *(answer.body.decode() for answer in answers)])


def requests(count: int, **more: Any) -> Any:
    """`count` requests, in batches that hypothesis gives the seeds of.

    Drawn by hypothesis itself, a request took longer than all that is done with it, and a quarter
    were repeated. So nothing is shrunk; a failure names its request.
    """
    options = settings(
        max_examples=count // BATCH,
        database=None,
        phases=[Phase.generate],
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
        **more,
    )
    return lambda test: options(given(random=st.randoms(use_true_random=True))(test))


@requests(5_000, derandomize=True)
def test_five_thousand_requests(lines: list[str], random: Random) -> None:
    send_all(random, BATCH, lines)


@pytest.mark.long
@requests(200_000)
def test_two_hundred_thousand_requests(lines: list[str], random: Random) -> None:
    send_all(random, BATCH, lines)


# The same as bytes, to real servers


def line_of(attack: Attack) -> bytes:
    return spell(
        f"{attack.method} {attack.target} HTTP/1.1", *(f"{n}: {v}" for n, v in attack.headers)
    )


def may_be_public(attack: Attack) -> bool:
    """Whether some server may take it for a public request: they read targets in ways of their own."""
    path = re.sub(r"^[a-zA-Z]+:(//[^/]*)?", "", re.split("[?#]", attack.target)[0])
    path = re.sub(r"\t|^[\0- ]+|[\0- ]+$", "", unquote(path, "latin-1"))
    # Of two slashes, one is dropped, or a host is taken to follow.
    read = {re.sub("^//+", "/", path), re.sub("^//[^/]*", "", path)}
    return attack.is_preflight or any(
        is_public(attack.method.strip(), path.removeprefix(prefix))
        for path in read
        for prefix in ("", *PREFIXES)
    )


def send_bytes(server: Server, random: Random, count: int) -> None:
    """Requests without a key, or with one that nobody has: none gets more than a refusal."""
    for attack in grammar.attacks(random, 2 * count):
        framed = attack.body or any(name in FRAMING for name, _ in attack.headers)
        if attack.grants > Access.PUBLIC or framed or may_be_public(attack):
            continue
        answer = ask(server, line_of(attack))
        if answer.theirs:  # gunicorn's pages quote the line that is wrong
            continue
        refused = str(answer.ours).startswith(("KEY_", "HEADER_MALFORMED"))
        if attack.method == "HEAD":
            refused = answer.status in (400, 401, 403)
        sent_to_sign_in = answer.status == 303 and b"hokusai/login" in answer.head
        assert refused or sent_to_sign_in, (attack, answer)
        assert not any(secret.encode() in answer.body for secret in SECRETS.values())


def test_random_bytes_do_not_get_past_a_server(server: Server) -> None:
    send_bytes(server, Random(1), 200)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_many_random_bytes_do_not_get_past_any_server(
    servers: dict[str, Server], name: str
) -> None:
    send_bytes(servers[name], Random(name), 3000)

"""Whose request it is, each request knows for itself, whatever else is under way at the same time."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.store.keys import LocalStore
from tests.e2e.test_confidentiality import Team, everything
from tests.harness import SERVERS, Server, serve

CLIENTS = 100
ROUNDS = 2
OTHER = "Owner 7"
WHOAMI = "/api/2.0/hokusai/whoami"
#: Where MLflow notes who made something: behind Flask, and behind FastAPI alone.
QUEUES, TOOLS = "/api/3.0/mlflow/review-queues", "/api/3.0/mlflow/mcp-servers"
NATIVE = ("uvicorn", "httptools")
#: Clients of the test of isolation, the requests of all of them, and what they ask for.
THREADS, REQUESTS = 20, 4_000
SEARCHES = (
    "/api/2.0/mlflow/registered-models/search?max_results=100",
    "/api/2.0/mlflow/experiments/search?max_results=100",
    "/api/2.0/mlflow/model-versions/search?max_results=100",
)
#: A worker with threads: those of `SERVERS` have none.
GTHREAD = ("--workers", "1", "--gunicorn-opts", "--threads 16 --keep-alive 60")

_numbers = itertools.count()


def owners(store: LocalStore) -> dict[str, str]:
    """Owner -> key."""
    names = [f"Owner {number}" for number in range(CLIENTS)]
    return {owner: store.create(owner=owner, scopes=["mlflow:write"])[1] for owner in names}


def queue() -> tuple[str, dict[str, str]]:
    """Path and body of a request that makes something, another thing each time."""
    name = f"queue {next(_numbers)}"
    return f"{QUEUES}/create", {"experiment_id": "0", "name": name, "queue_type": "CUSTOM"}


def tool() -> tuple[str, dict[str, str]]:
    """The like of `queue`, past Flask."""
    return TOOLS, {"name": f"com.example/tool-{next(_numbers)}"}


def request(method: str, path: str, key: str | None, *more: str) -> bytes:
    """The head of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *more]
    lines += ["Content-Type: application/json"] if method == "POST" else []
    lines += [f"X-API-Key: {key}"] if key else []
    return "\r\n".join([*lines, "", ""]).encode()


def maker(answer: bytes) -> str | None:
    """Who made a thing, as MLflow describes it."""
    told = json.loads(answer)
    found: str | None = told.get("review_queue", told).get("created_by")
    return found


class Crowd:
    """A server, and the keys of those who ask it."""

    def __init__(self, kind: str, server: Server) -> None:
        self.kind, self.server = kind, server
        self.keys = owners(server.store)
        self.kinds = (queue, tool) if kind in NATIVE else (queue,)


@pytest.fixture(scope="module", params=["uvicorn", "httptools", "waitress", "gthread"])
def crowd(
    request: pytest.FixtureRequest,
    servers: dict[str, Server],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Crowd]:
    with contextlib.ExitStack() as stack:
        if request.param == "gthread":
            folder = tmp_path_factory.mktemp("gthread")
            server = stack.enter_context(serve(folder, GTHREAD))
        else:
            server = servers[request.param]
        yield Crowd(request.param, server)


@pytest.mark.long
def test_100_clients_at_once_are_told_apart(crowd: Crowd) -> None:
    start = threading.Barrier(CLIENTS)

    def client(owner: str, key: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", crowd.server.port, timeout=300)

        def ask(method: str, path: str, key: str | None, body: Any = None) -> tuple[int, bytes]:
            headers = {"Content-Type": "application/json"} | ({"X-API-Key": key} if key else {})
            data = json.dumps(body) if body else None
            try:
                connection.request(method, path, body=data, headers=headers)
                response = connection.getresponse()
            except http.client.RemoteDisconnected:
                # A server closes a connection that a busy machine leaves idle for two seconds.
                connection.close()
                connection.request(method, path, body=data, headers=headers)
                response = connection.getresponse()
            return response.status, response.read()

        start.wait()
        with contextlib.closing(connection):
            for _, make in itertools.product(range(ROUNDS), crowd.kinds):
                status, told = ask("GET", WHOAMI, key)
                assert (status, json.loads(told)["owner"]) == (200, owner)
                assert ask("GET", WHOAMI, keys.generate())[0] == 401
                assert json.loads(ask("GET", WHOAMI, crowd.keys[OTHER])[1])["owner"] == OTHER
                path, body = make()
                status, made = ask("POST", path, key, body)
                assert (status, maker(made)) == (200, owner)
                assert ask("POST", path, None, body)[0] == 401
                if make is queue:
                    name = json.loads(made)["review_queue"]["queue_id"]
                    path = f"{QUEUES}/get?queue_id={name}"
                else:
                    path = f"{TOOLS}/{body['name']}"
                assert maker(ask("GET", path, key)[1]) == owner

    with ThreadPoolExecutor(CLIENTS) as threads:
        for done in [threads.submit(client, *item) for item in crowd.keys.items()]:
            done.result()


@pytest.mark.long
def test_keys_take_turns_on_one_connection_faster_than_it_is_answered(crowd: Crowd) -> None:
    if crowd.kind == "gthread":
        pytest.skip("gunicorn answers the first of them and no other")
    one, two = list(crowd.keys.items())[:2]
    wrong, none = (401, keys.generate()), (401, None)
    turns = [one, two, none, one, wrong, two, none, none, one]
    asked = [request("GET", WHOAMI, key) for _, key in turns]
    asked[-1] = asked[-1].replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    found = []
    for answer in crowd.server.raw(b"".join(asked)).split(b"HTTP/1.1 ")[1:]:
        head, _, body = answer.partition(b"\r\n\r\n")
        found.append(json.loads(body)["owner"] if head.startswith(b"200") else int(head[:3]))
    assert found == [due for due, _ in turns]


@pytest.mark.long
@pytest.mark.parametrize("crowd", NATIVE, indirect=True)
def test_bodies_that_arrive_byte_by_byte_in_turns(crowd: Crowd) -> None:
    size = 120
    with contextlib.ExitStack() as stack:
        streams = []
        for number, (owner, key) in enumerate(crowd.keys.items()):
            make = crowd.kinds[number % 2]
            path, body = make()
            # Flask has no body without a length from MLflow's bridge, nor from ours.
            form = f"Content-Length: {size}" if make is queue else "Transfer-Encoding: chunked"
            due = (401, None) if number % 5 == 0 else (200, owner)
            connection = socket.create_connection(("127.0.0.1", crowd.server.port), timeout=300)
            stack.enter_context(connection)
            sender = keys.generate() if due[0] == 401 else key
            connection.sendall(request("POST", path, sender, form))
            text = json.dumps(body).ljust(size).encode()
            pieces = [text[at : at + 1] for at in range(size)]
            if make is tool:
                pieces = [b"1\r\n%s\r\n" % piece for piece in pieces] + [b"0\r\n\r\n"]
            streams.append((connection, due, pieces))
        for turn in itertools.zip_longest(*(pieces for _, _, pieces in streams), fillvalue=b""):
            for (connection, (status, _), _), piece in zip(streams, turn, strict=True):
                # Who is refused need not be heard to the end.
                with contextlib.suppress(OSError) if status == 401 else contextlib.nullcontext():
                    connection.sendall(piece)
        for connection, due, _ in streams:
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert (answer.status, maker(answer.read())) == due


@pytest.mark.long
@pytest.mark.parametrize("kind", ["uvicorn", "gthread", "waitress"])
def test_no_supplier_sees_what_is_another_s_while_all_ask_at_once(
    kind: str, tmp_path: Path
) -> None:
    """Staff and suppliers take turns on connections that stay open, and on the server's threads."""
    options = GTHREAD if kind == "gthread" else SERVERS[kind]
    with serve(tmp_path, options, HOKUSAI_AUTH_ISOLATION="full") as server:
        teams = [Team(server, f"Owner {number}") for number in range(8)]
        worlds = [everything(team) for team in teams]
        staff = server.key("mlflow:admin")
        askers = [*((team.key, {world.word}) for team, world in zip(teams, worlds, strict=True))]
        askers += [(staff, {world.word for world in worlds})] * 2
        start = threading.Barrier(THREADS)

        def client(number: int) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
            start.wait()
            asked = 0
            with contextlib.closing(connection):
                # Each connection has another key for each request, in another order.
                for turn in range(REQUESTS // THREADS):
                    key, due = askers[(turn * (number % 9 + 1) + number) % len(askers)]
                    path = SEARCHES[turn % len(SEARCHES)]
                    connection.request("GET", path, headers={"X-API-Key": key})
                    response = connection.getresponse()
                    answer = response.read().decode()
                    assert response.status == 200, answer
                    assert {w.word for w in worlds if w.word in answer} == due, (path, number, turn)
                    asked += 1
            return asked

        with ThreadPoolExecutor(THREADS) as threads:
            assert sum(threads.map(client, range(THREADS))) == REQUESTS

"""Two of the four oracles on real servers of all four kinds, over raw sockets.

A key that may only read changes nothing, whatever it sends; and all servers say the same of the same
request. (That nothing of MLflow's is called without a key is in `test_spelling.py`, and that no key
shows anywhere in `test_canaries.py`.)
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from mlflow_hokusai_auth.server.upstream.routes import installed_routes, template
from tests.adversarial.test_spelling import NAMES, THEIRS
from tests.e2e.test_every_route import FETCHES, contents
from tests.harness import SERVERS, Server, serve
from tests.server.gate.test_adapters import VECTORS, expand
from tests.server.sentinel import KEYS, PRINCIPALS, Wire, code_of

pytestmark = pytest.mark.long  # servers of their own, and every route in every spelling

#: The keys of the vector file that are none of a moment; and when each ended, if it did.
ENDS: dict[str, float | None] = {
    **dict.fromkeys(["read", "other", "legacy", "write", "admin", "scopeless", "revoked"]),
    "expired": 1.0,
}
#: Those of a moment, which `test_adapters.py` has a clock for.
TIMED = {KEYS[kind] for kind in PRINCIPALS.keys() - ENDS}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """A server of each kind, with the keys of the vector file."""
    with contextlib.ExitStack() as stack:
        running = {}
        for name in NAMES:
            server = stack.enter_context(
                serve(
                    tmp_path_factory.mktemp(name),
                    SERVERS[name],
                    # As the gate of `test_adapters.py` has it.
                    HOKUSAI_AUTH_ASSISTANT="true",
                    HOKUSAI_AUTH_EMPTY_SCOPES="none",
                )
            )
            for kind, ends in ENDS.items():
                who = PRINCIPALS[kind]
                record = server.store.add(
                    KEYS[kind], owner=who.owner, scopes=who.scopes, expires_at=ends
                )
                if kind == "revoked":
                    server.store.revoke(record.key_id, force=True)
            running[name] = server
        yield running


class Line:
    """A connection for one request after another, for as long as the server keeps it."""

    def __init__(self, server: Server) -> None:
        self._address = ("127.0.0.1", server.port)
        self._socket: socket.socket | None = None

    def ask(self, wire: Wire, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body of the answer to these bytes."""
        names = {name.lower() for name, _ in wire.headers}
        more = [] if "host" in names else [("Host", "localhost")]
        if body and not names & {"content-length", "transfer-encoding"}:
            more.append(("Content-Length", str(len(body))))
        lines = [f"{wire.method} {wire.target} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in (*more, *wire.headers)]
        data = "\r\n".join([*lines, "", ""]).encode("latin-1") + body
        # Once more only where the server may have closed what it kept.
        for _ in range(1 if self._socket is None else 2):
            try:
                return self._ask(data, wire.method)
            except TimeoutError:
                break
            except ConnectionError:
                self.close()
        raise AssertionError(f"no answer to {data[:300]!r}")

    def _ask(self, data: bytes, method: str) -> tuple[int, bytes]:
        if self._socket is None:
            self._socket = socket.create_connection(self._address, timeout=20)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A server may refuse, and close, before it has read all.
        with contextlib.suppress(BrokenPipeError):
            self._socket.sendall(data)
        response = http.client.HTTPResponse(self._socket, method=method)
        response.begin()
        answer = response.read()
        if response.will_close:
            self.close()
        return response.status, answer

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


# The same verdict everywhere


def verdict(answer: tuple[int, bytes]) -> str | None:
    """The code of our refusal, ALLOW for what MLflow answered, or None if the server refused."""
    status, body = answer
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return code_of(body)
    return None if 400 <= status < 506 and body.startswith(THEIRS) else "ALLOW"


def reads_otherwise(name: str, target: str) -> bool:
    """Whether this server makes another request of `target` than the others do."""
    # Absolute form, or no slash at all, to each its own: see `test_spelling.py`.
    if not target.startswith("/"):
        return True
    # It takes all but one of the slashes that a path begins with away, for the gate and MLflow.
    return name == "waitress" and target.lower().startswith(("//", "/%2f"))


def is_mlflows_own(case: str, target: str) -> bool:
    """Whether uvicorn's MLflow, which is FastAPI's, answers in its own way what is allowed."""
    return case.startswith(("13-preflight", "22-gateway")) or target == "/health%0a"


def body_of(wire: Wire) -> bytes:
    headers = {name.lower(): value for name, value in wire.headers}
    if "transfer-encoding" in headers:
        return b"2\r\nxx\r\n0\r\n\r\n"
    return b"x" * int(headers.get("content-length", 0))


def test_all_servers_give_the_same_answer(four: dict[str, Server]) -> None:
    compared = 0
    with contextlib.ExitStack() as stack:
        lines = {name: stack.enter_context(contextlib.closing(Line(four[name]))) for name in NAMES}
        for case in VECTORS["case"]:
            for one in expand(case):
                wire, answers = one.wire, {}
                if any(key in str(wire) for key in TIMED):
                    continue
                for name in NAMES if "asgi_only" not in case else NAMES[:2]:
                    if not reads_otherwise(name, wire.target):
                        answers[name] = lines[name].ask(wire, body_of(wire))
                said = {name: verdict(answer) for name, answer in answers.items()}
                told = {answers[name][0] for name in said if said[name] is not None}
                what = (case["id"], wire.method, wire.target, str(wire.headers)[:200], said, told)
                if one.code in ("ALLOW", "REDIRECT"):
                    assert set(said.values()) <= {"ALLOW", None}, what
                    assert len(told) <= 1 or is_mlflows_own(case["id"], wire.target), what
                else:
                    assert told <= {one.status}, what
                    if wire.method != "HEAD":
                        assert set(said.values()) <= {one.code, None}, what
                compared += sum(code is not None for code in said.values())
    assert compared > 3000


# A key that may only read


#: Of what is to be there already, so that as many requests as can be would change it.
PATHS = {"artifact_path": "kept.txt", "name": "kept", "version": "1", "key": "k", "tag_key": "k"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FOO")


def routes() -> list[tuple[str, str]]:
    """The method and a path of each route of the installed MLflow."""

    def path(rule: str) -> str:
        return re.sub(r"\{(\w+)(:path)?\}", lambda name: PATHS.get(name[1], "1"), template(rule))

    found = {(method, path(rule)) for method, rule, _ in installed_routes()}
    return sorted(pair for pair in found if pair[1] not in FETCHES)


def encoded(text: str) -> str:
    return f"%{ord(text):02x}"


def spellings(method: str, path: str) -> Iterator[Wire]:
    """A route in all the ways that some server or framework may take for it."""
    for target in (
        path,
        f"/mlflow{path}",
        f"/api/mlflow{path}",
        f"/mlflow/mlflow{path}",
        f"/{path}",
        f"//{path}",
        f"/mlflow/{path}",
        f"{path}/",
        path.replace("/", "//"),
        f"/{encoded(path[1:2] or '/')}{path[2:]}",
        f"/%2F{path[1:]}",
        f"/%25{path[1:]}",
        "/" + path[1:].replace("/", "%2F"),
        f"/.{path}",
        f"/health/..{path}",
        f"/health/%2e%2e{path}",
        f"/x/..{path}",
        f"{path};x=1",
        f"/health;{path}",
        f"{path}%20",
        f"{path}%00",
        f"{path}%0a",
        f"{path}%23/version",
        f"{path}%3f/version",
        f"{path}?_method=GET",
        f"{path}?/health",
        f"http://localhost{path}",
        path[1:] or "*",
        path.upper(),
        path.replace("/2.0/", "/2.0"),
    ):
        yield Wire(method, target)
    for other in (method.lower(), method.title(), f"{method[:-1]}{method[-1].lower()}"):
        yield Wire(other, path)
    for header in ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"):
        yield Wire("GET", path, ((header, method),))
        yield Wire(method, path, ((header, "GET"),))
    for header in ("X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Uri"):
        yield Wire(method, "/version", ((header, path),))
        yield Wire(method, path, ((header, "/version"),))


def furnish(server: Server) -> bytes:
    """Make what could be changed; a body that names it in the words of every route of MLflow's."""

    def make(path: str, content: dict[str, Any]) -> Any:
        body = json.dumps(content).encode()
        sent = {"Content-Type": "application/json"}
        path = f"/api/2.0/mlflow/{path}"
        status, _, answer = server.request("POST", path, key=KEYS["admin"], headers=sent, body=body)
        assert status == 200, answer
        return json.loads(answer)

    experiment = make("experiments/create", {"name": "kept"})["experiment_id"]
    run = make("runs/create", {"experiment_id": experiment})["run"]["info"]["run_id"]
    make("registered-models/create", {"name": "kept"})
    make("model-versions/create", {"name": "kept", "source": f"runs:/{run}/model", "run_id": run})
    upload = "/api/2.0/mlflow-artifacts/artifacts/kept.txt"
    assert server.request("PUT", upload, key=KEYS["admin"], body=b"kept")[0] == 200
    said = {
        "name": "kept",
        "new_name": "changed",
        "experiment_id": experiment,
        "experiment_ids": [experiment],
        "run_id": run,
        "run_uuid": run,
        "version": "1",
        "stage": "Production",
        "alias": "a",
        "key": "k",
        "value": "1",
        "timestamp": 1,
        "step": 1,
        "status": "FINISHED",
        "description": "changed",
        "tags": [{"key": "k", "value": "1"}],
        "metrics": [{"key": "k", "value": 1, "timestamp": 1, "step": 1}],
        "params": [{"key": "k", "value": "1"}],
        "query": "mutation { x }",
    }
    body = json.dumps(said).encode()
    # MLflow adds a schema of its own, the same for everybody, when an experiment's are first listed.
    listed = Wire("GET", "/ajax-api/3.0/mlflow/label-schemas/list", (("X-API-Key", KEYS["admin"]),))
    with contextlib.closing(Line(server)) as line:
        line.ask(
            replace(listed, headers=(*listed.headers, ("Content-Type", "application/json"))), body
        )
    return body


@pytest.mark.parametrize("name", NAMES)
def test_read_key_changes_nothing(four: dict[str, Server], name: str) -> None:
    server = four[name]
    body = furnish(server)
    every = routes()
    reader = (("X-API-Key", KEYS["read"]), ("Content-Type", "application/json"))
    wires = [Wire(*pair) for pair in product(METHODS, sorted({path for _, path in every}))]
    # The routes of /ajax-api are those of /api under another name, which the lines above try.
    wires += [w for route in every if "/ajax-api/" not in route[1] for w in spellings(*route)]
    before, statuses = contents(server.folder), []
    with contextlib.closing(Line(server)) as line:
        for wire in wires:
            answer = line.ask(replace(wire, headers=wire.headers + reader), body)
            statuses.append(answer[0])
        assert contents(server.folder) == before
        # So many were let through, and so many refused: neither is for want of a good request.
        assert statuses.count(200) > 500 and statuses.count(403) > 5000
        # A key that may write changes something with the first requests of the same kind.
        writer = (("X-API-Key", KEYS["write"]), *reader[1:])
        for path in ("runs/set-tag", "registered-models/update"):
            method = "PATCH" if path.endswith("update") else "POST"
            status, said = line.ask(Wire(method, f"/api/2.0/mlflow/{path}", writer), body)
            assert status == 200, said
            assert contents(server.folder) != before
            before = contents(server.folder)

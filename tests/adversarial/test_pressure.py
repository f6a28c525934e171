"""What strangers can't use up: memory, metrics, lines of the log, the auth service, others' time.

On real servers of all four kinds. What one part promises by itself, such as a million made-up keys to
the cache, is next to that part.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import select
import socket
import string
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_hokusai_auth.core import keys
from tests import standin
from tests.adversarial.test_oracles import Line
from tests.adversarial.test_spelling import CREATE, NAMES, spell
from tests.e2e.test_running import wait_until
from tests.harness import SERVERS, Server, serve
from tests.server.sentinel import Wire
from tests.standin import Standin

pytestmark = pytest.mark.long  # servers of their own, and 10⁴ requests to each

MB = 2**20
EXPERIMENT = "/api/2.0/mlflow/experiments/get?experiment_id=0"


@pytest.fixture(scope="module")
def service() -> Iterator[Standin]:
    with Standin() as running:
        yield running


@pytest.fixture(scope="module", params=NAMES)
def server(
    request: pytest.FixtureRequest, service: Standin, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with serve(
        tmp_path_factory.mktemp(request.param),
        SERVERS[request.param],
        HOKUSAI_AUTH_BACKEND="local,service",
        HOKUSAI_AUTH_SERVICE_URL=service.url,
        HOKUSAI_AUTH_SERVICE_TIMEOUT="20",
        HOKUSAI_AUTH_CACHE_TTL="600",
        HOKUSAI_AUTH_LOG_READS="1",
    ) as running:
        yield running


def kind_of(server: Server) -> str:
    return next(name for name in NAMES if server.folder.name.startswith(name))


def memory(server: Server, line: str) -> dict[int, int]:
    """Bytes that each process of the server has (VmRSS) or has had at most (VmHWM)."""
    found = {}
    for pid in server.workers():
        text = Path(f"/proc/{pid}/status").read_text()
        found[pid] = int(re.search(rf"{line}:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]
    return found


def growth(server: Server, line: str, before: dict[int, int]) -> int:
    """Bytes that the process which grew most has grown by."""
    return max(size - before[pid] for pid, size in memory(server, line).items())


def test_300_mb_without_a_key_take_no_memory(server: Server) -> None:
    size, block = 300 * MB, bytes(MB)
    head = f"POST {CREATE} HTTP/1.1\r\nHost: a\r\nContent-Length: {{}}\r\n\r\n"
    for _ in range(20):  # until all workers have refused something
        server.raw(spell(f"POST {CREATE} HTTP/1.1"))
    for pid in server.workers():
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    before = memory(server, "VmHWM")
    answer = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head.format(size).encode())
        # Sent to the end, whatever is answered, unless the server hangs up; one that reads the whole
        # body before it calls the app answers after it.
        with contextlib.suppress(OSError):
            for _ in range(size // MB):
                connection.sendall(block)
                if select.select([connection], [], [], 0)[0] and not answer:
                    answer = connection.recv(4096)
            answer = answer or connection.recv(4096)
    assert answer[9:12] in (b"401", b""), answer
    assert growth(server, "VmHWM", before) < 5 * MB


def word() -> str:
    return "".join(random.choices(string.ascii_letters, k=random.randint(3, 12)))


def series(server: Server, key: str) -> set[str]:
    """The names and labels of everything that is measured."""
    status, _, body = server.request("GET", "/hokusai/metrics", key=key)
    assert status == 200
    lines = body.decode().splitlines()
    return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}


PATHS = ["/{0}", "/mlflow/{0}/{1}", "/api/mlflow/api/2.0/mlflow/{0}", "/hokusai/{0}"]
PATHS.append(CREATE + "/{0}")


def stranger() -> Wire:
    """A request of somebody's who makes up all there is to it, the key too."""
    path = random.choice(PATHS)
    method = random.choice(["GET", "POST", "PUT", "DELETE", "PATCH"])
    key = random.choice([keys.generate(), keys.generate(), word()])
    headers = (("X-API-Key", key), ("User-Agent", word()), ("X-Request-Id", word()))
    return Wire(method, path.format(word(), word()), (*headers, (word(), word())))


def test_invented_paths_and_keys_do_not_grow_memory_or_metrics(server: Server) -> None:
    good, metrics = server.key("mlflow:read"), server.key("metrics:read")

    def ask(count: int) -> None:
        for _ in range(count):
            status, body = line.ask(stranger())
            assert status == 401, body

    with contextlib.closing(Line(server)) as line:
        ask(1000)
        # With what the scrape itself adds, in each process that may answer it.
        for _ in range(5):
            assert line.ask(Wire("GET", "/version", (("X-API-Key", good),)))[0] == 200
            series(server, metrics)
        known, before = series(server, metrics), memory(server, "VmRSS")
        ask(10_000)
        assert line.ask(Wire("GET", "/version", (("X-API-Key", good),)))[0] == 200
    assert series(server, metrics) - known == set()
    # What the cache keeps of 10⁴ of them, which is all that it ever keeps, and no more.
    assert growth(server, "VmRSS", before) < 16 * MB


FORGED = '{"event": "request", "outcome": "forged"}'


def test_clients_can_not_forge_log_lines(server: Server) -> None:
    before = len(server.log.splitlines())
    good = f"X-API-Key: {server.key('mlflow:admin')}"
    quoted = FORGED.replace(" ", "%20").replace('"', "%22")
    for end in ("%0a", "%0d%0a", "%0d", "%c2%85", "%e2%80%a8", "%1b[2J", "%00"):
        for path in (f"/x{end}{quoted}", f"/version?x={end}{quoted}", f"/{end}x%22%7D{end}"):
            for headers in ((), (good,)):
                server.raw(spell(f"GET {path} HTTP/1.1", *headers))
    ends = ["\\n", "\x1b[2J", "\xe2\x80\xa8", "\n ", *"\x0b\x0c\x1c\x85\r\n\0"]
    names = ["User-Agent", "Referer", "X-Request-Id", "X-Forwarded-For", "traceparent", "Host"]
    for end in ends:
        for name in names:
            server.raw(spell("GET /version HTTP/1.1", f"{name}: x{end}{FORGED}", good))
        server.raw(spell(f"GET{end}{FORGED.replace(' ', '')} /version HTTP/1.1"))
        server.raw(spell("GET /version HTTP/1.1", f"Authorization: Basic {end}{FORGED}"))
    lines = server.log.split("\n")[before:]
    told = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(told) > 40
    assert {line["outcome"] for line in told if line["event"] == "request"} <= {
        "allowed", "refused", "host", "mlflow_error"
    }  # fmt: skip
    assert not [line for line in lines if re.match(r"\W*event", line) and not line.startswith("{")]
    ours = [line for line in lines if line.startswith("{")]
    assert not [line for line in ours if not line.isprintable()]


def test_a_crowd_with_one_key_makes_one_call_and_health_still_answers(
    server: Server, service: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, before = service.add(), len(service.calls)
    told = threading.Event()

    def held(*details: Any) -> None:
        told.wait(60)
        standin._KINDS["strict"](*details)

    monkeypatch.setitem(standin._KINDS, "held", held)
    service.behave("held")
    asking: list[None] = []
    answers: list[int] = []

    def ask() -> None:
        asking.append(None)
        answers.append(server.request("GET", EXPERIMENT, key=key)[0])

    threads = [threading.Thread(target=ask) for _ in range(200)]
    try:
        for thread in threads:
            thread.start()
        wait_until(lambda: len(service.calls) > before and len(asking) == 200, 60)
        # A WSGI server has a thread for each request and no more of them, so there whoever asks for
        # health waits as long as everybody else does.
        if kind_of(server) in ("gunicorn", "waitress"):
            told.set()
        assert server.request("GET", "/health")[0] == 200
        assert told.is_set() or not answers
    finally:
        told.set()
        for thread in threads:
            thread.join()
        service.behave("strict")
    assert answers == [200] * 200
    processes = {"gunicorn": 2}.get(kind_of(server), 1)
    assert len(service.calls) - before <= processes

"""Clients of one server for a long time: each request has a key of its own, and keys end meanwhile."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import sqlalchemy as sa

from bench import store as bench_store
from bench.rows import EXPERIMENT
from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.server.web.keys_api import REVOKED_EVERYWHERE
from mlflow_hokusai_auth.store.tables import KEYS
from tests.harness import Server

CLIENTS = 8
#: One request in so many is with a key that no store knows.
WRONG = 10
#: Known keys of which the last has expired; of the others, `bench_store.row` revokes every seventh.
EXPIRED = 20
#: Requests after which a client asks once more, with the key that is revoked next or was last.
SHARED = 5
#: Requests that are served with that key before it is revoked.
IN_USE = 20
PATHS = ("/version", EXPERIMENT, "/api/2.0/hokusai/whoami")
_AT_ONCE = 10_000
_TIMEOUT = 60


class Revocation(NamedTuple):
    """A key that was in use; `answered` is when the revocation was, in seconds (monotonic)."""

    key_id: str
    #: Whether the answer was to come only when no process takes the key any more.
    waited: bool
    answered: float


class Clients:
    """What they ask, `count` requests in all, and what became of it."""

    def __init__(self, server: Server, count: int) -> None:
        self._server = server
        self._admin = server.key("mlflow:admin")
        self.wanted = list(_made(server, count))
        self._numbers = iter(range(count))
        self._left: Iterator[int] = iter(())
        #: (status that was due, status) -> how often.
        self.answers: Counter[tuple[int, int]] = Counter()
        self.revocations: list[Revocation] = []
        self._shared: tuple[str, str] | None = None
        # By key: when each request with the shared key was sent, and its status.
        self.uses: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
        self._lock = threading.Lock()
        self._threads: list[Future[None]] = []

    @contextlib.contextmanager
    def asking(self, count: int) -> Iterator[None]:
        """All ask, until `count` more requests are answered. Raises what one of them raised."""
        self._left = islice(self._numbers, count)
        with ThreadPoolExecutor(CLIENTS) as threads:
            self._threads = [threads.submit(self._ask_on) for _ in range(CLIENTS)]
            try:
                yield
            except BaseException:
                deque(self._left, maxlen=0)  # so that they end
                raise
        for one in self._threads:
            one.result()

    @property
    def busy(self) -> bool:
        """Whether each of them still asks: none is at the end, or failed."""
        return not any(one.done() for one in self._threads)

    def revoke(self) -> None:
        """Make a key through the API, have all use it, revoke it, and ask with it for a while."""
        with self._connection() as connection:
            body = json.dumps({"owner": "soak", "scopes": ["model:write"]})
            made = self._manage(connection, "POST", "", body)
            key_id, self._shared = made["key_id"], (made["key_id"], made["key"])
            deadline = time.monotonic() + _TIMEOUT
            while sum(status == 200 for _, status in self.uses[key_id]) < IN_USE:
                assert time.monotonic() < deadline, f"{key_id} is not served"
                self._use(connection)
            waited = len(self.revocations) % 2 == 1
            self._manage(connection, "DELETE", f"/{key_id}?wait={str(waited).lower()}")
            answered = time.monotonic()
            while time.monotonic() < answered + REVOKED_EVERYWHERE * 1.2:
                self._use(connection)
            self.revocations.append(Revocation(key_id, waited, answered))

    def late(self, revocation: Revocation) -> float:
        """Seconds from the answer to `revocation` to the last request sent that was served."""
        uses = self.uses[revocation.key_id]
        return max(at for at, status in uses if status < 300) - revocation.answered

    def _ask_on(self) -> None:
        with self._connection() as connection:
            for number in self._left:
                key, due = self.wanted[number]
                status = _status(connection, PATHS[number % len(PATHS)], key)
                with self._lock:
                    self.answers[due, status] += 1
                if number % SHARED == 0 and self._shared is not None:
                    self._use(connection)

    def _use(self, connection: http.client.HTTPConnection) -> None:
        assert self._shared is not None
        key_id, key = self._shared
        sent = time.monotonic()
        self.uses[key_id].append((sent, _status(connection, PATHS[0], key)))

    def _manage(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: str = ""
    ) -> dict[str, str]:
        headers = {"X-API-Key": self._admin}
        connection.request(method, f"/api/2.0/hokusai/keys{path}", body=body, headers=headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status in (200, 201), answer
        return dict(answer)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=_TIMEOUT)
        with contextlib.closing(connection):
            yield connection


def _made(server: Server, count: int) -> Iterator[tuple[str, int]]:
    """So many keys, made in the store in bulk, each with the status that a request with it is due."""
    now, store = time.time(), server.store
    for first in range(0, count, _AT_ONCE):
        rows = []
        for number in range(first, min(first + _AT_ONCE, count)):
            key = keys.generate()
            if number % WRONG == WRONG - 1:
                yield key, 401
                continue
            row = bench_store.row(number, key, now)
            if number % EXPIRED == 0:
                row["expires_at"] = now - 60
            rows.append(row)
            yield key, 401 if row["revoked_at"] or number % EXPIRED == 0 else 200
        with store.database.changing() as change:
            change.connection.execute(sa.insert(KEYS), rows)
    store.database.engine.dispose()


def _status(connection: http.client.HTTPConnection, path: str, key: str) -> int:
    connection.request("GET", path, headers={"X-API-Key": key})
    response = connection.getresponse()
    response.read()
    return response.status

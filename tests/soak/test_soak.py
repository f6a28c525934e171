"""A server that is asked for long, by ever other keys, while keys are made and revoked: nothing of it
grows, and nobody is served who was revoked.

`make soak` runs it, `make soak REQUESTS=1000000` for longer.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest

from mlflow_hokusai_auth.server.api import SETTLED
from tests.bench import engines
from tests.bench.probes import Side
from tests.harness import SERVERS, serve
from tests.soak.clients import Clients

pytestmark = pytest.mark.slow  # minutes

REQUESTS = int(os.environ.get("SOAK_REQUESTS", 20_000))
#: Shares of the requests. In the first no key is made or revoked, so that each worker's cache gets full
#: by its end; nor in the last, as a change empties the caches, and so that they could grow further.
WARM, CALM = 0.2, 0.4
#: Megabytes that a worker may have more at the end of the last share than at the end of the first. It
#: goes up and down by half of that all the time. None of the 80 000 requests between may so leave more
#: than 100 bytes behind, and with ten times as many, 10.
GROWTH = 8.0
#: Files, and threads: pools make them when they are first needed at once, and keep some of them.
MORE = 4
#: Seconds between two looks at the workers.
EVERY = 1.0


class Sizes(NamedTuple):
    """Of one process: megabytes of its own, open files, threads."""

    memory: float
    files: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Sizes:
        return cls(
            engines.memory(pid)["Pss"],
            len(list(Path(f"/proc/{pid}/fd").iterdir())),
            len(list(Path(f"/proc/{pid}/task").iterdir())),
        )


class Watch(threading.Thread):
    """Looks at processes: how many requests were done, and the sizes of each process by id."""

    def __init__(self, clients: Clients, pids: list[int]) -> None:
        super().__init__(daemon=True)
        self._clients, self._pids = clients, pids
        self._over = threading.Event()
        self.seen: list[tuple[int, dict[int, Sizes]]] = []

    def run(self) -> None:
        while not self._over.wait(EVERY):
            self.seen.append((self._clients.done, {pid: Sizes.of(pid) for pid in self._pids}))

    def end(self) -> None:
        self._over.set()
        self.join()

    def before(self, share: float) -> dict[int, Sizes]:
        """The middle ones of the sizes in the twentieth of all requests before this share of them."""
        last = REQUESTS * share
        looks = [sizes for done, sizes in self.seen if last - REQUESTS / 20 <= done <= last]
        found = {pid: zip(*(sizes[pid] for sizes in looks), strict=True) for pid in self._pids}
        return {pid: Sizes(*map(median, values)) for pid, values in found.items()}


@pytest.mark.parametrize("kind", ["uvicorn", "gunicorn"])
def test_nothing_grows_and_nobody_is_served_who_was_revoked(tmp_path: Path, kind: str) -> None:
    with serve(tmp_path, SERVERS[kind]) as server:
        clients = Clients(server, REQUESTS)
        watch = Watch(clients, Side(kind, [server]).workers)
        begun = time.monotonic()
        with clients.asking():
            watch.start()
            clients.wait(REQUESTS * WARM)
            while clients.done < REQUESTS * (1 - CALM):
                clients.revoke()
        took = time.monotonic() - begun
        watch.end()
    late = {
        waited: max(clients.late(one) for one in clients.revocations if one.waited is waited)
        for waited in (False, True)
    }
    warm, end = watch.before(WARM), watch.before(1)
    print(f"\n{kind}: {REQUESTS} requests, {took:.0f} s, {dict(clients.answers)} (due, answered)")
    print(
        f"  {len(clients.revocations)} revocations; last served {late[False]:+.3f} s from the answer"
    )
    print(f"  to one, {late[True]:+.3f} s from the answer with ?wait=true")
    for pid in warm:
        print(f"  worker {pid}: {warm[pid]} to {end[pid]}")
    assert all(due == status for due, status in clients.answers)
    # Whose answer waited is over at once; any other within the time that is documented.
    assert late[True] < 0
    assert late[False] < SETTLED
    for one in clients.revocations:
        assert {status for _, status in clients.uses[one.key_id]} == {200, 401}
    for pid in warm:
        assert end[pid].memory < warm[pid].memory + GROWTH
        assert end[pid].files <= warm[pid].files + MORE
        assert end[pid].threads <= warm[pid].threads + MORE

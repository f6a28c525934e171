"""A server that is asked for long, by ever other keys, while keys are made and revoked: nothing of it
grows, and nobody is served who was revoked.

`make soak` runs it, `make soak REQUESTS=1000000` for longer.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from bench import engines
from bench.probes import Side
from mlflow_hokusai_auth.server.web.keys_api import REVOKED_EVERYWHERE
from tests.harness import SERVERS, serve
from tests.soak.clients import Clients

pytestmark = pytest.mark.long  # minutes

REQUESTS = int(os.environ.get("SOAK_REQUESTS", 20_000))
#: Share of the requests after which a look at the server is taken, and of those before the last look.
#: In neither is a key made or revoked, which empties the cache: as many keys are in it both times.
CALM = 0.3
#: Megabytes that a worker may have written more at the end than at the first look. None of the 70 000
#: requests between, with `make soak`, may so leave more than 75 bytes behind.
GROWTH = 5.0
#: Files, and threads: pools make them when they are first needed at once, and keep some of them.
MORE = 4
#: Looks, and seconds between them: the least of each size counts, as connections end a moment later.
LOOKS, EVERY = 20, 0.1


class Sizes(NamedTuple):
    """Of some processes together: megabytes they have written, open files, threads."""

    memory: float
    files: int
    threads: int

    @classmethod
    def of(cls, pids: list[int]) -> Sizes:
        return cls(
            sum(engines.memory(pid)["Dirty"] for pid in pids),
            sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids),
            sum(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in pids),
        )


def idle(pids: list[int]) -> Sizes:
    """Their sizes while nobody asks."""
    looks = []
    for _ in range(LOOKS):
        time.sleep(EVERY)
        looks.append(Sizes.of(pids))
    return Sizes(*map(min, zip(*looks, strict=True)))


@pytest.mark.parametrize("kind", ["uvicorn", "gunicorn"])
def test_nothing_grows_and_nobody_is_served_who_was_revoked(tmp_path: Path, kind: str) -> None:
    calm = int(REQUESTS * CALM)
    with serve(tmp_path, SERVERS[kind]) as server:
        clients = Clients(server, REQUESTS)
        workers = Side(kind, [server]).workers
        begun = time.monotonic()
        with clients.asking(calm):
            pass
        warm = idle(workers)
        with clients.asking(REQUESTS - 2 * calm):
            while clients.busy:
                clients.revoke()
        with clients.asking(calm):
            pass
        took = time.monotonic() - begun
        end = idle(workers)
    late = {
        waited: max(clients.late(one) for one in clients.revocations if one.waited is waited)
        for waited in (False, True)
    }
    print(f"\n{kind}: {REQUESTS} requests, {took:.0f} s, {dict(clients.answers)} (due, answered)")
    print(
        f"  {len(clients.revocations)} revocations; last served {late[False]:+.3f} s from the answer"
    )
    print(f"  to one, {late[True]:+.3f} s from the answer with ?wait=true")
    print(f"  {len(workers)} workers: {warm} to {end}")
    assert clients.answers.total() == REQUESTS
    assert all(due == status for due, status in clients.answers)
    # Whose answer waited is over at once; any other within the time that is documented.
    assert late[True] < 0
    assert late[False] < REVOKED_EVERYWHERE
    for one in clients.revocations:
        assert {status for _, status in clients.uses[one.key_id]} == {200, 401}
    assert end.memory < warm.memory + GROWTH * len(workers)
    assert end.files <= warm.files + MORE * len(workers)
    assert end.threads <= warm.threads + MORE * len(workers)

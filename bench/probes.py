"""The servers' background work: queries to the key store and Redis, and how soon they see a change."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import engines, load
from bench import store as bench_store
from bench.rows import EXPERIMENT
from mlflow_hokusai_auth.authorities.redis_client import client
from mlflow_hokusai_auth.store.keys import LocalStore
from tests.harness import Server

#: A new text as long as a key each time.
UNKNOWN = "hk_live_" + "0" * (40 - len(load.STAMP)) + load.STAMP
#: Seconds after which a worker has written its counts, and is idle.
_QUIET = 6
_NOT_INSIDE = ("cmdstat_evalsha", "cmdstat_info", "cmdstat_config|resetstat")


@dataclass
class Stand:
    """The parts of a measurement."""

    options: argparse.Namespace
    postgres: engines.Postgres
    redis_url: str
    store: LocalStore
    key: str
    limited: str


@dataclass
class Side:
    """Return the replicas without the gate, or with it."""

    name: str
    servers: list[Server]

    @property
    def workers(self) -> list[int]:
        """Return the process ids of the workers: processes without children."""
        return [
            pid
            for server in self.servers
            for pid in server.workers()
            if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
            and not any(task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/children"))
        ]


def per_request(stand: Stand, server: Server, requests: int = 100) -> dict[str, float]:
    """Return the queries of a request to the key store and Redis, without those of an idle worker."""
    redis, found = client(stand.redis_url, 5), {}
    redis.config_resetstat()
    for name, key in (("known", stand.key), ("limited", stand.limited)):
        stand.postgres.forget()
        _ask(server, [key] * requests)
        lookups = _lookups(stand)
        found[f"lookups_{name}"] = lookups / requests
    commands = redis.info("commandstats")
    found["redis_round_trips"] = commands["cmdstat_evalsha"]["calls"] / requests
    inside = sum(value["calls"] for name, value in commands.items() if name not in _NOT_INSIDE)
    found["redis_commands_inside"] = inside / requests
    stand.postgres.forget()
    stamp = time.time_ns() // 1_000_000
    _ask(server, [UNKNOWN.replace(load.STAMP, f"{stamp + one}") for one in range(requests)])
    found["lookups_unknown"] = _lookups(stand) / requests
    return found


def _lookups(stand: Stand) -> int:
    return sum(
        calls for query, calls in stand.postgres.statements("keys").items() if "digest" in query
    )


def _ask(server: Server, keys: Sequence[str], method: str = "GET", path: str = EXPERIMENT) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        for key in keys:
            connection.request(method, path, headers={"X-API-Key": key})
            connection.getresponse().read()


def idle(stand: Stand, bare: Side, gate: Side) -> dict[str, float]:
    """Return, per second and worker, the statements in the key store by kind, and CPU milliseconds."""
    time.sleep(_QUIET)
    ours = stand.postgres.backends("keys", "gate")
    pids = {"bare_worker": bare.workers, "gate_worker": gate.workers, "postgresql": ours}
    stand.postgres.forget()
    begun, before = time.perf_counter(), {name: engines.cpu(some) for name, some in pids.items()}
    time.sleep(max(4, stand.options.seconds))
    used = {name: engines.cpu(some) - before[name] for name, some in pids.items()}
    counts = stand.postgres.statements("keys")
    each = (time.perf_counter() - begun) * len(gate.workers)
    kinds = {"generation": 0, "live_settings": 0, "other": 0}
    for query, calls in counts.items():
        kind = "generation" if "WHERE" in query else "live_settings"
        kinds[kind if "hokusai_auth_state" in query else "other"] += calls
    return {
        "statements": sum(counts.values()) / each,
        **{name: calls / each for name, calls in kinds.items()},
        **{f"{name}_cpu_ms": seconds * 1000 / each for name, seconds in used.items()},
        "connections": (len(ours) - len(gate.servers)) / len(gate.workers),
    }


def scrape(stand: Stand, gate: Side) -> float:
    def scrape() -> None:
        status, _, answer = gate.servers[0].request("GET", "/hokusai/metrics", key=stand.key)
        assert status == 200, answer

    return bench_store.times(scrape, 20)[0]


def revocations(stand: Stand, here: Server, there: Server, repeats: int = 10) -> list[float]:
    """Return the milliseconds from a revocation's answer `here` to the last request served `there`."""
    found = []
    for _ in range(repeats):
        record, key = stand.store.create(owner="bench", scopes=["mlflow:read"])
        time.sleep(1)  # All caches were emptied for that.
        with contextlib.ExitStack() as stack:
            connections = [
                stack.enter_context(
                    contextlib.closing(http.client.HTTPConnection("127.0.0.1", there.port))
                )
                for _ in range(4)
            ]
            for _ in range(3):
                assert all(_status(one, key) == 200 for one in connections)
            path = f"/api/2.0/hokusai/keys/{record.key_id}"
            status, _, answer = here.request("DELETE", path, key=stand.key)
            assert status < 300, answer
            revoked = last = time.perf_counter()
            while time.perf_counter() < last + 1.5:
                if any([_status(one, key) == 200 for one in connections]):
                    last = time.perf_counter()
        found.append((last - revoked) * 1000)
    return found


def _status(connection: http.client.HTTPConnection, key: str) -> int:
    connection.request("GET", "/version", headers={"X-API-Key": key})
    response = connection.getresponse()
    response.read()
    return response.status

"""`make bench-scale`: growth with workers, replicas, keys and requests, on PostgreSQL and Redis.

As in `make bench`, bare MLflow and MLflow behind the gate run at once and are loaded in short turns.
Here all of them share all cores with the load, so the ratios mean something and the throughputs little.
`--docs` writes the figures to docs/scale.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import sqlalchemy as sa

from bench import engines, growth, load, micro, page, probes
from bench import store as bench_store
from bench.rows import CONNECTIONS, LOG_BATCH, Row, log_batch, machine, new_run, side
from bench.store import PROGRAMS
from mlflow_hokusai_auth.store.keys import LocalStore
from tests.harness import serve

#: The number of replicas, and of the workers of each.
CONFIGURATIONS = ((1, 1), (1, 2), (1, 4), (2, 2))
_OPTIONS = ("--uvicorn-opts", "--http h11", "--backend-store-uri")


def rows(run_id: str, limited: str) -> list[Row]:
    """Return the requests for both sides."""
    return [
        Row("no limit"),
        Row("hourly limit", key=limited),
        Row("/api/mlflow", prefix=micro.ALIAS),
        Row("log-batch", "POST", LOG_BATCH, body=log_batch(run_id)),
        Row("unknown key: 401", key=probes.UNKNOWN),
    ]


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("scale.json"), help="where to write them")
    parser.add_argument("--rounds", type=int, default=3, help="bare, gate, bare, … (default 3)")
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="of load, each time (default 1.5)"
    )
    parser.add_argument("--keys", type=int, default=100_000, help="at most (default 100000)")
    parser.add_argument("--configurations", type=int, default=len(CONFIGURATIONS), help="the first")
    parser.add_argument("--docs", action="store_true", help="put the figures into docs/scale.md")
    options = parser.parse_args()
    if not PROGRAMS or shutil.which("redis-server") is None:
        parser.error("PostgreSQL and Redis are needed: make programs")
    if options.docs and (options.keys, options.configurations) != (10**5, len(CONFIGURATIONS)):
        parser.error("docs/scale.md tells of 100000 keys and of all configurations")
    command = f"python -m bench.scale --rounds {options.rounds} --seconds {options.seconds:g}"
    result: dict[str, Any] = {
        "machine": {
            "Command": command,
            **machine(
                "load on the first, PostgreSQL, Redis and the servers on all",
                f"mlflow server --workers N {' '.join(_OPTIONS[:2])} (PostgreSQL, Redis, no job "
                f"execution), {CONNECTIONS} connections",
            ),
        }
    }
    print("\n".join(f"{name}: {value}" for name, value in result["machine"].items()))
    with engines.running() as (postgres, redis_url):
        result["growth"] = growth.costs(postgres, redis_url, options.keys)
        print("\nKeys, uses, changes, limits")
        for name, figure in result["growth"].items():
            print(f"  {name:24}{figure:14.3f}", flush=True)
        store = LocalStore(postgres.create("keys"))
        store.migrate()
        bench_store.fill(store, options.keys // 10)
        key = store.create(owner="bench", scopes=["mlflow:admin"])[1]
        limited = store.create(owner="bench", scopes=["mlflow:write"], rate_limit_per_hour=10**6)[1]
        stand = probes.Stand(options, postgres, redis_url, store, key, limited)
        postgres.create("mlflow")
        result["configurations"] = [
            _configuration(stand, *counts) for counts in CONFIGURATIONS[: options.configurations]
        ]
    options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"\nWritten to {options.json}")
    if options.docs:
        page.fill(result)
        print(f"Written to {page.PAGE}")


def _configuration(stand: probes.Stand, replicas: int, workers: int) -> dict[str, Any]:
    name = f"{replicas} × {workers} workers" if replicas > 1 else f"{workers} worker(s)"
    cores = len(os.sched_getaffinity(0))
    print(f"\n{name}; bare → gate, median of the rounds; ratio = gate / bare [least, greatest]")
    if replicas * workers + 1 > cores:
        print(f"  {replicas * workers} workers and the load share {cores} cores")
    with _contenders(stand, replicas, workers) as (bare, gate):
        listed = _http(stand, bare, gate)
        found: dict[str, Any] = {"replicas": replicas, "workers": workers, "rows": listed}
        with stand.postgres.most("keys", "gate") as connections:
            _measure(stand, (gate, Row("", key=probes.UNKNOWN)))
        # The servers' main processes keep one connection each, from their migrations.
        found["connections_most"] = (max(connections) - replicas) / len(gate.workers)
        found["per_request"] = probes.per_request(stand, gate.servers[0])
        found["idle"] = probes.idle(stand, bare, gate)
        for one in (bare, gate):
            sizes = [engines.memory(pid) for pid in one.workers]
            for kind in ("Pss", "Rss"):
                found[f"{one.name}_{kind}_mb"] = median(size[kind] for size in sizes)
        found["scrape_more_ms"] = probes.scrape(stand, gate)
        if replicas > 1:
            found["revocation_ms"] = probes.revocations(stand, gate.servers[0], gate.servers[1])
            count = stand.options.keys // 10
            bench_store.fill(stand.store, stand.options.keys - count, first=count)
            found["scrape_many_ms"] = probes.scrape(stand, gate)
        for what, figure in found.items():
            if what != "rows":
                print(f"  {what}: {figure}", flush=True)
    return found


def _beside(uri: str) -> str:
    """Create MLflow's own database in the PostgreSQL of the key store."""
    return sa.make_url(uri).set(database="mlflow").render_as_string(hide_password=False)


@contextlib.contextmanager
def _contenders(
    stand: probes.Stand, replicas: int, workers: int
) -> Iterator[tuple[probes.Side, probes.Side]]:
    """Yield that many replicas without the gate and with it, all on the same data."""
    uri = str(stand.store.database.engine.url)
    options = ("--workers", str(workers), *_OPTIONS, _beside(uri))
    gate = {
        "HOKUSAI_AUTH_DATABASE_URI": uri,
        "HOKUSAI_AUTH_REDIS_URL": stand.redis_url,
        "HOKUSAI_AUTH_SECRET_KEY": secrets.token_hex(32),
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:

        def start(name: str, app: str | None, **environ: str) -> probes.Side:
            # Not forked, because an operator's server is not.
            environ |= {"PGAPPNAME": name}
            servers = (
                serve(Path(folder) / f"{name}{number}", options, app=app, started=True, **environ)
                for number in range(replicas)
            )
            return probes.Side(name, [stack.enter_context(server) for server in servers])

        yield start("bare", None), start("gate", "hokusai-auth", **gate)


def _http(stand: probes.Stand, bare: probes.Side, gate: probes.Side) -> list[dict[str, Any]]:
    listed = []
    print(
        f"  {'':18}{'req/s':>13}  {'ratio':19}{'p50 ms':>13}{'p99 ms':>14}{'µs CPU':>14}  CPU ratio"
    )
    # Each side has its own run: on a common one they would wait for each other.
    on_bare, on_gate = (
        rows(new_run(one.servers[0], f"X-API-Key: {stand.key}"), stand.limited)
        for one in (bare, gate)
    )
    for row, twin in zip(on_bare, on_gate, strict=True):
        loads = {"bare": (bare, row), "gate": (gate, twin)}
        found: dict[str, list[dict[str, Any]]] = {"bare": [], "gate": []}
        for number in range(stand.options.rounds):
            order = ("bare", "gate") if number % 2 else ("gate", "bare")
            answers = _measure(stand, *(loads[name] for name in order))
            for name, answer in zip(order, answers, strict=True):
                found[name].append(answer)
        listed.append({"row": row.name, **page.summary(found)})
        print(f"  {row.name:18}{page.line(listed[-1])}", flush=True)
        for name, ones in found.items():
            statuses = {status for one in ones for status in one["statuses"]}
            if statuses != {"401" if name == "gate" and row.key == probes.UNKNOWN else "200"}:
                print(f"    {name} answered {', '.join(sorted(statuses))}")
    return listed


def _measure(stand: probes.Stand, *loads: tuple[probes.Side, Row]) -> list[dict[str, Any]]:
    # Both get the same bytes, with the key, because the gate does not cause the cost of receiving a
    # header. Without the gate, only the prefix is left out.
    sides = [
        side(
            row.request(
                one.servers[0].port,
                f"X-API-Key: {row.key or stand.key}",
                prefix=row.prefix if one.name == "gate" else "",
            ),
            *one.servers,
        )
        for one, row in loads
    ]
    return load.measure(
        min(os.sched_getaffinity(0)),
        sides=sides,
        seconds=stand.options.seconds,
        connections=CONNECTIONS,
    )


if __name__ == "__main__":
    main()

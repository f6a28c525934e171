"""`make bench`: what the gate costs, as the same `mlflow server` without it and with it.

The two run at once, pinned to one core, and are loaded in short turns from the other core, so that
what disturbs one disturbs the other. A ratio is the median of the ratios of the rounds, with the
least and the greatest beside it. CPU time per request is steadier on a machine with other work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

# As under `mlflow server`, where processes add up their counts; before anything of ours is imported.
os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", tempfile.mkdtemp(prefix="bench-metrics-"))

from tests.bench import load, micro, store
from tests.bench.rows import (
    CONNECTIONS,
    LOG_BATCH,
    Row,
    interval,
    log_batch,
    machine,
    new_run,
    ratio,
    side,
)
from tests.harness import SERVERS, Server, serve

MEGABYTES = 300
_UNKNOWN_KEY = "hk_live_" + "0" * 40


def rows(run_id: str) -> list[Row]:
    """Everything that is measured over HTTP."""
    return [
        Row("experiments/get", goal=0.97),
        Row("experiments/get, /api/mlflow", prefix=micro.ALIAS),
        Row("version", path="/version"),
        Row("health (public)", path="/health"),
        Row("runs/log-batch, 10 metrics", "POST", LOG_BATCH, body=log_batch(run_id)),
        Row("experiments/get, no key: 401", key=""),
        Row("experiments/get, wrong key: 401", key=_UNKNOWN_KEY),
        Row("experiments/get, bare twice", control=True),
    ]


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("bench.json"), help="where to write them")
    parser.add_argument("--rounds", type=int, default=5, help="bare, gate, bare, … (default 5)")
    parser.add_argument("--seconds", type=float, default=3, help="of load, each time (default 3)")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[0]})
    result: dict[str, Any] = {
        "machine": machine(
            f"servers on {cores[-1]}, load on {cores[0]}",
            " ".join(["mlflow server", *SERVERS["uvicorn"], "(SQLite, no job execution)"]),
        ),
        "rounds": options.rounds,
    }
    print("\n".join(f"{name}: {value}" for name, value in result["machine"].items()))
    result["micro"] = micro.costs()
    print("\nIn process, median µs")
    for name, cost in result["micro"].items():
        print(f"  {name:42}{cost:8.1f}")
    result["store"] = _store()
    with _contenders(cores[-1]) as (bare, gate):
        result["http"] = _http(bare, gate, cores[0], options)
        result["upload"] = _uploads(bare, gate, options.rounds)
    options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"\nWritten to {options.json}")


def _store() -> dict[str, tuple[float, float]]:
    print(f"\nStore with {store.KEY_COUNT} keys, milliseconds: median, 99th percentile")
    found = store.costs()
    for question, (middle, high) in found.items():
        goal = store.goal(question)
        verdict = f"goal {goal:.0f}: {'met' if high <= goal else 'MISSED'}"
        print(f"  {question:46}{middle:8.2f}{high:8.2f}  {verdict}", flush=True)
    return found


@contextlib.contextmanager
def _contenders(core: int) -> Iterator[tuple[Server, Server]]:
    """The server without and with the gate, both of them on `core` and no other."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        bare = stack.enter_context(serve(folder / "bare", app=None))
        gate = stack.enter_context(serve(folder / "gate"))
        for server in (bare, gate):
            for pid in (server.process.pid, *server.workers()):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    os.sched_setaffinity(int(task.name), {core})
        yield bare, gate


def _http(bare: Server, gate: Server, core: int, options: argparse.Namespace) -> list[Any]:
    print(f"\nOver HTTP, {CONNECTIONS} connections; ratio = gate / bare, median [least, greatest]")
    print(f"  {'':33}{'bare/s':>8}{'gate/s':>8}  {'ratio':19}{'p50 ms':>13}{'p99 ms':>14}", end="")
    print(f"{'µs CPU':>14}  {'CPU ratio':19}goal")
    key = gate.key("mlflow:write")
    # Each server has a run of its own; the ids are of one length.
    on_bare, on_gate = rows(new_run(bare, "")), rows(new_run(gate, key))
    listed = []
    for row, twin in zip(on_bare, on_gate, strict=True):
        if options.only not in row.name:
            continue
        plain = side(row.request(bare, key, gated=False), bare)
        other = plain if row.control else side(twin.request(gate, key, gated=True), gate)
        found: dict[str, list[dict[str, Any]]] = {"bare": [], "gate": []}
        for number in range(options.rounds):
            # Whoever is first has the longer pause before it.
            order = ("bare", "gate") if number % 2 else ("gate", "bare")
            sides = [plain if name == "bare" else other for name in order]
            answers = load.measure(
                core, sides=sides, seconds=options.seconds, connections=CONNECTIONS
            )
            for name, answer in zip(order, answers, strict=True):
                found[name].append(answer)
        listed.append(_show(row, found))
    return listed


def _uploads(bare: Server, gate: Server, rounds: int) -> list[dict[str, Any]]:
    print(f"\nUpload of {MEGABYTES} MB, sent to the end; growth is of the worker's peak memory")
    path, key = "/api/2.0/mlflow-artifacts/artifacts/bench.bin", gate.key("mlflow:write")
    ways = {
        "bare": (bare, path, "", 200, None),
        "gate, with a key": (gate, micro.ALIAS + path, f"X-API-Key: {key}\r\n", 200, 16),
        "gate, no key: 401": (gate, micro.ALIAS + path, "", 401, 5),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(-1, rounds):
        for name, (server, where, headers, status, _) in ways.items():
            one = load.upload(
                port=server.port,
                path=where,
                headers=headers,
                megabytes=2 if number < 0 else MEGABYTES,
                pids=server.workers(),
            )
            assert one["status"] == status, (name, one)
            (server.folder / "artifacts" / "bench.bin").unlink(missing_ok=True)
            if number >= 0:  # The first time, modules are loaded.
                found[name].append(one)
    for name, ones in found.items():
        seconds, growth = (median(one[item] for one in ones) for item in ("seconds", "growth_mb"))
        most, goal = max(one["growth_mb"] for one in ones), ways[name][4]
        verdict = "" if goal is None else f"goal < {goal} {'met' if most < goal else 'MISSED'}"
        print(f"  {name:20}{seconds:6.2f} s{growth:8.1f} MB (at most {most:.1f})  {verdict}")
    return [{"row": name, "goal_mb": ways[name][4], "rounds": ones} for name, ones in found.items()]


def _show(row: Row, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    middle = {
        name: {item: median(one[item] for one in ones) for item in ones[0] if item != "statuses"}
        for name, ones in found.items()
    }
    bare, gate = middle["bare"], middle["gate"]
    faster, cpu = ratio(found, "per_second"), ratio(found, "cpu_us")
    goal = ""
    if row.goal is not None:
        goal = f"≥ {row.goal} {'met' if faster[0] >= row.goal else 'MISSED'}"
        # Rounds on both sides of the goal: this machine was too busy to tell.
        goal += ", within the noise" if faster[1] < row.goal <= faster[2] else ""
    print(
        f"  {row.name:33}{bare['per_second']:8.0f}{gate['per_second']:8.0f}  {interval(faster):19}"
        f"{bare['p50_ms']:6.1f}→{gate['p50_ms']:6.1f}{bare['p99_ms']:7.1f}→{gate['p99_ms']:6.1f}"
        f"{bare['cpu_us']:7.0f}→{gate['cpu_us']:6.0f}  {interval(cpu):19}{goal}",
        flush=True,
    )
    wanted = {"bare": {"200"}, "gate": {"200" if row.key is None else "401"}}
    for name, ones in found.items():
        statuses = {status for one in ones for status in one["statuses"]}
        if statuses != wanted[name]:
            print(f"    {name} answered {', '.join(sorted(statuses))}")
    return {"row": row.name, "goal": row.goal, "ratio": faster, "cpu_ratio": cpu, **found}


if __name__ == "__main__":
    main()

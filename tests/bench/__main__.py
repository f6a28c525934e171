"""`make bench`: what the gate costs, as the same `mlflow server` without it and with it.

The two run at once, pinned to one core, and are loaded in short turns from the other core, so that
what disturbs one disturbs the other. A ratio is the median of the ratios of the rounds, with the
least and the greatest beside it. CPU time per request is steadier on a machine with other work.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

# As under `mlflow server`, where processes add up their counts; before anything of ours is imported.
os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", tempfile.mkdtemp(prefix="bench-metrics-"))

from tests.bench import load, micro, store
from tests.harness import SERVERS, Server, serve

CONNECTIONS = 8
MEGABYTES = 300
_EXPERIMENT = f"{micro.STATIC}?experiment_id=0"
_UNKNOWN_KEY = "hk_live_" + "0" * 40


@dataclass(frozen=True)
class Row:
    """One request that both servers are loaded with."""

    name: str
    method: str = "GET"
    path: str = _EXPERIMENT
    #: What the gate's path has in front of it; the bare server knows no such prefix.
    prefix: str = ""
    #: "" for no key, None for one that is good.
    key: str | None = None
    body: str = ""
    #: The least ratio of throughput that is hoped for.
    goal: float | None = None
    #: Both sides are the bare server: what differs then is noise.
    control: bool = False

    def request(self, server: Server, key: str, *, gated: bool) -> str:
        """The bytes of the request, each of them as one character.

        Both servers get the same ones, the key included: what it costs to receive a header is not
        the gate's doing. Only the prefix is left out where there is no gate to know it.
        """
        prefix = self.prefix if gated else ""
        if self.key is not None:
            key = self.key
        lines = [
            f"{self.method} {prefix}{self.path} HTTP/1.1",
            f"Host: 127.0.0.1:{server.port}",
            "User-Agent: mlflow-python-client/3",
            "Accept-Encoding: gzip, deflate",
            "Accept: */*",
            "Connection: keep-alive",
            *([f"X-API-Key: {key}"] if key else []),
        ]
        if self.body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(self.body)}"]
        return "\r\n".join(lines) + "\r\n\r\n" + self.body


def rows(run_id: str) -> list[Row]:
    """Everything that is measured over HTTP."""
    metrics = [
        {"key": f"metric_{i}", "value": 0.5, "timestamp": "STAMP", "step": 1} for i in range(10)
    ]
    batch = json.dumps({"run_id": run_id, "metrics": metrics}).replace('"STAMP"', load.STAMP)
    return [
        Row("experiments/get", goal=0.97),
        Row("experiments/get, /api/mlflow", prefix=micro.ALIAS),
        Row("version", path="/version"),
        Row("health (public)", path="/health"),
        Row("runs/log-batch, 10 metrics", "POST", "/api/2.0/mlflow/runs/log-batch", body=batch),
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
    result: dict[str, Any] = {"machine": _machine(cores), "rounds": options.rounds}
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
    on_bare, on_gate = rows(_new_run(bare, "")), rows(_new_run(gate, key))
    listed = []
    for row, twin in zip(on_bare, on_gate, strict=True):
        if options.only not in row.name:
            continue
        plain = _side(bare, row.request(bare, key, gated=False))
        other = plain if row.control else _side(gate, twin.request(gate, key, gated=True))
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


def _side(server: Server, request: str) -> dict[str, Any]:
    return {"port": server.port, "request": request, "pids": server.workers()}


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
    ratio, cpu = _ratio(found, "per_second"), _ratio(found, "cpu_us")
    goal = ""
    if row.goal is not None:
        goal = f"≥ {row.goal} {'met' if ratio[0] >= row.goal else 'MISSED'}"
        # Rounds on both sides of the goal: this machine was too busy to tell.
        goal += ", within the noise" if ratio[1] < row.goal <= ratio[2] else ""
    print(
        f"  {row.name:33}{bare['per_second']:8.0f}{gate['per_second']:8.0f}  {_interval(ratio):19}"
        f"{bare['p50_ms']:6.1f}→{gate['p50_ms']:6.1f}{bare['p99_ms']:7.1f}→{gate['p99_ms']:6.1f}"
        f"{bare['cpu_us']:7.0f}→{gate['cpu_us']:6.0f}  {_interval(cpu):19}{goal}",
        flush=True,
    )
    wanted = {"bare": {"200"}, "gate": {"200" if row.key is None else "401"}}
    for name, ones in found.items():
        statuses = {status for one in ones for status in one["statuses"]}
        if statuses != wanted[name]:
            print(f"    {name} answered {', '.join(sorted(statuses))}")
    return {"row": row.name, "goal": row.goal, "ratio": ratio, "cpu_ratio": cpu, **found}


def _ratio(found: dict[str, list[dict[str, Any]]], item: str) -> tuple[float, float, float]:
    """Median, least and greatest of gate / bare over the rounds."""
    pairs = zip(found["gate"], found["bare"], strict=True)
    ratios = sorted(gate[item] / bare[item] for gate, bare in pairs)
    return median(ratios), ratios[0], ratios[-1]


def _interval(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.3f} [{ratio[1]:.2f}, {ratio[2]:.2f}]"


def _new_run(server: Server, key: str) -> str:
    status, _, answer = server.request(
        "POST",
        "/api/2.0/mlflow/runs/create",
        key=key,
        headers={"Content-Type": "application/json"},
        body=b'{"experiment_id": "0"}',
    )
    assert status == 200, answer
    return str(json.loads(answer)["run"]["info"]["run_id"])


def _machine(cores: list[int]) -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text()
    model = next((line for line in info.splitlines() if line.startswith("model name")), ": unknown")
    packages = ("mlflow", "mlflow-hokusai-auth", "uvicorn", "h11", "starlette", "fastapi", "flask")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return {
        "CPU": f"{model.partition(': ')[2]}, {len(cores)} cores; servers on {cores[-1]}, "
        f"load on {cores[0]}",
        "System": f"{platform.platform(terse=True)}, load average {os.getloadavg()[0]:.1f}",
        "Versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "Server": " ".join(["mlflow server", *SERVERS["uvicorn"], "(SQLite, no job execution)"]),
    }


if __name__ == "__main__":
    main()

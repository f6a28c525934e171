"""`make bench`: compare the gate with bare MLflow and with its alternatives.

All contenders run at once, pinned to one core, and are loaded in short turns from the other core, so
that a disturbance meets all of them. A ratio is the median of the ratios of the rounds, with the
least and the greatest beside it. CPU time per request is steadier on a machine with other work.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# `mlflow server` sets this variable, too; it must be set before the package is imported.
os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", tempfile.mkdtemp(prefix="bench-metrics-"))

import mlflow.server

from bench import goals, isolation, load, micro, peers, report, store, transfers
from bench.rows import CONNECTIONS, LOG_BATCH, RUN, Row, log_batch, machine

#: Workers of each contender's servers, and their HTTP parser.
SERVERS = {
    "1 worker": (1, "h11"),
    "4 workers": (4, "h11"),
    "1 worker, httptools": (1, "httptools"),
}
#: The scripts of MLflow's pages; the bench loads the one of median size.
_SCRIPTS = sorted(
    Path(mlflow.server.__file__).parent.glob("js/build/static/js/*.chunk.js"),
    key=lambda path: path.stat().st_size,
)
ROWS = [
    Row("experiments/get"),
    Row("version", path="/version"),
    Row("log-batch", "POST", LOG_BATCH, body=log_batch(RUN)),
    Row("UI asset", path=f"/static-files/static/js/{_SCRIPTS[len(_SCRIPTS) // 2].name}"),
    Row("no key: 401", key=""),
    Row("wrong key: 401", key="wrong"),
]
#: The rows in which parsing HTTP is a large part, and the row that they are compared with.
_READING = ("experiments/get", "no key: 401", "wrong key: 401")


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("bench.json"), help="where to write them")
    parser.add_argument("--rounds", type=int, default=3, help="of all contenders (default 3)")
    parser.add_argument("--seconds", type=float, default=1, help="of load, each time (default 1)")
    parser.add_argument("--only", default="", help="what has this in its name, such as “4 workers”")
    parser.add_argument("--docs", action="store_true", help="put it all into docs/benchmarks.md")
    options = parser.parse_args()
    missing = peers.missing()
    if options.docs and (options.only or missing):
        parser.error(f"docs/benchmarks.md tells of all rows and peers; {missing=}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # Its servers end with it.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[0]})
    result: dict[str, Any] = {
        "machine": {
            "Command": f"python -m bench --rounds {options.rounds} --seconds {options.seconds:g}",
            **machine(
                f"servers on {cores[-1]}, load on {cores[0]}",
                "mlflow server --workers N --uvicorn-opts '--http h11' (or httptools, where a row says "
                f"so; SQLite, no job execution), {CONNECTIONS} connections",
            ),
            "Peers": peers.versions(),
        },
    }
    print("\n".join(f"{name}: {value}" for name, value in result["machine"].items()))
    if missing:
        print(f"Some peers are left out, as this is not installed: {', '.join(missing)}")
    result.update(micro={}, store={}, isolation={}, rates={}, memory={}, transfers={})
    if options.only in "in process":
        result["micro"] = micro.costs()
        report.show("In process", report.STEPS, report.numbers(result["micro"]))
    if options.only in "key store":
        result["store"] = store.costs()
        title = f"Key store with {store.KEY_COUNT} keys"
        report.show(title, report.STORE, report.store(result["store"]))
    if options.only in "isolation":
        result["isolation"] = isolation.costs()
        report.show("Isolation", report.ISOLATION, report.isolation(result["isolation"]))
    for name in SERVERS:
        _over_http(name, cores, options, result)
    result["goals"] = goals.judged(result)
    report.show("Goals", report.GOALS, result["goals"])
    options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"\nWritten to {options.json}")
    if options.docs:
        report.fill(result)
        print(f"Written to {report.PAGE}")


def _over_http(
    name: str, cores: list[int], options: argparse.Namespace, result: dict[str, Any]
) -> None:
    workers, http = SERVERS[name]
    rows = {f"{name}: {row.name}": row for row in ROWS if http == "h11" or row.name in _READING}
    rows = {title: row for title, row in rows.items() if options.only in title}
    # On one core, more workers do not move one artifact faster.
    first = name == next(iter(SERVERS))
    moved = [one for one in transfers.TRANSFERS if first and options.only in one.name]
    if not rows and not moved:
        return
    with peers.running(workers, http, cores[-1]) as contenders:
        for title, row in rows.items():
            found = _loaded(row, contenders, cores[0], options)
            result["rates"][title] = found
            report.show(title, report.RATES, report.rates(found))
            _unexpected(found, "200" if row.key is None else "401")
        result["memory"][name] = {one.name: transfers.peak(one) for one in contenders}
        report.show(f"{name}: memory", report.MEMORY, report.numbers(result["memory"][name]))
        for one in moved:
            found = transfers.measure(one, contenders, options.rounds)
            result["transfers"][one.name] = found
            report.show(one.name, report.TRANSFERS, report.transfers(found))
            _unexpected(found, "200" if one.key else "401")


def _loaded(
    row: Row, contenders: Sequence[peers.Contender], core: int, options: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {one.name: [] for one in contenders}
    for _ in range(options.rounds):
        answers = load.measure(
            core,
            sides=[one.side(row) for one in contenders],
            seconds=options.seconds,
            connections=CONNECTIONS,
        )
        for one, answer in zip(contenders, answers, strict=True):
            found[one.name].append(answer)
    return found


def _unexpected(found: dict[str, list[dict[str, Any]]], wanted: str) -> None:
    for name, ones in found.items():
        statuses = {status for one in ones for status in one["statuses"]}
        if statuses != {"200" if name == peers.BARE else wanted}:
            print(f"    {name} answered {', '.join(sorted(statuses))}")


if __name__ == "__main__":
    main()

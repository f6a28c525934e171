"""The tables of `make bench`, which are printed and written to docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from bench import page
from bench import store as bench_store
from bench.goals import Found
from bench.isolation import Cost
from bench.peers import BARE, GATE
from bench.rows import interval, ratio

PAGE = page.PAGE.with_name("benchmarks.md")
RATES = ["contender", "req/s", "to bare", "ours to it", "p50 ms", "p99 ms", "µs CPU", "CPU to bare"]
TRANSFERS = ["contender", "seconds", "to bare", "ours to it", "more memory, MB", "at most, MB"]
GOALS = ["goal", "wanted", "found", "verdict"]
STEPS = ["step", "µs"]
STORE = ["question", "median ms", "p99 ms", "goal"]
MEMORY = ["contender", "peak MB"]
ISOLATION = ["request", "more statements", "at most", "to without it", "at most"]

Lines = Sequence[Sequence[str]]


def rates(found: Found) -> Lines:
    """Return a line for each contender."""
    lines = []
    for name, ones in found.items():
        middle = {
            item: median(one[item] for one in ones) for item in ("p50_ms", "p99_ms", "cpu_us")
        }
        lines.append(
            (
                name,
                f"{median(one['per_second'] for one in ones):.0f}",
                interval(ratio(found, "per_second", name, BARE)),
                interval(ratio(found, "per_second", GATE, name)),
                f"{middle['p50_ms']:.1f}",
                f"{middle['p99_ms']:.1f}",
                f"{middle['cpu_us']:.0f}",
                interval(ratio(found, "cpu_us", name, BARE)),
            )
        )
    return lines


def transfers(found: Found) -> Lines:
    """Return the lines for an artifact; ratios are of speed, too."""
    return [
        (
            name,
            f"{median(one['seconds'] for one in ones):.3f}",
            interval(ratio(found, "seconds", BARE, name)),
            interval(ratio(found, "seconds", name, GATE)),
            f"{median(one['growth_mb'] for one in ones):.1f}",
            f"{max(one['growth_mb'] for one in ones):.1f}",
        )
        for name, ones in found.items()
    ]


def store(found: dict[str, tuple[float, float]]) -> Lines:
    """Return the lines of the store. The goal is for the 99th percentile."""
    lines = []
    for question, (middle, high) in found.items():
        goal = bench_store.goal(question)
        verdict = f"< {goal:g}: {'met' if high <= goal else 'MISSED'}"
        lines.append((question, f"{middle:.2f}", f"{high:.2f}", verdict))
    return lines


def isolation(found: dict[str, Cost]) -> Lines:
    """Return a line for each request; of a step, the figure is its time."""
    return [
        (
            name,
            *("" if number is None else f"{number}" for number in (one.more_sql, one.most_sql)),
            interval(one.ratio),
            f"{one.most_ratio:g}",
        )
        for name, one in found.items()
    ]


def numbers(found: dict[str, float]) -> Lines:
    return [(name, f"{one:.1f}") for name, one in found.items()]


def show(title: str, head: Sequence[str], lines: Lines) -> None:
    """Print a table."""
    table = [head, *lines]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    print(f"\n{title}")
    for line in table:
        first, *rest = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  " + "  ".join([first, *rest]).rstrip(), flush=True)


def fill(result: dict[str, Any]) -> None:
    """Write all tables to the page."""
    PAGE.write_text(page.filled(PAGE.read_text(), {}, markdown(result)))


def markdown(result: dict[str, Any]) -> str:
    """Return the tables."""
    parts = ["\n".join(f"- {name}: {value}" for name, value in result["machine"].items())]
    parts += ["### Goals", _table(GOALS, result["goals"])]
    for title, kind, head, cells in (
        ("Requests", "rates", RATES, rates),
        ("Artifacts, 1 worker", "transfers", TRANSFERS, transfers),
    ):
        lines = [(name, *line) for name, found in result[kind].items() for line in cells(found)]
        parts += [f"### {title}", _table(["row", *head], lines)]
    lines = [
        (workers, *line) for workers, found in result["memory"].items() for line in numbers(found)
    ]
    parts += ["### Peak memory", _table(["workers", *MEMORY], lines)]
    parts += ["### In process", _table(STEPS, numbers(result["micro"]))]
    parts += ["### Isolation", _table(ISOLATION, isolation(result["isolation"]))]
    parts += ["### Key store", _table(STORE, store(result["store"]))]
    return "\n\n".join(parts)


def _table(head: Sequence[str], lines: Lines) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)

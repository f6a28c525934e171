"""The goals of the bench, from the issues that set them. A missed goal fails nothing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

from bench.isolation import Cost
from bench.peers import BARE, BASIC, GATE
from bench.rows import interval, ratio

#: The least ratio of the gate's throughput to bare MLflow's, with one worker.
TO_BARE = {"experiments/get": 1.25, "log-batch": 1.25, "version": 1.5}
#: For experiments/get, on which the issue had measured basic-auth at 1/40 of bare MLflow.
TO_BASIC_AUTH = 30
#: The least ratio of the rate of refusals to that of the same request when it is served.
REFUSALS = 10
#: Megabytes, in the round with the most.
GROWTH = {"300 MB up, no key: 401": 5, "1024 MB up": 16, "1024 MB down": 16}
#: Microseconds at most, by the beginning of the step's name.
STEPS = {"plan + settle": 15, "CachedBackend.peek": 25, "AsgiGate": 25, "header provider": 50}

Found = dict[str, list[dict[str, Any]]]


class Goal(NamedTuple):
    name: str
    wanted: str
    found: str
    verdict: str


def judged(result: dict[str, Any]) -> list[Goal]:
    """Yield all goals for which `result` has figures."""
    rates, transfers = result["rates"], result["transfers"]
    return [
        *_rates(rates),
        *_growth(transfers),
        *_steps(result["micro"]),
        *_isolation(result.get("isolation", {})),
        *_peers(rates, transfers),
    ]


def _rates(rates: dict[str, Found]) -> Iterator[Goal]:
    for row, least in TO_BARE.items():
        found = rates.get(f"1 worker: {row}", {})
        if found:
            yield _at_least(f"{row}, to bare MLflow", least, _per_second(found, BARE))
    served = rates.get("1 worker: experiments/get")
    if served and BASIC in served:
        yield _at_least(f"experiments/get, to {BASIC}", TO_BASIC_AUTH, _per_second(served, BASIC))
    for servers, row in product(("1 worker", "1 worker, httptools"), ("no key", "wrong key")):
        served = rates.get(f"{servers}: experiments/get")
        refused = rates.get(f"{servers}: {row}: 401")
        if served and refused:
            pair = {"refused": refused[GATE], "served": served[GATE]}
            found_ratio = ratio(pair, "per_second", "refused", "served")
            name = f"{servers}: {row}: 401, to experiments/get served"
            yield _at_least(name, REFUSALS, found_ratio)


def _growth(transfers: dict[str, Found]) -> Iterator[Goal]:
    for name in [name for name in GROWTH if name in transfers]:
        most = max(one["growth_mb"] for one in transfers[name][GATE])
        yield _at_most(f"{name}, growth of memory, MB", GROWTH[name], most)


def _steps(micro: dict[str, float]) -> Iterator[Goal]:
    for name, cost in micro.items():
        for step, most in STEPS.items():
            if name.startswith(step):
                yield _at_most(f"{name}, µs", most, cost)


def _isolation(costs: dict[str, Cost]) -> Iterator[Goal]:
    for name, one in costs.items():
        if one.more_sql is not None and one.most_sql is not None:
            verdict = "met" if one.more_sql <= one.most_sql else "MISSED"
            yield Goal(f"{name}: statements", f"≤ {one.most_sql}", f"{one.more_sql}", verdict)
        verdict = "met" if one.ratio[0] <= one.most_ratio else "MISSED"
        verdict += ", within the noise" if one.ratio[1] <= one.most_ratio < one.ratio[2] else ""
        yield Goal(name, f"≤ {one.most_ratio:g}", interval(one.ratio), verdict)


def _peers(rates: dict[str, Found], transfers: dict[str, Found]) -> Iterator[Goal]:
    """Yield a goal for all of them together, and one for each that is faster."""
    compared = [
        *((name, peer, _per_second(found, peer)) for name, peer, found in _pairs(rates)),
        *(
            (name, peer, ratio(found, "seconds", peer, GATE))
            for name, peer, found in _pairs(transfers)
        ),
    ]
    slower = [
        _at_least(f"{name}, no slower than {peer}", 1, found)
        for name, peer, found in compared
        if found[0] < 1
    ]
    if compared:
        least = interval(min(found for *_, found in compared))
        verdict = "MISSED" if slower else "met"
        yield Goal(f"no slower than a peer, {len(compared)} times", "≥ 1", least, verdict)
    yield from slower


def _pairs(table: dict[str, Found]) -> Iterator[tuple[str, str, Found]]:
    for name, found in table.items():
        for peer in found:
            if peer not in (BARE, GATE):
                yield name, peer, found


def _per_second(found: Found, other: str) -> tuple[float, float, float]:
    return ratio(found, "per_second", GATE, other)


def _at_least(name: str, least: float, found: tuple[float, float, float]) -> Goal:
    verdict = "met" if found[0] >= least else "MISSED"
    # Some rounds met the goal and some did not: the machine was too busy.
    verdict += ", within the noise" if found[1] < least <= found[2] else ""
    return Goal(name, f"≥ {least:g}", interval(found), verdict)


def _at_most(name: str, most: float, found: float) -> Goal:
    return Goal(name, f"< {most:g}", f"{found:.1f}", "met" if found < most else "MISSED")

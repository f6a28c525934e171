"""That `make bench` still runs: how fast it is, it says itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import goals, isolation, micro, page, peers, store


@pytest.mark.long
def test_every_cost_is_measured() -> None:
    assert len(micro.costs()) > 5  # differences, which noise may make negative
    for question, (middle, high) in store.costs(200).items():
        assert 0 < middle <= high and store.goal(question)


@pytest.mark.long
def test_every_row_of_isolation_is_measured(tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    command = [sys.executable, "-m", "bench", "--only", "isolation", "--json", str(target)]
    done = subprocess.run(command, cwd=peers.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(target.read_text())
    assert not result["rates"] and not result["micro"] and not result["transfers"]
    rows = [*isolation.ROWS, *isolation.GROWING, *isolation.FULL * 3]
    assert len(result["isolation"]) == len(rows) + 5


@pytest.mark.long
def test_every_contender_is_measured(tmp_path: Path) -> None:
    """Those that are installed; what each answers is told where it is not what it should be."""
    target = tmp_path / "bench.json"
    few = ("--rounds", "1", "--seconds", "0.5", "--only", "1 worker: no key")
    command = [sys.executable, "-m", "bench", *few, "--json", str(target)]
    done = subprocess.run(command, cwd=peers.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " answered " not in done.stdout
    result = json.loads(target.read_text())
    (found,) = result["rates"].values()
    assert {peers.BARE, peers.GATE} <= set(found) == set(result["memory"]["1 worker"])
    assert len(found) == 8 or peers.missing()


def test_isolation_adds_no_more_statements_than_its_budget() -> None:
    """In a process of its own: other tests leave hooks in this one."""
    command = [sys.executable, "-m", "bench.isolation"]
    done = subprocess.run(command, cwd=peers.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert len(counts) > 15
    assert not {name: found for name, found in counts.items() if found[0] > found[1]}


def test_a_goal_is_missed_where_a_peer_is_faster() -> None:
    row = {peers.BARE: 100, peers.GATE: 130, "slower": 120, "faster": 140}
    found = {name: [{"per_second": rate}] for name, rate in row.items()}
    result = {"rates": {"1 worker: experiments/get": found}, "transfers": {}, "micro": {}}
    verdicts = {goal.name: goal.verdict for goal in goals.judged(result)}
    assert verdicts == {
        "experiments/get, to bare MLflow": "met",
        "no slower than a peer, 2 times": "MISSED",
        "1 worker: experiments/get, no slower than faster": "MISSED",
    }


@pytest.mark.long
@pytest.mark.skipif(
    not store.PROGRAMS or shutil.which("redis-server") is None, reason="needs PostgreSQL and Redis"
)
def test_every_figure_of_the_page_is_measured(tmp_path: Path) -> None:
    target = tmp_path / "scale.json"
    few = ("--configurations", "1", "--rounds", "1", "--seconds", "0.5", "--keys", "1000")
    command = [sys.executable, "-m", "bench.scale", *few, "--json", str(target)]
    done = subprocess.run(command, cwd=page.PAGE.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(target.read_text())
    (one,) = result["configurations"]
    # What the page says of a request whatever the machine.
    taken = one["per_request"]
    # One in a hundred, should its entry's time be over just then.
    assert taken["lookups_known"] <= 0.01 and taken["lookups_limited"] <= 0.01
    assert taken["lookups_unknown"] == 1 and taken["redis_round_trips"] == 2
    assert one["idle"]["other"] == 0
    text = page.filled(page.PAGE.read_text(), page.figures(result), page.tables(result))
    assert page.places(text) and ">?<" not in text and "| 1 | no limit |" in text

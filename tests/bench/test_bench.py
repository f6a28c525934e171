"""That `make bench` still runs: how fast it is, it says itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import micro, page, store


@pytest.mark.slow
def test_every_cost_is_measured() -> None:
    assert len(micro.costs()) > 5  # differences, which noise may make negative
    for question, (middle, high) in store.costs(200).items():
        assert 0 < middle <= high and store.goal(question)


@pytest.mark.slow
@pytest.mark.skipif(
    not store.PROGRAMS or shutil.which("redis-server") is None, reason="needs PostgreSQL and Redis"
)
def test_every_figure_of_the_page_is_measured(tmp_path: Path) -> None:
    target = tmp_path / "scale.json"
    few = ("--configurations", "1", "--rounds", "1", "--seconds", "0.5", "--keys", "1000")
    command = [sys.executable, "-m", "tests.bench.scale", *few, "--json", str(target)]
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

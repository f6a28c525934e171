"""The shorter way to Flask answers as MLflow's whole application does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import environment

pytestmark = pytest.mark.slow  # thousands of requests


@pytest.mark.parametrize("origins", ["https://allowed.example", "*", ""])
def test_answers_are_the_same_in_status_headers_and_body(tmp_path: Path, origins: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.server.both_ways", str(tmp_path), origins],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print({name: value for name, value in found.items() if name != "differing"})
    assert found["built"]
    assert found["rules"] > 200 and found["compared"] > 4000
    assert {"200", "400", "404"} <= set(found["statuses"])
    assert found["differing"] == []

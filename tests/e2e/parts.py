"""What tests of whole servers share."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.forkserver import IMPORTED
from tests.harness import Server, environment, free_port, run_command, run_forked

EXPERIMENT = "/api/2.0/mlflow/experiments/get?experiment_id=0"
METRICS = "/hokusai/metrics"

#: (name, labels) -> value.
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: bytes) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def scrape(server: Server) -> Samples:
    status, _, body = server.request("GET", METRICS, key=server.key("metrics:read"))
    assert status == 200, body
    return parsed(body)


def read(samples: Samples, name: str, /, **labels: str) -> float:
    """The sum over all series of this name with these labels."""
    wanted = labels.items()
    return sum(value for (n, has), value in samples.items() if n == name and wanted <= has)


@contextlib.contextmanager
def renamed(database: Path, table: str) -> Iterator[None]:
    """While the context lasts, the table has another name."""

    def rename(old: str, new: str) -> None:
        with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection:
            connection.execute("PRAGMA legacy_alter_table = ON")  # leave what refers to it alone
            connection.execute(f"ALTER TABLE {old} RENAME TO {new}")

    rename(table, f"{table}_gone")
    try:
        yield
    finally:
        rename(f"{table}_gone", table)


def python_path(folder: Path) -> str:
    """PYTHONPATH with `folder` first."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def interceptor(folder: Path, source: str, entry: str = "site_rule") -> str:
    """Install an interceptor, module `site_rule`, in `folder`: the PYTHONPATH with it."""
    about = folder / "site-1.dist-info"
    about.mkdir(parents=True)
    (folder / "site_rule.py").write_text(source)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: site\nVersion: 1\n")
    points = f"[mlflow_hokusai_auth.interceptor]\nsite = {entry}\n"
    (about / "entry_points.txt").write_text(points)
    return python_path(folder)


def post(server: Server, path: str, key: str, content: object) -> dict[str, Any]:
    """The answer to `content` as JSON, which must be a good one."""
    body = json.dumps(content).encode()
    headers = {"Content-Type": "application/json"}
    status, _, answer = server.request("POST", path, key=key, headers=headers, body=body)
    assert status == 200, (path, status, answer)
    found: dict[str, Any] = json.loads(answer)
    return found


def hokusai_auth(server: Server, *arguments: str) -> str:
    """What the command prints where the server is."""
    done = run_command(server.folder, *arguments, environ=server.environ)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def refused_start(folder: Path, *options: str, **environ: str) -> str:
    """The one message with which `mlflow server` says that it can't start."""
    folder.mkdir(exist_ok=True)
    command = ["-m", "mlflow", "server", "--app-name", "hokusai-auth"]
    command += ["--port", str(free_port()), *options]
    env = environment(folder, **environ)
    if IMPORTED.isdisjoint((*options, *environ)):
        done = run_forked(folder, *command, environ=env)
    else:
        whole = [sys.executable, *command]
        done = subprocess.run(whole, cwd=folder, env=env, capture_output=True, text=True)
    # 3 is what uvicorn makes of a worker that ended so.
    assert done.returncode in (1, 3), done.stderr
    assert "Traceback" not in done.stderr and "canary" not in done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("hokusai-auth can't start: "), done.stderr
    return said

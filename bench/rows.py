"""The requests of the load, and the comparison of two servers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench import load, micro
from tests.harness import Server

EXPERIMENT = f"{micro.STATIC}?experiment_id=0"
#: Connections on each side. With 15 or more, log-batch on PostgreSQL takes all connections of MLflow's
#: pool to wait for a second one each, for 30 seconds.
CONNECTIONS = 8
LOG_BATCH = "/api/2.0/mlflow/runs/log-batch"
#: A placeholder in a request, for the id of a run on that server.
RUN = "#" * 32


@dataclass(frozen=True)
class Row:
    """A request of the load."""

    name: str
    method: str = "GET"
    path: str = EXPERIMENT
    #: The prefix before the path, for the gate only; the others have no prefixes.
    prefix: str = ""
    #: "" for no key, None for a good key.
    key: str | None = None
    body: str = ""

    def request(self, port: int, header: str, *, prefix: str = "") -> str:
        """Return the request's bytes, as Latin-1 characters; `header` is a whole line."""
        lines = [
            f"{self.method} {prefix}{self.path} HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            "User-Agent: mlflow-python-client/3",
            "Accept-Encoding: gzip, deflate",
            "Accept: */*",
            "Connection: keep-alive",
            *([header] if header else []),
        ]
        if self.body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(self.body)}"]
        return "\r\n".join(lines) + "\r\n\r\n" + self.body


def log_batch(run_id: str) -> str:
    """Return the body of a request that logs 10 new metrics."""
    metrics = [
        {"key": f"metric_{i}", "value": 0.5, "timestamp": "STAMP", "step": 1} for i in range(10)
    ]
    return json.dumps({"run_id": run_id, "metrics": metrics}).replace('"STAMP"', load.STAMP)


def side(request: str, *servers: Server) -> dict[str, Any]:
    """Return a side for `load.measure`: `servers`, loaded evenly."""
    pids = [pid for server in servers for pid in server.workers()]
    return {"ports": [server.port for server in servers], "request": request, "pids": pids}


def ratio(
    found: dict[str, list[dict[str, Any]]], item: str, one: str = "gate", other: str = "bare"
) -> tuple[float, float, float]:
    """Return the median, least and greatest of one / other over the rounds."""
    pairs = zip(found[one], found[other], strict=True)
    ratios = sorted(first[item] / second[item] for first, second in pairs)
    return median(ratios), ratios[0], ratios[-1]


def interval(found: tuple[float, float, float]) -> str:
    """Format the result of `ratio`."""
    return f"{found[0]:.3f} [{found[1]:.2f}, {found[2]:.2f}]"


def new_run(server: Server, header: str) -> str:
    """Create a run, and return its id; `header` is the line with the credential."""
    name, _, value = header.partition(": ")
    status, _, answer = server.request(
        "POST",
        "/api/2.0/mlflow/runs/create",
        headers={name: value, "Content-Type": "application/json"},
        body=b'{"experiment_id": "0"}',
    )
    assert status == 200, answer
    return str(json.loads(answer)["run"]["info"]["run_id"])


def machine(cores: str, server: str) -> dict[str, str]:
    """Describe the machine: `cores` says what runs on which core, `server` what was started."""
    info = Path("/proc/cpuinfo").read_text()
    model = next((line for line in info.splitlines() if line.startswith("model name")), ": unknown")
    servers = ("uvicorn", "h11", "httptools", "starlette", "fastapi", "flask")
    packages = ("mlflow", "mlflow-hokusai-auth", *servers)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return {
        "CPU": f"{model.partition(': ')[2]}, {os.cpu_count()} cores; {cores}",
        "System": f"{platform.platform(terse=True)}, load average {os.getloadavg()[0]:.1f}",
        "Versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "Server": server,
    }

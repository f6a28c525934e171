from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import SERVERS, Server, serve

# Before anything imports MLflow, in the tests' own process as well.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# A test that fails must not wait for the four minutes in which MLflow's client tries again.
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "2"
for name in [n for n in os.environ if n.startswith(("HOKUSAI_", "MLFLOW_TRACKING_"))]:
    del os.environ[name]


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """Servers by the names of `SERVERS`, started when first asked for."""
    running = _Running(tmp_path_factory.mktemp("servers"))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def server(servers: dict[str, Server]) -> Server:
    """One uvicorn worker with h11, MLflow's default."""
    return servers["uvicorn"]


class _Running(dict[str, Server]):
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._contexts: list[object] = []

    def __missing__(self, name: str) -> Server:
        context = serve(self._folder / name, SERVERS[name])
        self[name] = context.__enter__()
        self._contexts.append(context)
        return self[name]

    def stop(self) -> None:
        # All are told before any is waited for.
        for server in self.values():
            server.signal(signal.SIGTERM)
        for context in self._contexts:
            context.__exit__(None, None, None)  # type: ignore[attr-defined]

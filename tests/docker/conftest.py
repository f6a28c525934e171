from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.docker.stack import Stack, engine_problem


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Everything of `docker/docker-compose.yml`, healthy; gone at the end."""
    if problem := engine_problem():
        pytest.skip(problem)
    running = Stack(tmp_path_factory.mktemp("stack"))
    try:
        running.up()
        yield running
    finally:
        running.down()

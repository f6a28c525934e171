"""The hooks' statements in a registry of 1,000 owners and 200,000 versions."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.server import handlers

from mlflow_hokusai_auth.core.policy import Policy
from mlflow_hokusai_auth.server.isolation.reads import Reads
from mlflow_hokusai_auth.server.live_settings import Isolation, Mode
from mlflow_hokusai_auth.server.upstream.artifact_roots import Watch
from mlflow_hokusai_auth.store import ownership
from tests.conftest import empty_database
from tests.server.isolation import bulk
from tests.server.isolation.stores import STAFF, Stores, calling
from tests.server.isolation.test_artifacts import World
from tests.server.isolation.test_reads import check_plans as check_read_plans
from tests.server.isolation.test_statements import check_budgets, check_plans


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_no_statement_grows_with_what_others_have(
    request: pytest.FixtureRequest, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = empty_database(request, kind, tmp_path).replace("postgresql:", "postgresql+psycopg:")
    stores = Stores(uri, tmp_path)
    monkeypatch.setattr(handlers, "_get_tracking_store", lambda *_: stores.tracking)
    ownership.prepare(stores.registry.engine)
    with calling(STAFF):  # the hooks of an earlier test may be left
        bulk.fill(stores.registry.engine, tmp_path.as_uri())
    world = World(stores, Mode("enforce"))
    # PostgreSQL rightly reads a table of a few pages without its index.
    check_plans(world, least=5_000)
    check_budgets(world)
    isolation = Isolation(Mode("enforce"), "full")
    reads = Reads(Policy(), Watch(isolation), world.artifacts.facts)
    reads.install()
    try:
        check_read_plans(stores, least=5_000 if kind == "postgresql" else 0)
    finally:
        reads.remove()

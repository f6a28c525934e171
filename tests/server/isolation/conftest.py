from __future__ import annotations

import pytest

from mlflow_hokusai_auth.server.isolation.hooks import installed
from mlflow_hokusai_auth.server.isolation.locations import Stored
from mlflow_hokusai_auth.server.isolation.reads import Reads
from mlflow_hokusai_auth.store import ownership
from tests.conftest import empty_database
from tests.server.isolation.stores import Stores


@pytest.fixture(scope="module", autouse=True)
def _no_other_application() -> None:
    """Remove the hooks that an application of an earlier test has left in this process."""
    for kind in (Stored, Reads):
        if (hooks := installed(kind)) is not None:
            hooks.remove()


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def stores(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """MLflow's stores on each kind of database, for all tests: each makes things of its own in them."""
    folder = tmp_path_factory.mktemp("stores")
    uri = empty_database(request, request.param, folder)
    made = Stores(uri.replace("postgresql:", "postgresql+psycopg:"), folder)
    # An application that another test put together records owners in this process, too.
    ownership.prepare(made.registry.engine)
    return made

"""A database of an older MLflow, with owners in it, which `mlflow db upgrade` brings up to date."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import sqlalchemy as sa
from mlflow.exceptions import MlflowException

from mlflow_hokusai_auth.core.policy import Policy
from mlflow_hokusai_auth.server.isolation.facts import Facts
from mlflow_hokusai_auth.server.isolation.writes import Writes
from mlflow_hokusai_auth.server.live_settings import Mode
from mlflow_hokusai_auth.server.upstream.artifact_roots import Watch
from mlflow_hokusai_auth.store import ownership
from mlflow_hokusai_auth.store.ownership_tables import METADATA
from tests.conftest import empty_database
from tests.server.isolation.stores import ACME, GLOBEX, STAFF, Stores, calling

#: The MLflow that Hokusai runs, in the environment that `make test-matrix` makes.
OLD = "3.9.0"
ENVIRONMENTS = (Path(__file__).parents[2], Path(sys.prefix).parent)

pytestmark = pytest.mark.long


def python_of(version: str) -> Path:
    """Return the Python of the environment that has this MLflow; skip the test if there is none."""
    for folder in ENVIRONMENTS:
        if (python := folder / f".venv-{version}" / "bin" / "python").exists():
            return python
    pytest.skip(f".venv-{version} is missing: make .venv-{version}/stamp")


#: Makes one of each thing with the older MLflow, and gives the models to owners.
MAKE = textwrap.dedent(
    """
    import sys, mlflow
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as Tracking
    from mlflow_hokusai_auth.core.policy import Policy
    from mlflow_hokusai_auth.core.types import Principal
    from mlflow_hokusai_auth.server import caller as callers
    from mlflow_hokusai_auth.server.isolation.facts import Facts
    from mlflow_hokusai_auth.server.isolation.writes import Writes
    from mlflow_hokusai_auth.server.live_settings import Mode
    from mlflow_hokusai_auth.server.upstream.artifact_roots import Watch
    from mlflow_hokusai_auth.store import ownership

    version, uri, folder = sys.argv[1:]
    assert mlflow.__version__ == version
    tracking, registry = Tracking(uri, folder), Registry(uri)
    ownership.prepare(registry.engine)
    Writes(Policy(), Watch(Mode("enforce")), Facts(usable=True)).install()
    for owner in ("ACME", "GLOBEX"):
        who = Principal(f"key_{owner}", owner, frozenset({"model:write"}), owner_id=owner)
        callers.current.set(callers.Caller(who, "", ""))
        experiment = tracking.create_experiment(f"{owner}-experiment")
        run = tracking.create_run(experiment, "u", 1, [], "r").info.run_id
        for name in ("kept", "renamed", "deleted"):
            registry.create_registered_model(f"{owner}-{name}")
            for _ in "12":
                registry.create_model_version(f"{owner}-{name}", f"s3://bucket/{run}", run)
    """
)


def ours(engine: sa.Engine) -> dict[str, list[str]]:
    """All rows of ownership."""
    with engine.connect() as connection:
        return {
            table.name: sorted(str(tuple(row)) for row in connection.execute(sa.select(table)))
            for table in METADATA.sorted_tables
        }


def run(*command: object, **environ: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environ},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_owners_outlive_an_upgrade_of_mlflow(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    python = python_of(OLD)
    uri = empty_database(request, kind, tmp_path).replace("postgresql:", "postgresql+psycopg:")
    run(python, "-c", MAKE, OLD, uri, tmp_path.as_uri())
    engine = sa.create_engine(uri)
    before = ours(engine)
    assert len(before["hokusai_models"]) == 6 and len(before["hokusai_versions"]) == 12

    # As the operator of a server does it, with the server's environment.
    strict = {"HOKUSAI_AUTH_ISOLATION": "writes"}
    run(sys.executable, "-m", "mlflow", "db", "upgrade", uri, **strict)
    assert ours(engine) == before

    stores, mode = Stores(uri, tmp_path), Mode("enforce")
    ownership.prepare(stores.registry.engine)
    Writes(Policy(), Watch(mode), Facts(usable=True)).install()
    try:
        with calling(ACME):
            registry = stores.registry
            registry.rename_registered_model("ACME-renamed", "ACME-new")
            registry.delete_model_version("ACME-kept", "1")
            registry.delete_registered_model("ACME-deleted")
            experiment = stores.tracking.get_experiment_by_name("ACME-experiment")
            stores.tracking.rename_experiment(experiment.experiment_id, "ACME-new")
            stores.tracking.create_run(experiment.experiment_id, "u", 1, [], "r")
            stores.tracking.delete_experiment(experiment.experiment_id)
            with pytest.raises(MlflowException, match="NOT_OWNER"):
                registry.delete_registered_model("GLOBEX-kept")
        with calling(STAFF):
            registry.delete_model_version("GLOBEX-kept", "1")
        with calling(GLOBEX):
            registry.delete_registered_model("GLOBEX-kept")
            with pytest.raises(MlflowException, match="NAME_TAKEN"):
                registry.create_registered_model("ACME-deleted")
    finally:
        mode.now = "off"
    with engine.connect() as connection:
        owned = {
            name: ownership.model_owner(connection, name)
            for name in ("ACME-kept", "ACME-renamed", "ACME-new", "ACME-deleted", "GLOBEX-kept")
        }
        versions = [
            ownership.version_owner(connection, name, number)
            for name in ("ACME-kept", "ACME-new", "ACME-renamed", "ACME-deleted")
            for number in (1, 2)
        ]
    assert owned == {
        "ACME-kept": "ACME",
        "ACME-renamed": "ACME",
        "ACME-new": "ACME",
        "ACME-deleted": "ACME",
        "GLOBEX-kept": "GLOBEX",
    }
    assert versions == [None, "ACME", "ACME", "ACME", None, None, None, None]

"""The ways back: to plain MLflow, and to the version before. Nothing is lost on them."""

from __future__ import annotations

import json
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from mlflow_hokusai_auth.core.types import Principal
from tests.e2e.test_registration import run_job
from tests.harness import HOKUSAI_AUTH, Server, serve
from tests.registry import Registry

pytestmark = pytest.mark.servers

PACKAGE = Path(__file__).parents[2] / "mlflow_hokusai_auth"
PREFIX = "/api/mlflow"


def register(server: Server, name: str, key: str | None, prefix: str = PREFIX) -> None:
    """A supplier's job."""
    environ = {**server.environ, "MLFLOW_TRACKING_URI": server.origin + prefix}
    if key is not None:
        environ["HOKUSAI_API_KEY"] = key
    environ.pop("PYTHONPATH", None)
    assert run_job(environ, name)[0]["status"] == "READY"


def created(server: Server, *scopes: str) -> str:
    """A key made by the version that runs there."""
    arguments = [part for scope in scopes for part in ("--scope", scope)]
    done = subprocess.run(
        [*HOKUSAI_AUTH, "keys", "create", "--owner", "ACME", "--json", *arguments],
        env=server.environ,
        cwd=server.folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["key"])


def test_to_plain_mlflow_and_back(tmp_path: Path) -> None:
    with serve(tmp_path, started=True) as server:
        key = created(server, "mlflow:write")
        register(server, "before", key)
        before = Registry(server.origin + PREFIX, key).contents()
    with serve(tmp_path, app=None, started=True) as plain:
        assert Registry(plain.origin).contents() == before
        assert plain.request("GET", PREFIX + "/version")[0] == 404
        register(plain, "meanwhile", None, prefix="")
        after = Registry(plain.origin).contents()
        assert before["versions"].items() < after["versions"].items()
    with serve(tmp_path, started=True) as again:
        assert again.request("GET", PREFIX + "/version")[0] == 401
        assert Registry(again.origin + PREFIX, key).contents() == after
        register(again, "after", key)


@pytest.fixture
def next_version(tmp_path: Path) -> Path:
    """This version with one more migration, as the next one will have: a folder for PYTHONPATH."""
    folder = tmp_path / "next"
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    text = (PACKAGE / "__init__.py").read_text()
    (folder / PACKAGE.name / "__init__.py").write_text(text.replace('"0.', '"99.'))
    return folder


def add_migration(next_version: Path, statement: str) -> None:
    versions = next_version / PACKAGE.name / "migrations" / "versions"
    last = max(path.name[:4] for path in versions.glob("0*.py"))
    number = f"{int(last) + 1:04}"
    migration = f"""
        from alembic import op

        revision = "{number}"
        down_revision = "{last}"


        def upgrade() -> None:
            op.execute({statement.format(number=int(number))!r})
        """
    (versions / f"{number}_next.py").write_text(textwrap.dedent(migration))


def test_to_the_version_before_and_forward_again(tmp_path: Path, next_version: Path) -> None:
    add_migration(
        next_version, "ALTER TABLE hokusai_auth_keys ADD COLUMN team VARCHAR(9) DEFAULT ''"
    )
    data = tmp_path / "data"
    with serve(data) as server:
        old_key = created(server, "mlflow:write")
        register(server, "before", old_key)
    with serve(data, PYTHONPATH=str(next_version)) as newer:
        assert 'version="99.' in metrics(newer)
        new_key = created(newer, "mlflow:write")
        register(newer, "by-the-next", new_key)
        contents = Registry(newer.origin + PREFIX, new_key).contents()
    with serve(data) as back:
        assert 'version="99.' not in metrics(back)
        for key in (old_key, new_key):
            assert Registry(back.origin + PREFIX, key).contents() == contents
        assert back.request("GET", PREFIX + "/version")[0] == 401
        third = created(back, "mlflow:write")
        principal = back.store.lookup(old_key)
        assert isinstance(principal, Principal)
        back.store.revoke(principal.key_id)
        register(back, "after", third)
        contents = Registry(back.origin + PREFIX, third).contents()
    with serve(data, PYTHONPATH=str(next_version)) as newer:
        assert Registry(newer.origin + PREFIX, third).contents() == contents
        assert newer.request("GET", PREFIX + "/version", key=old_key)[0] == 401
        assert newer.request("GET", PREFIX + "/version", key=new_key)[0] == 200


def test_a_store_that_the_version_before_can_t_use_is_refused_and_unchanged(
    tmp_path: Path, next_version: Path
) -> None:
    add_migration(
        next_version,
        "UPDATE hokusai_auth_state SET value = {number} WHERE name = 'usable_since'",
    )
    data = tmp_path / "data"
    with serve(data, PYTHONPATH=str(next_version)) as newer:
        key = created(newer, "mlflow:write")
    with pytest.raises(AssertionError, match="migrated by a newer version"), serve(data):
        pass
    with serve(data, PYTHONPATH=str(next_version)) as newer:
        assert newer.request("GET", PREFIX + "/version", key=key)[0] == 200


def metrics(server: Server) -> str:
    key = created(server, "metrics:read")
    return server.request("GET", "/hokusai/metrics", key=key)[2].decode()

"""What is published: a wheel and an sdist that install, and a client that needs mlflow-skinny alone."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from mlflow_hokusai_auth import __version__
from tests.harness import Server

ROOT = Path(__file__).parent.parent

CLIENT = """
import json, mlflow
from mlflow import MlflowClient
client = MlflowClient()
run = client.create_run(client.create_experiment("from a supplier's machine"))
client.log_metric(run.info.run_id, "accuracy", 0.9)
client.log_text(run.info.run_id, "text", "folder/file.txt")
client.create_registered_model("skinny")
version = client.create_model_version("skinny", run.info.artifact_uri, run.info.run_id)
print(json.dumps([version.status, [f.path for f in client.list_artifacts(run.info.run_id)]]))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    # The wheel is built from the sdist, so what the sdist lacks the wheel lacks too.
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return folder


def test_versions_are_one() -> None:
    from importlib.metadata import version

    assert version("mlflow-hokusai-auth") == __version__


@pytest.mark.slow
def test_the_archives_hold_what_runs_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "mlflow_hokusai_auth").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert package <= set(names)
    assert not [name for name in names if name.startswith(("tests", "docker"))]
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "Makefile", "setup.py", "tests/harness.py", "SECURITY.md"} <= inside
    assert package <= inside


@pytest.mark.slow
def test_a_client_machine_needs_mlflow_skinny_alone(
    built: Path, tmp_path: Path, server: Server
) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv/bin/python")
    (wheel,) = built.glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "-q", str(wheel)], check=True)
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True
    )
    names = {item["name"].lower() for item in json.loads(listed.stdout)}
    assert "mlflow-skinny" in names
    assert not names & {"mlflow", "sqlalchemy", "flask", "alembic", "pydantic-settings"}

    environ = {
        **server.environ,
        "HOKUSAI_API_KEY": server.key("mlflow:write"),
        "MLFLOW_TRACKING_URI": f"{server.origin}/api/mlflow",
    }
    done = subprocess.run(
        [python, "-c", CLIENT], env=environ, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == ["READY", ["folder"]]

    refused = subprocess.run(
        [str(tmp_path / "venv/bin/hokusai-auth"), "keys", "list"],
        env=environ,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 1
    assert "pip install 'mlflow-hokusai-auth[server]'" in refused.stderr


@pytest.mark.slow
def test_the_sdist_installs_with_the_server(built: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv/bin/python")
    (sdist,) = built.glob("*.tar.gz")
    subprocess.run([python, "-m", "pip", "install", "-q", f"{sdist}[server]"], check=True)
    made = subprocess.run(
        [str(tmp_path / "venv/bin/hokusai-auth"), "keys", "create"]
        + ["--owner", "x", "--scope", "mlflow:read", "--json"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    assert json.loads(made.stdout)["state"] == "active"

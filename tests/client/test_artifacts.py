"""Artifact requests keep the path of the tracking URI, so that routing by prefix is enough."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

from mlflow_hokusai_auth.client.artifacts import HokusaiArtifactRepository

from .conftest import FILE, Server

SERVICE = "/api/2.0/mlflow-artifacts/artifacts"
LOCATIONS = [
    "mlflow-artifacts:/",
    "mlflow-artifacts:",
    f"mlflow-artifacts:{SERVICE}",
    "mlflow-artifacts:/1/run/artifacts",
    "mlflow-artifacts:///1/run/artifacts",
]


def resolve(artifact_uri: str, tracking_uri: str) -> str:
    return str(HokusaiArtifactRepository.resolve_uri(artifact_uri, tracking_uri))


@pytest.mark.parametrize("location", LOCATIONS[:1] + LOCATIONS[-1:])
def test_every_artifact_call_keeps_the_prefix(
    location: str, tracking: Server, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / "a.txt"
    local.write_bytes(FILE)
    repository = get_artifact_repository(location)
    assert isinstance(repository, HokusaiArtifactRepository)
    assert isinstance(repository, MlflowArtifactsRepository)

    assert [found.path for found in repository.list_artifacts()] == ["a.txt"]
    repository.list_artifacts("sub")
    repository.log_artifact(str(local))
    repository.log_artifact(str(local), "sub")
    repository.log_artifacts(str(tmp_path), "all")
    assert Path(repository.download_artifacts("a.txt", str(tmp_path / "home"))).read_bytes() == FILE
    repository.delete_artifacts("a.txt")

    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "true")
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", "1")
    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "true")
    repository.log_artifact(str(local), "sub")
    repository.abort_multipart_upload("a.txt", "upload", "sub")
    assert Path(repository.download_artifacts("a.txt", str(tmp_path / "home"))).read_bytes() == FILE

    # Presigned URLs lead to the object store, not to the server, and get no key.
    stored = [request for request in tracking.seen if request.path.startswith("/bucket/")]
    called = [request for request in tracking.seen if request not in stored]
    for step in ("create", "complete", "abort"):
        path = f"/api/mlflow/api/2.0/mlflow-artifacts/mpu/{step}/"
        assert any(request.path.startswith(path) for request in called)
    assert len(called) > 10
    for request in called:
        assert request.path.startswith("/api/mlflow/api/")
        assert request.keys == [key]
    assert stored
    assert not any(request.keys for request in stored)


def test_server_info_is_fetched_below_the_prefix(tracking: Server, tmp_path: Path) -> None:
    repository = get_artifact_repository("mlflow-artifacts:/")
    if not hasattr(repository, "_fetch_server_capabilities"):
        pytest.skip("this version of MLflow does not ask")
    repository._fetch_server_capabilities()
    assert [request.path for request in tracking.seen] == ["/api/mlflow/api/3.0/mlflow/server-info"]


def test_mlflows_own_functions_keep_the_prefix(tracking: Server, key: str, tmp_path: Path) -> None:
    if hasattr(mlflow.artifacts, "list_artifacts"):  # not in 2.9
        assert mlflow.artifacts.list_artifacts("mlflow-artifacts:/")
    mlflow.artifacts.download_artifacts("mlflow-artifacts:/a.txt", dst_path=str(tmp_path))
    mlflow.artifacts.download_artifacts("mlflow-artifacts:/1/a.txt", dst_path=str(tmp_path))
    assert tracking.seen
    for request in tracking.seen:
        assert request.path.startswith("/api/mlflow/api/")
        assert request.keys == [key]


def test_every_prefix_is_kept(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = []
    for prefix in ("/api/mlflow", "/api/mlflow/", "//api//mlflow", "/api", "/x", ""):
        tracking_uri = f"https://reg.example.com{prefix}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
        kept = prefix.replace("//", "/").rstrip("/")
        for location in LOCATIONS:
            tail = "/1/run/artifacts" if "run" in location else ""
            expected = f"https://reg.example.com{kept}{SERVICE}{tail}"
            if (resolved := resolve(location, tracking_uri)) != expected:
                wrong.append(f"{location} at {tracking_uri}: {resolved}, not {expected}")
    assert not wrong, "\n".join(wrong)


def test_other_uris_resolve_as_in_mlflow(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    elsewhere = ["mlflow-artifacts://other:1/", "mlflow-artifacts://other/x"]
    ours, others = (f"https://{host}.example.com/api/mlflow" for host in ("reg", "other"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ours)

    def check(locations: list[str], tracking_uri: str) -> None:
        for location in locations:
            theirs = MlflowArtifactsRepository.resolve_uri(location, tracking_uri)
            assert resolve(location, tracking_uri) == theirs, (location, tracking_uri)

    check([*LOCATIONS, *elsewhere], ours)  # without a key
    request.getfixturevalue("key")
    check([*LOCATIONS, *elsewhere], others)
    check([*elsewhere, "mlflow-artifacts://reg.example.com/"], ours)


#: Imports each module, in a fork that has what MLflow itself imports already, but not MLflow.
FIRST = """
import contextlib, os, sys
for name in ("numpy", "pandas", "pydantic", "requests", "sqlalchemy"):
    with contextlib.suppress(ImportError):
        __import__(name)
for script in (
    "import mlflow_hokusai_auth.client.artifacts; assert 'mlflow' not in sys.modules",
    "import mlflow_hokusai_auth.client.header_provider",
    "import mlflow_hokusai_auth.client.auth_provider",
):
    if os.fork() == 0:
        exec(script)
        from mlflow_hokusai_auth.client.artifacts import HokusaiArtifactRepository as ours
        from mlflow_hokusai_auth.client.artifacts import HokusaiArtifactRepository as again
        import mlflow
        assert ours is again
        os._exit(0)
    assert os.wait()[1] == 0, script
"""


def test_module_may_be_imported_before_mlflow() -> None:
    """MLflow loads entry points during its import, and must not get a half-initialised module."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:mlflow", "-c", FIRST],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Failure attempting to register" not in done.stderr


def test_module_has_no_other_attribute() -> None:
    import mlflow_hokusai_auth.client.artifacts as module

    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = module.Other

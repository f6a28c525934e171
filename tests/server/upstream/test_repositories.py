"""MLflow opens only artifacts in the roots, whatever checks its version has."""

from __future__ import annotations

import asyncio
import io
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from mlflow_hokusai_auth.core.locations import Location
from mlflow_hokusai_auth.server.live_settings import Mode
from mlflow_hokusai_auth.server.upstream import artifact_roots
from mlflow_hokusai_auth.server.upstream.repositories import Change, Opener

SECRET = "canary"


class Trusting(LocalArtifactRepository):
    """A repository without checks, as in MLflow 3.4 and perhaps in other packages."""

    def list_artifacts(self, path: str | None = None) -> Any:
        return sorted(one.name for one in Path(self.artifact_dir, path or "").iterdir())

    def get_local_path(self, artifact_path: str) -> str:
        return Path(self.artifact_dir, artifact_path).read_text()

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        Path(self.artifact_dir, artifact_path or "", "written").write_text("x")

    async def log_artifact_from_async_stream(
        self, chunks: Any, artifact_file_name: str, artifact_path: str | None = None
    ) -> None:
        self.log_artifact("", artifact_path)

    def log_artifact_from_stream(
        self, stream: Any, artifact_file_name: str, artifact_path: str | None = None
    ) -> None:
        self.log_artifact("", artifact_path)

    def delete_artifacts(self, artifact_path: str | None = None) -> None:
        Path(self.artifact_dir, artifact_path or "", "secret.txt").unlink()


class Remote(ArtifactRepository):
    """A remote store, which accepts any path."""

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None: ...

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None: ...

    def list_artifacts(self, path: str | None = None) -> list[Any]:
        return []

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        if remote_file_path != "foreign/file":
            raise FileNotFoundError(remote_file_path)
        Path(local_path).write_text(SECRET)


def opener(root: Path, mode: str = "enforce") -> Opener:
    roots = artifact_roots.load((str(root), "s3://bucket/team"), {})
    return Opener(roots, artifact_roots.Watch(Mode(mode)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "secret.txt").write_text(SECRET)
    (root / "link").symlink_to(tmp_path / "out")
    return root


def test_no_path_leads_out_of_a_repository(root: Path) -> None:
    confined = opener(root).confined(Trusting(str(root)))
    assert isinstance(confined, Trusting)
    out = root.parent / "out"
    paths = ["../out", "in/../../out", "link", "in/../link", str(out), "%2e%2e/out"]
    uses: list[Any] = [
        confined.list_artifacts,
        lambda path: confined.list_artifacts(path=path),
        lambda path: confined.get_local_path(f"{path}/secret.txt"),
        lambda path: confined.log_artifact("x", path),
        lambda path: confined.log_artifact("x", artifact_path=path),
        lambda path: confined.log_artifact_from_stream(io.BytesIO(), "x", path),
        lambda path: asyncio.run(confined.log_artifact_from_async_stream(None, "x", path)),
        confined.delete_artifacts,
    ]
    for path in paths:
        for use in uses:
            with pytest.raises(MlflowException, match="LOCATION_REFUSED"):
                use(path)
    assert [one.read_text() for one in out.iterdir()] == [SECRET]
    confined.log_artifact("x", "in")
    assert (confined.list_artifacts("in"), confined.list_artifacts()) == (
        ["written"],
        ["in", "link"],
    )
    remote = opener(root).confined(Remote("s3://bucket/team"))
    with pytest.raises(MlflowException, match="LOCATION_REFUSED"):
        remote.list_artifacts("../other")
    # MLflow's own methods call these, so they are checked, too.
    with pytest.raises(MlflowException, match="LOCATION_REFUSED"):
        remote.download_artifacts("a/../../b", str(root))
    assert remote.list_artifacts("a") == []


def test_only_locations_in_the_roots_may_be_opened(root: Path) -> None:
    rows = {
        str(root): True,
        f"file://{root}/in": True,
        f"{root}/in/../../out": False,
        f"{root}/link": False,
        f"file://{root}/%2e%2e/out": False,
        f"{root}s": False,
        "/": False,
        "a\0b": False,
        "s3://bucket/team": True,
        "s3://bucket/team/a%20b": True,
        "s3://bucket/team/../x": False,
        "s3://bucket/team/%2e%2e/x": False,
        "s3://bucket/teams": False,
        "s3://bucket@evil/team": False,
        "runs:/0123/model": True,
        "runs://profile@databricks/0123/model": False,
        "models://host/name/1": False,
        "mlflow-artifacts:/1": False,
        "http://evil.example/api/2.0/mlflow-artifacts/artifacts/1": False,
    }
    wrong = []
    for uri, may in rows.items():
        try:
            opener(root).check(uri)
        except MlflowException:
            wrong += [uri] if may else []
        else:
            wrong += [] if may else [uri]
    assert not wrong
    for mode in ("observe", "off"):
        opener(root, mode).check("/etc")
        opener(root, mode).confined(Trusting(str(root))).list_artifacts("../out")


def test_roots_come_from_the_server_s_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    names = (artifact_roots.DESTINATION, artifact_roots.DEFAULT_ROOT, artifact_roots.SERVES)
    proxy = "http://own/api/2.0/mlflow-artifacts/artifacts"
    for given, places, base in (
        (("./linked", "mlflow-artifacts:/", "true"), ["real"], "real"),
        (("./linked", proxy, "true"), ["real"], "real"),
        (("./linked", "mlflow-artifacts:/", ""), ["real", "mlflow-artifacts:/"], None),
        (("./linked", "./mlruns", "true"), ["real", "mlruns"], "mlruns"),
        (("./linked", "linked/below", "true"), ["real"], "real/below"),
    ):
        roots = artifact_roots.load((), dict(zip(names, given, strict=True)))
        shown = [str(one).removeprefix(f"{tmp_path}/") for one in roots.places]
        assert shown == places, given
        assert base is None or str(roots.base) == f"{tmp_path}/{base}", given
    with pytest.raises(ValueError, match=r"--artifacts-destination s3://bucket/a%20b can't be"):
        artifact_roots.load((), {artifact_roots.DESTINATION: "s3://bucket/a%20b"})


class Blind:
    """Whoever does not see what `hidden` is in the path of, or by default anything."""

    looks = False
    hides = True

    def __init__(self, hidden: str = "") -> None:
        self.hidden = hidden

    def check(self, change: Change, *, last: bool = True) -> bool:
        return True

    def sees(self, place: Location) -> bool:
        return bool(self.hidden) and self.hidden not in place.parts


def test_file_that_is_not_seen_is_missing_in_a_remote_store(root: Path, tmp_path: Path) -> None:
    """MLflow's base class downloads in threads, which do not know the caller."""
    roots = artifact_roots.load((str(root), "s3://bucket/team"), {})
    opener = Opener(roots, artifact_roots.Watch(Mode("enforce")), Blind())
    repository = opener.confined(Remote("s3://bucket/team"))
    answers = []
    for path in ("foreign/file", "missing/file"):
        with pytest.raises(MlflowException) as raised:
            repository.download_artifacts(path, str(tmp_path))
        answers.append(str(raised.value).replace(path, "?"))
    assert answers[0] == answers[1]
    assert not [
        one for one in tmp_path.rglob("*") if one.is_file() and one.parent != tmp_path / "out"
    ]


@pytest.mark.parametrize("hidden", ["0" * 32, f"m-{'0' * 32}"])
def test_only_the_hidden_segment_of_a_path_is_another_one_for_mlflow(
    root: Path, hidden: str
) -> None:
    """MLflow's answer depends on the rest: on its length, its spelling, and on files in it."""
    roots = artifact_roots.load((str(root),), {})
    opener = Opener(roots, artifact_roots.Watch(Mode("enforce")), Blind(hidden))
    seen = []

    class Recording(Trusting):
        def get_local_path(self, artifact_path: str) -> str:
            seen.append(artifact_path)
            raise MlflowException(f"{artifact_path}, {os.path.normpath(artifact_path)}")

    repository = opener.confined(Recording(str(root)))
    for path in (
        f"./in/.//{hidden}/./{hidden}/x/.",
        f"./{hidden}",
        f"{hidden}/",
        f"a{hidden}/{hidden}",
        "in/./x",
    ):
        with pytest.raises(MlflowException) as raised:
            repository.get_local_path(path)
        assert str(raised.value) == f"{path}, {os.path.normpath(path)}"
        before, found, after = path.partition(f"/{hidden}" if "/" in path[:-1] else hidden)
        given = seen.pop()
        assert (given == path) == (not found) and len(given) == len(path)
        assert given.startswith(before) and given.endswith(after)


def test_path_that_mlflow_would_cut_in_its_messages_is_refused(root: Path) -> None:
    repository = opener(root).confined(Trusting(str(root)))
    longest = f"{'./' * 2047}in"
    assert repository.list_artifacts(longest) == []
    with pytest.raises(MlflowException, match="at most 4096 characters"):
        repository.list_artifacts(f"{longest}/")


def test_name_that_no_file_system_has_is_a_mistake_of_the_client(root: Path) -> None:
    """MLflow's own answer is 500."""
    repository = opener(root).confined(LocalArtifactRepository(str(root)))
    file = root.parent / "file"
    file.write_text("x")
    for name in ("é" * 127, "n" * 255):
        repository.log_artifact(str(file), name)
        assert [one.path for one in repository.list_artifacts(name)] == [f"{name}/file"]
    for name in ("é" * 128, "n" * 256):
        for call in (
            partial(repository.list_artifacts, f"in/{name}"),
            partial(repository.log_artifact, str(file), f"{name}/in"),
            partial(repository.log_artifact, name, "in"),
            partial(repository.log_artifact, name),
            partial(repository.delete_artifacts, name),
        ):
            with pytest.raises(MlflowException, match="at most 255 bytes") as raised:
                call()
            assert raised.value.error_code == "INVALID_PARAMETER_VALUE"

"""Nobody confined changes artifacts of other owners, or registered ones, in MLflow's repositories."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import inspect
import io
import json
import pkgutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow.store.artifact
import pytest
import sqlalchemy as sa
from mlflow.entities.logged_model_status import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.server import handlers
from mlflow.store.artifact import artifact_repo, artifact_repository_registry
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from sqlalchemy.orm import Session

from mlflow_hokusai_auth.core.policy import Policy
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server.isolation import preparation
from mlflow_hokusai_auth.server.isolation.artifacts import Artifacts, Frozen
from mlflow_hokusai_auth.server.isolation.facts import Facts
from mlflow_hokusai_auth.server.isolation.locations import Stored
from mlflow_hokusai_auth.server.isolation.writes import Writes
from mlflow_hokusai_auth.server.live_settings import Mode
from mlflow_hokusai_auth.server.upstream import artifact_roots, repositories
from mlflow_hokusai_auth.server.upstream.artifact_roots import Watch
from mlflow_hokusai_auth.server.upstream.experiment_folders import ExperimentFolders
from mlflow_hokusai_auth.server.upstream.repositories import READING, STORING
from mlflow_hokusai_auth.server.upstream.tables import SqlModelVersion
from mlflow_hokusai_auth.store import ownership
from tests.server.isolation.stores import ACME, GLOBEX, STAFF, Made, Stores, calling, unused_name

NAMELESS = replace(ACME, owner_id="")


@dataclass
class World:
    """One process of the server: its artifacts, and a clock for what it remembers."""

    stores: Stores
    mode: Mode
    now: float = 0.0

    def __post_init__(self) -> None:
        roots = artifact_roots.load(
            (),
            {
                artifact_roots.DESTINATION: str(self.stores.folder),
                artifact_roots.DEFAULT_ROOT: self.stores.folder.as_uri(),
                artifact_roots.SERVES: "true",
            },
        )
        watch, facts = Watch(self.mode), Facts(usable=True, timer=lambda: self.now)
        self.folders = ExperimentFolders(roots, {})
        self.artifacts = Artifacts(
            roots, Policy(), self.folders, watch, facts, Frozen(lambda: self.now)
        )
        Writes(Policy(), watch, facts).install()
        repositories.confine(roots, watch, self.artifacts)
        self.stored = Stored(roots, Policy(), watch, self.folders, self.artifacts)
        self.proxy = artifact_repository_registry.get_artifact_repository(str(self.stores.folder))

    def put(self, path: str, content: bytes = b"new") -> None:
        """Store a file as `PUT mlflow-artifacts/artifacts/PATH` does."""
        folder, _, name = path.rpartition("/")
        self.proxy.log_artifact_from_stream(io.BytesIO(content), name, folder or None)

    def file(self, path: str) -> Path:
        return self.stores.folder / path

    def made_by(self, principal: Principal) -> Made:
        """Things of one owner, with a file in the run, in the logged model and beside both."""
        with calling(principal):
            made = self.stores.make()
        for path in files(made):
            self.file(path).parent.mkdir(parents=True, exist_ok=True)
            self.file(path).write_text("first")
        return made


def files(made: Made) -> list[str]:
    return [
        f"{made.experiment}/{made.run}/artifacts/model/MLmodel",
        f"{made.experiment}/{made.run}/artifacts/notes.txt",
        f"{made.experiment}/models/{made.logged}/artifacts/MLmodel",
        f"{made.experiment}/own/data.txt",
    ]


@pytest.fixture
def world(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    ownership.prepare(stores.registry.engine)
    monkeypatch.setattr(handlers, "_get_tracking_store", lambda *_: stores.tracking)
    mode = Mode("enforce")
    yield World(stores, mode)
    # Other tests of this process write without a caller.
    mode.now = "off"


@pytest.fixture
def logged_models(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry finds logged models in the tracking store of `world`; there is no server to ask."""
    client = SimpleNamespace(get_logged_model=world.stores.tracking.get_logged_model)
    monkeypatch.setattr("mlflow.store.model_registry.sqlalchemy_store.MlflowClient", lambda: client)


def code(way: Callable[..., object], *given: object) -> str:
    """The code with which a way is refused; "" if it is not."""
    try:
        way(*given)
    except MlflowException as refused:
        said = json.loads(refused.serialize_as_json())
        return str(said.get("error") or said["error_code"])
    return ""


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".db"
    }


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def ways(world: World, folder: str, local: Path) -> dict[str, Callable[[], object]]:
    """Every method that changes artifacts, on the proxy's repository and on one with its root there."""
    proxy = world.proxy
    own = artifact_repository_registry.get_artifact_repository(str(world.file(folder)))
    source = local / "notes.txt"
    source.write_text("other")
    ways: dict[str, Callable[[], object]] = {}
    for name, repository, path in (("proxy", proxy, folder), ("own", own, None)):
        ways |= {
            f"{name}: file": lambda r=repository, p=path: r.log_artifact(str(source), p),
            f"{name}: files": lambda r=repository, p=path: r.log_artifacts(str(local), p),
            f"{name}: stream": lambda r=repository, p=path: r.log_artifact_from_stream(
                io.BytesIO(b"x"), "notes.txt", p
            ),
            f"{name}: chunks": lambda r=repository, p=path: asyncio.run(
                r.log_artifact_from_async_stream(chunks(b"x"), "notes.txt", p)
            ),
            f"{name}: deletion": lambda r=repository, p=path: r.delete_artifacts(p),
        }
    return ways


def test_another_owner_changes_no_artifacts(world: World, tmp_path: Path) -> None:
    theirs, own = world.made_by(ACME), world.made_by(GLOBEX)
    nobodys = world.made_by(replace(STAFF, owner_id=""))
    folders = [
        *(path.rpartition("/")[0] for made in (theirs, nobodys) for path in files(made)),
        *(f"{theirs.experiment}/{theirs.run}", f"{theirs.experiment}", "", "elsewhere", "0/x"),
        *(f"{own.experiment}", f"{own.experiment}/models", f"{own.experiment}/traces/tr-1"),
        f"{theirs.experiment}/{own.run}/artifacts",
        f"{own.experiment}/{theirs.run}/artifacts",
        f"{own.experiment}/{own.run}/artifacts/{theirs.run}",
        f"{own.experiment}/{'a' * 32}/artifacts",
        f"0{own.experiment}/x",
        "/".join(("x",) * 200),
    ]
    before = contents(world.stores.folder)
    for principal in (GLOBEX, NAMELESS):
        with calling(principal):
            for folder in folders:
                for name, way in ways(world, folder, tmp_path).items():
                    assert code(way) in (
                        "NOT_OWNER",
                        "EXPERIMENT_REFUSED",
                        "LOCATION_REFUSED",
                        "ISOLATED",
                    ), (principal.owner_id, folder, name)
    assert contents(world.stores.folder) == before


def test_owners_and_staff_change_artifacts(world: World, tmp_path: Path) -> None:
    for principal in (ACME, STAFF):
        made = world.made_by(ACME)
        for path in files(made):
            for name, way in ways(world, path.rpartition("/")[0], tmp_path).items():
                with calling(principal):
                    assert code(way) == "", (principal.owner_id, path, name)


def test_spellings_of_a_path_lead_nowhere_else(world: World) -> None:
    theirs, own = world.made_by(ACME), world.made_by(GLOBEX)
    there = files(theirs)[0].rpartition("/")[0]
    mine = f"{own.experiment}/{own.run}/artifacts"
    world.file(
        mine,
    ).joinpath("link").symlink_to(world.file(there))
    world.file(there).joinpath("link").symlink_to(world.file(mine))
    before = contents(world.stores.folder)
    paths = [
        f"./{there}",
        f"{there}//",
        f"{mine}/../../../{there}",
        f"{mine}/%2e%2e/%2e%2e/%2e%2e/{there}",
        f"{mine}/%252e%252e/{there}",
        there.replace(theirs.run, f"%{ord(theirs.run[0]):x}{theirs.run[1:]}"),
        f"{mine}/link",
        f"{there}/link",
        str(world.file(there)),
    ]
    with calling(GLOBEX):
        for path in paths:
            assert code(world.put, f"{path}/x") != "", path
            assert code(world.proxy.delete_artifacts, path) != "", path
    assert contents(world.stores.folder) == before


def test_path_with_too_many_folders_is_refused(world: World) -> None:
    own = world.made_by(ACME)
    for inner in ("x/" * 200, "".join(f"{number:032x}/" for number in range(40))):
        with calling(ACME):
            path = f"{own.experiment}/{own.run}/artifacts/{inner}x"
            assert code(world.put, path) == "LOCATION_REFUSED"


def test_every_run_in_a_path_counts(world: World) -> None:
    """An administrator placed ACME's experiment among the artifacts of GLOBEX's run."""
    outer = world.made_by(GLOBEX)
    inside = f"{outer.experiment}/{outer.run}/artifacts/in"
    stores = world.stores
    with calling(STAFF):
        number = stores.tracking.create_experiment(unused_name(), world.file(inside).as_uri())
    with stores.registry.engine.begin() as connection:
        ownership.record_experiment(
            connection,
            int(number),
            owner="ACME",
            key_id="",
            created_at=stores.tracking.get_experiment(number).creation_time,
        )
        world.folders.read_by(connection)
    with calling(ACME):
        run = stores.tracking.create_run(number, "u", 1, [], "r").info.run_id
    for principal in (ACME, GLOBEX):
        with calling(principal):
            for path in (f"{inside}/{run}/artifacts/x", f"{inside}/own/x"):
                assert code(world.put, path) == "NOT_OWNER"
            above = inside.rpartition("/")[0]
            assert code(world.proxy.delete_artifacts, above) == "NOT_OWNER"
    # In a folder that a person has chosen, the experiment is found by its location.
    chosen = unused_name()
    with calling(STAFF):
        number = stores.tracking.create_experiment(
            unused_name(), world.stores.folder.joinpath(chosen).as_uri()
        )
        run = stores.tracking.create_run(number, "u", 1, [], "r").info.run_id
        world.put(f"{chosen}/{run}/artifacts/x")
    with calling(GLOBEX):
        for path in (f"{chosen}/{run}/artifacts/x", f"{chosen}/{outer.run}/artifacts/x"):
            assert code(world.put, path) == "NOT_OWNER"


def test_registered_artifacts_are_frozen_by_every_spelling(world: World) -> None:
    for source in (
        "{root}/{folder}",
        "file:{root}/{folder}",
        "file://{root}/{folder}",
        "file://{root}/{folder}/",
        "mlflow-artifacts:/{folder}",
        "mlflow-artifacts:///{folder}",
        "runs:/{run}/model",
        "runs:///{run}/model/",
    ):
        made = world.made_by(ACME)
        file, other = files(made)[:2]
        folder = file.rpartition("/")[0]
        with calling(ACME):
            world.put(file, b"second")
            uri = source.format(root=world.stores.folder, folder=folder, run=made.run)
            version = world.stores.registry.create_model_version(made.model, uri)
            for path in (file, f"{folder}/more/x"):
                assert code(world.put, path) == "ARTIFACT_FROZEN", source
            for path in (file, folder, folder.rpartition("/")[0], f"{made.experiment}/{made.run}"):
                assert code(world.proxy.delete_artifacts, path) == "ARTIFACT_FROZEN", (source, path)
            # MLflow decodes the path of a deletion.
            spelled = folder.removesuffix("l") + f"%{ord('l'):x}"
            assert code(world.proxy.delete_artifacts, spelled) == "ARTIFACT_FROZEN", source
            world.put(other)
            world.put(f"{folder}2/x")
        assert world.file(file).read_bytes() == b"second"
        with calling(STAFF):
            world.put(file, b"third")
        with calling(ACME):
            world.stores.registry.delete_model_version(made.model, version.version)
            world.now += 2
            world.put(file, b"fourth")


def test_whoever_makes_a_version_freezes_its_files(world: World) -> None:
    for maker, mode in ((STAFF, "enforce"), (NAMELESS, "off"), (None, "off"), (ACME, "observe")):
        made = world.made_by(ACME)
        file, other = files(made)[:2]
        world.mode.now = mode
        with calling(maker):
            registry = world.stores.registry
            registry.create_model_version(made.model, str(world.file(file).parent))
            registry.rename_registered_model(made.model, name := unused_name())
            registry.transition_model_version_stage(name, "2", "Archived", False)
        world.mode.now = "enforce"
        with calling(ACME):
            assert code(world.put, file) == "ARTIFACT_FROZEN", (maker, mode)
            world.put(other)
        world.mode.now = mode
        with calling(maker):
            registry.delete_model_version(name, "2")
        world.mode.now, world.now = "enforce", world.now + 2
        with calling(ACME):
            world.put(file)


def test_location_that_mlflow_sets_later_is_frozen(world: World) -> None:
    made = world.made_by(ACME)
    file = files(made)[0]
    with Session(world.stores.registry.engine) as session, calling(STAFF):
        row = session.query(SqlModelVersion).filter_by(name=made.model).one()
        row.storage_location = str(world.file(file).parent)
        session.commit()
    with calling(ACME):
        assert code(world.put, file) == "ARTIFACT_FROZEN"


def test_versions_of_plain_mlflow_are_frozen_after_the_next_start(world: World) -> None:
    made = world.made_by(ACME)
    file = files(made)[0]
    engine = world.stores.registry.engine
    # Whose rows are recorded by a flush, and this is none.
    with calling(STAFF), engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO model_versions (name, version, current_stage, source) "
                "VALUES (:name, 7, 'None', :source)"
            ),
            {"name": made.model, "source": f"mlflow-artifacts:/{file.rpartition('/')[0]}/"},
        )
    uri = engine.url.render_as_string(hide_password=False)
    assert preparation.prepare({artifact_roots.TRACKING: uri}).obstacle is None
    with calling(ACME):
        assert code(world.put, file) == "ARTIFACT_FROZEN"


def test_finished_logged_model_is_frozen(world: World) -> None:
    made = world.made_by(ACME)
    file = files(made)[2]
    folder = file.rpartition("/")[0]
    with calling(ACME):
        world.put(file)
        world.stores.tracking.finalize_logged_model(made.logged, LoggedModelStatus.READY)
        assert code(world.put, file) == "ARTIFACT_FROZEN"
        for path in (file, folder, folder.rpartition("/")[0]):
            assert code(world.proxy.delete_artifacts, path) == "ARTIFACT_FROZEN", path


def test_unfinished_logged_model_is_frozen_by_its_name_in_its_run(world: World) -> None:
    made = world.made_by(ACME)
    with calling(ACME):
        tracking = world.stores.tracking
        model = tracking.create_logged_model(made.experiment, "net", made.run)
        file = f"{made.experiment}/models/{model.model_id}/artifacts/MLmodel"
        world.put(file)
        world.stores.registry.create_model_version(made.model, f"runs:/{made.run}/net")
        assert code(world.put, file) == "ARTIFACT_FROZEN"


class Slow(io.BytesIO):
    """An upload whose last bytes come after something else has happened."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__(b"late")
        self.meanwhile = meanwhile

    def read(self, *size: Any) -> bytes:
        data = super().read(*size)
        if not data:
            self.meanwhile()
        return data


async def slow(meanwhile: Callable[[], object]) -> AsyncIterator[bytes]:
    yield b"late"
    meanwhile()


def run(way: Callable[..., Any], *given: object) -> None:
    asyncio.run(way(*given))


def test_upload_that_ends_after_the_registration_changes_nothing(world: World) -> None:
    for kind in ("stream", "chunks"):
        made = world.made_by(ACME)
        folder, _, name = files(made)[0].rpartition("/")
        register = partial(
            world.stores.registry.create_model_version, made.model, str(world.file(folder))
        )
        with calling(ACME):
            if kind == "stream":
                way = partial(world.proxy.log_artifact_from_stream, Slow(register))
            else:
                write = world.proxy.log_artifact_from_async_stream
                way = partial(run, write, slow(register))
            assert code(way, name, folder) == "ARTIFACT_FROZEN", kind
        assert world.file(files(made)[0]).read_text() == "first", kind


def test_version_of_other_experiments_files_freezes_nobody_s(world: World) -> None:
    made = world.made_by(ACME)
    with calling(STAFF):
        version = world.stores.registry.create_model_version(made.model, str(world.stores.folder))
    with calling(ACME):
        world.put(files(made)[0])
    with calling(STAFF):
        world.stores.registry.delete_model_version(made.model, version.version)


def test_key_that_may_not_delete_deletes_no_artifacts(world: World) -> None:
    made = world.made_by(ACME)
    with calling(replace(ACME, no_delete=True)):
        world.put(files(made)[0])
        assert code(world.proxy.delete_artifacts, files(made)[0]) == "DELETE_REFUSED"


def test_modes_off_and_observe_refuse_nothing(world: World) -> None:
    made = world.made_by(ACME)
    for mode in ("off", "observe"):
        world.mode.now = mode
        with calling(GLOBEX):
            world.put(files(made)[0], mode.encode())
        assert world.file(files(made)[0]).read_text() == mode


def statements(world: World, way: Callable[[], object]) -> int:
    """The number of statements of one way."""
    seen: list[str] = []
    note = lambda *given: seen.append(given[2])  # noqa: E731
    sa.event.listen(world.stores.tracking.engine, "before_cursor_execute", note)
    try:
        code(way)
    finally:
        sa.event.remove(world.stores.tracking.engine, "before_cursor_execute", note)
    return len([text for text in seen if not text.startswith("PRAGMA")])


def test_owners_are_remembered_and_frozen_places_too(world: World) -> None:
    made = world.made_by(ACME)
    version = lambda: world.stores.registry.create_model_version(  # noqa: E731
        made.model, str(world.file(files(made)[0]).parent)
    )
    world = World(world.stores, Mode("enforce"))  # a process that knows nothing yet
    put = lambda: world.put(files(made)[0])  # noqa: E731
    with calling(STAFF):
        assert statements(world, put) == 0
    with calling(GLOBEX):
        assert statements(world, put) == 2  # the run's experiment, and its owner
        assert statements(world, put) == 0
    with calling(ACME):
        # Whether the place is frozen, before and after the upload.
        assert statements(world, put) == 2
        # Then for the other files of the folder after it only.
        assert statements(world, put) == 1
        assert statements(world, lambda: world.put(f"{files(made)[0]}2")) == 1
        assert statements(world, lambda: world.put(files(made)[1])) == 2
        world.now += 2
        assert statements(world, put) == 3  # the owner once more
        version()
        assert statements(world, put) == 1
        assert statements(world, put) == 0


def test_database_that_fails_stores_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = world.made_by(ACME)
    broken = sa.create_engine("sqlite:////nowhere/at/all.db")
    monkeypatch.setattr(
        "mlflow_hokusai_auth.server.upstream.stores.tracking_engine", lambda: broken
    )
    with calling(ACME):
        assert code(world.put, files(made)[0]) == "TEMPORARILY_UNAVAILABLE"
    assert world.file(files(made)[0]).read_text() == "first"


def test_every_method_of_the_installed_mlflow_is_in_a_list() -> None:
    for module in pkgutil.iter_modules(mlflow.store.artifact.__path__):
        importlib.import_module(f"mlflow.store.artifact.{module.name}")
    kinds = [artifact_repo.ArtifactRepository]
    for kind in kinds:
        kinds += kind.__subclasses__()
    known = {*READING, *STORING, "delete_artifacts", "log_artifacts"}
    unknown = {
        f"{kind.__name__}.{name}"
        for kind in kinds
        if kind.__module__.startswith("mlflow.")
        for name in dir(kind)
        if not name.startswith("_") and name not in known
        if inspect.isfunction(method := inspect.getattr_static(kind, name))
        if {"path", "artifact_path", "remote_file_path"} & {*inspect.signature(method).parameters}
    }
    assert not unknown, "a new method counts as one that changes a whole folder: add it to a list"


class Remote(LocalArtifactRepository):
    """A repository with the methods of those in a cloud."""

    def create_multipart_upload(
        self, local_file: str, num_parts: int = 1, artifact_path: str | None = None
    ) -> None: ...

    def complete_multipart_upload(
        self, local_file: str, upload_id: str, parts: Any = None, artifact_path: str | None = None
    ) -> None: ...

    def abort_multipart_upload(
        self, local_file: str, upload_id: str, artifact_path: str | None = None
    ) -> None: ...

    def create_presigned_upload_url(self, artifact_path: str, expiration: int = 900) -> None: ...

    def invented(self, artifact_path: str) -> None: ...


def test_uploads_in_parts_and_by_url_are_judged(world: World) -> None:
    theirs = world.made_by(ACME)
    opener = repositories.Opener(world.artifacts.roots, world.artifacts.watch, world.artifacts)
    remote = opener.confined(Remote(str(world.stores.folder)))
    path = files(theirs)[0]
    folder, _, name = path.rpartition("/")
    uses: list[Callable[[], object]] = [
        lambda: remote.create_multipart_upload(name, 1, folder),
        lambda: remote.complete_multipart_upload(name, "u", [], artifact_path=folder),
        lambda: remote.abort_multipart_upload(name, "u", folder),
        lambda: remote.create_presigned_upload_url(path),
        lambda: remote.invented(folder),
    ]
    for use in uses:
        with calling(GLOBEX):
            assert code(use) == "NOT_OWNER"
        with calling(ACME):
            assert code(use) == ""
    with calling(ACME):
        world.stores.registry.create_model_version(theirs.model, str(world.file(folder)))
        for use in uses:
            assert code(use) == "ARTIFACT_FROZEN"


def version(world: World, name: str, source: str, run: str | None = None) -> str:
    return code(world.stores.registry.create_model_version, name, source, run)


@contextmanager
def checked(world: World) -> Iterator[None]:
    """Check sources, until the context ends: the mappers would keep the check."""
    check = world.stored.version
    for name in ("before_insert", "before_update"):
        sa.event.listen(SqlModelVersion, name, check)
    try:
        yield
    finally:
        for name in ("before_insert", "before_update"):
            sa.event.remove(SqlModelVersion, name, check)


def share(world: World, model: str, level: str) -> None:
    with world.stores.registry.engine.begin() as connection:
        grant = {"id": unused_name()[-32:], "grantee": "GLOBEX", "granted_by": "ACME"}
        grant |= {"pattern": model, "level": level, "expires_at": None}
        grant |= {"key_id": "", "created_at": 0.0}
        connection.execute(sa.insert(ownership.GRANTS), grant)
        ownership.expand_grant(connection, grant)


@pytest.mark.usefixtures("logged_models")
def test_source_of_a_version_is_one_s_own_or_shared(world: World) -> None:
    stores = world.stores
    theirs, own, shared = world.made_by(ACME), world.made_by(GLOBEX), world.made_by(ACME)
    nobodys = world.made_by(replace(STAFF, owner_id=""))
    folder = {made: files(made)[0].rpartition("/")[0] for made in (theirs, own, shared, nobodys)}
    for made in (theirs, own, shared, nobodys):
        with calling(STAFF):
            stores.registry.create_model_version(made.model, str(world.file(folder[made])))
    share(world, shared.model, "read")

    def sources(made: Made) -> list[str]:
        return [
            str(world.file(folder[made])),
            world.file(folder[made]).as_uri(),
            f"mlflow-artifacts:/{folder[made]}",
            f"models:/{made.logged}",
            f"models:/{made.model}/2",
            f"mlflow-artifacts:/{made.experiment}/own",
        ]

    with checked(world), calling(GLOBEX):
        for source in (*sources(own), "dummy-source"):
            assert version(world, own.model, source) == "", source
        for made in (theirs, nobodys):
            for source in sources(made):
                assert version(world, own.model, source) == "SOURCE_REFUSED", source
        for source in (
            f"mlflow-artifacts:/{own.experiment}",
            f"mlflow-artifacts:/{own.experiment}/{theirs.run}/artifacts",
            f"mlflow-artifacts:/{own.experiment}/{own.run}/artifacts/{theirs.run}",
            f"mlflow-artifacts:/{unused_name()}",
            f"runs:/{'0' * 32}/model",
            # The newest logged model of that name, whenever it is opened.
            f"runs:/{own.run}/model",
            f"runs:/{theirs.run}/model",
        ):
            assert version(world, own.model, source) == "SOURCE_REFUSED", source
        # A version that is shared, and the files of it; nothing else of its run.
        for source in (f"models:/{shared.model}/2", *sources(shared)[:3]):
            assert version(world, own.model, source) == "", source
        for source in (f"runs:/{shared.run}/other", f"models:/{shared.logged}"):
            assert version(world, own.model, source) == "SOURCE_REFUSED", source
    # An administrator's version of everybody's files gives nobody the rest.
    with calling(STAFF):
        stores.registry.create_model_version(shared.model, str(stores.folder))
    with checked(world), calling(GLOBEX):
        assert version(world, own.model, sources(theirs)[0]) == "SOURCE_REFUSED"
    with checked(world), calling(NAMELESS):
        assert version(world, own.model, sources(own)[0]) != ""
    with checked(world), calling(STAFF):
        assert version(world, own.model, sources(theirs)[0]) == ""


@pytest.mark.usefixtures("logged_models")
def test_run_of_a_version_is_one_s_own_or_that_of_its_files(world: World) -> None:
    stores = world.stores
    theirs, own, shared = world.made_by(ACME), world.made_by(GLOBEX), world.made_by(ACME)
    with calling(ACME):
        number = shared.experiment
        logged = stores.tracking.create_logged_model(number, "m", source_run_id=shared.run)
        folder = str(world.file(files(shared)[0].rpartition("/")[0]))
        stores.registry.create_model_version(shared.model, folder, shared.run)
        stores.registry.create_model_version(shared.model, f"models:/{logged.model_id}")
    share(world, shared.model, "read")
    mine = str(world.file(files(own)[0].rpartition("/")[0]))
    with checked(world), calling(GLOBEX):
        assert version(world, own.model, mine, own.run) == ""
        for run in (theirs.run, shared.run, "0" * 32):
            assert version(world, own.model, mine, run) == "NOT_OWNER", run
            assert version(world, own.model, f"models:/{own.logged}", run) == "NOT_OWNER", run
        # MLflow's client names the run of the first version when it copies one.
        for source in (f"models:/{shared.model}/2", folder, logged.artifact_location):
            assert version(world, own.model, source, shared.run) == "", source
            assert version(world, own.model, source, theirs.run) == "NOT_OWNER", source
    with checked(world), calling(STAFF):
        assert version(world, own.model, mine, theirs.run) == ""


def test_foreign_files_of_an_old_version_stay_out_of_another_owner_s_model(world: World) -> None:
    theirs, own = world.made_by(ACME), world.made_by(GLOBEX)
    place = str(world.file(files(theirs)[0].rpartition("/")[0]))
    # Before isolation any files would do.
    world.mode.now = "off"
    with calling(GLOBEX):
        world.stores.registry.create_model_version(own.model, place)
    world.mode.now = "enforce"
    share(world, theirs.model, "contribute")
    with checked(world), calling(GLOBEX):
        for source in (f"models:/{own.model}/2", place):
            # There, the files' owner would seem to have shared them.
            assert version(world, theirs.model, source) == "SOURCE_REFUSED", source
            assert version(world, own.model, source) == "", source
        mine = str(world.file(files(own)[0].rpartition("/")[0]))
        assert version(world, theirs.model, mine) == ""
        assert version(world, theirs.model, f"models:/{theirs.model}/2") == ""

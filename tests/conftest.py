from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import time_machine
from hypothesis import settings

from tests import harness
from tests.harness import Server, free_port, run_folder, shared

# Before anything imports MLflow, in the tests' own process as well.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# A test that fails must not wait for the four minutes in which MLflow's client tries again.
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "2"
for name in [n for n in os.environ if n.startswith(("HOKUSAI_", "MLFLOW_TRACKING_"))]:
    del os.environ[name]
# By default hypothesis fails an example that takes 200 ms, which a busy machine makes of any.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_configure() -> None:
    # Before xdist starts its workers, which share it.
    run_folder()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "servers" in getattr(item, "fixturenames", ()):
            item.add_marker("servers")


#: The one test of `make test` that has a server.
MAIN_JOB = "test_supplier_registers_a_model"


#: Seconds after which no long test begins any more; `.ci/run` has some, `make test-long` has not.
LONG_SECONDS = float(os.environ.get("LONG_TESTS_SECONDS", "inf"))
_began = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("long") and time.monotonic() - _began > LONG_SECONDS:
        pytest.skip(f"left to make test-long, as {LONG_SECONDS:g} s are over")
    tiers = ("servers", "long", "docker")
    harness.may_serve = item.name == MAIN_JOB or any(map(item.get_closest_marker, tiers))


@pytest.fixture(scope="session")
def servers() -> dict[str, Server]:
    """Servers by the names of `SERVERS`, started when first asked for; all tests share them."""
    return _Shared()


@pytest.fixture(scope="session")
def server(servers: dict[str, Server]) -> Server:
    """One uvicorn worker with h11, MLflow's default."""
    return servers["uvicorn"]


@pytest.fixture(autouse=True)
def _artifacts_anywhere() -> Iterator[None]:
    """An application that a test puts together confines MLflow in this process until the test ends."""
    yield
    if name := sys.modules.get("mlflow.store.artifact.artifact_repository_registry"):
        vars(name._artifact_repository_registry).pop("get_artifact_repository", None)


class _Shared(dict[str, Server]):
    def __missing__(self, name: str) -> Server:
        self[name] = shared(name)
        return self[name]


@contextlib.contextmanager
def redis_server(directory: Path, *options: str) -> Iterator[None]:
    """A Redis of its own; skips the test where there is none."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    process = subprocess.Popen(
        ["redis-server", "--bind", "127.0.0.1", "--save", "", "--dir", str(directory), *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert any("Ready to accept connections" in line for line in process.stdout)
        yield
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    with redis_server(tmp_path, "--port", str(port)):
        yield f"redis://127.0.0.1:{port}/0"


_numbers = itertools.count()


@pytest.fixture
def one_minute() -> Iterator[None]:
    """Let the clock go on from the start of this minute: attempts count by the minute."""
    with time_machine.travel(time.time() // 60 * 60):
        yield


@pytest.fixture(params=["sqlite", "postgresql"])
def database_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind that the store may be in."""
    return empty_database(request, request.param, tmp_path)


def empty_database(request: pytest.FixtureRequest, kind: str, folder: Path) -> str:
    """Return the URI of an empty database of `kind`, in `folder` if it is SQLite's."""
    if kind == "sqlite":
        return f"sqlite:///{folder}/keys.db"
    cluster: Postgresql = request.getfixturevalue("postgresql")
    name = f"test_{next(_numbers)}"
    engine = sa.create_engine(cluster.uri.replace("postgresql", "postgresql+psycopg", 1))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    # Each connection is a process of PostgreSQL's, for which a busy machine may need over 3 s.
    return f"{cluster.uri.removesuffix('postgres')}{name}?connect_timeout=60"


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Postgresql]:
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("PostgreSQL is not installed: no /usr/lib/postgresql/*/bin/initdb")
    cluster = Postgresql(programs[-1].parent)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.remove()


class Postgresql:
    """A cluster of its own in a new folder, which listens on a free port of 127.0.0.1."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        # Not pytest's folder, whose parents only its owner may enter.
        self._folder = Path(tempfile.mkdtemp(prefix="hokusai-auth-postgresql-"))
        # PostgreSQL refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(self._folder, self._user)
        self.port = free_port()
        self._run("initdb", "--username=postgres", "--auth=trust", "--no-sync", "--no-instructions")

    @property
    def uri(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c fsync=off"
        options += f" -c unix_socket_directories={self._folder}"
        log = str(self._folder / "log")
        self._run("pg_ctl", "start", "--wait", f"--log={log}", f"--options={options}")

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "--mode=immediate")

    def remove(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, program: str, *options: str) -> None:
        command = [str(self._programs / program), "-D", str(self._folder / "data"), *options]
        # Not a pipe: the server keeps it open, and the wait for its end would be for the server's.
        with (self._folder.with_suffix(".out")).open("wb") as output:
            try:
                subprocess.run(
                    command, user=self._user, cwd="/", stdout=output, stderr=output, check=True
                )
            finally:
                self._folder.with_suffix(".out").unlink(missing_ok=True)

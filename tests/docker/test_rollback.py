"""The commands of docs/rollback.md, run as they stand there; nothing that was registered is lost."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Iterator

import pytest

from mlflow_hokusai_auth.core.types import MODES
from tests.docker.stack import REPLICAS, ROOT, SCRIPT, Stack, docker, until
from tests.registry import Registry

pytestmark = pytest.mark.docker

PAGE = (ROOT / "docs" / "rollback.md").read_text()
BLOCKS = re.findall(r"^```sh ([\w-]+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
IMAGE = "mlflow-hokusai-auth"
VERSION = "/api/mlflow/version"
#: What the next version will do to the store, and this one has to live with.
MIGRATION = """
FROM {image}:latest
RUN echo 'revision, down_revision = "{number}", "{last}"' > {folder}/{number}_next.py \
 && echo 'from alembic import op' >> {folder}/{number}_next.py \
 && echo 'def upgrade(): op.execute("CREATE TABLE hokusai_auth_teams (name VARCHAR(9))")' \
    >> {folder}/{number}_next.py
"""


def run(stack: Stack, name: str, *, image: str = "previous") -> None:
    """Run the blocks of this name as they are, but for the tag of the version before."""
    script = "set -eu\n" + "".join(text for found, text in BLOCKS if found in ("setup", name))
    script = script.replace(f"{IMAGE}:previous", f"{IMAGE}:{image}")
    began = time.monotonic()
    done = subprocess.run(
        ["sh", "-c", script],
        cwd=SCRIPT.parent,
        env=stack.environ,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"{name} ({image}): {time.monotonic() - began:.0f} s")


def register(stack: Stack, name: str, key: str = "") -> None:
    done = stack.client("python", "/register.py", name, key=key)
    assert json.loads(done.stdout)["status"] == "READY"


def statuses(stack: Stack) -> set[int]:
    """What both replicas answer without a key."""
    return {stack.ask(replica, "GET", VERSION)[0] for replica in REPLICAS}


def all_in(stack: Stack, mode: str) -> bool:
    """Whether no process of either replica is in another mode than this."""
    key = stack.key("metrics:read")
    told = [stack.ask(replica, "GET", "/hokusai/metrics", key=key)[1] for replica in REPLICAS]
    others = [f'hokusai_auth_mode{{mode="{other}"}} 0.0\n' for other in MODES if other != mode]
    return all(other in text for text in told for other in others)


@pytest.fixture
def kept(stack: Stack) -> Iterator[Registry]:
    """The registry, which has at the end what it had, and what was registered meanwhile."""
    key = stack.key("mlflow:write")
    register(stack, f"before-{time.time_ns()}", key)
    registry = Registry(stack.url("nginx") + "/api/mlflow", key)
    before = registry.contents()
    yield registry
    assert stack.request("nginx", "GET", VERSION)[0] == 401
    after = registry.contents()
    assert all(before[kind].items() <= after[kind].items() for kind in before)


def test_the_mode(stack: Stack, kept: Registry) -> None:
    run(stack, "mode")
    began = time.monotonic()
    until(lambda: all_in(stack, "off"))
    print(f"followed within {time.monotonic() - began:.1f} s more")
    assert statuses(stack) == {200}
    answer = stack.request("nginx", "GET", VERSION)
    assert answer[1]["x-hokusai-auth-mode"] == "off"
    register(stack, f"off-{time.time_ns()}")
    run(stack, "mode-back")
    until(lambda: all_in(stack, "enforce"))
    assert statuses(stack) == {401}


def test_the_mode_by_force_without_the_key_store(stack: Stack, kept: Registry) -> None:
    with gone(stack, "hokusai"):
        key = stack.service_key(scopes=["model:read"])
        until(lambda: stack.ask("mlflow-1", "GET", VERSION, key=key)[0] == 503)
        run(stack, "force")
        assert statuses(stack) == {200}
        register(stack, f"forced-{time.time_ns()}")
    run(stack, "force-back")
    assert statuses(stack) == {401}


@contextlib.contextmanager
def gone(stack: Stack, database: str) -> Iterator[None]:
    """Nobody gets a connection to the database meanwhile, and whoever had one loses it."""

    def say(sql: str) -> None:
        stack.exec("postgres", "psql", "-U", "postgres", "-v", "ON_ERROR_STOP=1", "-c", sql)

    say(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
    say(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'")
    try:
        yield
    finally:
        say(f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")


def test_the_version_before(stack: Stack, kept: Registry) -> None:
    versions = ROOT / "mlflow_hokusai_auth" / "migrations" / "versions"
    last = max(path.name[:4] for path in versions.glob("0*.py"))
    folder = stack.exec(
        "mlflow-1", "python", "-c", "import mlflow_hokusai_auth as m; print(m.__path__[0])"
    ).stdout.strip()
    text = MIGRATION.format(
        image=IMAGE,
        number=f"{int(last) + 1:04}",
        last=last,
        folder=f"{folder}/migrations/versions",
    ).replace("RUN", "USER root\nRUN", 1)
    docker("build", "--tag", f"{IMAGE}:next", "-", stdin=text + "USER 10001\n")
    docker("tag", f"{IMAGE}:latest", f"{IMAGE}:previous")
    try:
        run(stack, "version", image="next")
        said = stack.exec("postgres", "psql", "-U", "postgres", "-c", "\\dt", "hokusai").stdout
        assert "hokusai_auth_teams" in said
        new_key = stack.new_key("mlflow:write")["key"]
        register(stack, f"next-{time.time_ns()}", new_key)
        run(stack, "version")
        for replica in REPLICAS:
            assert stack.inspect(replica)["Config"]["Image"] == f"{IMAGE}:previous"
        assert statuses(stack) == {401}
        register(stack, f"previous-{time.time_ns()}", new_key)
    finally:
        run(stack, "version-back")
    assert stack.ask("mlflow-2", "GET", VERSION, key=new_key)[0] == 200


def test_plain_mlflow(stack: Stack, kept: Registry) -> None:
    before = kept.contents()
    try:
        run(stack, "plain")
        plain = Registry(stack.url("nginx") + "/api/mlflow")
        assert plain.contents() == before
        assert stack.request("nginx", "GET", "/hokusai/login")[0] == 404
        register(stack, f"plain-{time.time_ns()}")
        meanwhile = plain.contents()
    finally:
        run(stack, "plain-back")
    assert statuses(stack) == {401}
    assert kept.contents() == meanwhile

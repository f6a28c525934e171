"""The unit of systemd and the command beside it, which `docs/operator/systemd.md` installs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from tests.docker.stack import until
from tests.docker.test_alerts import ROOT
from tests.harness import free_port

FOLDER = ROOT / "docker" / "systemd"
UNIT = (FOLDER / "mlflow.service").read_text()
COMMAND = (FOLDER / "hokusai-auth").read_text()
PAGE = (ROOT / "docs" / "operator" / "systemd.md").read_text()
BIN = Path(sys.executable).parent
#: The points of `systemd-analyze security`, of 100, that the unit may have.
EXPOSURE = 20


def replaced(text: str, names: dict[str, str]) -> str:
    """`text` with other names; fails if it has not one of the old ones."""
    for old, new in names.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def test_systemd_takes_the_unit_and_finds_it_little_exposed(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    here = tmp_path / "mlflow.service"
    here.write_text(UNIT.replace("/opt/mlflow/bin/mlflow ", f"{BIN}/mlflow "))
    for command in (
        ["verify", "--man=no"],
        ["security", "--offline=yes", f"--threshold={EXPOSURE}"],
    ):
        done = subprocess.run(["systemd-analyze", *command, here], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not re.search(r"unknown|ignoring|failed", done.stderr, re.I), done.stderr


def test_the_command_and_the_page_are_about_the_service_of_the_unit() -> None:
    settings = dict(re.findall(r"^(\w+)=(.+)$", UNIT, re.M))
    folder = f"/var/lib/{settings['StateDirectory']}"
    assert settings["WorkingDirectory"] == folder
    for part in (
        f"--uid={settings['User']}",
        f"--gid={settings['Group']}",
        f"EnvironmentFile={settings['EnvironmentFile']}",
        f"WorkingDirectory={folder}",
        f"UMask={settings['UMask']}",
        f"{settings['ExecStart'].split()[0].rpartition('/')[0]}/hokusai-auth",
    ):
        assert part in COMMAND, part
    assert settings["ExecStart"].partition(" ")[2] in PAGE
    for part in (f"install -m 600 /dev/null {settings['EnvironmentFile']}", f"--home-dir {folder}"):
        assert part in PAGE, part
    assert os.access(FOLDER / "hokusai-auth", os.X_OK)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of the service, under a name of its own, and the command beside it."""
    if not Path("/run/systemd/system").is_dir() or os.geteuid() != 0:
        pytest.skip("systemd does not run here, or this is not root")
    name, port = f"hokusai-test-{os.getpid()}", free_port()
    environment, command = tmp_path / "env", tmp_path / "hokusai-auth"
    environment.touch(0o600)
    environment.write_text("HOKUSAI_AUTH_POLICY=scopes\n")
    both = {
        "/opt/mlflow/bin": str(BIN),
        "/etc/mlflow.env": str(environment),
        "/var/lib/mlflow": f"/var/lib/{name}",
    }
    # No user is made for a test, and the environment may be in somebody's home.
    only = {
        "StateDirectory=mlflow": f"StateDirectory={name}",
        "=mlflow\n": "=daemon\n",
        "ProtectHome=yes": "ProtectHome=read-only",
        "--port 5000": f"--port {port}",
    }
    unit = Path(f"/run/systemd/system/{name}.service")
    unit.write_text(replaced(UNIT, {**both, **only}))
    command.write_text(replaced(COMMAND, {**both, "id=mlflow": "id=daemon"}))
    command.chmod(0o755)
    try:
        subprocess.run(["systemctl", "daemon-reload"], check=True)
        subprocess.run(["systemctl", "start", name], check=True)
        yield f"http://127.0.0.1:{port}", command
    finally:
        subprocess.run(["systemctl", "stop", name], check=False)
        unit.unlink()
        subprocess.run(["systemctl", "daemon-reload"], check=False)
        shutil.rmtree(f"/var/lib/{name}", ignore_errors=True)


@pytest.mark.servers
def test_service_runs_and_the_command_opens_its_key_store(service: tuple[str, Path]) -> None:
    origin, command = service

    def is_up() -> bool:
        with contextlib.suppress(OSError), urlopen(f"{origin}/health", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    def run(*arguments: str) -> Any:
        environ = {**os.environ, "SUDO_USER": "alice"}
        text = subprocess.check_output([command, *arguments], env=environ, text=True)
        return json.loads(text)

    until(is_up, 120)
    key = run("keys", "create", "--owner", "x", "--scope", "mlflow:read", "--json")["key"]
    asked = Request(f"{origin}/version", headers={"X-API-Key": key})
    with urlopen(asked, timeout=30) as answer:
        assert answer.status == 200
    with pytest.raises(HTTPError, match="401"):
        urlopen(f"{origin}/version", timeout=30)
    # There is one event, and so one line.
    assert run("audit", "--event", "key.created", "--json")["actor"] == "cli:alice"

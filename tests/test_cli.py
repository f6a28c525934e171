"""`hokusai-auth`, as it is called: exit status, output, and nothing secret in an argument."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlflow_hokusai_auth.core import keys
from tests.harness import HOKUSAI_AUTH, environment


@pytest.fixture
def run(tmp_path: Path):
    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*HOKUSAI_AUTH, *arguments],
            input=stdin,
            env=environment(tmp_path),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return run


def test_a_key_is_shown_once(run) -> None:
    made = run("keys", "create", "--owner", "ACME", "--scope", "mlflow:write", "--json")
    answer = json.loads(made.stdout)
    assert keys.importable(answer["key"])
    for command in (["list"], ["list", "--json"], ["show", answer["key_id"]]):
        shown = run("keys", *command)
        assert shown.returncode == 0
        assert answer["key_id"] in shown.stdout
        assert answer["key"][8:] not in shown.stdout + shown.stderr


def test_the_key_alone_is_on_standard_output(run) -> None:
    arguments = ["--owner", "ACME", "--scope", "mlflow:read", "--environment", "test"]
    made = run("keys", "create", *arguments, "--expires-in", "30d", "--name", "notebook")
    assert keys.importable(made.stdout.strip()) and made.stdout.startswith("hk_test_")
    assert "not stored" in made.stderr


def test_import_show_and_revoke(run, tmp_path: Path) -> None:
    key = "hk_live_" + "Ab1" * 10 + "zz"
    (tmp_path / "key.txt").write_text(key + "\n")
    arguments = ["--owner", "Old friend", "--scope", "model:write", "--json"]
    taken = run("keys", "import", *arguments, "--key-file", "key.txt")
    assert taken.returncode == 0 and key not in taken.stdout
    again = run("keys", "import", *arguments, stdin=key)
    assert again.returncode == 1 and "already" in again.stderr and key not in again.stderr
    key_id = json.loads(taken.stdout)["key_id"]
    assert json.loads(run("keys", "revoke", key_id, "--json").stdout)["state"] == "revoked"
    assert "revoked" in run("keys", "list").stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "key_nobody"], "There is no key 'key_nobody'"),
        (["revoke", "key_nobody"], "There is no key 'key_nobody'"),
        (["create", "--owner", "x", "--scope", "root"], "Unknown scope: root. Known: admin"),
        (["create", "--owner", " ", "--scope", "mlflow:read"], "owner must say"),
        (["create", "--owner", "x", "--scope", "mlflow:read", "--expires-in", "1y"], "such as 30d"),
        (
            ["create", "--owner", "x", "--scope", "mlflow:read", "--environment", "prod"],
            "environment must be one of live, test, dev",
        ),
        (["import", "--owner", "x", "--scope", "mlflow:read"], "no key that can be imported"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(run, arguments: list[str], says: str) -> None:
    done = run("keys", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("hokusai-auth: ") and says in line


def test_routes_prints_every_route_with_its_class(run) -> None:
    rows = json.loads(run("routes", "--json").stdout)
    assert len(rows) > 480
    assert {row["access"] for row in rows} == {"public", "read", "write", "admin"}
    assert [row for row in rows if row["access"] == "public"] == [
        {
            "access": "public",
            "method": "GET",
            "route": "/health",
            "kind": "server",
            "served_by": served_by,
        }
        for served_by in ("flask", "native")
    ]


def test_explain_names_the_rule_and_the_verdict(run) -> None:
    arguments = ["POST", "/api/mlflow/api/2.0/mlflow/experiments/delete", "--scope", "model:write"]
    shown = run("explain", *arguments)
    assert "POST /api/2.0/mlflow/experiments/delete" in shown.stdout
    assert "a key with model:write is refused" in shown.stdout
    answer = json.loads(run("explain", *arguments, "--scope", "mlflow:write", "--json").stdout)
    assert answer["needs"] == "write" and answer["verdict"].endswith("allowed")
    assert "mlflow:write" in answer["scopes"] and "mlflow:read" not in answer["scopes"]
    assert "everybody" in run("explain", "GET", "/mlflow/health").stdout
    assert "not known" in run("explain", "GET", "/mlflow/mlflow/health").stdout


def test_without_the_server_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    # A path without SQLAlchemy: what a client machine has.
    (tmp_path / "sqlalchemy.py").write_text("raise ImportError('none here', name='sqlalchemy')")
    for code in ("cli import main; main(['keys', 'list'])", "server.app import create_app"):
        done = subprocess.run(
            [sys.executable, "-c", f"from mlflow_hokusai_auth.{code}"],
            env={**environment(tmp_path), "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert "pip install 'mlflow-hokusai-auth[server]'" in done.stderr
        assert "Traceback" not in done.stderr

"""The command's work before any worker starts, and the assembly of each worker."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import mlflow.server.fastapi_app
import pytest
from prometheus_client import REGISTRY

from mlflow_hokusai_auth.authorities import server_jobs
from mlflow_hokusai_auth.core.types import MODES
from mlflow_hokusai_auth.server import app, metrics, settings
from mlflow_hokusai_auth.server.gate import interceptors
from mlflow_hokusai_auth.server.upstream import static_files
from mlflow_hokusai_auth.store.database import Actor
from mlflow_hokusai_auth.store.keys import LocalStore
from tests.contract.test_mlflow import VERSION
from tests.server.forked import forked
from tests.server.upstream.test_sockets import nodelay

OFF = "hokusai-auth: MODE IS off. NO REQUEST NEEDS A KEY."
OBSERVE = "hokusai-auth: mode is observe. Requests that would be refused are only logged."


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    yield
    metrics.clear()
    os.environ.clear()
    os.environ.update(before)


def store(folder: Path) -> LocalStore:
    made = LocalStore(f"sqlite:///{folder}/hokusai_auth.db")
    made.migrate()
    return made


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the message of `create_app` when it ends the worker."""
    with pytest.raises(SystemExit) as ended:
        app.create_app()
    # With this code uvicorn's supervisor does not restart the worker.
    assert ended.value.code == 3
    return capsys.readouterr().err


# The command


def test_workers_and_jobs_inherit_what_they_need(tmp_path: Path) -> None:
    app.bootstrap({})
    assert os.environ["FORWARDED_ALLOW_IPS"] == ""
    assert os.environ[server_jobs.TOKEN].startswith("hk_jobs_")
    assert Path(os.environ[metrics.DIRECTORY]).is_dir()
    assert LocalStore(f"sqlite:///{tmp_path}/hokusai_auth.db").is_current()


def test_forwarded_allow_ips_of_the_operator_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "192.0.2.1")
    app.bootstrap({"uvicorn_opts": "--log-level debug", "gunicorn_opts": "--timeout 60"})
    assert os.environ["FORWARDED_ALLOW_IPS"] == "192.0.2.1"


def test_writable_files_of_mlflow_s_pages_cause_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for user, writable, said in (
        (0, True, "the server runs as root, who may write every file"),
        (1000, True, "the server's user may write the files"),
        (1000, False, ""),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os, "geteuid", lambda user=user: user)
            patch.setattr(os, "access", lambda *_, writable=writable: writable)
            warning = static_files.may_be_written()
        assert (warning or "").startswith(said) and bool(warning) == bool(said)
    monkeypatch.setattr(static_files, "may_be_written", lambda: "may be written")
    app.bootstrap({})
    assert capsys.readouterr().err == "hokusai-auth: may be written\n"


SAID = [
    ({}, None, []),
    ({"MODE": "observe"}, None, [OBSERVE]),
    ({"MODE": "off"}, None, [OFF]),
    ({}, "off", [OFF, "mode is off, set by `hokusai-auth mode`. It overrides HOKUSAI_AUTH_MODE="]),
    ({"MODE": "off"}, "enforce", ["mode is enforce, set by `hokusai-auth mode`. It overrides "]),
    ({"MODE": "observe"}, "observe", [OBSERVE]),
    ({"FORCE_MODE": "enforce"}, "off", []),
    ({"FORCE_MODE": "off"}, "enforce", [OFF]),
    ({"SERVICE_URL": "http://auth.example.com"}, None, []),
    (
        {"BACKEND": "service", "SERVICE_URL": "http://auth.example.com"},
        None,
        ["hokusai-auth: keys are sent to http://auth.example.com without encryption."],
    ),
    ({"BACKEND": "service", "SERVICE_URL": "https://auth.example.com"}, None, []),
]


def test_command_prints_warnings_for_the_operator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = []
    for number, (environ, kept, said) in enumerate(SAID):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(static_files, "may_be_written", lambda: None)
            if kept is not None:
                database = store(folder).database
                database.set_state("mode", MODES.index(kept), "mode.set", Actor("operator", ""))
            for name, value in environ.items():
                patch.setenv(f"HOKUSAI_AUTH_{name}", value)
            app.bootstrap({})
        lines = capsys.readouterr().err.splitlines()
        if len(lines) != len(said) or any(
            text not in line for text, line in zip(said, lines, strict=True)
        ):
            wrong.append(f"{environ}, {kept}: {lines}, not {said}")
    assert not wrong, "\n".join(wrong)


def test_command_starts_without_its_store_only_if_forced_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOKUSAI_AUTH_DATABASE_URI", "sqlite:////nowhere/at/all.db")
    with pytest.raises(SystemExit, match="can't start"):
        app.bootstrap({})
    monkeypatch.setenv("HOKUSAI_AUTH_FORCE_MODE", "off")
    app.bootstrap({})
    assert "hokusai-auth: starts all the same, as its mode is off: " in capsys.readouterr().err


def test_command_stops_at_mistakes_that_would_stop_workers() -> None:
    shared = {
        "BACKEND": "service",
        "SERVICE_URL": "https://auth.example.com",
        "REDIS_URL": "redis://127.0.0.1:1",
        "SECRET_KEY": "s" * 32,
    }
    point = EntryPoint("tenants", "no_such_module:Tenants", interceptors.GROUP)
    for environ, points, says in (
        ({"LEAK_PUBLIC_KEYS": "/nowhere.json"}, [], "/nowhere.json can't be read"),
        ({"METRICS_BIND": "192.0.2.1:9464"}, [], "metrics can't be served at 192.0.2.1:9464"),
        (shared, [], "redis"),
        ({}, [point], r"interceptor tenants .*can't be loaded"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(f"HOKUSAI_AUTH_{name}", value)
            patch.setitem(sys.modules, "redis", None)
            patch.setattr(interceptors, "entry_points", lambda group, found=points: found)
            with pytest.raises(SystemExit, match=f"can't start: .*{says}"):
                app.bootstrap({})


def test_import_does_nothing_outside_the_server_command() -> None:
    assert app._in_server_command() is None
    for command, options in (("server", {"port": 1}), ("gc", None)):
        with click.Context(click.Command(command), info_name=command) as context:
            context.params = {"port": 1}
            assert app._in_server_command() == options


# A worker


def test_worker_that_cannot_start_prints_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    for environ, says in (
        ({}, "the key store's tables are missing"),
        ({"HOKUSAI_AUTH_MODE": "on"}, "HOKUSAI_AUTH_MODE: "),
        ({"_MLFLOW_STATIC_PREFIX": "/ui"}, "--static-prefix is not supported"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            said = refused(capsys)
        assert said.startswith("hokusai-auth can't start: ") and says in said


def test_unexpected_error_is_shown_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise TypeError("unforeseen")

    monkeypatch.setattr(settings, "load", fail)
    said = refused(capsys)
    assert "Traceback" in said and "TypeError: unforeseen" in said


ORIGINS = ("https://ui.example", "http://localhost:3000", "https://evil.example")
PAGES = [
    "account",
    "audit",
    "health",
    "links",
    "monitoring",
    "ownership",
    "pages",
    "status",
    "token",
    "trust",
    "unknown",
    "validation",
]


def worker(folder: Path, **environ: str) -> dict[str, Any]:
    """Describe the parts of a worker, in a fork that has none of them yet."""

    def start() -> dict[str, Any]:
        os.chdir(folder)
        os.environ.update(environ)
        logging.setLogRecordFactory(logging.LogRecord)
        # The server would take pytest's handlers for the operator's.
        for name in ("", "mlflow_hokusai_auth.audit"):
            logging.getLogger(name).handlers.clear()
        metrics.INFO.clear()
        metrics.MODE.clear()
        collected: list[object] = []
        gc.collect = lambda: collected.append("all")  # type: ignore[assignment]
        with socket.socket(socket.AF_INET) as listening:
            listening.bind(("127.0.0.1", 0))
            made: Any = app.create_app()
            at_once = nodelay(listening)
        collected.append(gc.get_freeze_count() > 0)
        flask_app = mlflow.server.app
        gate = getattr(made, "_gate", None)
        return {
            "type": type(made).__name__,
            "threads": sorted(one.name for one in threading.enumerate()[1:]),
            "shortcut": getattr(made, "_fast_path", None) is not None,
            "user": "_set_user" in [one.__name__ for one in flask_app.before_request_funcs[None]],
            "pages": sorted(name for name in flask_app.blueprints if name.startswith("hokusai")),
            "cut": logging.getLogRecordFactory() is not logging.LogRecord,
            "shown": bool(logging.getLogger("mlflow_hokusai_auth.audit").handlers),
            "collected and frozen": collected == ["all", True],
            "told": sorted(
                family.name
                for family in REGISTRY.collect()
                if family.name in ("hokusai_auth_info", "hokusai_auth_mode") and family.samples
            ),
            "sends at once": at_once,
            "cors": gate and [gate.cors.headers(origin) != () for origin in ORIGINS],
        }

    found: dict[str, Any] = forked(start)
    return found


@pytest.mark.skipif(VERSION < (3, 5), reason="MLflow before 3.5 has no security middleware")
@pytest.mark.parametrize("origins", ["", "https://ui.example"])
def test_application_under_uvicorn_is_assembled_as_designed(origins: str, tmp_path: Path) -> None:
    store(tmp_path)
    environ = {"MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": origins} if origins else {}
    found = worker(tmp_path, _MLFLOW_SGI_NAME="uvicorn", **environ)
    assert found == {
        "type": "AsgiGate",
        "threads": ["hokusai-auth-live-settings"],
        "shortcut": True,
        "user": True,
        "pages": ["hokusai", *(f"hokusai_{name}" for name in PAGES)],
        "cut": True,
        "shown": True,
        "collected and frozen": True,
        "told": ["hokusai_auth_info", "hokusai_auth_mode"],
        "sends at once": True,
        "cors": [bool(origins), True, False],
    }


def test_wsgi_application_starts_without_a_store_if_forced_off(
    tmp_path: Path,
) -> None:
    assert worker(tmp_path, HOKUSAI_AUTH_FORCE_MODE="off")["type"] == "function"


def test_wsgi_application_starts_no_thread_before_it_serves(tmp_path: Path) -> None:
    # With gunicorn's --preload the process forks then, and a fork keeps the locks that a thread holds.
    store(tmp_path)
    assert worker(tmp_path, _MLFLOW_SGI_NAME="gunicorn")["threads"] == []

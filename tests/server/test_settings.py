"""Mistakes in the settings stop the server's start, with a message."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_hokusai_auth.core.errors import SettingsError
from mlflow_hokusai_auth.server import settings
from mlflow_hokusai_auth.server.app import bootstrap


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    yield
    # The variables that `bootstrap` sets for workers and jobs must not reach later tests.
    os.environ.clear()
    os.environ.update(before)


def test_the_defaults_start_a_server(tmp_path: Path) -> None:
    bootstrap({"static_prefix": None, "uvicorn_opts": None, "gunicorn_opts": None})
    assert (tmp_path / "hokusai_auth.db").exists()


#: A setting, a value that it must not have, and what is said of it.
MISTAKES = [
    ("CACHE_TTL", "soon", "HOKUSAI_AUTH_CACHE_TTL: "),
    ("CACHE_TTL", "0", "HOKUSAI_AUTH_CACHE_TTL: "),
    ("PREFIX", "/x", "did you mean HOKUSAI_AUTH_PREFIXES?"),
    ("COLOUR", "red", "no such setting"),
    ("MODE", "on", "HOKUSAI_AUTH_MODE: "),
    ("BACKEND", "ldap", "must be local, service or local,service"),
    ("BACKEND", "service", "start: HOKUSAI_AUTH_BACKEND=service needs"),
    ("SERVICE_URL", "a.example", "start: HOKUSAI_AUTH_SERVICE_URL: must"),
    ("SERVICE_URL", "ftp://auth.example.com", "must look like https://"),
    ("SERVICE_URL", "https://", "must look like https://"),
    ("SERVICE_URL", "https://a.example:99999", "has a port that is not a number up to 65535"),
    ("SERVICE_URL", "https://a.example:canary", "has a port that is not a number up to 65535"),
    ("SERVICE_CA_BUNDLE", "/nowhere.pem", "must name a file of certificates"),
    ("SERVICE_CA_BUNDLE", __file__, "must name a file of certificates"),
    ("SERVICE_URL", "https://a.example/?canary", "must look like https://"),
    ("SERVICE_URL", "https://a.example/#canary", "must look like https://"),
    ("SERVICE_URL", "https://canary@a.example", "must look like https://"),
    ("SERVICE_URL", "https://:canary@a.example", "must look like https://"),
    ("TRUSTED_PROXIES", "proxy", "HOKUSAI_AUTH_TRUSTED_PROXIES: "),
    ("SECRET_KEY", "canary", "32 characters"),
    ("REDIS_URL", "redis://x", "needs HOKUSAI_AUTH_SECRET_KEY"),
    ("METRICS_BIND", "9464", "must look like 127.0.0.1:9464"),
    ("METRICS_BIND", "127.0.0.1:", "must look like 127.0.0.1:9464"),
    ("METRICS_BIND", "127.0.0.1:0", "must look like 127.0.0.1:9464"),
    ("METRICS_BIND", "127.0.0.1:65536", "must look like 127.0.0.1:9464"),
    ("PREFIXES", "x", "must look like /mlflow"),
    ("PREFIXES", "/mlflow/", "must look like /mlflow"),
    ("PREFIXES", "/", "must look like /mlflow"),
    ("PREFIXES", "/a%2Fb", "must look like /mlflow"),
    ("PREFIXES", "/größe", "must look like /mlflow"),
    ("PREFIXES", "/a/../b", "must look like /mlflow"),
    ("PREFIXES", "/api", "routes of its own below /api"),
    ("DATABASE_URI", "sqlite://", "in memory"),
    ("DATABASE_URI", "not a url", "no database URL"),
    ("DATABASE_URI", "mysql://u:canary@h/d", "must begin with"),
    ("DATABASE_URI", "sqlite:////nowhere/at/all.db", "can't be written"),
    ("DATABASE_URI", "postgresql://u:canary@127.0.0.1:1/d", "can't be read"),
]
REDIS_WITHOUT_ITS_SCHEME = {
    "HOKUSAI_AUTH_BACKEND": "service",
    "HOKUSAI_AUTH_SERVICE_URL": "https://auth.example.com",
    "HOKUSAI_AUTH_REDIS_URL": "redis.example.com:6379",
    "HOKUSAI_AUTH_SECRET_KEY": "canary" * 9,
}


def test_mistake_is_refused_at_start() -> None:
    mistakes: list[tuple[dict[str, str], dict[str, str], str]] = [
        ({"static_prefix": "/ui"}, {}, "HOKUSAI_AUTH_PREFIXES=/ui"),
        ({"uvicorn_opts": "--root-path /ui"}, {}, "--root-path is not supported"),
        ({"uvicorn_opts": "--root-path=/ui"}, {}, "--root-path is not supported"),
        ({}, {"UVICORN_ROOT_PATH": "/ui"}, "--root-path is not supported"),
        ({"gunicorn_opts": "-k uvicorn.workers.UvicornWorker"}, {}, "Remove --gunicorn-opts"),
        ({}, REDIS_WITHOUT_ITS_SCHEME, "redis"),
        *(({}, {f"HOKUSAI_AUTH_{name}": value}, says) for name, value, says in MISTAKES),
    ]
    wrong = []
    for options, environ, says in mistakes:
        said = "it started"
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            try:
                bootstrap(options)
            except SystemExit as refused:
                said = str(refused)
        begins = said.startswith("hokusai-auth can't start: ")
        if not begins or says not in said or "canary" in said:
            wrong.append(f"{options} {environ}: {said}, not {says}")
    assert not wrong, "\n".join(wrong)


def test_variables_of_a_kubernetes_service_with_our_name_are_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP_ADDR"):
        monkeypatch.setenv(f"HOKUSAI_AUTH_{name}", "tcp://10.0.0.1:80")
    assert settings.load() == settings.Settings()
    monkeypatch.setenv("HOKUSAI_AUTH_PORTS", "1")
    with pytest.raises(SettingsError, match="HOKUSAI_AUTH_PORTS"):
        settings.load()


def test_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hokusai_auth.db").write_bytes(b"something else, and long enough to be read" * 99)
    with pytest.raises(SystemExit, match="can't be read"):
        bootstrap({})


def test_password_is_not_in_the_settings_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOKUSAI_AUTH_DATABASE_URI", "postgresql://user:canary@host/db")
    assert "canary" not in repr(settings.load())


def test_setting_is_read_from_its_secret_file_unless_the_environment_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "hokusai_auth_database_uri").write_text("postgresql://user:canary@host/db\n")
    (tmp_path / "hokusai_auth_secret_key").write_text("canary" * 9)
    (tmp_path / "somebody_else_s").write_text("")
    config = settings.load(tmp_path)
    assert config.database_uri.get_secret_value() == "postgresql://user:canary@host/db"
    assert config.secret_key.get_secret_value() == "canary" * 9
    monkeypatch.setenv("HOKUSAI_AUTH_DATABASE_URI", "sqlite:///other.db")
    assert settings.load(tmp_path).database_uri.get_secret_value() == "sqlite:///other.db"
    assert settings.load(tmp_path / "none").secret_key.get_secret_value() == ""
    (tmp_path / "hokusai_auth_secret_key").write_text("canary")
    with pytest.raises(SettingsError, match=r"SECRET_KEY: .*32 characters") as refused:
        settings.load(tmp_path)
    assert "canary" not in str(refused.value)


def test_secret_file_that_cannot_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret = tmp_path / "hokusai_auth_secret_key"
    secret.write_text("canary" * 9)

    def refuse(path: Path, *_: object, **__: object) -> str:
        # The file's mode would not keep root out.
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(SettingsError, match=f"Permission denied: '{secret}'"):
        settings.load(tmp_path)


def test_list_may_have_spaces_and_empty_items(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOKUSAI_AUTH_PREFIXES", "/a, /b,, ")
    assert settings.load().prefixes == ("/a", "/b")


def test_names_of_other_hokusai_services_are_read_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTH_SERVICE_URL", "https://auth.example.com/")
    monkeypatch.setenv("REGISTRY_ADMIN_USER_EMAILS", "a@example.com, B@example.com")
    monkeypatch.setenv("REGISTRY_ADMIN_SCOPES", "ops")
    config = settings.load()
    assert config.service_url == "https://auth.example.com"
    policy = settings.policy_of(config)
    assert policy.admin_emails == {"a@example.com", "b@example.com"}
    assert policy.admin_scopes == {"ops"}
    monkeypatch.setenv("HOKUSAI_AUTH_SERVICE_URL", "https://ours.example.com")
    assert settings.load().service_url == "https://ours.example.com"

"""The jobs' secret, from the command that makes it to the workers that remove it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlflow_hokusai_auth.authorities.server_jobs import (
    PASSWORD,
    TOKEN,
    USERNAME,
    issue,
    take,
    with_jobs,
)
from mlflow_hokusai_auth.client.profile import KEY
from mlflow_hokusai_auth.core import job_rules, keys, operations
from mlflow_hokusai_auth.core.job_rules import PRINCIPAL
from mlflow_hokusai_auth.core.types import Access, Principal, Rejected


@pytest.fixture(autouse=True)
def _no_key_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def test_jobs_find_a_password_and_workers_remove_it() -> None:
    environ = {"PATH": "/bin", USERNAME: " "}
    issue(environ)
    secret = environ[TOKEN]
    assert environ == {
        "PATH": "/bin",
        TOKEN: secret,
        USERNAME: "hokusai-jobs",
        PASSWORD: secret,
    }
    assert take(environ) == secret
    assert environ == {"PATH": "/bin"}
    assert take(environ) is None


def test_each_start_has_a_secret_of_its_own() -> None:
    # This server runs in a job of another server.
    first: dict[str, str] = {}
    issue(first)
    second = {TOKEN: first[TOKEN]}
    issue(second)
    assert second[TOKEN] != first[TOKEN]


def test_key_of_this_machine_is_not_sent_beside_the_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = keys.generate()
    monkeypatch.setenv(KEY, own)
    environ = {KEY: own}
    issue(environ)
    assert environ[KEY] == environ[PASSWORD] == environ[TOKEN]
    take(environ)
    assert environ == {}


def test_settings_of_the_operator_stay() -> None:
    for theirs in ({USERNAME: "a"}, {PASSWORD: "b"}, {USERNAME: "a", PASSWORD: "b"}):
        environ = {**theirs, KEY: "c"}
        issue(environ)
        secret = environ.pop(TOKEN)
        assert environ == {**theirs, KEY: "c"}
        assert take(environ | {TOKEN: secret}) == secret
        assert environ == {**theirs, KEY: "c"}


def test_token_that_this_package_did_not_make_is_not_taken() -> None:
    for token in ("", "something of MLflow's", "hk_jobs_short"):
        environ = {TOKEN: token, USERNAME: "a", PASSWORD: token}
        assert take(environ) is None, token
        assert environ == {TOKEN: token, USERNAME: "a", PASSWORD: token}


class Inner:
    """An authority that knows one key."""

    known = Principal("acme", "key_1", frozenset({"mlflow:read"}))

    def peek(self, key: str, address: str) -> Principal | Rejected | None:
        return None

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        return self.known if key == "theirs" else Rejected()


def test_only_the_secret_is_accepted_as_the_jobs_key(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Inner()
    monkeypatch.delenv(TOKEN, raising=False)
    assert with_jobs(inner) is inner
    made: dict[str, str] = {}
    issue(made)
    monkeypatch.setenv(TOKEN, made[TOKEN])
    authority = with_jobs(inner)
    assert authority.peek(made[TOKEN], "") is authority.lookup(made[TOKEN], "") is PRINCIPAL
    assert PRINCIPAL.owner_id == "mlflow-jobs"
    assert authority.peek("theirs", "") is None
    assert authority.lookup("theirs", "") is Inner.known
    assert authority.lookup(made[TOKEN][:-1], "") == Rejected()


def test_no_rule_for_jobs_deletes_or_takes_an_administrator() -> None:
    access = {operation.rule: operation.access for operation in operations.rules()}
    assert all(access[rule] <= Access.WRITE for rule in job_rules.RULES)
    assert not any("DELETE" in rule or "/delete" in rule for rule in job_rules.RULES)


def test_the_secret_passes_for_a_key_and_is_redacted() -> None:
    environ: dict[str, str] = {}
    issue(environ)
    secret = environ[TOKEN]
    assert keys.problem(secret) is None
    assert not keys.importable(secret)
    assert keys.redact(f"GET /?api_key={secret}") == "GET /?api_key=hk_jobs_***"

"""`hokusai-auth trust`: what is trusted, as the command line shows and changes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlflow_hokusai_auth.client.admin import HokusaiAuthClient
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.trusts import Trusts
from tests.issuer import jwk, rsa_key
from tests.test_cli import Call, audited, call, mistake, store  # noqa: F401 - fixtures

GITHUB = ("--github", "acme/models", "--workflow", "release.yml")
ADD = ("trust", "add", "--owner", "ACME", "--scope", "model:write")


def added(call: Call, *arguments: str) -> dict[str, Any]:  # noqa: F811
    answer: dict[str, Any] = json.loads(call(*ADD, *arguments, "--json").stdout)
    return answer


def test_as_the_issue_writes_it(call: Call, store: LocalStore) -> None:  # noqa: F811
    trust = added(call, *GITHUB, "--environment", "prod", "--models", "acme-*", "--ttl", "15m")
    assert trust["claims"] == {
        "repository": "acme/models",
        "job_workflow_ref": "acme/models/.github/workflows/release.yml@*",
        "environment": "prod",
    }
    assert (trust["ttl"], trust["models"], trust["single_use"]) == (900, ["acme-*"], True)
    stored = Trusts(store.database).get(trust["trust_id"]).trust
    assert (stored.owner, stored.scopes) == ("ACME", ("model:write",))
    table = call("trust", "list").stdout
    assert trust["trust_id"] in table
    assert "environment=prod" in table
    assert json.loads(call("trust", "list", "--json").stdout) == {"trusts": [trust]}
    edited = json.loads(
        call("trust", "edit", trust["trust_id"], "--any-model", "--ttl", "1h", "--json").stdout
    )
    assert (edited["models"], edited["ttl"]) == ([], 3600)
    assert trust["trust_id"] in call("trust", "remove", trust["trust_id"]).stdout
    assert call("trust", "list").stdout == "none\n"
    events = [(row["event"], row["actor"]) for row in audited(call)]
    assert events == [(f"trust.{what}", "cli:alice") for what in ("added", "edited", "removed")]


def test_says_who_gets_keys_without_an_environment(
    call: Call,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "Everybody who may push to any branch"
    here = call(*ADD, *GITHUB, "--json")
    prod = call(*ADD, *GITHUB, "--environment", "prod", "--json")
    assert text in here.stderr and text not in prod.stderr
    # A server answers with what the local store has.
    monkeypatch.setattr("mlflow.set_tracking_uri", lambda _: None)
    for local in (here, prod):
        answer = json.loads(local.stdout)
        monkeypatch.setattr(
            HokusaiAuthClient, "add_trust", lambda *_, answer=answer, **__: dict(answer)
        )
        there = call(*ADD, *GITHUB, "--url", "http://127.0.0.1:9", "--json")
        assert json.loads(there.stdout) == answer
        assert there.stderr.splitlines() == [x for x in local.stderr.splitlines() if text in x]


def test_other_issuers_and_key_sets_from_files(call: Call, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps({"keys": [jwk(rsa_key(), "a")]}))
    trust = added(
        call,
        *("--issuer", "https://kubernetes.default.svc", "--claim", "sub=system:a=b"),
        *("--claim", "team=acme-*", "--jwks", str(file), "--single-use"),
    )
    assert trust["claims"] == {"sub": "system:a=b", "team": "acme-*"}
    assert (trust["jwks"], trust["single_use"]) == (True, True)
    edited = json.loads(
        call("trust", "edit", trust["trust_id"], "--ask-issuer", "--forget-ids", "--json").stdout
    )
    assert edited["jwks"] is False
    assert added(call, "--gitlab", "acme/models")["single_use"] is False


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ((*ADD,), 2, "Say who is trusted"),
        (("trust", "add", "--scope", "model:write", *GITHUB), 2, "A supplier gives --url"),
        ((*ADD, "--github", "acme/models"), 2, "needs workflow"),
        ((*ADD, *GITHUB, "--ttl", "2h"), 2, "ttl"),
        ((*ADD, *GITHUB, "--ttl", "soon"), 2, "--ttl takes"),
        ((*ADD, *GITHUB, "--claim", "ref"), 2, "NAME=VALUE"),
        ((*ADD, *GITHUB, "--claim", "ref=a", "--claim", "ref=b"), 2, "each name once"),
        ((*ADD, *GITHUB, "--scope", "mlflow:admin"), 2, "outlive the trust"),
        ((*ADD, *GITHUB, "--jwks", "pyproject.toml"), 2, "--jwks"),
        (("trust", "edit", "trust_0", "--ttl", "5m"), 1, "There is no trust"),
        (("trust", "edit", "trust_0"), 2, "Nothing to change"),
        (("trust", "remove", "trust_0"), 1, "There is no trust"),
    ],
)
def test_mistakes(call: Call, arguments: tuple[str, ...], status: int, words: str) -> None:  # noqa: F811
    assert words in mistake(call(*arguments, status=status))


def test_options_that_contradict_each_other(call: Call) -> None:  # noqa: F811
    for pair in (("--models", "a*", "--any-model"), ("--no-delete", "--may-delete")):
        assert "not both" in call("trust", "edit", "trust_0", *pair, status=2).output


def test_operator_is_told_that_nothing_is_exchanged_without_public_urls(
    call: Call,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "HOKUSAI_AUTH_PUBLIC_URLS is not set" in call(*ADD, *GITHUB).stderr
    monkeypatch.setenv("HOKUSAI_AUTH_PUBLIC_URLS", "https://registry.example.com")
    assert "PUBLIC_URLS" not in call(*ADD, "--gitlab", "acme/models").stderr


def test_lifetimes_keep_to_the_maximum(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("HOKUSAI_AUTH_KEY_LIFETIME_MAX", "600")
    assert "KEY_LIFETIME_MAX" in mistake(call(*ADD, *GITHUB, "--ttl", "11m", status=2))
    trust = added(call, *GITHUB)
    assert trust["ttl"] == 600
    edit = ("trust", "edit", trust["trust_id"], "--ttl")
    assert "KEY_LIFETIME_MAX" in mistake(call(*edit, "11m", status=2))
    call(*edit, "5m")

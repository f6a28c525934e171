"""`hokusai-auth links`, and `--link` of `keys create` and `keys rotate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.links import Links, Opened, Refused
from tests.test_cli import Call, audited, call, mistake, store  # noqa: F401 - fixtures

PUBLIC = "https://registry.example.com/mlflow"
CREATE = ("keys", "create", "--owner", "ACME", "--scope", "model:write", "--link")


@pytest.fixture(autouse=True)
def public_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOKUSAI_AUTH_PUBLIC_URLS", f"{PUBLIC},http://localhost:5000")


def code_in(url: str) -> str:
    assert url.startswith(f"{PUBLIC}/hokusai/link#")
    code = keys.link_code_in(url)
    assert code is not None
    return code


def test_as_the_issue_writes_it(call: Call, store: LocalStore) -> None:  # noqa: F811
    done = call(*CREATE, "--link-expires", "2h", "--expires-in", "30d", "--models", "acme-*")
    code = code_in(done.stdout.strip())
    links = Links(store.database)
    (link,) = links.each()
    assert link.link_id in done.stderr and code not in done.stderr
    assert link.expires_at - link.created_at == 7200
    assert list(store.each()) == []
    answer = links.open(code)
    assert isinstance(answer, Opened)
    assert answer.record.models == ("acme-*",)
    ends = answer.record.expires_at
    assert ends is not None and round(ends - answer.record.created_at) == 30 * 86400

    rotation = call("keys", "rotate", answer.record.key_id, "--link", "--overlap", "0s", "--json")
    made = json.loads(rotation.stdout)
    assert made["replaces"] == answer.record.key_id
    again = links.open(code_in(made["url"]))
    assert isinstance(again, Opened) and again.replaced is not None

    refused = links.open(code)
    assert isinstance(refused, Refused)
    assert "1 with refused attempts (1 after it was opened" in call("status").stdout
    taken = json.loads(call(*CREATE, "--json").stdout)
    assert "revoked" in call("links", "revoke", taken["link_id"]).stdout
    listed = json.loads(call("links", "list", "--json").stdout)["links"]
    assert [one["state"] for one in listed] == ["revoked", "opened", "opened"]
    last = again.record.key_id
    call("keys", "rotate", last, "--link")
    store.rotate(last)
    assert "void" in call("links", "list").stdout.splitlines()[1]
    table = call("links", "list").stdout
    assert all(one["link_id"] in table for one in listed) and code not in table
    assert [row["event"] for row in audited(call) if row["event"].startswith("link.")] == [
        "link.created",
        "link.opened",
        "link.created",
        "link.opened",
        "link.refused",
        "link.created",
        "link.revoked",
        "link.created",
    ]


def test_mistakes_say_what_to_do(
    call: Call,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for arguments, status, words in (
        ((*CREATE[:-1], "--link-expires", "1h"), 2, "--link-expires needs --link"),
        ((*CREATE, "--link-expires", "8d"), 2, "--link-expires takes 7d at most"),
        ((*CREATE, "--link-expires", "soon"), 2, "--link-expires takes"),
        ((*CREATE, "--environment", "x"), 2, "environment"),
        (("keys", "rotate", "key_0", "--link"), 1, "There is no key"),
        (("links", "revoke", "link_0"), 1, "There is no link"),
    ):
        text = call(*arguments, status=status).stderr
        assert words in text, (arguments, text)
    monkeypatch.delenv("HOKUSAI_AUTH_PUBLIC_URLS")
    assert "HOKUSAI_AUTH_PUBLIC_URLS is not set" in mistake(call(*CREATE, status=1))


def test_links_of_a_leaver_are_taken_back(call: Call, store: LocalStore) -> None:  # noqa: F811
    code = code_in(call(*CREATE).stdout.strip())
    leaver = ("keys", "revoke", "--owner", "ACME")
    assert "0 keys of ACME and 1 one-time link would end" in call(*leaver).stdout
    assert "1 one-time link revoked" in call(*leaver, "--apply").stdout
    refused = Links(store.database).open(code)
    assert isinstance(refused, Refused) and refused.state == "revoked"


def test_a_link_needs_a_store_that_a_server_has(
    call: Call,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOKUSAI_AUTH_DATABASE_URI", f"sqlite:///{tmp_path}/elsewhere.db")
    assert "there is no key store" in mistake(call(*CREATE, status=1))
    assert not (tmp_path / "elsewhere.db").exists()

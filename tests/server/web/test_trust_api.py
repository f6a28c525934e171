"""Suppliers manage the trusts of their own owner, in process with a real store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import flask
import pytest
from werkzeug.test import TestResponse

from mlflow_hokusai_auth.core.lifetimes import Lifetimes
from mlflow_hokusai_auth.core.trust import workload
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.web import api, trust_api
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.trusts import Trusts
from tests.core.test_trust import GITHUB
from tests.server.sentinel import make_gate

ADMIN = Principal("key_admin", "operator", frozenset({"mlflow:admin"}), owner_id="operator")
NEW = {"scopes": ["model:write"], "github": "acme/models", "workflow": "release.yml"}
Asked = Callable[..., TestResponse]


class Site:
    """The routes on a store, where suppliers manage trusts; keys live for half an hour at most."""

    def __init__(self, folder: Path) -> None:
        self.store = LocalStore(f"sqlite:///{folder}/keys.db")
        self.store.migrate()
        self.trusts = Trusts(self.store.database)
        self.serve(Lifetimes(longest=1800))

    def serve(self, lifetimes: Lifetimes, *, suppliers: bool = True) -> None:
        """Make the app anew, with these lifetimes."""
        gate = make_gate()
        gate = make_gate(policy=replace(gate.policy, supplier_trust=suppliers))
        actions = trust_api.TrustActions(self.store, gate, lifetimes=lifetimes)
        self.app = flask.Flask("mlflow")
        self.app.register_blueprint(trust_api.blueprint(actions))
        self.app.register_blueprint(api.unknown_paths())

    def key(self, owner: str = "ACME", *scopes: str, **more: Any) -> Principal:
        """Return the principal of a new key."""
        _, key = self.store.create(owner=owner, scopes=scopes or ["model:write"], **more)
        return self.principal(key)

    def principal(self, key: str) -> Principal:
        found = self.store.lookup(key)
        assert isinstance(found, Principal)
        return found

    def ask(self, line: str, caller: Principal, **more: Any) -> TestResponse:
        method, path = line.split()
        token = callers.current.set(callers.Caller(caller, "192.0.2.7", "request-1"))
        try:
            path = f"/api/2.0/hokusai{path}"
            return self.app.test_client().open(path, method=method, **more)
        finally:
            callers.current.reset(token)

    def added(self, caller: Principal, **more: Any) -> str:
        answer = self.ask("POST /trust", caller, json={**NEW, **more})
        assert answer.status_code == 201, answer.json
        return str((answer.json or {})["trust_id"])

    def listed(self, caller: Principal) -> list[str]:
        answer = self.ask("GET /trust", caller)
        assert answer.status_code == 200, answer.json
        return [one["trust_id"] for one in (answer.json or {})["trusts"]]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def refused(answer: TestResponse, status: int, words: str) -> None:
    message = (answer.json or {}).get("message", "")
    assert (answer.status_code, words in message) == (status, True), (answer.status_code, message)


def test_supplier_manages_the_trusts_of_its_own_owner(site: Site) -> None:
    mine = site.key()
    trust_id = site.added(mine, environment="prod", ttl=600, models=["acme-*"])
    stored = site.trusts.get(trust_id).trust
    assert (stored.owner, stored.kind, stored.scopes) == ("ACME", "github", ("model:write",))
    assert stored.issuer == "https://token.actions.githubusercontent.com"
    other = site.added(mine, owner="ACME", github=None, gitlab="acme/models", workflow=None)
    assert site.listed(mine) == [trust_id, other]
    answer = site.ask(f"PATCH /trust/{trust_id}", mine, json={"scopes": ["model:read"], "ttl": 60})
    assert ((answer.json or {})["scopes"], (answer.json or {})["ttl"]) == (["model:read"], 60)
    assert site.ask(f"PATCH /trust/{trust_id}", mine, json={"forget_ids": True}).status_code == 200
    assert site.ask(f"DELETE /trust/{trust_id}", mine).status_code == 200
    assert site.listed(mine) == [other]
    rows = [row for row in site.store.database.audited() if row["event"].startswith("trust.")]
    assert [row["event"] for row in rows] == [
        "trust.added",
        "trust.added",
        "trust.edited",
        "trust.edited",
        "trust.removed",
    ]
    assert {
        (row["actor"], row["actor_key_id"], row["address"], row["request_id"]) for row in rows
    } == {("ACME", mine.key_id, "192.0.2.7", "request-1")}


def test_trusts_of_other_owners_do_not_exist(site: Site) -> None:
    """Another owner's trust, and one that there is not, have the same answer."""
    theirs = site.added(site.key("Globex"), github="globex/models")
    mine = site.key()
    made_up = "trust_" + "0" * 16
    assert site.listed(mine) == []
    for line in ("PATCH /trust/{}", "DELETE /trust/{}"):
        answers = [site.ask(line.format(one), mine, json={"ttl": 60}) for one in (theirs, made_up)]
        assert [one.status_code for one in answers] == [404, 404]
        texts = [one.get_data(as_text=True) for one in answers]
        assert texts[0].replace(theirs, made_up) == texts[1]
    assert site.listed(ADMIN) == [theirs]
    assert site.trusts.get(theirs).trust.ttl == 900


def test_supplier_cannot_take_over_the_jobs_of_another_owner(site: Site) -> None:
    """With more claims, the later trust would win, and the jobs would work for its owner."""
    theirs = {"github": "globex/models"}
    site.added(ADMIN, owner="Globex", **theirs)
    mine = site.key()
    for more in (
        {},
        {"environment": "prod"},
        {"workflow": "other.yml"},
        {"github": "Globex/Models"},
    ):
        answer = site.ask("POST /trust", mine, json={**NEW, **theirs, **more})
        refused(answer, 409, "not free")
        assert "trust_" not in answer.get_data(as_text=True)
        assert "Globex" not in answer.get_data(as_text=True)
    # Its own is named, and another repository of the same name elsewhere is another one.
    own = site.added(mine)
    refused(site.ask("POST /trust", mine, json=NEW), 409, own)
    site.added(mine, github=None, gitlab="globex/models")
    # An operator knows what it does.
    site.added(ADMIN, owner="ACME", github="globex/models", environment="prod")


def test_supplier_says_neither_who_signs_nor_for_whom(site: Site) -> None:
    mine = site.key()
    own = site.added(mine)
    jwks = {"keys": [{"kty": "RSA"}]}
    for more, words in (
        ({"owner": "Globex"}, "its own owner only"),
        ({"owner": "acme"}, "its own owner only"),
        ({"issuer": "https://github.example.com/_services/token"}, "Only the server's operator"),
        ({"issuer": "https://token.actions.githubusercontent.com"}, "Only the server's operator"),
        ({"claims": {"repository_id": "74"}}, "Only the server's operator"),
        ({"jwks": jwks}, "Only the server's operator"),
        ({"github": None, "workflow": None, "issuer": "https://i", "claims": {"sub": "x"}}, "Only"),
        ({"scopes": ["mlflow:write"]}, "does not have the scopes"),
    ):
        answer = site.ask("POST /trust", mine, json={**NEW, "github": "acme/other", **more})
        refused(answer, 403, words)
    for change in ({"jwks": jwks}, {"jwks": None}):
        answer = site.ask(f"PATCH /trust/{own}", mine, json=change)
        assert answer.status_code in (400, 403), answer.json
    refused(site.ask(f"PATCH /trust/{own}", mine, json={"jwks": None}), 403, "operator changes")
    refused(site.ask("POST /trust", mine, json={**NEW, "scopes": ["mlflow:admin"]}), 400, "outlive")
    refused(site.ask("POST /trust", mine, json={**NEW, "ttl": 1801}), 400, "KEY_LIFETIME_MAX")
    refused(site.ask(f"PATCH /trust/{own}", mine, json={"ttl": 1801}), 400, "KEY_LIFETIME_MAX")
    refused(site.ask("POST /trust", ADMIN, json=NEW), 400, "owner")
    assert site.listed(ADMIN) == [own]


def test_lifetimes_of_operators_trusts_keep_to_the_maximum(site: Site) -> None:
    new = {**NEW, "owner": "ACME"}
    refused(site.ask("POST /trust", ADMIN, json={**new, "ttl": 1801}), 400, "KEY_LIFETIME_MAX")
    own = site.added(ADMIN, owner="ACME", ttl=1800)
    refused(site.ask(f"PATCH /trust/{own}", ADMIN, json={"ttl": 1801}), 400, "KEY_LIFETIME_MAX")
    assert site.trusts.get(own).trust.ttl == 1800


@pytest.mark.parametrize(("longest", "ttl"), [(None, 900), (1800, 900), (300, 300)])
def test_lifetime_that_nobody_gave_is_within_the_maximum(
    site: Site, longest: float | None, ttl: float
) -> None:
    site.serve(Lifetimes(longest=longest))
    for caller in (ADMIN, site.key()):
        trust_id = site.added(caller, owner="ACME", workflow=f"{caller.key_id}.yml")
        assert site.trusts.get(trust_id).trust.ttl == ttl


def test_an_edit_leaves_no_trust_beyond_the_supplier_s_key(site: Site) -> None:
    """The operator may give an owner's jobs more than one of its keys has."""
    trust_id = site.added(ADMIN, owner="ACME", scopes=["mlflow:write"])
    mine = site.key()
    for change in ({"ttl": 60}, {"forget_ids": True}):
        answer = site.ask(f"PATCH /trust/{trust_id}", mine, json=change)
        assert answer.status_code == 403, answer.json
    change = {"scopes": ["model:write"], "models": ["acme-x"]}
    assert site.ask(f"PATCH /trust/{trust_id}", mine, json=change).status_code == 200
    narrowed = site.key(models=["acme-*"])
    for change in ({"models": []}, {"models": ["a*"]}):
        answer = site.ask(f"PATCH /trust/{trust_id}", narrowed, json=change)
        assert answer.status_code == 403, answer.json
    assert site.trusts.get(trust_id).trust.models == ("acme-x",)


def test_narrowed_key_leaves_the_trusts_of_other_models_alone(site: Site) -> None:
    narrowed = site.key(models=["acme-*"])
    for models in ([], ["acme-x", "other"]):
        trust_id = site.added(ADMIN, owner="ACME", workflow=f"{len(models)}.yml", models=models)
        before = site.trusts.get(trust_id)
        for line, body in (
            (f"PATCH /trust/{trust_id}", {"models": ["acme-x"]}),
            (f"PATCH /trust/{trust_id}", {"forget_ids": True}),
            (f"DELETE /trust/{trust_id}", None),
        ):
            answer = site.ask(line, narrowed, json=body)
            assert answer.status_code == 403 and "acme-*" in answer.text, (line, answer.text)
        assert site.trusts.get(trust_id) == before
    own = site.added(narrowed, models=["acme-x"])
    assert site.ask(f"DELETE /trust/{own}", narrowed).status_code == 200


def test_exchanged_key_never_manages_trusts(site: Site) -> None:
    made = site.trusts.add(
        workload(github="acme/models", workflow="release.yml"),
        owner="ACME",
        scopes=("model:write",),
        ttl=900.0,
    ).trust.trust_id
    exchanged = site.trusts.exchange(
        made, GITHUB, jwks=None, digest="0" * 64, token_id="1", ends_at=2e9
    )
    assert isinstance(exchanged, tuple)
    of_job = site.principal(exchanged[1])
    assert exchanged[1].startswith("hk_ci_")
    # Some setting may say that its scopes are an administrator's.
    for caller in (of_job, replace(of_job, is_admin=True)):
        for line in ("GET /trust", "POST /trust", f"PATCH /trust/{made}", f"DELETE /trust/{made}"):
            refused(site.ask(line, caller, json=NEW), 403, "exchanged")
    # Another authority does not say how its keys were made.
    for caller in (replace(of_job, source="", key_id="key_0"), site.key("Globex")):
        caller = replace(caller, owner_id="ACME")
        refused(site.ask("POST /trust", caller, json=NEW), 403, "own key store")
    assert site.listed(ADMIN) == [made]


def test_key_that_deletes_nothing_removes_no_trust(site: Site) -> None:
    mine = site.key(no_delete=True)
    refused(site.ask("POST /trust", mine, json=NEW), 403, "no_delete")
    trust_id = site.added(mine, no_delete=True)
    refused(site.ask(f"DELETE /trust/{trust_id}", mine), 403, "may not delete")
    assert site.listed(mine) == [trust_id]


def test_a_revoked_key_leaves_its_trusts(site: Site) -> None:
    mine = site.key()
    trust_id = site.added(mine)
    site.store.revoke(mine.key_id)
    assert site.listed(site.key()) == [trust_id]


def test_without_the_setting_only_administrators_manage_trusts(site: Site) -> None:
    """The gate refuses the request before; this is for a spelling that it takes for another."""
    site.serve(Lifetimes(), suppliers=False)
    refused(site.ask("GET /trust", site.key()), 403, "operator manages")
    assert site.listed(ADMIN) == []

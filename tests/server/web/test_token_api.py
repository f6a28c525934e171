"""Trusts and the exchange of identity tokens in process, with a real issuer and a real store."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import flask
import pytest
import sqlalchemy as sa
from werkzeug.test import TestResponse

from mlflow_hokusai_auth.authorities.identity_tokens import Verifier
from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.denials import CODES
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server import metrics
from mlflow_hokusai_auth.server.gate.limits import EXCHANGES_PER_MINUTE, Limits
from mlflow_hokusai_auth.server.observe import redaction
from mlflow_hokusai_auth.server.web import api, token_api, trust_api
from mlflow_hokusai_auth.server.web.trust_schemas import GRANT_TYPE, ISSUED_TYPE, TOKEN_TYPES
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.trusts import Trusts
from tests.core.test_trust import GITHUB
from tests.issuer import Issuer
from tests.server.sentinel import make_gate

HERE = "https://registry.example.com"
ADMIN = Principal("key_admin", "operator", frozenset({"mlflow:admin"}))
TRUST = {
    "owner": "ACME",
    "scopes": ["model:write"],
    "github": "acme/models",
    "workflow": "release.yml",
}
TIMES = ("iss", "nbf", "exp", "iat", "jti")


class Site:
    """The app with both APIs, its store, and the issuer of tokens as GitHub's."""

    def __init__(self, folder: Path, issuer: Issuer, **options: Any) -> None:
        self.issuer = issuer
        self.store = LocalStore(f"sqlite:///{folder}/keys.db")
        self.store.migrate()
        self.trusts = Trusts(self.store.database)
        self.gate = make_gate()
        object.__setattr__(self.gate, "limits", Limits())
        verifier = None if options.pop("unset", False) else Verifier([HERE])
        self.app = flask.Flask("mlflow")
        self.app.register_blueprint(
            trust_api.blueprint(
                trust_api.TrustActions(self.store, self.gate, options.get("has_store", True))
            )
        )
        self.app.register_blueprint(token_api.blueprint(self.trusts, self.gate, verifier))
        self.app.register_blueprint(api.unknown_paths())

    def ask(self, line: str, caller: Principal | None = ADMIN, **more: Any) -> TestResponse:
        method, path = line.split()
        token = callers.current.set(callers.Caller(caller, "192.0.2.7", "request-1"))
        try:
            path = f"/api/2.0/hokusai{path}"
            return self.app.test_client().open(path, method=method, **more)
        finally:
            callers.current.reset(token)

    def trust(self, **more: Any) -> str:
        body = {**TRUST, "issuer": self.issuer.url, **more}
        answer = self.ask("POST /trust", json=body)
        assert answer.status_code == 201, answer.json
        assert answer.json is not None
        return str(answer.json["trust_id"])

    def token(self, **changes: object) -> str:
        claims = {name: value for name, value in GITHUB.items() if name not in TIMES}
        return self.issuer.token({**claims, "aud": HERE, **changes})

    def exchange(self, token: str, *, form: bool = False, **changes: Any) -> TestResponse:
        fields = {
            "grant_type": GRANT_TYPE,
            "subject_token_type": TOKEN_TYPES[0],
            "subject_token": token,
            **changes,
        }
        sent = {"data": fields} if form else {"json": fields}
        return self.ask("POST /token", None, **sent)


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with Issuer() as running:
        yield running


@pytest.fixture
def site(tmp_path: Path, issuer: Issuer) -> Site:
    return Site(tmp_path, issuer)


def test_exchange_as_rfc_8693_has_it(site: Site) -> None:
    site.trust(ttl=600, environment="prod", models=["acme-*"])
    for form in (True, False):
        answer = site.exchange(site.token(), form=form)
        assert answer.status_code == 200, answer.json
        given = answer.json
        assert given is not None
        assert given["issued_token_type"] == ISSUED_TYPE
        assert (given["token_type"], given["scope"], given["owner"]) == (
            "Bearer",
            "model:write",
            "ACME",
        )
        assert 590 <= given["expires_in"] <= 600
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Pragma"] == "no-cache"
        found = site.store.lookup(given["access_token"])
        assert isinstance(found, Principal)
        assert (found.key_id, found.source) == (given["key_id"], given["source"])
        assert found.models == ("acme-*",)
    event = site.store.database.audited(limit=1)[0]
    assert (event["event"], event["address"], event["request_id"]) == (
        "key.exchanged",
        "192.0.2.7",
        "request-1",
    )


def refusal(answer: TestResponse) -> tuple[int, str]:
    """Return status and code of a refusal, after a look at all its fields."""
    given = answer.json
    assert given is not None
    code = given["message"].split("(")[1].split(")")[0].split()[1]
    known = CODES[code]
    assert answer.status_code == known.status
    assert (given["error_code"], given["detail"]) == (known.error_code, known.detail)
    words = {"GRANT_UNSUPPORTED": "unsupported_grant_type"}
    usual = "invalid_request" if known.status == 400 else "temporarily_unavailable"
    assert given["error"] == words.get(code, usual)
    # RFC 6749, 5.2.
    assert all(" " <= c <= "~" and c not in '"\\' for c in given["error_description"])
    assert ("Retry-After" in answer.headers) == (known.status in (429, 503))
    assert answer.headers["Cache-Control"] == "no-store"
    return answer.status_code, code


def test_refusals_have_the_fields_of_rfc_6749_and_of_mlflow(site: Site) -> None:
    site.trust(environment="prod")
    wrong_form = {"content_type": "application/x-www-form-urlencoded"}
    good = {"grant_type": GRANT_TYPE, "subject_token_type": TOKEN_TYPES[0], "subject_token": "x"}
    for answer, code in (
        (site.ask("POST /token", None, data=b""), "EXCHANGE_MALFORMED"),
        (site.ask("POST /token", None, data=b"[]"), "EXCHANGE_MALFORMED"),
        (site.ask("POST /token", None, data=b"[" * 9999), "EXCHANGE_MALFORMED"),
        (site.ask("POST /token", None, data=b"", **wrong_form), "GRANT_UNSUPPORTED"),
        (site.ask("POST /token", None, data=b"\xff", **wrong_form), "EXCHANGE_MALFORMED"),
        (site.ask("POST /token", None, data=b"a=b&" * 40, **wrong_form), "EXCHANGE_MALFORMED"),
        (
            site.ask("POST /token", None, data=urlencode(good) + "&subject_token=y", **wrong_form),
            "EXCHANGE_MALFORMED",
        ),
        (site.exchange("x", grant_type="client_credentials"), "GRANT_UNSUPPORTED"),
        (site.exchange("x", grant_type=None), "GRANT_UNSUPPORTED"),
        (site.exchange("x", grant_type=[GRANT_TYPE]), "GRANT_UNSUPPORTED"),
        (site.exchange("x", subject_token_type=ISSUED_TYPE), "EXCHANGE_MALFORMED"),
        (site.exchange("x", subject_token_type={}), "EXCHANGE_MALFORMED"),
        (site.exchange("x", requested_token_type=TOKEN_TYPES[0]), "EXCHANGE_MALFORMED"),
        (site.exchange("x", actor_token="y"), "EXCHANGE_MALFORMED"),
        (site.exchange(""), "EXCHANGE_MALFORMED"),
        (site.exchange("x", subject_token=7), "EXCHANGE_MALFORMED"),
        (site.exchange("x"), "TOKEN_INVALID"),
        (site.exchange(site.token(environment='"\\é\n')), "TOKEN_UNTRUSTED"),
        (site.exchange(site.token(aud="https://evil.example")), "TOKEN_AUDIENCE"),
        (site.exchange(site.token(event_name="pull_request")), "PULL_REQUEST_REFUSED"),
        (site.exchange(site.token(exp=int(time.time()) - 100)), "TOKEN_EXPIRED"),
        (site.exchange(site.token(nbf=int(time.time()) + 100)), "TOKEN_NOT_YET_VALID"),
    ):
        assert refusal(answer)[1] == code
    token = site.token()
    assert site.exchange(token).status_code == 200
    assert refusal(site.exchange(token)) == (400, "TOKEN_USED")
    assert refusal(site.exchange(site.token(repository_id="999"))) == (400, "REPOSITORY_CHANGED")
    answer = site.ask("POST /token?subject_token=x", None, json=good)
    assert answer.status_code == 400


def test_server_without_public_urls_exchanges_nothing(tmp_path: Path, issuer: Issuer) -> None:
    site = Site(tmp_path, issuer, unset=True)
    site.trust()
    answer = site.exchange(site.token())
    assert refusal(answer) == (503, "MISCONFIGURED")
    assert "HOKUSAI_AUTH_PUBLIC_URLS" in (answer.json or {})["message"]


def test_server_without_a_key_store_has_no_trusts(tmp_path: Path, issuer: Issuer) -> None:
    site = Site(tmp_path, issuer, has_store=False)
    for line in ("GET /trust", "POST /trust", "PATCH /trust/trust_0", "DELETE /trust/trust_0"):
        answer = site.ask(line, json={})
        assert answer.status_code == 404
        assert "BACKEND=service" in (answer.json or {})["message"]


@pytest.mark.usefixtures("one_minute")
def test_one_address_exchanges_so_many_tokens_in_a_minute(site: Site) -> None:
    codes = [refusal(site.exchange("x")) for _ in range(EXCHANGES_PER_MINUTE + 1)]
    assert codes[:-1] == [(400, "TOKEN_INVALID")] * EXCHANGES_PER_MINUTE
    assert codes[-1] == (429, "RATE_LIMITED")


def test_flood_of_made_up_tokens_writes_nothing_and_asks_nobody(site: Site) -> None:
    site.trust()
    site.exchange(site.token())
    asked = len(site.issuer.asked)
    statements: list[str] = []

    def record(_c: object, _cursor: object, text: str, *_: object) -> None:
        statements.append(text)

    sa.event.listen(site.store.database.engine, "before_cursor_execute", record)
    with Issuer() as other:
        for number in range(30):
            claims = {"iss": site.issuer.url if number % 2 else other.url, "aud": HERE}
            assert site.exchange(other.token(claims)).status_code == 400
        for _ in range(30):
            assert refusal(site.exchange(site.token(repository="evil/evil")))[0] == 400
        assert other.asked == []
    assert len(site.issuer.asked) == asked
    assert not [text for text in statements if not text.startswith("SELECT")]


def test_store_that_is_down_is_503(site: Site, tmp_path: Path) -> None:
    site.trust()
    with site.store.database.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE hokusai_auth_trusts RENAME TO elsewhere")
    assert refusal(site.exchange(site.token())) == (503, "AUTHORITY_UNAVAILABLE")


def test_no_token_reaches_a_log_a_metric_an_answer_or_the_audit_log(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "_logRecordFactory", logging.LogRecord)
    redaction.cut_keys()
    caplog.set_level(logging.DEBUG)
    site.trust()
    tokens = [
        site.token(),
        site.token(aud="https://evil.example"),
        site.token(event_name="pull_request"),
        site.token(exp=1),
        site.token()[:-9] + "AAAAAAAAA",
        site.token(repository="evil/evil"),
        site.token(iss="https://evil.example"),
    ]
    answers = [site.exchange(token) for token in (*tokens, tokens[0])]
    made = str((answers[0].json or {})["access_token"])
    site.ask(f"GET /trust?x={tokens[0]}")
    logging.getLogger("uvicorn.access").info("GET /token?subject_token=%s", tokens[0])
    with site.store.database.engine.connect() as connection:
        rows = [
            connection.exec_driver_sql(f"SELECT * FROM {table}").all()
            for table in sa.inspect(connection).get_table_names()
        ]
    seen = {
        "log": caplog.text,
        "metrics": metrics.text(site.store),
        "answers": [answer.text for answer in answers[1:]],
        "store": rows,
    }
    assert "An identity token was refused" in caplog.text
    for token in tokens:
        for part in token.split(".")[1:]:
            for name, content in seen.items():
                assert part not in str(content), name
    for name, content in seen.items():
        assert made not in str(content), name


def test_refusals_are_logged_with_the_claim_and_counted(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.trust()

    def count(result: str) -> float:
        return metrics.EXCHANGES.labels(result)._value.get()

    before = count("TOKEN_UNTRUSTED"), count("exchanged")
    site.exchange(site.token(job_workflow_ref="acme/models/.github/workflows/x.yml@refs/heads/a"))
    site.exchange(site.token())
    assert (count("TOKEN_UNTRUSTED"), count("exchanged")) == (before[0] + 1, before[1] + 1)
    (line,) = [one for one in caplog.messages if one.startswith("An identity token was refused")]
    fields = json.loads(line.partition(": ")[2])
    assert (fields["claim"], fields["address"]) == ("job_workflow_ref", "192.0.2.7")
    assert "release.yml" in fields["expected"]


# Trusts


def test_trusts_are_added_listed_edited_and_removed(site: Site) -> None:
    trust_id = site.trust(environment="prod")
    answer = site.ask("GET /trust").json
    assert answer is not None
    (listed,) = answer["trusts"]
    assert listed["trust_id"] == trust_id
    assert listed["claims"] == {
        "repository": "acme/models",
        "job_workflow_ref": "acme/models/.github/workflows/release.yml@*",
        "environment": "prod",
    }
    assert (listed["jwks"], listed["single_use"], listed["ttl"]) == (False, True, 900)
    key_set = site.issuer.key_set()
    edited = site.ask(f"PATCH /trust/{trust_id}", json={"ttl": 60, "jwks": key_set}).json
    assert edited == {**listed, "ttl": 60.0, "jwks": True}
    assert site.exchange(site.token()).status_code == 200
    edited = site.ask(f"PATCH /trust/{trust_id}", json={"forget_ids": True, "jwks": None}).json
    assert edited is not None
    assert (edited["pins"], edited["jwks"], edited["exchanges"]) == ({}, False, 1)
    removed = site.ask(f"DELETE /trust/{trust_id}").json
    assert removed == edited
    assert site.ask("GET /trust").json == {"trusts": []}
    events = [one["event"] for one in site.store.database.audited() if "trust" in one["event"]]
    assert events == ["trust.added", "trust.edited", "trust.edited", "trust.removed"]


def test_mistakes_in_trusts(site: Site) -> None:
    trust_id = site.trust()
    base = {"owner": "ACME", "scopes": ["model:write"]}
    for line, body, status, words in (
        ("POST /trust", base, 400, "Say who is trusted"),
        ("POST /trust", {**base, "github": "a/b"}, 400, "needs workflow"),
        ("POST /trust", {**TRUST, "scopes": []}, 400, "scopes"),
        ("POST /trust", {**TRUST, "scopes": ["model:wirte"]}, 400, "Did you mean"),
        ("POST /trust", {**TRUST, "scopes": ["mlflow:admin"]}, 400, "outlive the trust"),
        ("POST /trust", {**TRUST, "ttl": 3601}, 400, "ttl"),
        ("POST /trust", {**TRUST, "ttl": 59}, 400, "ttl"),
        ("POST /trust", {**TRUST, "ttl": "15m"}, 400, "ttl"),
        ("POST /trust", {**TRUST, "claim": {}}, 400, "unknown"),
        ("POST /trust", {**TRUST, "claims": {"sub": 1}}, 400, "claims"),
        ("POST /trust", {**TRUST, "claims": {"sub": "a\ud800"}}, 400, "claim"),
        ("POST /trust", {**TRUST, "jwks": {"keys": []}}, 400, "jwks can't be used"),
        ("POST /trust", {**TRUST, "jwks": {"x": "y" * 70_000}}, 400, "65536 bytes"),
        ("POST /trust", {**TRUST, "issuer": site.issuer.url}, 409, trust_id),
        (f"PATCH /trust/{trust_id}", {}, 400, "Nothing to change"),
        (f"PATCH /trust/{trust_id}", {"owner": "x"}, 400, "unknown"),
        (f"PATCH /trust/{trust_id}", {"scopes": ["admin"]}, 400, "outlive the trust"),
        ("PATCH /trust/trust_0", {"ttl": 60}, 404, "trust list"),
        ("DELETE /trust/trust_0", None, 404, "trust list"),
    ):
        answer = site.ask(line, json=body)
        assert (answer.status_code, words in (answer.json or {})["message"]) == (status, True), (
            line,
            body,
            answer.json,
        )


def test_exchanged_key_says_so_of_itself(site: Site) -> None:
    assert keys.generate("ci").startswith("hk_ci_")
    site.trust()
    given = site.exchange(site.token()).json or {}
    record = site.store.get(given["key_id"])
    from mlflow_hokusai_auth.server.web.schemas import describe

    described = describe(record)
    assert (described["source"], described["environment"]) == (given["source"], "ci")
    assert described["trust_id"] == record.trust_id

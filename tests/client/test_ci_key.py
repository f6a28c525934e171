"""`HOKUSAI_TRUST=auto`: a job's identity token goes to the tracking server only, once for each key."""

from __future__ import annotations

import io
import json
import logging
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, quote

import mlflow
import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_hokusai_auth.client import ci_key, origin_guard, profile
from mlflow_hokusai_auth.client.auth_provider import HokusaiAuthProvider
from mlflow_hokusai_auth.client.diagnose import doctor, identity
from mlflow_hokusai_auth.core import keys
from tests.issuer import REQUEST_TOKEN, RUNNER, Issuer

from .conftest import Handler, listening


class Registry:
    """A tracking server that exchanges tokens, and notes what it gets."""

    def __init__(self) -> None:
        self.port = 0
        self.tokens: list[str] = []
        self.keys: list[str | None] = []
        self.made: list[str] = []
        #: (status, headers, content) of exchanges to come, in place of keys.
        self.refusals: list[tuple[int, dict[str, str | None], object]] = []
        self.lifetime: object = 900
        #: Exchanged keys that the gate refuses; None: it refuses all.
        self.ended: set[str | None] | None = set()
        self.bodies: list[bytes] = []
        #: Called before a key is refused.
        self.before_refusal: Callable[[], object] = lambda: None
        #: The server that requests with good keys are redirected to.
        self.moved_to = ""

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}/api/mlflow"

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class _Registry(Handler):
    state: Registry

    def answer(self, body: bytes) -> tuple[int, dict[str, str | None], bytes]:
        state = self.state
        if self.path != f"/api/mlflow{ci_key.PATH}":
            state.keys.append(self.headers.get("X-API-Key"))
            state.bodies.append(body)
            if state.ended is None or state.keys[-1] in state.ended:
                state.before_refusal()
                content: object = {"error_code": "UNAUTHENTICATED", "message": "(401 KEY_REVOKED)"}
                return 401, {"Content-Type": "application/json"}, json.dumps(content).encode()
            if state.moved_to:
                return 307, {"Location": state.moved_to + self.path}, b""
            content = {"experiments": []}
            return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()
        fields = {name: values[0] for name, values in parse_qs(body.decode()).items()}
        assert fields.pop("grant_type").endswith(":token-exchange")
        assert fields.pop("subject_token_type").endswith(":id_token")
        state.tokens.append(fields.pop("subject_token"))
        assert not fields
        assert self.headers.get("Authorization") is None
        if state.refusals:
            status, headers, content = state.refusals.pop(0)
            return status, headers, json.dumps(content).encode()
        state.made.append(keys.generate("ci"))
        content = {
            "access_token": state.made[-1],
            "expires_in": state.lifetime,
            "owner": "ACME",
            "scope": "model:write",
        }
        return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with Issuer() as running:
        yield running


@pytest.fixture
def registry() -> Iterator[Registry]:
    state = Registry()
    with listening(_Registry, state=state) as state.port:
        yield state


class Clock:
    """The clock of `ci_key`; sleeping moves it."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(ci_key, "time", made)
    return made


@pytest.fixture
def job(registry: Registry, issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A job of GitHub's, for which `registry` is the tracking server."""
    for name, value in issuer.runner().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOKUSAI_TRUST", "auto")
    mlflow.set_tracking_uri(registry.uri)
    return registry


def ask() -> None:
    MlflowClient().search_experiments()


def audience(token: str) -> object:
    import jwt

    return jwt.decode(token, options={"verify_signature": False})["aud"]


def test_key_is_exchanged_once_and_sent_with_every_request(
    job: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        ask()
    assert len(job.tokens) == 1
    assert audience(job.tokens[0]) == job.origin
    assert job.keys == [job.made[0]] * 3
    (said,) = [line for line in caplog.messages if "exchanged" in line]
    assert "a Hokusai API key of ACME (model:write)" in said
    assert "ends in 15 minutes" in said
    for secret in (job.made[0], job.tokens[0], REQUEST_TOKEN):
        assert secret not in caplog.text


def test_nothing_is_exchanged_unless_it_is_asked_for(
    job: Registry, issuer: Issuer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = len(issuer.asked)
    for value in ("", "no", "AUTO"):
        monkeypatch.setenv("HOKUSAI_TRUST", value)
        ask()
    assert job.keys == [None] * 3
    assert [line for line in caplog.messages if "must be auto" in line]
    # A key that is configured comes first.
    monkeypatch.setenv("HOKUSAI_TRUST", "auto")
    own = keys.generate("test")
    monkeypatch.setenv("HOKUSAI_API_KEY", own)
    ask()
    assert job.keys[-1] == own
    # So does one that can't be used: it was chosen.
    monkeypatch.delenv("HOKUSAI_API_KEY")
    monkeypatch.setenv("HOKUSAI_API_KEY_FILE", "/nowhere/key")
    ask()
    assert job.keys[-1] is None
    assert (job.tokens, issuer.asked[asked:]) == ([], [])


def test_key_is_renewed_before_it_ends(job: Registry, clock: Clock) -> None:
    ask()
    clock.now += 900 * ci_key.RENEW_AFTER - 1
    ask()
    assert len(job.made) == 1
    clock.now += 2
    ask()
    assert len(job.made) == 2
    assert job.keys == [job.made[0]] * 2 + [job.made[1]]
    # If the renewal fails, the key that there is goes on until its end.
    clock.now += 601
    job.refusals = [(400, {}, {"message": "No (400 TOKEN_UNTRUSTED). Ask."})]
    ask()
    assert job.keys[-1] == job.made[1]
    exchanged = len(job.tokens)
    ask()
    assert (len(job.tokens), job.keys[-1]) == (exchanged, job.made[1])
    clock.now += ci_key.PAUSE
    ask()
    assert job.keys[-1] == job.made[2]


def test_refusal_is_told_once_and_tried_again_later(
    job: Registry, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    message = (
        "Workload not trusted (400 TOKEN_UNTRUSTED). The claim environment is 'test'\n\x1b[31m"
    )
    job.refusals = [(400, {}, {"message": message})] * 2
    for _ in range(3):
        ask()
    assert job.keys == [None] * 3
    assert len(job.tokens) == 1
    (said,) = [line for line in caplog.messages if "TOKEN_UNTRUSTED" in line]
    assert said.isprintable()
    assert "HOKUSAI_TRUST=auto" in said
    clock.now += ci_key.PAUSE
    ask()
    assert len(job.tokens) == 2
    clock.now += ci_key.PAUSE
    ask()
    assert job.keys[-1] == job.made[0]


def test_server_that_asks_to_wait_is_asked_again_with_another_token(
    job: Registry, clock: Clock
) -> None:
    busy: tuple[int, dict[str, str | None], object] = (503, {"Retry-After": "7"}, {"message": "no"})
    job.refusals = [busy, (429, {"Retry-After": "9999"}, {})]
    ask()
    assert job.keys == job.made
    assert len(set(job.tokens)) == 3
    assert clock.now == Clock.now + 7 + ci_key.MAX_WAIT
    ci_key.forget()
    job.refusals = [busy] * ci_key.TRIES
    ask()
    assert job.keys[-1] is None


def test_answers_that_are_no_key(job: Registry, caplog: pytest.LogCaptureFixture) -> None:
    for content in (
        {},
        [],
        {"access_token": "a key", "expires_in": 900},
        {"access_token": "hk_ci_x"},
        {"access_token": "hk_ci_x", "expires_in": "900"},
        {"access_token": "hk_ci_x", "expires_in": 0},
        {"access_token": "hk_ci_x", "expires_in": -5},
    ):
        ci_key.forget()
        job.refusals = [(200, {}, content)]
        ask()
        assert job.keys[-1] is None, content
    assert "without a key, or without its lifetime" in caplog.text


def test_token_goes_to_no_other_server(
    job: Registry, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Registry()
    with listening(_Registry, state=other) as other.port:
        job.refusals = [(307, {"Location": f"{other.uri}{ci_key.PATH}"}, {})]
        ask()
        assert other.tokens == []
        ci_key.forget()
        # Only the tracking server's origin, and only if the key may go there.
        monkeypatch.setenv("HOKUSAI_ALLOWED_ORIGINS", other.origin)
        exchanged = len(job.tokens)
        ask()
        assert (len(job.tokens), job.keys[-1], other.tokens) == (exchanged, None, [])
    monkeypatch.delenv("HOKUSAI_ALLOWED_ORIGINS")
    asked = len(issuer.asked)
    for uri in ("http://registry.example.com", "databricks", "sqlite:///mlflow.db"):
        mlflow.set_tracking_uri(uri)
        ci_key.forget()
        assert profile.api_key() is None
    assert len(issuer.asked) == asked


def test_key_of_one_server_is_not_sent_to_the_next(job: Registry) -> None:
    ask()
    other = Registry()
    with listening(_Registry, state=other) as other.port:
        mlflow.set_tracking_uri(other.uri)
        ask()
        assert other.keys == other.made
        assert other.made != job.made
        assert audience(other.tokens[0]) == other.origin


@pytest.mark.parametrize("provider", ["header", "both"])
def test_request_is_sent_again_with_another_key_if_the_server_ended_the_first(
    job: Registry,
    clock: Clock,
    provider: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if provider == "both":
        monkeypatch.setenv("MLFLOW_TRACKING_AUTH", "hokusai")
    ask()
    job.ended = {job.made[0]}
    for _ in range(3):
        ask()
    assert job.keys == [job.made[0]] * 2 + [job.made[1]] * 3
    assert (len(job.made), len(set(job.bodies))) == (2, 1)
    # A server that refuses every key gets no more than one exchange in a while.
    job.ended = None
    refused = len(job.keys)
    for _ in range(3):
        with pytest.raises(MlflowException, match="KEY_REVOKED"):
            ask()
    assert job.keys[refused:] == [job.made[1]] * 3
    clock.now += ci_key.PAUSE
    for _ in range(3):
        with pytest.raises(MlflowException, match="KEY_REVOKED"):
            ask()
    assert job.keys[refused + 3 :] == [job.made[1]] + [job.made[2]] * 3
    assert len(job.made) == 3
    assert len([line for line in caplog.messages if "once more" in line]) == 1
    for secret in (*job.made, *job.tokens):
        assert secret not in caplog.text


def test_job_whose_trust_is_gone_sends_its_key_no_more(
    job: Registry, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    ask()
    job.ended = None
    gone: tuple[int, dict[str, str | None], object] = (400, {}, {"message": "TOKEN_UNTRUSTED"})
    job.refusals = [gone] * 9
    for _ in range(3):
        with pytest.raises(MlflowException, match="KEY_REVOKED"):
            ask()
    assert job.keys == [job.made[0]] * 2 + [None] * 2
    assert len(job.tokens) == 2
    assert len([line for line in caplog.messages if "TOKEN_UNTRUSTED" in line]) == 1


def test_many_threads_with_an_ended_key_exchange_once_more(job: Registry) -> None:
    ask()
    job.ended = {job.made[0]}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ask(), range(8)))
    assert len(job.made) == 2
    assert job.keys[-1] == job.made[1]


def test_other_keys_and_bodies_that_are_gone_are_not_sent_again(
    job: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask()
    job.ended = None

    def post(**more: Any) -> int:
        auth = HokusaiAuthProvider().get_auth()
        url = f"{job.uri}/api/2.0/mlflow/experiments/search"
        return requests.post(url, auth=auth, timeout=30, **more).status_code

    # The caller's own key is not ours to replace.
    assert post(headers={"X-API-Key": "hk_live_other"}) == 401
    assert job.keys[1:] == ["hk_live_other"]
    # A file was read to its end. The next request has the other key.
    job.ended = {job.made[0]}
    assert post(data=io.BytesIO(b"model")) == 401
    assert (job.keys[2:], job.bodies[-1]) == ([job.made[0]], b"model")
    assert post(data=b"{}") == 200
    assert job.keys[3:] == [job.made[1]]


def test_key_that_replaces_another_goes_to_no_other_origin(job: Registry) -> None:
    other = Registry()
    with listening(_Registry, state=other) as other.port:
        ask()
        # A redirect follows the request that was sent again.
        job.ended, job.moved_to = {job.made[0]}, other.origin
        ask()
        assert job.keys == [job.made[0]] * 2 + [job.made[1]]
        assert other.keys == [None]
        # The tracking URI changes while the server refuses a key.
        ci_key.forget()
        job.moved_to = ""
        ask()
        sent, job.ended = len(job.keys), None
        job.before_refusal = lambda: mlflow.set_tracking_uri(other.uri)
        with pytest.raises(MlflowException, match="KEY_REVOKED"):
            ask()
        assert job.keys[sent:] == [job.made[-1]]
        assert (len(other.made), other.keys) == (1, [None])


def test_exchanged_key_goes_to_no_other_origin_that_is_allowed(
    job: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = Registry()
    with listening(_Registry, state=other) as other.port:
        monkeypatch.setenv("HOKUSAI_ALLOWED_ORIGINS", f"{job.origin},{other.origin}")
        for auth in ("", "hokusai"):
            monkeypatch.setenv("MLFLOW_TRACKING_AUTH", auth)
            ask()
            MlflowClient(registry_uri=other.uri).search_registered_models()
        assert (job.keys, other.keys) == (job.made * 2, [None, None])
        assert other.tokens == []
        (said,) = [line for line in caplog.messages if other.origin in line]
        assert f"exchanged with {job.origin}" in said
        assert job.made[0] not in caplog.text
        # A key of another origin stays there even if the tracking URI changes in the middle.
        key = ci_key.obtain()
        mlflow.set_tracking_uri(other.uri)
        assert not origin_guard.may_send(other.uri, key)
        assert not origin_guard.is_allowed(other.uri, pickle.loads(pickle.dumps(key)))
        # A configured key may go to both.
        monkeypatch.setenv("HOKUSAI_API_KEY", keys.generate("test"))
        ask()
        assert other.keys[-1] == profile.api_key()


def test_why_a_ci_gives_no_token(
    job: Registry, issuer: Issuer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def why() -> str:
        ci_key.forget()
        with pytest.raises(ci_key.Unavailable) as error:
            ci_key.obtain()
        return str(error.value)

    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "")
    assert "id-token: write" in why()
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "wrong-credential")
    assert "401" in why()
    assert "wrong-credential" not in why()
    # Some proxies repeat what they were sent.
    path = "/echo?audience=" + quote(job.origin, safe="")
    issuer.answers = {path: (502, {}, b"Authorization: bearer wrong-credential")}
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{issuer.url}/echo")
    assert "502" in why()
    assert "wrong-credential" not in why()
    for name in issuer.runner():
        monkeypatch.delenv(name)
    assert "no job of GitHub" in why()
    monkeypatch.setitem(sys.modules, "id", None)
    assert "mlflow-hokusai-auth[ci]" in why()
    ask()
    assert job.keys[-1] is None


def test_many_threads_exchange_once(job: Registry) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: profile.api_key(), range(16)))
    assert found == set(job.made)
    assert len(job.tokens) == 1


def test_no_password_of_netrc_goes_along(job: Registry, clean_environment: Any) -> None:
    netrc = clean_environment / ".netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\n")
    netrc.chmod(0o600)
    assert ci_key.obtain() == job.made[0]


def test_doctor_and_whoami_know_it(job: Registry, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    results = doctor.Results(job.uri)
    ok, found, _ = doctor.check_key(results)
    assert ok
    assert "exchanged for this job's identity token" in found
    assert results.key == job.made[0]
    report, key = identity._look(job.uri)
    assert (report["key_from"], key) == ("HOKUSAI_TRUST=auto", job.made[0])
    ci_key.forget()
    job.refusals = [(400, {}, {"message": "No (400 TOKEN_UNTRUSTED). Ask."})]
    ok, found, _ = doctor.check_key(doctor.Results(job.uri))
    assert (ok, "TOKEN_UNTRUSTED" in found) == (False, True)
    report, _ = identity._look(job.uri)
    assert "TOKEN_UNTRUSTED" in report["error"]


def test_runner_is_asked_as_github_documents_it(job: Registry, issuer: Issuer) -> None:
    asked = len(issuer.asked)
    ask()
    (path,) = issuer.asked[asked:]
    assert path.startswith(f"{RUNNER}?api-version=2.0")
    assert f"audience={job.origin.replace(':', '%3A').replace('/', '%2F')}" in path
    assert SimpleNamespace(**issuer.runner()).GITHUB_ACTIONS == "true"

"""Only the servers that the key belongs to receive it, once per request."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
import requests
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlflow.deployments import get_deploy_client
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking.request_header.registry import _request_header_provider_registry
from mlflow.utils.rest_utils import MlflowHostCreds, http_request
from urllib3.util import Retry, parse_url

from mlflow_hokusai_auth.client import origin_guard, profile, waiting
from mlflow_hokusai_auth.client.auth_provider import HokusaiAuth
from mlflow_hokusai_auth.client.header_provider import HokusaiHeaderProvider
from mlflow_hokusai_auth.core import keys

from .conftest import Server
from .test_admin import Api, answering
from .test_profile import PIECES

SEARCH = "/api/mlflow/api/2.0/mlflow/experiments/search"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"


def call() -> None:
    mlflow.MlflowClient().search_experiments()


@pytest.fixture
def header_provider_only() -> None:
    """The default: MLFLOW_TRACKING_AUTH is not set."""


@pytest.fixture
def auth_provider_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    registry = _request_header_provider_registry._registry
    before = list(registry)
    registry[:] = [known for known in registry if not isinstance(known, HokusaiHeaderProvider)]
    monkeypatch.setenv("MLFLOW_TRACKING_AUTH", "hokusai")
    yield
    registry[:] = before


@pytest.fixture
def both_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_AUTH", "hokusai")


@pytest.fixture(params=["header_provider_only", "auth_provider_only", "both_providers"])
def way(request: pytest.FixtureRequest) -> None:
    """Each way in which a request can get the key."""
    request.getfixturevalue(request.param)


def test_key_is_sent_once_and_only_that(tracking: Server, key: str, way: None) -> None:
    before = dict(os.environ)
    call()
    assert [request.path for request in tracking.seen] == [SEARCH]
    assert tracking.seen[0].keys == [key]
    assert "authorization" not in {name.lower() for name, _ in tracking.seen[0].headers}
    assert dict(os.environ) == before


def test_rotation_and_removal_without_restart(
    tracking: Server, way: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = []
    for _ in range(2):
        expected.append([keys.generate()])
        monkeypatch.setenv("HOKUSAI_API_KEY", expected[-1][0])
        call()
    monkeypatch.delenv("HOKUSAI_API_KEY")
    call()
    assert [request.keys for request in tracking.seen] == [*expected, []]


def test_key_is_sent_beside_a_tracking_token(
    tracking: Server, key: str, way: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "other-token")
    call()
    assert tracking.seen[0].keys == [key]
    assert ("Authorization", "Bearer other-token") in tracking.seen[0].headers


def test_unsendable_key_is_withheld_and_never_shown(
    tracking: Server,
    key: str,
    way: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    for damage in ("\r\n", "\nX-Evil: 1", " "):
        monkeypatch.setenv("HOKUSAI_API_KEY", key[:20] + damage + key[20:])
        call()
        assert tracking.seen[-1].keys == [], damage
        for half in (key[:20], key[20:]):
            assert not tracking.saw(half) and half not in caplog.text, damage


def test_nothing_is_logged_with_the_key(
    tracking: Server, key: str, way: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    call()
    assert tracking.saw(key)
    assert key not in caplog.text
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    with pytest.raises(MlflowException) as raised:
        call()
    assert key not in str(raised.getrepr(showlocals=False))
    assert key not in caplog.text


@pytest.fixture
def afresh(caplog: pytest.LogCaptureFixture) -> Callable[..., None]:
    """Clear the warnings, the log and the requests of these servers."""

    def afresh(*servers: Server) -> None:
        for server in servers:
            server.seen.clear()
        caplog.clear()
        profile._warned.clear()

    return afresh


def test_key_is_not_forwarded_to_another_origin(
    tracking: Server,
    other: Server,
    key: str,
    way: None,
    caplog: pytest.LogCaptureFixture,
    afresh: Callable[..., None],
) -> None:
    for place in ("http://127.0.0.1:{}", "http://localhost:{}", "//127.0.0.1:{}"):
        for status in (301, 302, 303, 307, 308):
            afresh(tracking, other)
            tracking.redirects[SEARCH] = (status, place.format(other.port) + SEARCH)
            call()
            call()
            assert [request.keys for request in tracking.seen] == [[key], [key]], (place, status)
            assert len(other.seen) == 2 and not other.saw(key), (place, status)
            (warning,) = caplog.records
            assert "another origin" in warning.getMessage()


def test_key_is_forwarded_within_its_origin(tracking: Server, key: str, way: None) -> None:
    for place, sent in (
        ("/api/mlflow/there", [key]),
        (f"{tracking.origin}/there", [key]),
        (f"http://localhost:{tracking.port}/there", []),
    ):
        tracking.redirects[SEARCH] = (307, place)
        call()
        assert [request.keys for request in tracking.seen[-2:]] == [[key], sent], place


def test_every_redirect_is_checked(tracking: Server, other: Server, key: str, way: None) -> None:
    tracking.redirects[SEARCH] = (307, "/one")
    tracking.redirects["/one"] = (307, f"{other.origin}/two")
    other.redirects["/two"] = (307, f"{tracking.origin}/three")
    call()
    assert [request.path for request in tracking.seen] == [SEARCH, "/one", "/three"]
    assert [request.keys for request in tracking.seen] == [[key], [key], []]
    assert len(other.seen) == 1
    assert not other.saw(key)


def foreign_registry(other: Server, _: Path) -> None:
    mlflow.set_registry_uri(other.origin)
    mlflow.MlflowClient().search_registered_models()


def foreign_download(other: Server, folder: Path) -> None:
    mlflow.artifacts.download_artifacts(f"{other.origin}{ARTIFACTS}/a.txt", dst_path=str(folder))


def foreign_artifact_location(other: Server, folder: Path) -> None:
    repository = get_artifact_repository(
        f"mlflow-artifacts://127.0.0.1:{other.port}/0/run/artifacts"
    )
    local = folder / "b.txt"
    local.write_text("x")
    repository.log_artifact(str(local))
    repository.list_artifacts()


def foreign_deployments(other: Server, _: Path) -> None:
    get_deploy_client(other.origin).predict(endpoint="any", inputs={"x": 1})


def foreign_client(other: Server, _: Path) -> None:
    mlflow.MlflowClient(tracking_uri=other.origin).search_experiments()


FOREIGN: list[Callable[[Server, Path], None]] = [
    foreign_registry,
    foreign_download,
    foreign_artifact_location,
    foreign_client,
]
if importlib.util.find_spec("pydantic"):  # MLflow 2.9 has it only with its genai extra
    FOREIGN.append(foreign_deployments)


def test_other_servers_never_receive_the_key(
    tracking: Server,
    other: Server,
    key: str,
    way: None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    afresh: Callable[..., None],
) -> None:
    for use in FOREIGN:
        afresh(tracking, other)
        use(other, tmp_path)
        use(other, tmp_path)
        call()
        assert tracking.seen[-1].keys == [key], use
        assert other.seen and not other.saw(key), use
        (warning,) = warnings(caplog)
        assert f"HOKUSAI_ALLOWED_ORIGINS={other.origin}" in warning, use


def test_allowed_origins_decides_alone(
    tracking: Server,
    other: Server,
    key: str,
    way: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("HOKUSAI_ALLOWED_ORIGINS", other.origin)
    call()
    mlflow.MlflowClient(tracking_uri=other.origin).search_experiments()
    assert [request.keys for request in tracking.seen + other.seen] == [[], [key]]
    assert f"add {tracking.origin} to the list" in caplog.text


def test_no_warning_without_a_key(
    server: Server, other: Server, way: None, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow.set_tracking_uri(server.origin)
    mlflow.MlflowClient(tracking_uri=other.origin).search_experiments()
    call()
    assert [request.keys for request in server.seen + other.seen] == [[], []]
    assert not caplog.records


def test_refusal_of_plain_http_names_the_fix(key: str) -> None:
    why, fix = origin_guard.explain_refusal(
        profile.origin("http://registry.example.com/mlflow"), key
    )
    assert "plain http" in why
    assert "HOKUSAI_ALLOWED_ORIGINS=http://registry.example.com " in fix
    assert "https" in fix


def test_provider_may_be_registered_twice(tracking: Server, key: str, way: None) -> None:
    registry = _request_header_provider_registry
    before = list(registry._registry)
    registry.register(HokusaiHeaderProvider)
    registry.register(HokusaiHeaderProvider)
    try:
        call()
    finally:
        registry._registry[:] = before
    assert tracking.seen[0].keys == [key]


def test_a_key_that_the_caller_sets_stays(tracking: Server, way: None) -> None:
    creds = MlflowHostCreds(tracking.origin, auth=os.environ.get("MLFLOW_TRACKING_AUTH"))
    for name in ("X-API-Key", "x-api-key"):
        http_request(creds, "/x", "GET", extra_headers={name: "own"})
        assert tracking.seen[-1].keys == ["own"], name


def test_the_callers_hooks_still_run_and_stay_as_they_are(tracking: Server, key: str) -> None:
    answered = []
    hooks = {"response": lambda response, **_: answered.append(response.status_code)}
    before = dict(hooks)
    for _ in range(2):
        http_request(MlflowHostCreds(tracking.origin), "/x", "GET", hooks=hooks)
    assert [request.keys for request in tracking.seen] == [[key], [key]]
    assert answered == [200, 200]
    assert hooks == before


def test_a_second_request_made_by_a_hook_changes_nothing(
    tracking: Server, other: Server, key: str
) -> None:
    def again(response: requests.Response, **_: Any) -> requests.Response:
        if response.history:
            return response
        tracking.redirects["/x"] = (307, f"{other.origin}/y")
        second = requests.get(response.url, allow_redirects=False)
        second.history.append(response)
        return second

    http_request(MlflowHostCreds(tracking.origin), "/x", "GET", hooks={"response": [again]})
    assert other.seen
    assert not other.saw(key)


SUNSET = {"Deprecation": "@1764597600", "Sunset": "Tue, 01 Dec 2026 14:00:00 GMT"}


@pytest.fixture
def replaced(key: str) -> Iterator[Api]:
    """A tracking server that answers with `SUNSET`, as for a replaced key."""
    with answering() as api:
        mlflow.set_tracking_uri(api.uri)
        api.answers["POST /api/2.0/mlflow/experiments/search"] = (200, {}, SUNSET)
        yield api


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name == "mlflow_hokusai_auth.client"]


def test_replaced_key_warns_once(
    replaced: Api, key: str, way: None, caplog: pytest.LogCaptureFixture
) -> None:
    call()
    call()
    (warning,) = warnings(caplog)
    assert "replaced and ends on 2026-12-01 14:00Z" in warning
    assert "Set HOKUSAI_API_KEY to the new key" in warning and "operator" in warning
    assert key not in caplog.text
    later = {**SUNSET, "Sunset": "Wed, 02 Dec 2026 00:00:00 GMT"}
    replaced.answers["POST /api/2.0/mlflow/experiments/search"] = (200, {}, later)
    call()
    assert "2026-12-02 00:00Z" in warnings(caplog)[1]


def test_warning_precedes_the_removal_of_the_key(
    replaced: Api, other: Server, key: str, way: None, caplog: pytest.LogCaptureFixture
) -> None:
    away = {**SUNSET, "Location": f"{other.origin}/x"}
    replaced.answers["POST /api/2.0/mlflow/experiments/search"] = (307, b"", away)
    call()
    assert ["replaced and ends" in text for text in warnings(caplog)] == [True, False]
    assert other.seen and not other.saw(key)


def test_malformed_announcements_are_ignored(
    replaced: Api, way: None, caplog: pytest.LogCaptureFixture
) -> None:
    for headers in (
        {"Deprecation": "@1764597600"},
        {"Sunset": SUNSET["Sunset"]},
        {**SUNSET, "Deprecation": "true"},
        {**SUNSET, "Deprecation": "@"},
        {**SUNSET, "Deprecation": "@1764597600; x"},
        {**SUNSET, "Sunset": "soon"},
        {**SUNSET, "Sunset": ""},
        {**SUNSET, "Sunset": "2026-12-01"},
        {**SUNSET, "Sunset": "Tue, 99 Dec 2026 14:00:00 GMT"},
        {**SUNSET, "Sunset": "Tue, 01 Dec 2026 14:00:00"},
        {**SUNSET, "Sunset": "Fri, 31 Dec 9999 23:59:59 -1200"},
    ):
        replaced.answers["POST /api/2.0/mlflow/experiments/search"] = (200, {}, headers)
        call()
        assert not warnings(caplog), headers


def test_no_warning_for_another_key_than_ours(
    replaced: Api, way: None, caplog: pytest.LogCaptureFixture
) -> None:
    creds = MlflowHostCreds(replaced.uri, auth=os.environ.get("MLFLOW_TRACKING_AUTH"))
    path = "/api/2.0/mlflow/experiments/search"
    http_request(creds, path, "POST", extra_headers={"X-API-Key": "own"})
    assert replaced.last.headers["x-api-key"] == "own"
    assert not warnings(caplog)


@given(st.text(), st.text())
@example("@1", "")
@example("@1", "Tue, 01 Dec 2026 14:00:00 +9999")
@settings(deadline=None)
def test_odd_announcements_never_raise(deprecation: str, sunset: str) -> None:
    response = requests.Response()
    response.request = requests.PreparedRequest()
    response.request.headers = requests.structures.CaseInsensitiveDict()
    for one in (deprecation, "@1"):
        response.headers.update({"Deprecation": one, "Sunset": sunset})
        origin_guard.warn_of_sunset(response)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """MLflow repeats a request twice without waiting; the clock of what was said stands still."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(waiting, "_told", {})
    monkeypatch.setattr(Retry, "sleep", lambda *_: None)
    return clock


def refused(code: str, message: str, **headers: str) -> tuple[int, dict[str, str], dict[str, str]]:
    status = 429 if code == "RATE_LIMITED" else 503
    body = {"error_code": "E", "error": code, "message": message}
    return status, body, {name.replace("_", "-"): value for name, value in headers.items()}


def test_wait_is_said_once_and_at_once(
    replaced: Api, way: None, impatient: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    limit = {"Retry_After": "60", "RateLimit_Reset": "3600"}
    said: list[list[str]] = []

    def answer() -> tuple[int, dict[str, str], dict[str, str]]:
        said.append(warnings(caplog))
        return refused("RATE_LIMITED", "Rate limit exceeded (429 RATE_LIMITED). Key.", **limit)

    replaced.answers["POST /api/2.0/mlflow/experiments/search"] = answer
    with pytest.raises(MlflowException, match="too many 429"):
        call()
    served_again = (
        "RATE_LIMITED: served again in 3600 s. MLflow waits and tries again, up to 2 times."
    )
    # It was said before the first repetition.
    assert said == [[], [served_again], [served_again]]
    impatient.now += 3599
    with pytest.raises(MlflowException):
        call()
    assert warnings(caplog) == [served_again]
    impatient.now += 2
    with pytest.raises(MlflowException):
        call()
    assert warnings(caplog) == [served_again, served_again]


def test_outage_is_said_in_the_words_of_the_server(
    replaced: Api, way: None, key: str, impatient: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    text = (
        f"Service unavailable (503 AUTHORITY_UNAVAILABLE). Keys\x1b[2J of\n{key} can't be checked."
    )
    answers = [(200, {}), refused("AUTHORITY_UNAVAILABLE", text, Retry_After="1")]
    replaced.answers["POST /api/2.0/mlflow/experiments/search"] = answers.pop
    call()
    (said,) = warnings(caplog)
    assert said.startswith(
        "AUTHORITY_UNAVAILABLE: Keys [2J of hk_test_*** can't be checked. MLflow"
    )


def test_refusals_that_do_not_ask_our_client_to_wait_are_left_alone(
    replaced: Api,
    impatient: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = refused("RATE_LIMITED", "no", Retry_After="1")
    for status, body, headers in (
        (429, b"<html>", {}),
        (429, [1], {}),
        (503, {"error": 5, "message": "m"}, {}),
        (503, {"error": "AUTHORITY_UNAVAILABLE"}, {}),
        (429, other[1], {"Retry-After": "soon"}),
        (500, other[1], {}),
        (429, {"error": "SOMETHING", "message": "m"}, {}),
    ):
        answers = [(200, {}, {}), (status, body, headers)]
        replaced.answers["POST /api/2.0/mlflow/experiments/search"] = answers.pop
        call()
        assert not answers and not warnings(caplog), body
    # A server that the key does not belong to says nothing through us.
    monkeypatch.setenv("HOKUSAI_ALLOWED_ORIGINS", "https://registry.example.com")
    answers[:] = [(200, {}, {}), other]
    replaced.answers["POST /api/2.0/mlflow/experiments/search"] = answers.pop
    call()
    assert not any("RATE_LIMITED" in text for text in warnings(caplog))


def test_last_answer_reaches_the_caller_whole(
    replaced: Api, impatient: SimpleNamespace, key: str
) -> None:
    answer = refused("RATE_LIMITED", "m (429 RATE_LIMITED). Wait.", Retry_After="1")
    replaced.answers["POST /x"] = answer
    creds = MlflowHostCreds(replaced.uri)
    response = http_request(creds, "/x", "POST", raise_on_status=False)
    assert response.json() == answer[1]


def caller(body: str, **names: Any) -> Callable[..., Any]:
    """A stand-in for MLflow's `http_request`, with the locals that `body` makes."""
    names["__name__"] = "mlflow.utils.rest_utils"
    names["ask"] = HokusaiHeaderProvider().request_headers
    exec(f"def http_request(**kwargs):\n    {body}\n    return ask()", names)
    return names["http_request"]  # type: ignore[no-any-return]


def test_unknown_callers_get_no_key(
    tracking: Server, caplog: pytest.LogCaptureFixture, afresh: Callable[..., None]
) -> None:
    databricks = SimpleNamespace(use_databricks_sdk=True)
    for body, warning in (
        ("pass", "does not reveal the URL"),
        ("url = 5", "does not reveal the URL"),
        ("url = allowed; kwargs = None", "does not reveal the URL"),
        ("url = allowed; host_creds = databricks", "Databricks SDK"),
        ("url = allowed; kwargs['hooks'] = 5", "AttributeError"),
        ("url = allowed; extra_headers = 5", "TypeError"),
        ("url = 'https://evil.example'", "not the origin"),
    ):
        afresh()
        ask = caller(body, allowed=tracking.origin, databricks=databricks)
        assert ask() == ask() == {}, body
        assert [warning in record.getMessage() for record in caplog.records] == [True], body


def test_provider_gives_no_key_outside_a_request(
    tracking: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    afresh: Callable[..., None],
) -> None:
    for auth in ("hokusai", ""):
        afresh()
        monkeypatch.setenv("MLFLOW_TRACKING_AUTH", auth)
        assert HokusaiHeaderProvider().in_context() is True
        assert HokusaiHeaderProvider().request_headers() == {}
        assert ("MLFLOW_TRACKING_AUTH=hokusai" in caplog.text) is (auth != "hokusai")


def test_url_in_parts_as_in_mlflow_2_9(tracking: Server, key: str) -> None:
    creds = MlflowHostCreds(tracking.origin + "/")
    evil = MlflowHostCreds(tracking.origin.replace("127", "evil@127"))
    assert caller("host_creds = creds; endpoint = '/x'", creds=creds)() == {"X-API-Key": key}
    assert caller("host_creds = creds; endpoint = '@evil.example/x'", creds=evil)() == {}


def test_http_request_still_looks_as_the_provider_needs_it() -> None:
    assert http_request.__module__ == "mlflow.utils.rest_utils"
    assert http_request.__code__.co_name == "http_request"
    parameters = inspect.signature(http_request).parameters
    assert parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
    assert {"host_creds", "endpoint", "extra_headers"} <= set(parameters)
    assert hasattr(sys, "_getframe")


def test_the_authentication_object_never_raises_and_shows_no_key(
    key: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOKUSAI_ALLOWED_ORIGINS", "https://a.example")
    auth = HokusaiAuth()
    assert key not in repr(auth) + repr(vars(auth))
    unprepared = requests.PreparedRequest()
    assert auth(unprepared) is unprepared
    unprepared.url = "https://a.example"
    assert auth(unprepared) is unprepared
    assert key not in caplog.text


BEGINNINGS = ["//", "///", "////", "/\t/", "/\\", "\\\\", "http:", "http://good.example:8080", "/"]
LOCATIONS = st.one_of(
    st.lists(PIECES, max_size=8).map("".join),
    st.tuples(st.sampled_from(BEGINNINGS), st.lists(PIECES, max_size=5).map("".join)).map("".join),
)


@given(LOCATIONS)
@example("////evil.example")
@example("/\t/evil.example")
@settings(max_examples=1000, deadline=None)
def test_key_never_leaves_its_origin_on_any_redirect(location: str) -> None:
    request = requests.Request("GET", "http://good.example:8080/a", headers={"x-api-KEY": "k"})
    prepared = request.prepare()
    response = requests.Response()
    response.status_code = 307
    response.url, response.request = str(prepared.url), prepared
    # http.client decodes the UTF-8 bytes as Latin-1.
    response.headers["Location"] = location.encode().decode("latin-1")
    vars(response).update(_content=b"", _content_consumed=True)
    origin_guard.drop_key_on_redirect(response)
    if origin_guard.HEADER not in prepared.headers:
        return
    session = requests.Session()
    try:
        following = next(session.resolve_redirects(response, prepared, yield_requests=True), None)
    except (requests.exceptions.RequestException, ValueError):
        return
    if following is not None and following.url.lower().startswith("http"):
        goes_to = parse_url(following.url)
        assert (goes_to.scheme, goes_to.host, goes_to.port) == ("http", "good.example", 8080)

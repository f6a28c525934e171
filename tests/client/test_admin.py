"""Key management from Python, against a server that answers by the REST API's contract."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import mlflow
import pytest
from mlflow.exceptions import MlflowException, RestException
from mlflow.store.entities import PagedList

from mlflow_hokusai_auth.client import admin
from mlflow_hokusai_auth.client.admin import HokusaiAuthClient

from .conftest import Handler, listening

PREFIX = "/api/mlflow"
API = f"{PREFIX}/api/2.0/hokusai"
RECORD = {"key_id": "key_1", "owner": "ACME", "scopes": ["model:write"], "state": "active"}
UNKNOWN = (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "There is no such route."})

#: status, body (JSON unless bytes) and, perhaps, headers (None: without that one)
Answer = tuple[Any, ...]


@dataclass
class Asked:
    """One received request."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


@dataclass
class Api:
    """A server under `PREFIX` with preset answers that records its requests."""

    port: int = 0
    #: "GET /path/below/the/prefix" -> answer, or a function that returns it
    answers: dict[str, Answer | Callable[[], Answer]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def uri(self) -> str:
        return self.origin + PREFIX

    @property
    def last(self) -> Asked:
        return self.asked[-1]

    def on(self, route: str, *answer: Any) -> None:
        """Set the answer to `route` of the API, such as "GET whoami"."""
        method, path = route.split()
        self.answers[f"{method} /api/2.0/hokusai/{path}"] = answer


class _Answers(Handler):
    api: Api

    def answer(self, body: bytes) -> tuple[int, dict[str, str | None], bytes]:
        url = urlsplit(self.path)
        query = {name: ",".join(values) for name, values in parse_qs(url.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        read = json.loads(body) if body else None
        self.api.asked.append(Asked(self.command, url.path, query, headers, read))
        answer = self.api.answers.get(f"{self.command} {url.path.removeprefix(PREFIX)}", UNKNOWN)
        status, sent, *more = answer() if callable(answer) else answer
        content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
        usual = {"Date": self.date_time_string(), "Content-Type": "application/json"}
        return status, {**usual, **(more[0] if more else {})}, content


@contextlib.contextmanager
def answering() -> Iterator[Api]:
    """A running `Api`."""
    api = Api()
    with listening(_Answers, api=api) as api.port:
        yield api


@pytest.fixture
def api() -> Iterator[Api]:
    with answering() as running:
        mlflow.set_tracking_uri(running.uri)
        yield running


@pytest.fixture
def client(api: Api, key: str) -> HokusaiAuthClient:
    return HokusaiAuthClient(api.uri)


def test_mlflow_finds_the_client(api: Api, key: str) -> None:
    get_app_client = pytest.importorskip("mlflow.server").get_app_client
    api.on("GET whoami", 200, RECORD)
    assert get_app_client("hokusai-auth", tracking_uri=api.uri).whoami() == RECORD
    assert (api.last.method, api.last.path) == ("GET", f"{API}/whoami")
    assert api.last.headers["x-api-key"] == key


def test_create_sends_only_the_given_fields(api: Api, client: HokusaiAuthClient) -> None:
    for status in (200, 201):
        api.on("POST keys", status, {**RECORD, "key": "hk_..."})
        assert client.create_key("ACME", ["model:write"])["key"] == "hk_..."
    body = {"owner": "ACME", "scopes": ["model:write"], "environment": "live"}
    assert api.last.body == body
    client.create_key("ACME", ["model:write"], expires_in=None)  # for ever, not the default
    assert api.last.body == {**body, "expires_in": None}
    more = {
        "name": "ci",
        "environment": "test",
        "expires_in": 3600,
        "networks": ["192.0.2.0/24"],
        "rate_limit_per_hour": 1000,
        "note": "two\nlines",
        "models": ["acme-*"],
        "no_delete": True,
    }
    client.create_key("ACME", ("model:write", "model:read"), **more)
    assert api.last.body == {"owner": "ACME", "scopes": ["model:write", "model:read"], **more}


def test_import_sends_the_key(api: Api, client: HokusaiAuthClient) -> None:
    api.on("POST keys/import", 201, RECORD)
    assert client.import_key("hk_live_old", "ACME", ["model:write"]) == RECORD
    assert api.last.body == {"key": "hk_live_old", "owner": "ACME", "scopes": ["model:write"]}
    more = {"name": "n", "expires_in": 1.5, "networks": ["::1"], "rate_limit_per_hour": 1}
    client.import_key("hk_live_old", "ACME", ["model:write"], note="old", **more)
    assert {**more, "note": "old"}.items() <= api.last.body.items()


def test_list_returns_pages(api: Api, client: HokusaiAuthClient) -> None:
    api.on("GET keys", 200, {"keys": [RECORD], "next_page_token": "next", "total": 9})
    page = client.list_keys()
    assert isinstance(page, PagedList)
    assert (list(page), page.token, page.total) == ([RECORD], "next", 9)
    assert api.last.query == {"max_results": "100"}
    api.on("GET keys", 200, {"keys": [], "next_page_token": None})
    which = {"owner": "A&B", "environment": "dev", "state": "revoked", "query": "q r"}
    which |= {"scope": "read", "expires_within": 1, "unused_for": 2, "order_by": "owner DESC"}
    last = client.list_keys(**which, max_results=7, page_token="next")
    assert (list(last), last.token) == ([], None)
    which = {name: str(value) for name, value in which.items()}
    assert api.last.query == {**which, "max_results": "7", "page_token": "next"}


def test_edit_distinguishes_none_from_omitted(api: Api, client: HokusaiAuthClient) -> None:
    api.on("PATCH keys/key_1", 200, RECORD)
    changes: dict[str, Any]
    for changes in (
        {},
        {"expires_in": None},
        {"rate_limit_per_hour": None, "name": ""},
        {"owner": "B", "scopes": ["admin"], "networks": [], "note": "", "expires_in": 60},
        {"models": [], "no_delete": False},
    ):
        assert client.edit_key("key_1", **changes) == RECORD
        assert api.last.body == changes


def test_rotate_returns_the_new_key(api: Api, client: HokusaiAuthClient) -> None:
    answer = {**RECORD, "key_id": "key_2", "key": "hk_...", "replaces": RECORD}
    api.on("POST keys/key_1/rotate", 201, answer)
    for overlap, body in ((None, {}), (0, {"overlap": 0})):
        assert client.rotate_key("key_1", overlap=overlap) == answer
        assert api.last.body == body


def test_revoke_sends_its_options(api: Api, client: HokusaiAuthClient) -> None:
    api.on("DELETE keys/key_1", 200, {**RECORD, "state": "revoked"})
    for names in ((), ("wait",), ("force", "wait")):
        assert client.revoke_key("key_1", **dict.fromkeys(names, True))["state"] == "revoked"
        assert api.last.query == dict.fromkeys(names, "true")


def test_ownership_is_asked_and_changed_by_its_routes(api: Api, client: HokusaiAuthClient) -> None:
    one: dict[str, Any] = {"name": "lead", "owner": "ACME"}
    page = {"max_results": "7", "page_token": "a b"}
    for call, route, status, answer, query, body in (
        (
            lambda: client.list_owners(kind="experiment", unowned=True, max_results=7),
            "GET owners",
            200,
            {"owners": [one], "next_page_token": "next"},
            {"kind": "experiment", "unowned": "true", "max_results": "7"},
            None,
        ),
        (
            lambda: client.list_owners(owner="A&B", max_results=7, page_token="a b"),
            "GET owners",
            200,
            {"owners": [one]},
            {"kind": "model", "owner": "A&B", **page},
            None,
        ),
        (
            lambda: client.owners_of("/a/b?"),
            "GET owners/of",
            200,
            {"owners": [one]},
            {"name": "/a/b?"},
            None,
        ),
        (
            lambda: client.assign_owner(owner="ACME", models="a*"),
            "POST owners/assign",
            200,
            one,
            {},
            {"owner": "ACME", "models": "a*", "apply": False, "keep_grants": False},
        ),
        (
            lambda: client.assign_owner(names=[one], apply=True, keep_grants=True),
            "POST owners/assign",
            200,
            one,
            {},
            {"names": [one], "apply": True, "keep_grants": True},
        ),
        (lambda: client.release_name("l"), "POST owners/release", 200, one, {}, {"name": "l"}),
        (client.check_owners, "GET owners/check", 200, {"problems": [one]}, {}, None),
        (
            lambda: client.add_grant(grantee="G", pattern="a*", level="contribute", expires_in=9),
            "POST grants",
            201,
            one,
            {},
            {"grantee": "G", "pattern": "a*", "level": "contribute", "expires_in": 9},
        ),
        (
            lambda: client.list_grants(max_results=7, page_token="a b"),
            "GET grants",
            200,
            {"grants": [one], "next_page_token": None},
            page,
            None,
        ),
        (lambda: client.remove_grant("grant_1"), "DELETE grants/grant_1", 200, one, {}, None),
        (
            lambda: client.add_prefix(prefix="a-", owner="ACME"),
            "POST prefixes",
            201,
            one,
            {},
            {"prefix": "a-", "owner": "ACME", "kind": "model"},
        ),
        (client.list_prefixes, "GET prefixes", 200, {"prefixes": [one]}, {}, None),
        (
            lambda: client.remove_prefix(prefix="a-", kind="experiment"),
            "DELETE prefixes",
            200,
            one,
            {"prefix": "a-", "kind": "experiment"},
            None,
        ),
    ):
        api.on(route, status, answer)
        found = call()
        assert found in (one, [one]), route
        asked = f"{api.last.method} {api.last.path.removeprefix(API + '/')}"
        assert (asked, api.last.query, api.last.body) == (route, query, body)
    api.on("GET owners", 200, {"owners": [], "next_page_token": "next"})
    assert client.list_owners().token == "next"


def test_export_is_read_lazily(api: Api, client: HokusaiAuthClient) -> None:
    lines = [{**RECORD, "note": "a\u2028b"}, {**RECORD, "key_id": "key_2"}]
    body = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    api.on("GET keys/export", 200, body)
    assert list(client.export_keys()) == lines
    api.on("GET keys/export", 403, {"error_code": "PERMISSION_DENIED", "message": "Not for you."})
    with pytest.raises(RestException, match=r"Not for you\."):
        next(client.export_keys())


def test_broken_export_raises(api: Api, client: HokusaiAuthClient) -> None:
    line = json.dumps(RECORD).encode() + b"\n"
    for body, length in ((line, len(line) + 1), (line + b'{"key_', None)):
        extra = {"Connection": "close", "Content-Length": length and str(length)}
        api.on("GET keys/export", 200, body, extra)
        with pytest.raises(MlflowException, match="broke off"):
            list(client.export_keys())


def test_export_yields_each_line_at_once(api: Api, client: HokusaiAuthClient) -> None:
    # This is more than requests reads at a time. The rest of the body never comes.
    lines = (json.dumps(RECORD).encode() + b"\n") * 100
    api.on("GET keys/export", 200, lines, {"Content-Length": "100000"})
    taken = client.export_keys()
    assert next(taken)["key_id"] == "key_1"
    taken.close()


def test_key_id_is_one_path_segment(api: Api, client: HokusaiAuthClient) -> None:
    calls = (client.get_key, client.edit_key, client.rotate_key, client.revoke_key)
    for call, key_id in product(calls, ("", ".", "..")):
        with pytest.raises(MlflowException, match="not the id of a key"):
            call(key_id)
        assert not api.asked, (call, key_id)
    strange = ("a/b", "a?wait=true", "a#b", "../whoami", "ä b", "%2e%2e")
    for call, key_id in product(calls, strange):
        with pytest.raises(RestException):
            call(key_id)
        step = api.last.path.removeprefix(f"{API}/keys/").removesuffix("/rotate")
        assert step and "/" not in step and api.last.path.startswith(f"{API}/keys/"), key_id
        assert api.last.query == {}, key_id


def test_refusal_raises_the_servers_message(api: Api, client: HokusaiAuthClient) -> None:
    for status in (400, 403, 404, 409, 429, 503):
        api.on("GET keys/key_1", status, {"error_code": "BAD_REQUEST", "message": f"No {status}."})
        with pytest.raises(RestException, match=rf"No {status}\.") as caught:
            client.get_key("key_1")
        assert caught.value.error_code == "BAD_REQUEST"
    for status in (200, 201, 404, 502):
        api.on("GET whoami", status, f"<html>Sign in, {status}</html>".encode())
        with pytest.raises(MlflowException, match=f"Sign in, {status}"):
            client.whoami()


def test_only_reads_are_retried(
    api: Api, client: HokusaiAuthClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    for route in ("POST keys", "POST keys/import", "POST keys/key_1/rotate", "GET whoami"):
        api.on(route, 502, {"error_code": "INTERNAL_ERROR", "message": "Down."})
    for call in (
        lambda: client.create_key("ACME", ["model:write"]),
        lambda: client.import_key("hk_live_old", "ACME", ["model:write"]),
        lambda: client.rotate_key("key_1"),
        lambda: client.whoami(),
    ):
        with pytest.raises(RestException, match=r"Down\."):
            call()
    assert [asked.method for asked in api.asked] == ["POST"] * 3 + ["GET"] * 2


def test_nothing_is_created_without_a_server(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    for uri in ("sqlite:///mlflow.db", "./mlruns", ""):
        with pytest.raises(MlflowException, match="MLFLOW_TRACKING_URI"):
            HokusaiAuthClient(uri).whoami()
        assert sorted(tmp_path.iterdir()) == before, uri


def test_audit_is_followed(
    api: Api, client: HokusaiAuthClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []
    monkeypatch.setattr(admin, "time", SimpleNamespace(sleep=naps.append))
    pages = [[{"id": 9}], [], [{"id": 8}, {"id": 7}], [{"id": 5}]]
    api.answers["GET /api/2.0/hokusai/audit"] = lambda: (200, {"events": pages.pop()})
    events = client.follow_audit(event="key.", interval=3)
    assert [next(events)["id"] for _ in range(3)] == [8, 7, 9]
    assert naps == [3]
    first, *further = [asked.query for asked in api.asked]
    assert first == {"max_results": "1"}
    # From the newest event on, and then from the last one that was read.
    assert [one["after"] for one in further] == ["5", "7", "7"]
    assert {one["event"] for one in further} == {"key."}

"""Our client, MLflow's client and our server mean the same: refusals, keys, the REST API.

What all authorities over keys have in common is in `test_authorities.py`; here is only that the
stand-in for the auth service and our own endpoint give the same answers to the same questions.
"""

from __future__ import annotations

import http.client
import json
import re
import time
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
import pytest
import urllib3.util.retry
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException
from mlflow.utils.request_utils import _TRANSIENT_FAILURE_RESPONSE_CODES
from pydantic import BaseModel

from mlflow_hokusai_auth.cli import supplier
from mlflow_hokusai_auth.client.admin import HokusaiAuthClient
from mlflow_hokusai_auth.client.diagnose import doctor
from mlflow_hokusai_auth.core import browser, credentials, keys
from mlflow_hokusai_auth.core.denials import CODES, MAX_RETRY_AFTER, render
from mlflow_hokusai_auth.core.types import Credential, Deny, Request
from mlflow_hokusai_auth.server.web import (
    link_schemas,
    openapi,
    ownership_schemas,
    schemas,
    trust_schemas,
)
from mlflow_hokusai_auth.store.keys import LocalStore
from tests.client.test_admin import PREFIX, Api, Asked, answering
from tests.core.rows import each
from tests.standin import Standin

from .test_authorities import LONG, endpoint

GUIDE = (Path(__file__).parents[2] / "docs/supplier/giving-the-key.md").read_text()
EXPERIMENT = "/api/2.0/mlflow/experiments/get"
BASE = "/api/2.0/hokusai"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """A server that answers as it is told, and is MLflow's tracking server."""
    with answering() as running:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", running.uri)
        yield running


# Refusals


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds for which MLflow's client waits before it tries again, instead of the wait."""
    taken: list[float] = []
    clock = types.SimpleNamespace(**{**vars(time), "sleep": taken.append})
    monkeypatch.setattr(urllib3.util.retry, "time", clock)
    return taken


def refuse(api: Api, code: str, retry_after: float | None = None) -> None:
    refusal = render(Deny(code, "Do this.", retry_after=retry_after))
    headers = {name: value for name, value in refusal.headers if name != "Content-Length"}
    api.answers[f"GET {EXPERIMENT}"] = (refusal.status, refusal.body, headers)


RETRIED = [code for code in CODES if CODES[code].status in _TRANSIENT_FAILURE_RESPONSE_CODES]
FINAL = [code for code in CODES if code not in RETRIED]
#: Those that say when. MLflow's client sends a body that took too long again without being told.
WAIT = [code for code in RETRIED if code != "BODY_TIMEOUT"]


def test_the_user_reads_what_to_do(api: Api) -> None:
    def check(code: str) -> None:
        api.asked.clear()
        refuse(api, code)
        with pytest.raises(RestException) as caught:
            MlflowClient().get_experiment("0")
        assert "Do this." in str(caught.value) and code in str(caught.value)
        assert caught.value.error_code == CODES[code].error_code
        status = caught.value.get_http_status_code()
        assert status == CODES[code].status or code in ("BODY_TOO_LARGE", "HEADERS_TOO_LARGE")
        assert len(api.asked) == 1

    each(check, ((code,) for code in FINAL))


def test_client_retries_after_retry_after(
    api: Api, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")

    def check(code: str) -> None:
        api.asked.clear()
        naps.clear()
        refuse(api, code, 7)
        with pytest.raises(MlflowException):
            MlflowClient().get_experiment("0")
        assert len(api.asked) == 4 and naps[:3] == [7, 7, 7]

    each(check, ((code,) for code in WAIT))


def test_the_longest_wait_is_bearable(api: Api, naps: list[float]) -> None:
    refuse(api, "RATE_LIMITED", 1e9)
    with pytest.raises(MlflowException):
        MlflowClient().get_experiment("0")
    assert set(naps) == {MAX_RETRY_AFTER}


def test_only_temporary_refusals_have_retry_after() -> None:
    for code in CODES:
        told = "Retry-After" in dict(render(Deny(code, "")).headers)
        assert told is (code in WAIT), code


def test_doctor_has_a_fix_for_each_key_refusal_and_no_unknown_code() -> None:
    assert set(doctor.FIXES) <= set(CODES)
    # What a key can be refused with before it is known what it may do.
    about_keys = {code for code in CODES if code.startswith(("KEY_", "ADDRESS_", "RATE_", "AUTH"))}
    assert about_keys == set(doctor.FIXES)


# Where a key may be

#: Place in a request -> how it gets there: the environment of MLflow's client, or the guide's words.
WAYS: dict[str, tuple[dict[str, str], ...] | str] = {
    "X-API-Key": (
        {"HOKUSAI_API_KEY": "{}"},
        {"HOKUSAI_API_KEY": "{}", "MLFLOW_TRACKING_AUTH": "hokusai"},
    ),
    "Authorization": (
        {"MLFLOW_TRACKING_TOKEN": "{}"},
        {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "{}"},
    ),
    # MLflow's own clients of the gateway have it for this; `mlflow.gateway.constants`.
    "X-MLflow-Authorization": "gateway",
    credentials.QUERY_PLACE: "`?api_key=`",
    browser.PLACE: "/hokusai/login",
}


def test_every_place_of_a_key_has_a_way_into_it() -> None:
    assert set(WAYS) == {*credentials._PLACES.values(), credentials.QUERY_PLACE, browser.PLACE}
    for told in (way for way in WAYS.values() if isinstance(way, str)):
        assert told in GUIDE


@pytest.mark.parametrize(
    ("place", "variables"),
    [(place, one) for place, way in WAYS.items() if isinstance(way, tuple) for one in way],
)
def test_the_server_finds_the_key_where_mlflow_s_client_puts_it(
    place: str, variables: dict[str, str], api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = keys.generate("test")
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(key))
    with pytest.raises(MlflowException):
        MlflowClient().get_experiment("0")
    headers = tuple((n.encode(), v.encode("latin-1")) for n, v in api.last.headers.items())
    request = Request("GET", EXPERIMENT, b"", headers, "127.0.0.1")
    found = credentials.find(request, outbound=False, query_key=True)
    assert found == Credential(key, (place,))


def test_the_ways_without_python_are_as_documented() -> None:
    key = keys.generate("test")
    for name, value in (("X-API-Key", "KEY"), ("Authorization", "Bearer KEY")):
        assert f"`{name}: {value}`" in GUIDE
        headers = ((name.lower().encode(), value.replace("KEY", key).encode()),)
        request = Request("GET", EXPERIMENT, b"", headers, "127.0.0.1")
        found = credentials.find(request, outbound=False, query_key=True)
        assert found == Credential(key, (name,))


# The REST API

#: A field of each kind, as a server would give it.
_EXAMPLES: dict[Any, Any] = {str: "x", int: 1, float: 1.0, bool: True, list: []}


def example(model: type[BaseModel]) -> dict[str, Any]:
    """An answer with every field of `model`, and no other."""

    def of(kind: Any) -> Any:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return example(kind)
        if typing.get_origin(kind) is list:
            return [of(typing.get_args(kind)[0])]
        if typing.get_args(kind):
            return of(typing.get_args(kind)[0])
        return _EXAMPLES[kind]

    return {name: of(field.annotation) for name, field in model.model_fields.items()}


#: Method of the client -> a call that uses every parameter of it.
CALLS: dict[str, Callable[[HokusaiAuthClient], Any]] = {
    "whoami": lambda client: client.whoami(),
    "create_key": lambda client: client.create_key(
        "a", ["model:read"], name="n", environment="test", expires_in=1, networks=["::1"],
        rate_limit_per_hour=1, note="x", models=["a*"], no_delete=True,
    ),
    "import_key": lambda client: client.import_key(
        keys.generate("test"), "a", ["model:read"], name="n", expires_in=1, networks=["::1"],
        rate_limit_per_hour=1, note="x", models=["a*"], no_delete=True,
    ),
    "list_keys": lambda client: client.list_keys(
        owner="a", environment="test", state="active", query="q", page_token="t",
        scope="read", expires_within=1, unused_for=1, order_by="owner",
    ),
    "find_keys": lambda client: client.find_keys("abcd"),
    "get_key": lambda client: client.get_key("key_1"),
    "edit_key": lambda client: client.edit_key(
        "key_1", owner="a", name="n", scopes=["model:read"], expires_in=1, networks=["::1"],
        rate_limit_per_hour=1, note="x", models=["a*"], no_delete=True,
    ),
    "rotate_key": lambda client: client.rotate_key("key_1", overlap=1),
    "revoke_key": lambda client: client.revoke_key("key_1", wait=True, force=True),
    "revoke_keys": lambda client: client.revoke_keys("a", apply=True, wait=True, force=True),
    "export_keys": lambda client: list(client.export_keys()),
    "list_owners": lambda client: client.list_owners(
        kind="model", owner="a", unowned=True, max_results=1, page_token="t",
    ),
    "owners_of": lambda client: client.owners_of("m"),
    "assign_owner": lambda client: client.assign_owner(
        owner="a", models="m*", experiments="e*", names=[{"kind": "model", "name": "m"}], apply=True,
        keep_grants=True, from_owner="b",
    ),
    "release_name": lambda client: client.release_name("m"),
    "check_owners": lambda client: client.check_owners(),
    "add_grant": lambda client: client.add_grant(
        grantee="b", pattern="m*", level="contribute", expires_in=1,
    ),
    "list_grants": lambda client: client.list_grants(max_results=1, page_token="t"),
    "remove_grant": lambda client: client.remove_grant("key_1"),
    "add_prefix": lambda client: client.add_prefix(prefix="a-", owner="a", kind="model"),
    "list_prefixes": lambda client: client.list_prefixes(),
    "remove_prefix": lambda client: client.remove_prefix(prefix="a-", kind="model"),
    "create_link": lambda client: client.create_link(
        key={"owner": "a", "scopes": ["model:read"]}, replaces="key_1", overlap=1, expires_in=1,
    ),
    "list_links": lambda client: client.list_links(),
    "revoke_link": lambda client: client.revoke_link("key_1"),
    "add_trust": lambda client: client.add_trust(
        "a", ["model:read"], github="a/b", gitlab="a/b", issuer="https://i", workflow="w.yml",
        environment="e", claims={"sub": "x"}, single_use=True, ttl=60.0, models=["a*"],
        no_delete=True, jwks={"keys": []},
    ),
    "list_trusts": lambda client: client.list_trusts(),
    "edit_trust": lambda client: client.edit_trust(
        "key_1", scopes=["model:read"], models=["a*"], no_delete=True, ttl=60.0, jwks=None,
        forget_ids=True,
    ),
    "remove_trust": lambda client: client.remove_trust("key_1"),
    "isolation": lambda client: client.isolation(),
    "set_isolation": lambda client: client.set_isolation("writes"),
    "status": lambda client: client.status(),
    "list_audit": lambda client: client.list_audit(
        since=1.5, event="key.", key_id="key_1", actor="a", after=1, max_results=1, page_token="2",
    ),
    "follow_audit": lambda client: next(client.follow_audit(event="e", key_id="k", actor="a")),
}  # fmt: skip


def test_every_method_of_the_client_is_called_here() -> None:
    assert {name for name in vars(HokusaiAuthClient) if not name.startswith("_")} == set(CALLS)


def described(asked: Asked) -> dict[str, Any]:
    """The description of a request, with the parameters of its path."""
    path = asked.path.removeprefix(PREFIX)
    paths = openapi.document()["paths"]
    fits = [one for one in paths if re.fullmatch(re.sub(r"\{\w+\}", "key_[^/]+", one), path)]
    assert len(fits) == 1, f"{path} is not described"
    operation: dict[str, Any] = paths[fits[0]][asked.method.lower()]
    return operation


def schema(content: dict[str, Any]) -> dict[str, Any]:
    """The model that a body is described by; {} for one that is free."""
    reference = content["content"].get("application/json", {}).get("schema", {}).get("$ref", "")
    models: dict[str, Any] = openapi.document()["components"]["schemas"]
    found: dict[str, Any] = models[reference.rpartition("/")[2]] if reference else {}
    return found


def test_what_the_client_sends_is_described(api: Api) -> None:
    def check(name: str) -> None:
        api.asked.clear()
        # Found by what is refused: only the request counts here.
        with pytest.raises(MlflowException):
            CALLS[name](HokusaiAuthClient(api.uri))
        (asked,) = api.asked
        operation = described(asked)
        parameters = operation.get("parameters", ())
        query = {one["name"] for one in parameters if one["in"] == "query"}
        assert set(asked.query) <= query
        if name.startswith(("list_", "owners_of", "remove_prefix")):
            assert set(asked.query) == query
        if "requestBody" in operation:
            body = schema(operation["requestBody"])
            assert set(asked.body) == set(body["properties"]), "every field, and no other"
        else:
            assert asked.body is None

    each(check, ((name,) for name in CALLS))


def test_what_the_client_reads_is_described(api: Api) -> None:
    def check(name: str) -> None:
        api.answers.clear()
        with pytest.raises(MlflowException):
            CALLS[name](HokusaiAuthClient(api.uri))
        asked = api.last
        responses = described(asked)["responses"]
        ((status, good),) = [(code, one) for code, one in responses.items() if code[0] == "2"]
        title = schema(good)["title"]
        places = (schemas, ownership_schemas, trust_schemas, link_schemas)
        (model,) = {getattr(place, title) for place in places if hasattr(place, title)}
        answer = example(model)
        api.answers[f"{asked.method} {asked.path.removeprefix(PREFIX)}"] = (int(status), answer)
        found = CALLS[name](HokusaiAuthClient(api.uri))
        if isinstance(found, list):
            token = answer.pop("next_page_token", None)
            assert getattr(found, "total", None) == answer.pop("total", None)
            assert [list(found)] == list(answer.values()) and getattr(found, "token", None) == token
        else:
            assert found == answer

    each(check, ((name,) for name in CALLS if name not in ("export_keys", "follow_audit")))


class _Read(dict[str, Any]):
    """A dictionary that knows which of its names were asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)


def test_whoami_has_all_that_the_commands_read() -> None:
    answer = _Read(example(schemas.Identity))
    answer["rate_limit"] = limit = _Read(example(schemas.LimitLeft))
    # `identity.examine` adds these to the answer.
    ours = {"server": "", "key_from": "", "ends_in": 1.0, "owned": {}, "grants": []}
    answer.update(ours)
    supplier._lines(answer)
    results = doctor.Results(mlflow.get_tracking_uri(), identity=answer)
    for look in (doctor.check_scope, doctor.check_expiry):
        look(results)
    assert list(doctor.default_experiment(results))
    assert answer.asked - ours.keys() == set(schemas.Identity.model_fields)
    assert limit.asked == set(schemas.LimitLeft.model_fields)


# The auth service's contract

#: The fields of an answer with status 200, as the service's documents have them.
FIELDS = {
    "is_valid": bool,
    "key_id": str,
    "user_id": str,
    "service_id": str,
    "scopes": list,
    "rate_limit_per_hour": (int, type(None)),
    "billing_plan": (str, type(None)),
    "monthly_prediction_limit": (int, type(None)),
    "error": type(None),
}
CLIENT_IP = "192.0.2.7"


@pytest.fixture
def both(tmp_path: Path) -> Iterator[dict[str, dict[str, tuple[int, dict[str, Any]]]]]:
    """Case -> what the stand-in and our endpoint answer to it."""
    store = LocalStore(f"sqlite:///{tmp_path}/keys.db")
    store.migrate()
    with Standin() as standin, endpoint(store) as url:
        ours, theirs = _ours(store), _theirs(standin)
        answers = {case: {} for case in ours}
        for name, origin, made in (("ours", url, ours), ("theirs", standin.url, theirs)):
            for case, key in made.items():
                answers[case][name] = validate(origin, key)
        yield answers


def _ours(store: LocalStore) -> dict[str, str]:
    def make(**fields: Any) -> tuple[str, str]:
        record, key = store.create(owner="ACME", scopes=["model:write"], **fields)
        return record.key_id, key

    revoked, key = make()
    store.revoke(revoked, force=True)
    return {
        "good": make()[1],
        "from its network": make(networks=["192.0.2.0/24"])[1],
        "from another network": make(networks=["198.51.100.0/24"])[1],
        "expired": make(expires_at=1.0)[1],
        "revoked": key,
        "unknown": keys.generate("test"),
    }


def _theirs(standin: Standin) -> dict[str, str]:
    grant: dict[str, Any] = {"user_id": "ACME", "scopes": ["model:write"]}
    return {
        "good": standin.add(**grant),
        "from its network": standin.add(**grant, addresses=["192.0.2.0/24"]),
        "from another network": standin.add(**grant, addresses=["198.51.100.0/24"]),
        "expired": standin.add(**grant, state="expired"),
        "revoked": standin.add(**grant, state="revoked"),
        "unknown": keys.generate("test"),
    }


def validate(origin: str, key: str) -> tuple[int, dict[str, Any]]:
    """The answer to what our client of the service sends."""
    parts = urlsplit(origin)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=LONG)
    body = json.dumps({"service_id": "platform", "client_ip": CLIENT_IP})
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", "/api/v1/keys/validate", body, headers)
    response = connection.getresponse()
    answer: dict[str, Any] = json.load(response)
    connection.close()
    return response.status, answer


def test_the_stand_in_and_our_endpoint_answer_alike(
    both: dict[str, dict[str, tuple[int, dict[str, Any]]]],
) -> None:
    good = {"good", "from its network"}
    for case, answers in both.items():
        for who, (status, answer) in answers.items():
            assert status == (200 if case in good else 401), (case, who)
            assert answer.get("is_valid", False) is (case in good), (case, who)
            if case not in good:
                # For those who read no more than that there was an error.
                assert isinstance(answer["error"], str) and answer["error"], (case, who)
                continue
            assert set(FIELDS) <= set(answer), (case, who)
            assert all(isinstance(answer[name], kind) for name, kind in FIELDS.items()), (case, who)
            same = ("is_valid", "user_id", "service_id", "scopes", "error")
            assert [answer[name] for name in same] == [
                True, "ACME", "platform", ["model:write"], None,
            ]  # fmt: skip

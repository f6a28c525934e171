"""The REST API in process, on a real store: keys, mistakes, and reports of leaks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flask
import pytest
import time_machine
from werkzeug.test import TestResponse

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.core.lifetimes import UNLIMITED, Lifetimes
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.web import api, keys_api, leak_reports, schemas
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.links import Links
from tests.server.sentinel import make_gate
from tests.server.web import test_leak_reports as signed

ADMIN = Principal("key_admin", "operator", frozenset({"mlflow:admin"}))
ACME = {"owner": "ACME", "scopes": ["model:write"]}


@dataclass
class Api:
    """The app with the API, and its store."""

    store: LocalStore
    app: flask.Flask

    def ask(
        self, line: str, body: object = None, caller: Principal | None = ADMIN, **headers: str
    ) -> TestResponse:
        method, path = line.split()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        token = callers.current.set(callers.Caller(caller, "192.0.2.7", "request-1"))
        try:
            return self.app.test_client().open(
                f"/api/2.0/hokusai{path}",
                method=method,
                data=None if body is None else data,
                headers={name.replace("_", "-"): value for name, value in headers.items()},
            )
        finally:
            callers.current.reset(token)

    def audited(self) -> Mapping[str, Any]:
        """The last event of the audit log."""
        return self.store.database.audited(limit=1)[0]


def served(
    folder: Path,
    leak_keys: Any = signed.KEYS,
    isolated: Callable[[], bool] = lambda: False,
    lifetimes: Lifetimes = UNLIMITED,
) -> Api:
    store = LocalStore(f"sqlite:///{folder}/keys.db")
    store.migrate()
    app = flask.Flask("mlflow")
    app.register_blueprint(keys_api.blueprint(store, make_gate(), leak_keys, isolated, lifetimes))
    app.register_blueprint(api.unknown_paths())
    return Api(store, app)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Api]:
    yield served(tmp_path)


MISTAKES: list[tuple[str, object, int, str]] = [
    ("GET /keys?max_results=0", None, 400, "from 1 to 1000"),
    ("GET /keys?ownr=a", None, 400, "unknown parameter 'ownr'; known: environment, "),
    ("GET /keys?ownr=a", None, 400, "Did you mean `owner`?"),
    ("DELETE /keys/key_0?wiat=true", None, 400, "Did you mean `wait`?"),
    ("GET /whoami?x=1", None, 400, "known: none"),
    ("GET /nothing", None, 404, "There is no /api/2.0/hokusai/nothing"),
    ("GET /", None, 404, "There is no /api/2.0/hokusai/"),
    ("PUT /keys", None, 404, "takes GET, HEAD, POST only"),
    ("GET /keys?max_results=x", None, 400, "must be a whole number"),
    ("GET /keys?max_results=%D9%A3", None, 400, "must be a whole number"),
    ("GET /keys?max_results=" + "9" * 5000, None, 400, "max_results"),
    ("GET /keys?max_results=" + "9" * 10, None, 400, "must be a whole number"),
    ("GET /keys?query=a%00b", None, 400, "'query' must be printable"),
    ("GET /keys?query=" + "a" * 256, None, 400, "'query' must be printable"),
    ("GET /keys?state=lost", None, 400, "state"),
    ("GET /keys?page_token=x", None, 400, "page_token"),
    ("GET /keys?page_token=" + "A" * 513, None, 400, "'page_token' must be printable"),
    ("GET /keys?scope=raed", None, 400, "scope must be one of"),
    ("GET /keys?order_by=digest", None, 400, "order_by must begin with one of"),
    ("GET /keys?expires_within=-1", None, 400, "expires_within must be a whole number"),
    ("GET /keys?unused_for=%D9%A3", None, 400, "unused_for must be a whole number"),
    ("GET /keys/key_0", None, 404, "no key 'key_0'"),
    ("DELETE /keys/key_0?wait=yes", None, 400, "wait must be true or false"),
    ("DELETE /keys/key_0?force=", None, 400, "force must be true or false"),
    ("POST /keys", b"{", 400, "Send a JSON object"),
    ("POST /keys", [], 400, "Send a JSON object"),
    ("POST /keys", {}, 400, "owner: "),
    ("POST /keys", {**ACME, "owner": " "}, 400, "must name the owner of the key"),
    ("POST /keys", {**ACME, "owner": "a\x07"}, 400, "must be printable text"),
    ("POST /keys", {**ACME, "name": "a\nb"}, 400, "must be printable text"),
    ("POST /keys", {**ACME, "note": "a\x07"}, 400, "must be printable text"),
    ("POST /keys", {**ACME, "scopes": ["root"]}, 400, "unknown scope 'root'; known: "),
    ("POST /keys", {**ACME, "environment": "jobs"}, 400, "must be one of "),
    ("POST /keys", {**ACME, "networks": ["x"]}, 400, "x is no network: give an address"),
    (
        "POST /keys",
        {**ACME, "models": ["a*b"]},
        400,
        "a*b is neither a name nor a beginning and `*`, such as `acme-*`: `*` may stand only",
    ),
    ("POST /keys", {**ACME, "models": [" "]}, 400, "'' is neither a name"),
    ("POST /keys", {**ACME, "models": ["\ud800"]}, 400, "'\\ud800' is neither"),
    ("POST /keys", {**ACME, "models": ["a\0"]}, 400, "it has a control character"),
    ("POST /keys", {**ACME, "models": "acme-*"}, 400, "models: "),
    ("POST /keys", {**ACME, "models": ["a"] * 65}, 400, "models: "),
    ("POST /keys", {**ACME, "no_delete": "true"}, 400, "no_delete: "),
    ("POST /keys", {**ACME, "scopes": ["mlflow:write"], "no_delete": True}, 400, "never narrowed"),
    ("POST /keys", {**ACME, "scopes": ["admin"], "models": ["a"]}, 400, "never narrowed: admin."),
    ("POST /keys", {**ACME, "colour": "red"}, 400, "colour: unknown; known: owner, "),
    ("POST /keys/import", {**ACME, "key": "hk_live_short"}, 400, "can be imported"),
    ("PATCH /keys/key_0", {}, 400, "Nothing to change. Known: owner, "),
    ("PATCH /keys/key_0", {"name": "x"}, 404, "no key 'key_0'"),
    ("POST /keys/key_0/rotate", {"overlap": -1}, 400, "overlap: "),
]


def test_mistakes_are_explained(here: Api) -> None:
    wrong = []
    for line, body, status, says in MISTAKES:
        answer = here.ask(line, body)
        reply = answer.json or {}
        kept = answer.headers["Cache-Control"] == "no-store" and not here.store.page()[0]
        if answer.status_code != status or says not in reply.get("message", ""):
            wrong.append(f"{line} {body}: {answer.status_code} {answer.text}, not {status} {says}")
        elif not reply["error_code"] or not kept:
            wrong.append(f"{line} {body}: {reply} {answer.headers} {here.store.page()}")
    assert not wrong, "\n".join(wrong)


def test_mistake_names_the_wrong_fields(here: Api) -> None:
    """The pages say what is wrong beside the field."""
    stored = "hk_live_" + "a1B2" * 8
    assert here.ask("POST /keys/import", {**ACME, "key": stored}).status_code == 201
    rows: list[tuple[str, dict[str, Any], dict[str, str]]] = [
        (
            "",
            {"owner": " ", "networks": ["10.0.0.1", "10.0.0.0/33", "x"], "colour": "red"},
            {
                "owner": "must name the owner of the key",
                "networks": "10.0.0.0/33 is no network: give",
            },
        ),
        ("", {"owner": "acme"}, {"owner": "The owner 'ACME' exists"}),
        ("", {"scopes": ["mlflow:read"], "models": ["a"]}, {"models": "models and no_delete"}),
        ("", {"scopes": ["mlflow:read"], "no_delete": True}, {"no_delete": "models and no_delete"}),
        ("/import", {"key": "hk_live_short"}, {"key": "This is not a key that can be imported"}),
        ("/import", {"key": stored}, {"key": "This key is in the store already"}),
    ]
    for path, body, expected in rows:
        reply = here.ask(f"POST /keys{path}", {**ACME, **body}).json
        assert reply is not None and reply["fields"].keys() == expected.keys(), (body, reply)
        for name, says in expected.items():
            assert reply["fields"][name].startswith(says), (body, reply)
    reply = here.ask("GET /keys/key_0").json
    assert reply is not None and "fields" not in reply


def test_key_is_made_changed_and_shown(here: Api) -> None:
    fields = {"name": " a ", "note": "b\nc", "networks": ["192.0.2.1"], "rate_limit_per_hour": 5}
    fields |= {"models": ["acme-* "], "no_delete": True}
    answer = here.ask("POST /keys", {**ACME, **fields, "expires_in": 60, "environment": "test"})
    made = answer.json
    assert answer.status_code == 201 and made is not None
    assert keys.problem(key := made.pop("key")) is None
    assert (
        made.items()
        >= {
            **ACME,
            "name": "a",
            "note": "b\nc",
            "networks": ["192.0.2.1/32"],
            "rate_limit_per_hour": 5,
            "models": ["acme-*"],
            "no_delete": True,
            "environment": "test",
            "state": "active",
        }.items()
    )
    assert abs(made["expires_at"] - time.time() - 60) < 30
    assert here.audited()["event"] == "key.created" and here.audited()["actor"] == "operator"
    path = f"/keys/{made['key_id']}"
    changed = here.ask(f"PATCH {path}", {"name": "b", "networks": [], "expires_in": None}).json
    assert changed == {**made, "name": "b", "networks": [], "expires_at": None}
    rotated = here.ask(f"POST {path}/rotate").json
    assert rotated is not None and (rotated["models"], rotated["no_delete"]) == (["acme-*"], True)
    path = f"/keys/{rotated['key_id']}"
    refused = here.ask(f"PATCH {path}", {"scopes": ["mlflow:write"]})
    assert refused.status_code == 400 and "never narrowed" in refused.text
    changed = here.ask(f"PATCH {path}", {"models": [], "no_delete": False}).json
    assert changed is not None and (changed["models"], changed["no_delete"]) == ([], False)
    assert here.audited()["detail"] == {"models": [], "no_delete": False}
    assert here.ask(f"GET {path}").json == {**changed, "uses_by_hour": [0] * 24}
    for query, count in (
        ("", 2),
        ("?owner=ACME&query=&max_results=", 2),
        ("?owner=", 2),
        ("?owner=x", 0),
        ("?state=revoked", 0),
        ("?state=valid&scope=model:write&order_by=state+DESC", 2),
        ("?expires_within=86400", 1),
        ("?unused_for=3600", 0),
    ):
        page = here.ask(f"GET /keys{query}").json
        assert page is not None and len(page["keys"]) == page["total"] == count, query
    first = here.ask("GET /keys?max_results=1&order_by=expires_at").json
    assert first is not None and (len(first["keys"]), first["total"]) == (1, 2)
    path = f"GET /keys?order_by=expires_at&page_token={first['next_page_token']}"
    second = here.ask(path).json
    assert second is not None and len(second["keys"]) == 1
    assert second["keys"] != first["keys"] and second["next_page_token"] is None
    assert here.ask("POST /keys/import", {**ACME, "key": key}).status_code in (400, 409)


def test_existing_key_is_imported_once(here: Api) -> None:
    old = "hk_live_" + "a1B2" * 8
    assert here.ask("POST /keys/import", {**ACME, "key": f" {old}\n"}).status_code == 201
    assert here.store.find(old) is not None
    assert here.ask("POST /keys/import", {**ACME, "key": old}).status_code == 409


def test_owner_that_differs_in_case_only_is_a_conflict(here: Api) -> None:
    made = here.ask("POST /keys", ACME).json
    other = here.ask("POST /keys", {**ACME, "owner": "Globex"}).json
    assert made is not None and other is not None
    for line, body in (
        ("POST /keys", {**ACME, "owner": "acme"}),
        ("POST /keys/import", {**ACME, "owner": "acme", "key": "hk_live_" + "a1B2" * 8}),
        (f"PATCH /keys/{other['key_id']}", {"owner": "acme"}),
    ):
        answer = here.ask(line, body)
        assert answer.status_code == 409 and answer.json is not None, line
        assert answer.json["error_code"] == "RESOURCE_CONFLICT", line
        assert "'ACME' exists" in answer.json["message"], line
    assert here.ask("POST /keys", ACME).status_code == 201


def test_export_has_all_keys_or_an_error_status(here: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    assert here.ask("GET /keys/export").text == ""
    made = [here.store.create(**ACME)[0].key_id for _ in range(3)]  # type: ignore[arg-type]
    answer = here.ask("GET /keys/export")
    assert {json.loads(line)["key_id"] for line in answer.text.splitlines()} == set(made)
    assert "hokusai-keys.ndjson" in answer.headers["Content-Disposition"]

    def fail(*_: object, **__: object) -> Any:
        raise AuthorityUnavailable("down")

    monkeypatch.setattr(here.store, "_places", fail)
    failed = here.ask("GET /keys/export")
    assert failed.status_code == 503 and failed.json is not None
    assert failed.json["error_code"] == "TEMPORARILY_UNAVAILABLE"


def test_key_may_rotate_itself_and_no_other(here: Api) -> None:
    own, other = (here.store.create(**ACME)[0] for _ in range(2))  # type: ignore[arg-type]
    caller = Principal(own.key_id, own.owner, frozenset(own.scopes))
    assert here.ask(f"POST /keys/{other.key_id}/rotate", caller=caller).status_code == 403
    assert here.ask(f"POST /keys/{own.key_id}/rotate", b"[]", caller).status_code == 400
    answer = here.ask(f"POST /keys/{own.key_id}/rotate", {"overlap": 30}, caller)
    assert answer.status_code == 201 and answer.json is not None
    assert here.store.find(answer.json["key"]) is not None
    assert abs(answer.json["replaces"]["expires_at"] - time.time() - 30) < 20
    assert here.ask(f"POST /keys/{own.key_id}/rotate", caller=caller).status_code == 409
    assert here.ask(f"POST /keys/{other.key_id}/rotate").status_code == 201


def test_key_without_an_expiry_gets_the_default(tmp_path: Path) -> None:
    api = served(tmp_path, lifetimes=Lifetimes(default=3600.0))
    for given, lives in (({}, 3600), ({"expires_in": 7200}, 7200), ({"expires_in": None}, None)):
        made = api.ask("POST /keys", {**ACME, **given}).json
        assert made is not None
        ends = None if lives is None else pytest.approx(made["created_at"] + lives, abs=5)
        assert made["expires_at"] == ends, given
    # Imports, and keys that exist, are left alone.
    imported = api.ask("POST /keys/import", {**ACME, "key": keys.generate()}).json
    assert imported is not None and imported["expires_at"] is None
    edited = api.ask(f"PATCH /keys/{imported['key_id']}", {"name": "x"}).json
    assert edited is not None and edited["expires_at"] is None


def test_no_new_expiry_is_beyond_the_maximum(tmp_path: Path) -> None:
    api = served(tmp_path, lifetimes=Lifetimes(default=3600.0, longest=2 * 86400.0))
    own = api.store.create(**ACME)[0]  # type: ignore[arg-type]
    for given, says in (
        ({"expires_in": 3 * 86400}, "this is too long: keys of this server live 2 days (172800 s)"),
        ({"expires_in": None}, "a key must end: keys of this server live 2 days (172800 s)"),
    ):
        for line, body in ((f"PATCH /keys/{own.key_id}", {}), ("POST /keys", ACME)):
            answer = api.ask(line, {**body, **given})
            assert answer.status_code == 400 and answer.json is not None, line
            assert says in answer.json["message"] and "KEY_LIFETIME_MAX" in answer.json["message"]
    assert api.store.get(own.key_id).expires_at is None
    assert api.ask(f"PATCH /keys/{own.key_id}", {"name": "x"}).status_code == 200
    assert api.ask("POST /keys", {**ACME, "expires_in": 2 * 86400}).status_code == 201
    imported = {**ACME, "key": keys.generate(), "expires_in": 3 * 86400}
    assert api.ask("POST /keys/import", imported).status_code == 201
    rotated = api.ask(f"POST /keys/{own.key_id}/rotate").json
    assert rotated is not None
    assert rotated["expires_at"] == pytest.approx(time.time() + 2 * 86400, abs=20)


def test_rotation_keeps_the_length_but_no_key_puts_off_its_own_end(tmp_path: Path) -> None:
    for longest, renewed in ((None, 1500.0), (1200.0, 1200.0)):
        folder = tmp_path / str(longest)
        folder.mkdir()
        api = served(folder, lifetimes=Lifetimes(longest=longest))
        with time_machine.travel(1_000_000, tick=False) as clock:
            own, other = (
                api.store.create(**ACME, expires_at=1_001_500.0)[0]  # type: ignore[arg-type]
                for _ in range(2)
            )
            clock.shift(600)
            answer = api.ask(f"POST /keys/{other.key_id}/rotate").json
            assert answer is not None and answer["expires_at"] == 1_000_600 + renewed, longest
            caller = Principal(own.key_id, own.owner, frozenset(own.scopes))
            answer = api.ask(f"POST /keys/{own.key_id}/rotate", caller=caller).json
            assert answer is not None and answer["expires_at"] == 1_001_500, longest


def test_forms_offer_what_is_allowed() -> None:
    day = 86400.0
    for lifetimes, days, chosen, never, most in (
        (UNLIMITED, [30, 90, 365], None, True, 7300),
        (Lifetimes(365 * day), [30, 90, 365], 365, True, 7300),
        (Lifetimes(7 * day), [7, 30, 90, 365], 7, True, 7300),
        (Lifetimes(365 * day, 90 * day), [30, 90], 90, False, 90),
        (Lifetimes(None, 45 * day), [30, 45], 45, False, 45),
        (Lifetimes(7 * day, day / 2), [0.5], 0.5, False, 0),
    ):
        offered = keys_api.expiry_choices(lifetimes)
        assert [number for number, _ in offered["days"]] == days, lifetimes
        assert (offered["chosen"], offered["never"], offered["most"]) == (chosen, never, most)


def test_body_is_read_with_any_content_type(here: Api) -> None:
    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
        own, key = here.store.create(**ACME)  # type: ignore[arg-type]
        path = f"POST /keys/{own.key_id}/rotate"
        assert here.ask(path, b'{"overlapp": 0}', content_type=kind).status_code == 400, kind
        assert here.ask(path, b'{"overlap": 0}', content_type=kind).status_code == 201, kind
        found = here.store.find(key)
        assert found is not None and found.state(time.time()) == "expired"


def test_key_does_not_evade_its_rate_limit_by_rotating_itself(here: Api) -> None:
    own, _ = here.store.create(**ACME, rate_limit_per_hour=3)  # type: ignore[arg-type]
    caller = Principal(own.key_id, own.owner, frozenset(own.scopes), rate_limit_per_hour=3)
    path = f"POST /keys/{own.key_id}/rotate"
    refused = here.ask(path, caller=caller)
    assert refused.status_code == 409 and refused.json is not None
    assert "once it is an hour old" in refused.json["message"]
    with time_machine.travel(time.time() + keys_api.MIN_LIMITED_AGE + 1) as clock:
        made = here.ask(path, {"overlap": 2 * keys_api.MIN_LIMITED_AGE}, caller).json
        assert made is not None
        caller = replace(caller, key_id=made["key_id"])
        path = f"POST /keys/{made['key_id']}/rotate"
        # Otherwise the number of live keys would grow by one each hour.
        clock.shift(keys_api.MIN_LIMITED_AGE + 1)
        refused = here.ask(path, caller=caller)
        assert refused.status_code == 409 and "has ended" in refused.text
        clock.shift(keys_api.MIN_LIMITED_AGE)
        assert here.ask(path, caller=caller).status_code == 201
    # An administrator could make a key without a limit anyway, so may rotate any.
    admin, _ = here.store.create(owner="o", scopes=["mlflow:admin"], rate_limit_per_hour=3)
    manages = Principal(admin.key_id, "o", frozenset(admin.scopes), rate_limit_per_hour=3)
    for caller in (ADMIN, manages):
        fresh, _ = here.store.create(**ACME, rate_limit_per_hour=3)  # type: ignore[arg-type]
        path = f"POST /keys/{fresh.key_id}/rotate"
        assert here.ask(path, caller=caller).status_code == 201


def test_key_is_revoked_and_the_last_administrator_only_by_force(
    here: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(keys_api, "time", SimpleNamespace(sleep=waited.append))
    record, _ = here.store.create(owner="root", scopes=["mlflow:admin"])
    path = f"DELETE /keys/{record.key_id}"
    refused = here.ask(f"{path}?force=false")
    assert refused.status_code == 409 and refused.json is not None
    assert refused.json["error_code"] == "RESOURCE_CONFLICT"
    answer = here.ask(f"{path}?force=true")
    assert answer.json is not None and answer.json["state"] == "revoked"
    assert waited == []
    assert here.ask(f"{path}?wait=true").json == answer.json
    assert waited == [keys_api.REVOKED_EVERYWHERE]


def test_which_key_is_this(here: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    record, key = here.store.create(owner="ACME", scopes=["model:read"])
    for text in (key, f" {key}\n", key[-4:]):
        found = here.ask("POST /keys/find", {"key": text}).json
        assert found == {"keys": [schemas.describe(record)]}, text
        assert key not in json.dumps(found) and key not in caplog.text
    retyped = key[:-1] + ("0" if key[-1] != "0" else "1")
    assert here.ask("POST /keys/find", {"key": "hk_live_" + "a1B2" * 8}).json == {"keys": []}
    for wrong in (
        {"key": retyped},
        {"key": ""},
        {key: "x"},
        {"key": "two words"},
        {"key": key * 9},
    ):
        answer = here.ask("POST /keys/find", wrong)
        assert answer.status_code == 400, wrong
        assert key[8:-1] not in answer.text and key[8:-1] not in caplog.text, wrong


def test_all_keys_of_an_owner_are_revoked_if_it_is_said(
    here: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(keys_api, "time", SimpleNamespace(sleep=waited.append))
    ids = [here.store.create(owner="ACME", scopes=["model:read"])[0].key_id for _ in range(2)]
    links = Links(here.store.database)
    link_id = links.create(owner="ACME", scopes=["model:read"])[0].link_id
    plan = here.ask("POST /keys/revoke", {"owner": "ACME"}).json
    assert plan is not None and plan["links"] == [link_id] and len(links.waiting_of("ACME")) == 1
    assert plan is not None and not plan["applied"]
    assert [one["key_id"] for one in plan["keys"]] == ids[::-1]
    assert {one["state"] for one in plan["keys"]} == {"active"} and waited == []
    body = {"owner": "ACME", "apply": True, "wait": True}
    done = here.ask("POST /keys/revoke", body).json
    assert done is not None and {one["state"] for one in done["keys"]} == {"revoked"}
    assert waited == [keys_api.REVOKED_EVERYWHERE]
    assert done["links"] == [link_id] and links.waiting_of("ACME") == []
    links.create(owner="NEWCOMER", scopes=["model:read"])
    newcomer = here.ask("POST /keys/revoke", {"owner": "NEWCOMER"}).json
    assert newcomer is not None and len(newcomer["links"]) == 1
    (event, _) = here.store.database.audited(event="key.revoked")
    assert event["actor"] == ADMIN.owner
    assert here.ask("POST /keys/revoke", {"owner": "GLOBEX"}).status_code == 404
    for wrong in ({}, {"owner": ""}, {"owner": "ACME", "apply": "yes"}, {"owner": "a\0"}):
        assert here.ask("POST /keys/revoke", wrong).status_code == 400, wrong


def test_whoami_describes_the_caller(here: Api) -> None:
    record, _ = here.store.create(**ACME, name="laptop")  # type: ignore[arg-type]
    caller = Principal(
        record.key_id,
        "ACME",
        frozenset(record.scopes),
        rate_limit_per_hour=9,
        networks=("::1",),
        models=("acme-*",),
        no_delete=True,
    )
    reply = here.ask("GET /whoami", caller=caller).json
    assert reply is not None
    assert (reply["key_id"], reply["name"], reply["networks"]) == (record.key_id, "laptop", ["::1"])
    assert reply["rate_limit"]["limit"] == reply["rate_limit"]["remaining"] == 9
    assert (reply["models"], reply["no_delete"]) == (["acme-*"], True)
    # The store does not know a key of the auth service.
    reply = here.ask("GET /whoami").json
    assert reply is not None and reply["name"] == "" and reply["rate_limit"] is None


def test_whoami_names_a_default_experiment_for_confined_keys_while_they_are(tmp_path: Path) -> None:
    now = ["off"]
    api = served(tmp_path, isolated=lambda: now[0] == "writes")

    def named(owner_id: str, *scopes: str) -> str | None:
        # The display name doesn't count.
        caller = Principal("key_1", "Shown", frozenset(scopes), owner_id=owner_id)
        reply = api.ask("GET /whoami", caller=caller).json
        assert reply is not None and "default_experiment" in reply
        name: str | None = reply["default_experiment"]
        return name

    confined = ("model:write",), ("model:write", "mlflow:access"), ("model:read",), ()
    staff = ("mlflow:admin",), ("mlflow:write",)
    for scopes in confined + staff:
        assert named("ACME", *scopes) is None, scopes
    now[0] = "writes"
    for scopes in confined:
        assert named("ACME", *scopes) == "default:ACME", scopes
        assert named("", *scopes) is None, scopes
    for scopes in staff:
        assert named("ACME", *scopes) is None, scopes
    now[0] = "observe"
    assert named("ACME", *confined[0]) is None


class TestReportsOfLeaks:
    def report(self, api: Api, *tokens: str, key: Any = signed.SIGNER, by: str = "one") -> Any:
        rest = {"type": "hokusai", "url": "https://a.example", "source": "commit"}
        body = json.dumps([{"token": token, **rest} for token in tokens]).encode()
        return self.send(api, body, key=key, by=by)

    def send(self, api: Api, body: bytes, key: Any = signed.SIGNER, by: str = "one") -> Any:
        headers = {
            leak_reports.IDENTIFIER_HEADER: by,
            leak_reports.SIGNATURE_HEADER: signed.sign(body, key),
        }
        return api.ask("POST /keys/leaked", body, None, **headers)

    def test_leaked_key_is_revoked_at_once(self, here: Api) -> None:
        # The last key that may manage keys is revoked, too.
        record, key = here.store.create(owner="root", scopes=["mlflow:admin"])
        retyped = key[:-1] + ("0" if key[-1] != "0" else "1")
        elsewhere = "hk_live_" + "a1B2" * 8
        answer = self.report(here, key, retyped, elsewhere)
        assert answer.status_code == 200
        # The reply omits `elsewhere`, which may be a key of the auth service.
        assert [(one["token_hash"], one["label"]) for one in answer.json] == [
            (keys.digest(key), "true_positive"),
            (keys.digest(retyped), "false_positive"),
        ]
        assert here.store.get(record.key_id).revoked_at is not None
        audited = here.audited()
        assert (audited["event"], audited["key_id"]) == ("key.leaked", record.key_id)
        assert "https://a.example" in str(audited) and audited["address"] == "192.0.2.7"
        # A revoked key still counts as one of ours.
        assert self.report(here, key).json[0]["label"] == "true_positive"

    def test_report_without_githubs_signature_revokes_nothing(self, here: Api) -> None:
        record, leaked = here.store.create(**ACME)  # type: ignore[arg-type]
        for key, by in ((signed.OTHER, "one"), (signed.SIGNER, "three")):
            answer = self.report(here, leaked, key=key, by=by)
            assert answer.status_code == 401
            assert answer.json["error_code"] == "UNAUTHENTICATED"
            assert here.store.get(record.key_id).revoked_at is None

    def test_malformed_report_is_refused(self, here: Api) -> None:
        assert self.send(here, b"{}").status_code == 400

    def test_report_is_refused_without_githubs_keys(self, tmp_path: Path) -> None:
        # The gate answers 404 before the body: tests/adversarial/test_strangers.py.
        api = served(tmp_path, {})
        record, leaked = api.store.create(**ACME)  # type: ignore[arg-type]
        assert self.report(api, leaked).status_code == 401
        assert api.store.get(record.key_id).revoked_at is None

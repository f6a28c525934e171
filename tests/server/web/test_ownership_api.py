"""The REST API of owners, grants and prefixes in process, on MLflow's tables in SQLite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flask
import pytest
import sqlalchemy as sa
from mlflow.store.model_registry.dbmodels.models import SqlRegisteredModel

from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.core.policy import Policy, access
from mlflow_hokusai_auth.core.types import Access, Principal
from mlflow_hokusai_auth.server.upstream import stores
from mlflow_hokusai_auth.server.web import ownership_api
from mlflow_hokusai_auth.store import ownership
from mlflow_hokusai_auth.store.keys import LocalStore
from tests import mlflow_tables
from tests.server.sentinel import make_gate
from tests.server.web.test_keys_api import ADMIN, Api

ACME = Principal("key_acme", "acme", frozenset({"model:write"}), owner_id="acme")
GLOBEX = Principal("key_globex", "globex", frozenset({"model:write"}), owner_id="globex")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow_tables.make(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def here(engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Api:
    monkeypatch.setattr(stores, "shared_engine", lambda: engine)
    store = LocalStore(f"sqlite:///{tmp_path}/keys.db")
    store.migrate()
    app = flask.Flask("mlflow")
    app.register_blueprint(ownership_api.blueprint(store, make_gate()))
    return Api(store, app)


def register(engine: sa.Engine, name: str, owner: str) -> None:
    ownership.prepare(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(SqlRegisteredModel).values(name=name))
        ownership.record_model(connection, name, owner=owner, key_id="key_1", now=1.0)


def ask(here: Api, line: str, body: object = None, caller: Principal = ADMIN) -> Any:
    """The answer's JSON; fails unless it is a good one."""
    answer = here.ask(line, body, caller)
    assert answer.status_code in (200, 201), answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    return answer.json


def test_owners_share_their_own_models_and_no_others(here: Api, engine: sa.Engine) -> None:
    register(engine, "acme-lead", "acme")
    register(engine, "globex-lead", "globex")
    (row,) = ask(here, "GET /owners/of?name=acme-lead", caller=GLOBEX)["owners"]
    assert (row["owner"], row["key_id"]) == ("acme", None)
    assert len(ask(here, "GET /owners?max_results=9", caller=GLOBEX)["owners"]) == 2
    body = {"grantee": "globex", "pattern": "*", "level": "contribute"}
    answer = here.ask("POST /grants", body, ACME)
    assert answer.status_code == 201 and answer.json is not None
    grant = answer.json
    assert (grant["granted_by"], grant["models"], grant["key_id"]) == ("acme", 1, "key_acme")
    event = here.audited()
    assert (event["event"], event["actor"], event["actor_key_id"]) == (
        "grants.added",
        "acme",
        "key_acme",
    )
    assert (event["detail"]["grantee"], event["detail"]["pattern"]) == ("globex", "*")
    assert [row["id"] for row in ask(here, "GET /grants", caller=GLOBEX)["grants"]] == [grant["id"]]
    assert here.ask(f"DELETE /grants/{grant['id']}", caller=GLOBEX).status_code == 404
    assert ask(here, f"DELETE /grants/{grant['id']}", caller=ACME)["models"] == 1
    assert here.audited()["event"] == "grants.removed"


def test_operators_say_whose_everything_is(here: Api, engine: sa.Engine) -> None:
    register(engine, "lead", "acme")
    assignment = {"owner": "globex", "models": "l*"}
    assert ask(here, "POST /owners/assign", assignment)["changed"] == 1
    assert ask(here, "GET /owners?owner=globex")["owners"] == []
    ask(here, "POST /owners/assign", {**assignment, "apply": True})
    assert ask(here, "GET /owners?owner=globex&unowned=false")["owners"][0]["name"] == "lead"
    assert here.audited()["event"] == "owners.assigned"
    rows = [{"name": "lead"}, {"name": "x", "kind": "model", "owner": "acme"}]
    answer = ask(here, "POST /owners/assign", {"names": rows, "owner": "acme", "apply": True})
    assert (answer["changed"], answer["missing"]) == (1, ["x"])
    here.store.create(owner="ACME", scopes=["model:read"])
    (problem,) = ask(here, "GET /owners/check")["problems"]
    assert problem["name"] == "ACME, acme"
    assert ask(here, "POST /owners/release", {"name": "lead"})["owner"] == "acme"
    ask(here, "POST /prefixes", {"prefix": "acme-", "owner": "acme"})
    assert ask(here, "GET /prefixes")["prefixes"] == [
        {"prefix": "acme-", "kind": "model", "owner": "acme"}
    ]
    ask(here, "DELETE /prefixes?prefix=acme-")
    assert here.audited()["event"] == "prefixes.removed"


def test_mistakes_are_explained(here: Api) -> None:
    ask(here, "POST /prefixes", {"prefix": "acme-", "owner": "acme"})
    nobody = Principal("key_0", "", frozenset({"model:write"}))
    wrong = []
    for line, body, caller, status, says in (
        ("GET /owners?kind=run", None, ADMIN, 400, "kind must be one of"),
        ("GET /owners?max_results=x", None, ADMIN, 400, "must be a whole number"),
        ("GET /owners?max_results=0", None, ADMIN, 400, "from 1 to 1000"),
        ("GET /owners?unowned=1", None, ADMIN, 400, "unowned must be true or false"),
        ("GET /owners?page_token=%00", None, ADMIN, 400, "page_token"),
        ("GET /owners/of", None, ADMIN, 404, "There is no registered model"),
        ("GET /owners/of?name=%00", None, ADMIN, 404, "There is no registered model"),
        ("POST /owners/assign", b"{", ADMIN, 400, "Send a JSON object"),
        ("POST /owners/assign", {}, ADMIN, 400, "one of them"),
        ("POST /owners/assign", {"apply": 1}, ADMIN, 400, "apply: "),
        ("POST /owners/assign", {"names": [{"name": 1}]}, ADMIN, 400, "names.0.name: "),
        ("POST /owners/assign", {"names": [{"x": 1}]}, ADMIN, 400, "x: unknown; known: kind, name"),
        ("POST /owners/release", {"name": "x"}, ADMIN, 404, "No owner has"),
        ("POST /grants", {"grantee": "g"}, ACME, 400, "pattern: "),
        ("POST /grants", {"grantee": "g", "pattern": "a*b"}, ACME, 400, "only at its end"),
        ("POST /grants", {"grantee": "g", "pattern": "\ud800"}, ACME, 400, "pattern: "),
        ("POST /grants", {"grantee": "g", "pattern": "a", "colour": 1}, ACME, 400, "unknown"),
        ("POST /grants", {"grantee": "g", "pattern": "a"}, nobody, 403, "has no owner"),
        ("DELETE /grants/grant_0", None, ACME, 404, "You gave no grant"),
        ("POST /prefixes", {"prefix": "acme-x", "owner": "g"}, ADMIN, 409, "reserved for acme"),
        ("DELETE /prefixes", None, ADMIN, 404, "No names of models"),
        ("DELETE /prefixes?prefix=a&kind=x", None, ADMIN, 400, "kind must be"),
    ):
        answer = here.ask(line, body, caller)
        if answer.status_code != status or says not in (answer.json or {}).get("message", ""):
            wrong.append(f"{line} {body}: {answer.status_code} {answer.text}, not {status} {says}")
    assert wrong == []


def test_store_without_a_shared_database_is_told(
    here: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "shared_engine", lambda: None)
    answer = here.ask("GET /owners")
    assert answer.status_code == 409 and "MLFLOW_BACKEND_STORE_URI" in answer.text


def test_database_without_our_tables_is_told(
    here: Api, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reader = sa.create_engine(f"sqlite:///file:{tmp_path}/mlflow.db?mode=ro&uri=true")
    monkeypatch.setattr(stores, "shared_engine", lambda: reader)
    answer = here.ask("GET /owners")
    assert answer.status_code == 503 and "hokusai-auth owners sql" in answer.text
    reader.dispose()


def test_routes_are_open_to_whom_they_should_be() -> None:
    """A supplier shares and looks; only operators say whose what is, by REST and on the page."""
    base = "/api/2.0/hokusai"
    may = {
        line: [
            name
            for name in ("model:read", "model:write", "mlflow:write", "mlflow:admin")
            if access(
                Principal("key_1", "o", frozenset({name}), owner_id="o"),
                operation := classify(*line.split()),
                Policy(),
            )
            >= operation.access
            > Access.KEY
        ]
        for line in (
            f"GET {base}/owners",
            f"GET {base}/owners/of",
            f"GET {base}/grants",
            "GET /hokusai/models",
            f"POST {base}/grants",
            f"DELETE {base}/grants/grant_1",
            "POST /hokusai/models/share",
            "POST /hokusai/models/unshare",
            f"POST {base}/owners/assign",
            f"POST {base}/owners/release",
            f"GET {base}/owners/check",
            f"GET {base}/prefixes",
            f"POST {base}/prefixes",
            f"DELETE {base}/prefixes",
            "POST /hokusai/models/assign",
            "POST /hokusai/models/reserve",
            "POST /hokusai/models/unreserve",
        )
    }
    everybody = ["model:read", "model:write", "mlflow:write", "mlflow:admin"]
    assert list(may.values()) == [everybody] * 4 + [everybody[1:]] * 4 + [["mlflow:admin"]] * 9


def test_operator_reads_and_sets_isolation(here: Api) -> None:
    now = {"isolation": "off", "in_effect": "off", "mode": "enforce", "by_default": True}
    assert ask(here, "GET /isolation") == {**now, "obstacle": None}
    now |= {"isolation": "writes", "in_effect": "writes", "by_default": False, "obstacle": None}
    assert ask(here, "POST /isolation", {"isolation": "writes"}) == now
    event = here.audited()
    assert (event["event"], event["detail"]) == ("isolation.changed", {"isolation": "writes"})
    assert ask(here, "POST /isolation", {"isolation": "default"})["by_default"]
    for body in ({"isolation": "most"}, {"isolation": None}, {}, {"isolation": "off", "x": 1}):
        assert here.ask("POST /isolation", body, ADMIN).status_code == 400, body


def test_isolation_that_can_t_be_kept_is_refused(
    engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "shared_engine", lambda: engine)
    store = LocalStore(f"sqlite:///{tmp_path}/keys.db")
    store.migrate()
    app = flask.Flask("mlflow")
    gate = make_gate()
    gate.isolation.decide("off", "MLflow 3.8 is older than 3.9")
    app.register_blueprint(ownership_api.blueprint(store, gate))
    api = Api(store, app)
    for line, body in (("POST /isolation", {"isolation": "writes"}), ("GET /owners", None)):
        answer = api.ask(line, body, ADMIN)
        assert (answer.status_code, "older than 3.9" in answer.text) == (409, True)
    assert sa.inspect(engine).has_table("hokusai_models") is False
    assert ask(api, "POST /isolation", {"isolation": "observe"})["isolation"] == "observe"

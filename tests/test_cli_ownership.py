"""The commands for owners, grants and prefixes, in MLflow's database and over REST."""

from __future__ import annotations

import getpass
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from mlflow.store.model_registry.dbmodels.models import SqlModelVersion, SqlRegisteredModel
from mlflow.store.tracking.dbmodels.models import SqlExperiment, SqlRun

from mlflow_hokusai_auth import cli
from mlflow_hokusai_auth.cli import main
from mlflow_hokusai_auth.store import ownership
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.ownership_tables import METADATA
from tests import mlflow_tables
from tests.harness import serve

Call = Callable[..., Result]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow_tables.make(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def call(engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a command in this process, as the operator of the database."""
    monkeypatch.setenv("HOKUSAI_AUTH_DATABASE_URI", f"sqlite:///{tmp_path}/keys.db")
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    LocalStore(f"sqlite:///{tmp_path}/keys.db").migrate()
    return run


def run(*arguments: str, status: int = 0) -> Result:
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == status, done.output
    return done


def told(call: Call, *arguments: str, status: int = 0) -> Any:
    return json.loads(call(*arguments, "--json", status=status).stdout)


def make(engine: sa.Engine, *names: str) -> None:
    with engine.begin() as connection:
        for name in names:
            connection.execute(sa.insert(SqlRegisteredModel).values(name=name))


def test_operator_takes_over_what_exists(call: Call, engine: sa.Engine) -> None:
    make(engine, "acme-a", "acme-b", "globex-a")
    with engine.begin() as connection:
        version = {"name": "acme-a", "version": 1, "source": "s3://b/m", "current_stage": "None"}
        connection.execute(sa.insert(SqlModelVersion).values(version))
    assert [row["name"] for row in told(call, "owners", "list", "--unowned")["owners"]] == [
        "acme-a",
        "acme-b",
        "globex-a",
    ]
    with engine.begin() as connection:
        connection.execute(sa.update(SqlModelVersion).values(user_id="ACME"))
    assert "ACME" in call("owners", "list", "--unowned").stdout
    assert "ACME" not in call("owners", "list").stdout
    plan = call("owners", "assign", "--models", "acme-*", "--owner", "acme").stdout
    assert "2 would change; nothing did, without --apply. 0 have this owner already." in plan
    assert "s3://b/m" in plan
    assert told(call, "owners", "list", "--owner", "acme")["owners"] == []
    done = call("owners", "assign", "--models", "acme-*", "--owner", "acme", "--apply").stdout
    assert "2 changed." in done
    (row,) = told(call, "owners", "of", "acme-a")["owners"]
    assert row["owner"] == "acme"
    assert "acme" in call("owners", "of", "acme-a").stdout
    (event,) = map(json.loads, call("audit", "--event", "owners", "--json").stdout.splitlines())
    assert (event["event"], event["actor"]) == ("owners.assigned", "cli:alice")
    assert "was acme's, and has no owner now" in call("owners", "release", "acme-a").stdout
    assert told(call, "owners", "release", "acme-b")["owner"] == "acme"


def test_all_that_a_leaver_owns_goes_to_another_owner(call: Call, engine: sa.Engine) -> None:
    make(engine, "a", "b")
    call("owners", "assign", "--models", "a", "--owner", "ACME", "--apply")
    call("prefixes", "add", "acme-", "--owner", "ACME")
    move = ("owners", "assign", "--from", "ACME", "--to", "GLOBEX")
    assert "2 would change; nothing did, without --apply." in call(*move).stdout
    assert "2 changed." in call(*move, "--apply").stdout
    assert told(call, "owners", "of", "a")["owners"][0]["owner"] == "GLOBEX"
    assert told(call, "prefixes", "list")["prefixes"][0]["owner"] == "GLOBEX"
    for wrong in ((*move, "--models", "a"), ("owners", "assign", "--to", "GLOBEX")):
        assert "--from" in call(*wrong, status=2).stderr


def test_what_is_shared_with_a_leaver_is_named_with_its_command(
    call: Call, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("keys", "create", "--owner", "ACME", "--scope", "model:write")
    leaver = ("keys", "revoke", "--owner", "ACME", "--apply")
    call("owners", "check")
    make(engine, "a")
    call("owners", "assign", "--models", "a", "--owner", "GLOBEX", "--apply")
    grant, other = (
        told(call, "grants", "add", "--owner", owner, "--model", "a")["id"]
        for owner in ("ACME", "INITECH")
    )
    said = call(*leaver).stderr
    assert f"hokusai-auth grants remove {grant}" in said and other not in said
    call("grants", "remove", grant)
    assert "grants remove" not in call(*leaver).stderr
    # The keys end all the same if MLflow's database can't be read.
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "sqlite:////nowhere/mlflow.db")
    said = call(*leaver)
    assert "0 keys of ACME revoked." in said.stdout
    assert "grants can't be read" in said.stderr and "grants remove ID" in said.stderr


def test_explain_says_which_rule_hides_a_thing_or_shows_it(
    call: Call, engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_id = told(call, "keys", "create", "--owner", "ACME", "--scope", "model:write")["key_id"]
    asks = ("explain", "--as", key_id)
    again = call(*asks, "--model", "scorer", status=1).stderr
    assert "has no owners yet: start a server" in again
    call("owners", "check")
    make(engine, "scorer")
    with engine.begin() as connection:
        made = {"experiment_id": 7, "name": "e", "creation_time": 5}
        connection.execute(sa.insert(SqlExperiment).values(made))
        connection.execute(sa.insert(SqlRun).values(run_uuid="f" * 32, experiment_id=7))
    for things in ("--models", "--experiments"):
        call("owners", "assign", things, "*", "--owner", "GLOBEX", "--apply")
    hidden = told(call, *asks, "--model", "scorer", status=1)
    assert hidden == {
        "key_id": key_id,
        "key_owner": "ACME",
        "kind": "model",
        "name": "scorer",
        "owner": "GLOBEX",
        "isolation": "full",
        "allowed": False,
        "verdict": "hidden: the model's owner is GLOBEX, and no grant shares it with ACME",
    }
    assert hidden["verdict"] in call(*asks, "--model", "scorer", status=1).stdout
    run = told(call, *asks, "--run", "f" * 32, status=1)
    assert run["verdict"].startswith("hidden: GLOBEX owns the run's experiment 7")
    assert told(call, *asks, "--experiment", "7", status=1)["owner"] == "GLOBEX"
    assert told(call, *asks, "--experiment", "x", status=1)["verdict"].startswith("missing: ")
    grant = told(call, "grants", "add", "--owner", "ACME", "--model", "scorer")
    shown = told(call, *asks, "--model", "scorer")
    assert shown["allowed"] and f"grant {grant['id']} of an operator" in shown["verdict"]
    monkeypatch.setenv("HOKUSAI_AUTH_ISOLATION", "writes")
    assert told(call, *asks, "--run", "f" * 32)["isolation"] == "writes"
    call("isolation", "full")
    assert not told(call, *asks, "--run", "f" * 32, status=1)["allowed"]
    call("mode", "observe")
    assert told(call, *asks, "--run", "f" * 32)["isolation"] == "off"
    assert "There is no key" in call("explain", "--as", "key_x", "--run", "x", status=1).stderr
    monkeypatch.delenv("MLFLOW_BACKEND_STORE_URI")
    assert "--backend-store-uri" in call(*asks, "--run", "x", status=2).stderr


def test_file_says_whose_everything_is(call: Call, engine: sa.Engine, tmp_path: Path) -> None:
    make(engine, "a", "b, c")
    with engine.begin() as connection:
        connection.execute(sa.insert(SqlExperiment).values(experiment_id=1, name="e"))
    file = tmp_path / "owners.csv"
    text = 'kind,name,owner\nmodel,a,\nmodel,"b, c",globex\nexperiment,e,globex\nmodel,x,\n'
    # As a spreadsheet writes it.
    file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    done = call("owners", "assign", "--csv", str(file), "--owner", "acme", "--apply")
    assert "3 changed." in done.stdout and "there is no x" in done.stderr
    owners = {row["name"]: row["owner"] for row in told(call, "owners", "list")["owners"]}
    assert owners == {"a": "acme", "b, c": "globex"}
    assert told(call, "owners", "of", "e")["owners"][0]["owner"] == "globex"
    for wrong, says in (
        ("", "the first line must be"),
        ("name\na", "the first line must be"),
        ("kind,name,colour\nmodel,a,red", "the first line must be"),
        ("kind,name\n", "from 1 to 10000 rows, not 0"),
        ("kind,name\nmodel,a\nmodel,\n", "row 2 has no kind or no name"),
        ('kind,name\nmodel,"a', "unexpected end"),
        ("kind,name\nrun,a", "kind must be one of"),
        ("kind,name\nmodel,a", "owner of row 1: it is empty"),
    ):
        file.write_text(wrong)
        done = call("owners", "assign", "--csv", str(file), "--apply", status=2)
        assert says in done.stderr, (wrong, done.stderr)
    file.write_bytes(b"kind,name\nmodel,\xff")
    for given in ((), ("--models", "a", "--experiments", "b")):
        said = call("owners", "assign", *given, "--owner", "acme", status=2).stderr
        assert "give --models, --experiments, --from or --csv: one of them" in said
    assert "--csv: " in call("owners", "assign", "--csv", str(file), status=2).stderr


def test_pages_follow_each_other(call: Call, engine: sa.Engine) -> None:
    make(engine, *"abc")
    first = call("owners", "list", "--max-results", "2")
    assert "--page-token 'b'" in first.stderr
    rest = told(call, "owners", "list", "--max-results", "2", "--page-token", "b")
    assert ([row["name"] for row in rest["owners"]], rest["next_page_token"]) == (["c"], None)


def test_grants_and_prefixes_are_added_listed_and_removed(call: Call, engine: sa.Engine) -> None:
    make(engine, "lead")
    arguments = ("--owner", "GLOBEX", "--model", "l*", "--level", "contribute")
    done = call("grants", "add", *arguments, "--expires-in", "30d", "--json")
    assert done.stderr == ""
    grant = json.loads(done.stdout)
    assert (grant["granted_by"], grant["level"], grant["models"]) == ("", "contribute", 1)
    assert round(grant["expires_at"] - grant["created_at"]) == 30 * 86400
    done = call("grants", "add", "--owner", "GLOBEX", "--model", "laed", "--json")
    misspelt = json.loads(done.stdout)["id"]
    assert f"`hokusai-auth grants remove {misspelt}`" in done.stderr
    call("grants", "remove", misspelt)
    listed = call("grants", "list").stdout
    assert grant["id"] in listed and "operators" in listed
    assert told(call, "grants", "list")["grants"] == [grant]
    assert grant["id"] in call("grants", "remove", grant["id"]).stdout
    assert "You gave no grant" in call("grants", "remove", grant["id"], status=1).stderr
    prefix = told(call, "prefixes", "add", "acme-", "--owner", "ACME")
    assert told(call, "prefixes", "list")["prefixes"] == [prefix]
    assert "acme-" in call("prefixes", "list").stdout
    told(call, "prefixes", "remove", "acme-")
    assert call("prefixes", "list").stdout == "none\n"


def test_check_says_what_is_wrong_by_its_exit_status(call: Call, engine: sa.Engine) -> None:
    assert call("owners", "check").stdout == "none\n"
    with engine.begin() as connection:
        ownership.record_model(connection, "lead", owner="acme", key_id="", now=1.0)
    (problem,) = told(call, "owners", "check", status=1)["problems"]
    assert (problem["problem"], problem["name"]) == ("MODEL_MISSING", "lead")


def test_sql_is_for_the_kind_of_database(call: Call, engine: sa.Engine) -> None:
    statements = call("owners", "sql").stdout
    with engine.begin() as connection:
        for statement in statements.split(";\n"):
            if statement:
                connection.exec_driver_sql(statement)
    assert {table.name for table in METADATA.sorted_tables} <= set(
        sa.inspect(engine).get_table_names()
    )
    postgres = told(call, "owners", "sql", "--backend-store-uri", "postgresql://u@h/d")["sql"]
    assert "CREATE TABLE IF NOT EXISTS hokusai_models" in postgres and "FLOAT(53)" in postgres


def test_unsuitable_database_is_refused(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty.db"
    empty.touch()
    for uri, says in (
        (f"sqlite:///{empty}", "no tables of MLflow"),
        (f"sqlite:///{tmp_path}/none.db", "there is no file"),
        ("sqlite://", "there is no file"),
        ("./mlruns", "names no database"),
        ("postgresql://u:secret@h:port/d", "names no database"),
        ("postgresql://u:secret@127.0.0.1:9/d", "MLflow's database can't be used"),
        ("mysql+nothing://u:secret@h/d", "names no database"),
    ):
        monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", uri)
        done = call("owners", "list", status=1)
        assert done.stdout == "" and says in done.stderr, (uri, done.stderr)
        assert "secret" not in done.stderr
    assert empty.stat().st_size == 0
    assert not (tmp_path / "none.db").exists()


def test_without_a_database_a_server_is_needed(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLFLOW_BACKEND_STORE_URI")
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: f"file://{tmp_path}")
    assert "Set MLFLOW_TRACKING_URI" in call("owners", "list", status=1).stderr


def test_the_database_may_be_a_secret_of_the_container(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As for `docker exec`, which runs a command beside the image's entry."""
    secret = tmp_path / "mlflow_backend_store_uri"
    secret.write_text(f"sqlite:///{tmp_path}/mlflow.db\n")
    monkeypatch.setattr(cli, "BACKEND_STORE_URI", secret)
    monkeypatch.delenv("MLFLOW_BACKEND_STORE_URI")
    assert told(call, "owners", "list") == {"owners": [], "next_page_token": None}
    assert call("isolation", "writes").stdout.startswith("writes\n")


@pytest.mark.servers
def test_suppliers_share_over_rest_what_an_operator_gave_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tmp_path) as server:
        keys = {
            owner: server.store.create(owner=owner, scopes=["model:write"])[1]
            for owner in ("acme", "globex")
        } | {"operator": server.key("mlflow:admin")}

        def by(who: str, *arguments: str, status: int = 0) -> Any:
            monkeypatch.setenv("HOKUSAI_API_KEY", keys[who])
            monkeypatch.setenv("MLFLOW_TRACKING_URI", server.origin)
            monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: server.origin)
            done = run(*arguments, "--json", status=status)
            return json.loads(done.stdout) if status == 0 else done.stderr

        body = json.dumps({"name": "lead"}).encode()
        path = "/api/2.0/mlflow/registered-models/create"
        headers = {"Content-Type": "application/json"}
        made = server.request("POST", path, body=body, headers=headers, key=keys["operator"])
        assert made[0] == 200
        arguments = ("owners", "assign", "--models", "lead", "--owner", "acme", "--apply")
        assert "needs the scope mlflow:admin" in by("acme", *arguments, status=1)
        assert by("operator", *arguments)["changed"] == 1
        grant = by("acme", "grants", "add", "--owner", "globex", "--model", "lead")
        assert (grant["granted_by"], grant["models"]) == ("acme", 1)
        assert by("globex", "owners", "of", "lead")["owners"][0]["owner"] == "acme"
        assert "no registered model" in by("globex", "owners", "of", "led", status=1)
        assert by("globex", "grants", "list")["grants"][0]["id"] == grant["id"]
        assert "You gave no grant" in by("globex", "grants", "remove", grant["id"], status=1)
        assert by("acme", "grants", "remove", grant["id"])["models"] == 1


def test_isolation_is_switched_on_only_where_it_can_be_kept(
    call: Call, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(*arguments: str) -> str:
        said = call("isolation", "writes", *arguments, status=1).stderr
        assert told(call, "isolation")["isolation"] == "default"
        return str(said)

    registry = f"sqlite:///{tmp_path}/registry.db"
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_REGISTRY_STORE_URI", registry)
        assert "another store" in refused()
    with monkeypatch.context() as patch:
        patch.delenv("MLFLOW_BACKEND_STORE_URI")
        assert "--backend-store-uri" in refused()
        # The way back needs no more than the store of keys.
        assert call("isolation", "off").stdout.startswith("off\n")
        call("isolation", "default")
    assert "there is no file" in refused("--backend-store-uri", f"sqlite:///{tmp_path}/no.db")
    assert "names no database" in refused("--backend-store-uri", str(tmp_path))
    assert not (tmp_path / "no.db").exists()
    # To look decides nothing.
    assert told(call, "isolation")["default"] is None
    make(engine, "acme-a")
    call("owners", "list")
    assert told(call, "isolation")["default"] == "observe"
    said = call("isolation").stdout
    assert "for MLflow's database: observe\n" in said
    assert "1 registered models and 0 experiments" in said
    call("owners", "assign", "--models", "acme-a", "--owner", "acme", "--apply")
    assert "Everything has an owner" in call("isolation").stdout
    assert call("isolation", "writes").stdout.startswith("writes\nsince ")
    said = call("isolation").stdout
    assert "kept apart now" not in said and "owner" not in said
    call("mode", "observe")
    assert "Suppliers are not kept apart now, because the mode is observe." in (
        call("isolation").stdout
    )
    assert told(call, "isolation")["mode"] == "observe"

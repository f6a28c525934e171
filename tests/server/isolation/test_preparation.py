"""Where owners can be known, and what a server does where they can't."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import mlflow
import pytest

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.core.types import ISOLATION, MOST_ISOLATION, Access
from mlflow_hokusai_auth.server.isolation import preparation
from mlflow_hokusai_auth.server.isolation.facts import Facts
from mlflow_hokusai_auth.server.isolation.preparation import Preparation, Prepared, prepare
from mlflow_hokusai_auth.server.live_settings import Isolation, Mode
from mlflow_hokusai_auth.server.upstream import stores
from mlflow_hokusai_auth.server.upstream.artifact_roots import REGISTRY, TRACKING
from mlflow_hokusai_auth.store import ownership
from tests.server.isolation.stores import Stores

NOWHERE = "postgresql+psycopg://nobody:canary@127.0.0.1:9/none"


def where(made: Stores) -> str:
    return str(made.registry.engine.url.render_as_string(hide_password=False))


def test_tables_are_made_and_the_decision_is_told(stores: Stores) -> None:
    uri = where(stores)
    assert prepare({TRACKING: uri}).obstacle is None
    assert prepare({TRACKING: uri, REGISTRY: uri}).isolation == ownership.decided(
        stores.registry.engine
    )


def test_isolation_is_off_where_owners_can_t_be_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = f"sqlite:///{tmp_path}/mlflow.db"

    def found(**environ: str) -> str:
        prepared = prepare(environ)
        assert (prepared.isolation, prepared.passing) == ("off", False)
        assert prepared.obstacle is not None
        # Nothing may be decided for a server that can.
        assert not Path(tmp_path, "mlflow.db").exists()
        return prepared.obstacle

    assert "no database" in found()
    assert "no database" in found(**{TRACKING: str(tmp_path)})
    assert "another store" in found(**{TRACKING: database, REGISTRY: f"{database}2"})
    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "__version__", "3.8.1")
        assert "older than 3.9" in found(**{TRACKING: database})
    with monkeypatch.context() as patch:
        patch.setattr(stores, "has_workspaces", lambda: True)
        assert "workspaces" in found(**{TRACKING: database})


def test_workspaces_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not stores.has_workspaces()
    monkeypatch.setenv("MLFLOW_ENABLE_WORKSPACES", "true")
    assert stores.has_workspaces()


def test_database_without_tables_of_mlflow_is_an_obstacle(tmp_path: Path) -> None:
    prepared = prepare({TRACKING: f"sqlite:///{tmp_path}/empty.db"})
    assert prepared.isolation == "off" and not prepared.passing
    assert "no tables of MLflow" in str(prepared.obstacle)


def test_database_out_of_reach_may_have_isolation() -> None:
    prepared = prepare({TRACKING: NOWHERE})
    assert (prepared.isolation, prepared.passing) == (MOST_ISOLATION, True)
    assert prepared.obstacle and "canary" not in prepared.obstacle


def test_database_is_looked_for_until_it_is_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = [Prepared(MOST_ISOLATION, "out of reach", True)] * 2
    answers += [Prepared("observe", unowned=(3, 4)), Prepared("off", "never asked for")]
    monkeypatch.setattr(preparation, "prepare", lambda: answers.pop(0))
    isolation, facts = Isolation(Mode()), Facts(usable=True)
    prepared = Preparation(isolation, facts)
    prepared.look_again()
    # Nobody knows what was decided, so suppliers wait.
    assert (facts.usable, isolation.closed_from, isolation.level) == (
        False,
        Access.READ,
        MOST_ISOLATION,
    )
    assert not caplog.records
    for _ in range(2):
        prepared.look_again()
        assert (facts.usable, isolation.closed_from, isolation.level) == (True, None, "observe")
    (line,) = caplog.messages
    assert line.startswith("ISOLATION IS observe.") and "3 registered models and 4" in line


def test_operator_is_told_at_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lines(found: Prepared, setting: str = "", stored: str = "") -> str:
        caplog.clear()
        monkeypatch.setattr(preparation, "prepare", lambda: found)
        isolation = Isolation(Mode(), setting)
        prepared = Preparation(isolation, Facts(usable=True))
        if stored:
            isolation.follow({"isolation": ISOLATION.index(stored)})
        prepared.report()
        assert all(one.levelno >= logging.WARNING for one in caplog.records)
        return "\n".join(caplog.messages)

    assert lines(Prepared(MOST_ISOLATION)) == ""
    assert "hokusai-auth owners assign" in lines(Prepared("observe", unowned=(1, 0)))
    said = lines(Prepared("observe"))
    assert "Everything has an owner" in said and f"hokusai-auth isolation {MOST_ISOLATION}" in said
    # A person has chosen.
    assert lines(Prepared("observe", unowned=(1, 0)), "off") == ""
    assert lines(Prepared("observe", unowned=(1, 0)), stored=MOST_ISOLATION) == ""
    assert "ISOLATION IS off: no DDL" in lines(Prepared("off", "no DDL"))
    for setting, stored in (("writes", ""), ("off", "writes")):
        said = lines(Prepared("off", "no DDL"), setting, stored)
        assert "ISOLATION IS writes, SO SUPPLIERS CAN'T CHANGE ANYTHING: no DDL" in said


def test_database_that_goes_away_in_the_middle_is_out_of_reach(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> str:
        raise AuthorityUnavailable("gone")

    monkeypatch.setattr(ownership, "prepare", fail)
    assert prepare({TRACKING: where(stores)}) == Prepared(MOST_ISOLATION, "gone", True)


def test_owner_that_gets_too_old_just_now_is_read_again(stores: Stores) -> None:
    for skipped in range(2):
        # Each look at the clock is a while after the one before.
        ticks = itertools.count(step=0.3)
        facts = Facts(usable=True, timer=ticks.__next__)
        facts._owners[1] = "ACME"
        for _ in range(skipped):
            next(ticks)
        with stores.registry.engine.connect() as connection:
            for _ in range(9):
                assert facts.experiment_owner(connection, 1) in ("ACME", None)

"""`GET status`: what is in force, by REST."""

from __future__ import annotations

from pathlib import Path

import flask
import pytest

from mlflow_hokusai_auth import __version__
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.core.types import MODES
from mlflow_hokusai_auth.server.live_settings import Isolation, Mode
from mlflow_hokusai_auth.server.web import status_api
from mlflow_hokusai_auth.server.web.health import Health
from mlflow_hokusai_auth.store.keys import LocalStore


def test_status_says_what_is_in_force_and_what_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(f"sqlite:///{tmp_path}/keys.db")
    store.migrate()
    record, _ = store.create(owner="ACME", scopes=["model:write"])
    store.rotate(record.key_id)
    mode = Mode("enforce")
    isolation = Isolation(mode, "", "full")
    health = Health({"one": lambda: "answers"})
    app = flask.Flask("mlflow")
    app.register_blueprint(status_api.blueprint(store, mode, isolation, health))
    client = app.test_client()
    answer = client.get("/api/2.0/hokusai/status").json
    assert answer is not None
    part = answer["health"]["checks"].pop("one")
    assert (part["ok"], part["found"]) == (True, "answers")
    assert answer == {
        "version": __version__,
        "mode": "enforce",
        "mode_by": "setting",
        "isolation": "full",
        "isolation_by": "decision",
        "isolation_in_effect": "full",
        "keys": {"active": 1, "deprecated": 1, "expired": 0, "revoked": 0},
        "keys_ending_soon": 0,
        "links_waiting": 0,
        "links_refused": 0,
        "links_tried_again": 0,
        "migrations_current": True,
        "health": {"status": "ok", "checks": {}},
    }
    mode.follow({"mode": MODES.index("observe")})
    answer = client.get("/api/2.0/hokusai/status").json
    assert answer is not None
    assert (answer["mode"], answer["mode_by"]) == ("observe", "store")
    assert answer["isolation_in_effect"] == "off"

    def fail() -> bool:
        raise AuthorityUnavailable("down")

    monkeypatch.setattr(store, "is_current", fail)
    answer = client.get("/api/2.0/hokusai/status").json
    assert answer is not None and (answer["keys"], answer["migrations_current"]) == (None, False)


def test_who_decides_mode_and_isolation() -> None:
    for mode, by in (
        (Mode("observe"), "setting"),
        (Mode("observe", "off"), "force_mode"),
    ):
        assert mode.by == by
        mode.follow({"mode": 0})
        assert mode.by == ("force_mode" if by == "force_mode" else "store")
        mode.follow({"mode": 99})
        assert mode.by == by
    assert Isolation(Mode()).by == "decision" and Isolation(Mode(), "off").by == "setting"
    isolation = Isolation(Mode(), "off")
    isolation.follow({"isolation": 0})
    assert isolation.by == "store"

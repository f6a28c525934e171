"""A running server announces keys that end soon or that nobody uses, and deletes what is over."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.links import KEPT, Links
from mlflow_hokusai_auth.store.notices import DAY
from mlflow_hokusai_auth.store.tables import KEYS
from tests.docker.stack import until
from tests.harness import serve

pytestmark = pytest.mark.servers


def test_server_announces_keys_and_deletes_what_is_over(tmp_path: Path) -> None:
    store = LocalStore(f"sqlite:///{tmp_path}/hokusai_auth.db")
    store.migrate()
    now = time.time()
    ends, rests = (
        store.create(owner="ACME", scopes=["mlflow:read"], expires_at=expires_at)[0].key_id
        for expires_at in (now + 10 * DAY, None)
    )
    with store.database.engine.begin() as connection:
        for key, days in ((ends, 20), (rests, 100)):
            old = sa.update(KEYS).where(KEYS.c.key_id == key)
            connection.execute(old.values(created_at=now - days * DAY))
    links = Links(store.database)
    links.create(owner="ACME", scopes=["mlflow:read"], expires_in=-KEPT - 1)
    with serve(tmp_path) as server:
        until(lambda: links.each() == [])
        until(lambda: len(store.database.audited(event="key.unused")) == 1)
        (ending,) = store.database.audited(event="key.ending")
        (unused,) = store.database.audited(event="key.unused")
        assert (ending["key_id"], unused["key_id"]) == (ends, rests)
        # The line for a log's query, by owner and key.
        lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
        (line,) = [line for line in lines if line["event"] == "key.ending"]
        assert (line["key_id"], line["detail"]["owner"]) == (ends, "ACME")
        key = server.key("metrics:read")
        _, _, metrics = server.request("GET", "/hokusai/metrics", key=key)
    for told in (
        'events_total{event="key.ending"} 1.0',
        'events_total{event="key.unused"} 1.0',
        'keys_ending{days="14"} 1.0',
        'keys_ending{days="3"} 0.0',
        'keys_unused{days="90"} 1.0',
    ):
        assert f"hokusai_auth_{told}\n".encode() in metrics, told

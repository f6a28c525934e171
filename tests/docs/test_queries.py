"""The queries of the page on monitoring find what they promise in the server's real lines."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from mlflow_hokusai_auth.core.types import Deny, Principal
from mlflow_hokusai_auth.server.observe.decision_log import line
from mlflow_hokusai_auth.store.database import Actor
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.notices import NOTICES_GIVEN
from tests.docs.pages import DOCS, blocks
from tests.server.observe.test_decision_log import allow, exchange

PAGE = DOCS / "operator" / "monitoring.md"
KEY = "key_0123456789abcdef"


def log_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the log lines of two owners: requests, a change, and a key that ends soon."""
    acme = Principal(KEY, "ACME", frozenset({"model:write"}))
    other = Principal("key_other", "Other", frozenset({"model:write"}))
    refused = exchange(Deny("SCOPE_MISSING", "", principal=acme), 403, passed=False)
    requests = [
        line(exchange(allow(principal=acme)), "allowed"),
        line(refused, "refused"),
        line(refused, "refused"),
        line(exchange(allow(principal=other)), "allowed"),
    ]
    store = LocalStore(f"sqlite:///{tmp_path}/keys.db")
    store.migrate()
    with caplog.at_level(logging.INFO, "mlflow_hokusai_auth.audit"):
        record, _ = store.create(
            owner="ACME",
            scopes=["mlflow:read"],
            expires_at=time.time() + 86400,
            by=Actor("ACME", KEY),
        )
        with store.database.changing(generation=False) as change:
            NOTICES_GIVEN[0].audit(change, record)
    audited = [one.getMessage() for one in caplog.records if one.name.endswith(".audit")]
    return ["INFO:     Started server process [7]", *map(json.dumps, requests), *audited, "{"]


def test_jq_finds_what_the_page_promises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    (tmp_path / "server.log").write_text("\n".join(log_lines(tmp_path, caplog)) + "\n")
    (text,) = (block.text for block in blocks(PAGE) if "jq -" in block.text)

    def ask(query: str) -> list[str]:
        command = ["bash", "-euo", "pipefail", "-c", query]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    of_owner, of_key, refusals, notices = map(ask, text.split("\n\n"))
    assert [row.split("\t")[1:4] for row in of_owner] == [
        ["allowed", "ok", "200"],
        ["refused", "SCOPE_MISSING", "403"],
        ["refused", "SCOPE_MISSING", "403"],
    ]
    assert [json.loads(row)["event"] for row in of_key] == ["request"] * 3 + ["key.created"]
    assert [row.split() for row in refusals] == [["2", "ACME", "SCOPE_MISSING"]]
    assert [row.split("\t")[0::2] for row in notices] == [["key.ending", "ACME"]]


def test_loki_s_filters_before_json_are_texts_of_the_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = log_lines(tmp_path, caplog)
    (text,) = (block.text for block in blocks(PAGE) if block.language == "logql")
    filters = [part.partition("`")[0] for part in text.split("|= `")[1:]]
    assert len(filters) == 3
    for wanted in filters:
        assert any(wanted in one for one in lines), wanted
    assert any('"event": "key.ending"' in one for one in lines)

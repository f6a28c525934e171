"""`hokusai-auth log-level`: takes effect in every process of a running server, without a restart."""

from __future__ import annotations

import http.client
import json
import logging
import time
from collections.abc import Iterator

import pytest

from mlflow_hokusai_auth.core import keys
from tests.e2e.parts import hokusai_auth
from tests.harness import Server, each_worker_answers, run_command, serve, wait_until
from tests.standin import Standin

pytestmark = pytest.mark.servers

#: What is logged at the level of info, for each key that the service rejects.
INFO = "The auth service rejects a key"


@pytest.fixture(scope="module", params=["uvicorn", "gunicorn"])
def server(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    service: Standin,
) -> Iterator[Server]:
    """Two workers, which serve."""
    preload = ("--gunicorn-opts", "--preload")
    with serve(
        tmp_path_factory.mktemp("levels"),
        ("--workers", "2", *(preload if request.param == "gunicorn" else ())),
        HOKUSAI_AUTH_BACKEND="local,service",
        HOKUSAI_AUTH_SERVICE_URL=service.url,
        HOKUSAI_AUTH_NEGATIVE_CACHE_TTL="0",
        HOKUSAI_AUTH_SERVICE_TIMEOUT="30",
    ) as running:
        # A worker that begins to serve later takes the level as it is then.
        if request.param == "uvicorn":
            wait_until(lambda: running.log.count("Application startup complete") == 2)
        else:
            wait_until(lambda: running.log.count("Booting worker") == 2)
            each_worker_answers(running)
        yield running


def told(server: Server, level: str) -> int:
    return server.log.count(f"The log level is now {level}\n")


def follows(server: Server, level: str) -> None:
    before = told(server, level.upper())
    hokusai_auth(server, "log-level", level)
    wait_until(lambda: told(server, level.upper()) == before + 2)


def ask_everybody(server: Server) -> None:
    """Unknown keys over enough connections that each worker gets some."""
    connections = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(24)]
    for connection in connections:
        connection.request("GET", "/version", headers={"X-API-Key": keys.generate()})
        response = connection.getresponse()
        response.read()
        assert response.status == 401
        connection.close()


def test_it_takes_effect_in_every_worker_and_back(server: Server) -> None:
    def shown() -> int:
        before = server.log.count(INFO)
        ask_everybody(server)
        return server.log.count(INFO) - before

    assert shown() == 0
    follows(server, "debug")
    assert shown() == 24
    follows(server, "info")
    assert shown() == 24
    follows(server, "warning")
    assert shown() == 0
    follows(server, "error")
    assert shown() == 0
    follows(server, "debug")
    follows(server, "warning")


def test_it_changes_neither_the_audit_log_nor_that_of_decisions(server: Server) -> None:
    follows(server, "error")
    before = server.log.count('"event": "request"')
    ask_everybody(server)
    wait_until(lambda: server.log.count('"event": "request"') == before + 24)
    follows(server, "warning")


def test_it_is_audited(server: Server) -> None:
    began = time.time()
    follows(server, "info")
    follows(server, "warning")
    events = server.store.database.audited(event="log_level", since=began - 1)[-2:]
    assert [event["event"] for event in events] == ["log_level.changed"] * 2
    assert [event["detail"] for event in events] == [{"level": "info"}, {"level": "warning"}]
    assert all(event["actor"].startswith("cli:") for event in events)
    listed = hokusai_auth(server, "audit", "--event", "log_level", "--json")
    assert json.loads(listed.splitlines()[-1])["detail"] == {"level": "warning"}


def test_a_level_that_is_none_is_refused(server: Server) -> None:
    done = run_command(server.folder, "log-level", "loud", environ=server.environ)
    assert done.returncode == 2
    assert "'loud' is not one of" in done.stderr
    assert server.store.database.states().get("log_level") in (None, logging.WARNING)

"""Health of a running server, whose parts break one after the other."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.server.web.health import FRESH
from tests.conftest import Postgresql
from tests.e2e.parts import EXPERIMENT, python_path, renamed
from tests.harness import PREFIXES, Server, serve, wait_until
from tests.standin import Standin

pytestmark = pytest.mark.servers

SUMMARY = "/api/health/mlflow"
DETAILED = f"{SUMMARY}/detailed"
PARTS = ["artifact_root", "isolation", "key_authority", "key_store", "migrations", "mlflow_store"]


#: What Python runs in the server before anything else: it looks at its parts as often as tests ask.
SITECUSTOMIZE = """
from mlflow_hokusai_auth.server.web import health

health.FRESH = 0.1
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, service: Standin) -> Iterator[Server]:
    """With workspaces, without one of which MLflow's store does not answer."""
    folder = tmp_path_factory.mktemp("health")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    with serve(
        folder,
        ("--workers", "1", "--enable-workspaces"),
        PYTHONPATH=python_path(folder),
        HOKUSAI_AUTH_BACKEND="local,service",
        HOKUSAI_AUTH_SERVICE_URL=service.url,
        HOKUSAI_AUTH_SERVICE_TIMEOUT="1",
    ) as running:
        yield running


def details(server: Server, key: str | None = None) -> dict[str, Any]:
    status, _, body = server.request("GET", DETAILED, key=key or server.key("mlflow:read"))
    found = json.loads(body)
    assert status == (200 if found["status"] == "ok" else 503), body
    return found


def becomes(server: Server, *failing: str, key: str | None = None) -> dict[str, Any]:
    """Wait until these parts fail, and no other; what is then told of the parts."""
    known = key or server.key("mlflow:read")

    def failed() -> list[str]:
        status, _, body = server.request("GET", DETAILED, key=known)
        assert status in (200, 503), body
        parts = json.loads(body).get("checks")
        return [] if parts is None else sorted(name for name in parts if not parts[name]["ok"])

    wait_until(lambda: failed() == sorted(failing))
    status, _, body = server.request("GET", SUMMARY)
    assert status == (503 if failing else 200)
    assert json.loads(body) == {"status": "failing" if failing else "ok"}
    assert server.request("GET", "/health")[::2] == (200, b"OK")
    return details(server, known)["checks"]


class TestWhoIsTold:
    def test_health_is_public(self, server: Server) -> None:
        for prefix in PREFIXES:
            status, _, body = server.request("GET", f"{prefix}/health")
            assert (status, body) == (200, b"OK"), prefix

    def test_readiness_is_public_and_one_word(self, server: Server) -> None:
        for prefix in PREFIXES:
            status, headers, body = server.request("GET", prefix + SUMMARY)
            assert (status, json.loads(body)) == (200, {"status": "ok"}), prefix
            assert headers["cache-control"] == "no-store", prefix

    def test_details_need_a_key(self, server: Server) -> None:
        for prefix in PREFIXES:
            assert server.request("GET", prefix + DETAILED)[0] == 401, prefix
            wrong = keys.generate()
            assert server.request("GET", prefix + DETAILED, key=wrong)[0] == 401, prefix
        for prefix, scope in itertools.product(PREFIXES, ("model:read", "mlflow:admin")):
            status, headers, body = server.request("GET", prefix + DETAILED, key=server.key(scope))
            found = json.loads(body)
            assert (status, found["status"], sorted(found["checks"])) == (200, "ok", PARTS), prefix
            for part in found["checks"].values():
                assert part["ok"] is True and part["found"] and part["latency_ms"] >= 0, part
            assert headers["cache-control"] == "no-store", prefix

    def test_nothing_else_is_public_and_it_is_only_read(self, server: Server) -> None:
        paths = ("/health/", "/health/x", f"{SUMMARY}/", f"{SUMMARY}/more")
        closed = [("GET", path) for path in paths]
        closed += [(method, SUMMARY) for method in ("POST", "PUT", "DELETE")]
        wrong = [
            f"{method} {prefix}{path}: {status}"
            for prefix, (method, path) in itertools.product(PREFIXES, closed)
            if (status := server.request(method, prefix + path)[0]) != 401
        ]
        assert not wrong, "\n".join(wrong)


class TestOneByOne:
    @pytest.fixture(autouse=True)
    def well_before_and_after(self, server: Server) -> Iterator[None]:
        becomes(server)
        yield
        becomes(server)

    def test_the_keys_table(self, server: Server) -> None:
        # Known while it lasts: a known key counts for less than a second without its store.
        with renamed(server.folder / "hokusai_auth.db", "hokusai_auth_keys"):
            wait_until(lambda: server.request("GET", SUMMARY)[0] == 503)
            assert json.loads(server.request("GET", SUMMARY)[2]) == {"status": "failing"}
            assert server.request("GET", "/health")[0] == 200

    def test_the_key_store_itself(self, server: Server) -> None:
        with renamed(server.folder / "hokusai_auth.db", "hokusai_auth_state"):
            parts = becomes(server, "key_store")
            assert "no such table" in parts["key_store"]["found"]

    def test_mlflow_s_database(self, server: Server) -> None:
        with renamed(server.folder / "mlflow.db", "experiments"):
            parts = becomes(server, "mlflow_store")
            assert "sql" not in parts["mlflow_store"]["found"].lower()
            assert server.request("GET", EXPERIMENT, key=server.key("mlflow:read"))[0] >= 500

    def test_the_artifact_folder(self, server: Server) -> None:
        # Tests may run as root, who may read and write everything; not a file as a folder, though.
        folder = server.folder / "artifacts"
        path = "/api/2.0/mlflow-artifacts/artifacts/file.txt"
        key = server.key("mlflow:write")
        assert server.request("PUT", path, key=key, body=b"x")[0] == 200
        folder.rename(server.folder / "kept")
        folder.touch()
        parts = becomes(server, "artifact_root")
        assert parts["artifact_root"]["found"] == "the artifact folder is not a folder"
        assert server.request("PUT", path, key=key, body=b"x")[0] == 500
        # Gone altogether is not broken: the next artifact makes it anew.
        folder.unlink()
        becomes(server)
        assert server.request("PUT", path, key=key, body=b"x")[0] == 200

    def test_the_auth_service(self, server: Server, service: Standin) -> None:
        assert becomes(server)["key_authority"]["found"] == "local, service answers"

        def told(words: str) -> bool:
            return words in becomes(server, "key_authority")["key_authority"]["found"]

        service.behave("broken")
        wait_until(lambda: told("answers 500"))
        service.behave("slow", seconds=30)
        wait_until(lambda: told("took more than 1 s"))
        service.behave("strict")
        service.go()
        wait_until(lambda: told("can't be reached"))
        # Keys of the store are not affected.
        assert server.request("GET", EXPERIMENT, key=server.key("mlflow:read"))[0] == 200
        service.come_back()


def test_a_crowd_that_asks_costs_the_service_one_question_in_five_seconds(
    tmp_path: Path, service: Standin
) -> None:
    environ = {"HOKUSAI_AUTH_BACKEND": "local,service", "HOKUSAI_AUTH_SERVICE_URL": service.url}
    with serve(tmp_path, **environ) as server:
        assert becomes(server)["key_authority"]["found"] == "local, service answers"
        before, began = len(service.calls), time.monotonic()
        answers: list[int] = []
        crowd = [
            threading.Thread(target=lambda: answers.append(server.request("GET", SUMMARY)[0]))
            for _ in range(50)
        ]
        for client in crowd:
            client.start()
        for client in crowd:
            client.join()
        assert answers == [200] * 50
        # The last look may have been old when they began.
        assert len(service.calls) - before <= 1 + (time.monotonic() - began) / FRESH


def test_with_the_service_alone_nobody_may_ask_for_the_parts_while_it_is_down(
    tmp_path: Path, service: Standin
) -> None:
    key = service.add(scopes=["mlflow:read"])
    with serve(
        tmp_path,
        HOKUSAI_AUTH_BACKEND="service",
        HOKUSAI_AUTH_SERVICE_URL=service.url,
        HOKUSAI_AUTH_CACHE_TTL="1",
    ) as server:
        becomes(server, key=key)
        service.go()
        wait_until(lambda: server.request("GET", SUMMARY)[0] == 503)
        wait_until(lambda: server.request("GET", DETAILED, key=key)[0] == 503)
        assert server.request("GET", "/health")[0] == 200
        service.come_back()
        becomes(server, key=key)


def test_a_database_that_is_down_is_told_of_without_its_password(
    tmp_path: Path, postgresql: Postgresql
) -> None:
    uri = postgresql.uri.replace("postgres@", "postgres:canary@")
    with serve(tmp_path, HOKUSAI_AUTH_DATABASE_URI=uri) as server:
        key = server.key("mlflow:read")
        becomes(server, key=key)
        postgresql.stop()
        try:
            wait_until(lambda: server.request("GET", SUMMARY)[0] == 503)
            assert json.loads(server.request("GET", SUMMARY)[2]) == {"status": "failing"}
            answer = server.request("GET", DETAILED, key=key)
            assert answer[0] == 503  # the key can't be looked up
            assert b"canary" not in answer[2]
            assert server.request("GET", "/health")[0] == 200
        finally:
            postgresql.start()
        becomes(server, key=key)
        assert "canary" not in server.log


def test_other_ways_of_serving_tell_the_same(servers: dict[str, Server]) -> None:
    for kind in ("gunicorn", "waitress"):
        assert sorted(becomes(servers[kind])) == PARTS, kind
        assert servers[kind].request("GET", DETAILED)[0] == 401, kind

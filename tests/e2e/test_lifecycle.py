"""A key's whole life, the same whichever way it is managed: command line, REST, Python, page."""

from __future__ import annotations

import http.client
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Protocol

import mlflow.server
import pytest
from mlflow import MlflowClient

from mlflow_hokusai_auth.server.web.keys_api import REVOKED_EVERYWHERE
from tests.conftest import redis_server
from tests.e2e.conftest import CHROMIUM, CHROMIUM_ARGS
from tests.e2e.parts import hokusai_auth
from tests.harness import SERVERS, Server, free_port, serve, wait_until

pytestmark = pytest.mark.servers

OWNER = "ACME Corp."
LIMIT = 15
#: Seconds for which a replaced key goes on; the test ends it before that.
OVERLAP = 3600


class Managed(Protocol):
    """One way to manage keys."""

    def __init__(self, server: Server, admin: str) -> None: ...

    def create(self, limit: int) -> tuple[str, str]:
        """Make a key that may register models, `limit` times an hour: its id and itself."""
        ...

    def unlimit(self, key_id: str) -> None: ...

    def rotate(self, key_id: str, overlap: int) -> tuple[str, str]: ...

    def revoke(self, key_id: str) -> None:
        """End the key; comes back when it is refused everywhere."""
        ...

    def states(self) -> dict[str, str]:
        """The state of each key of `OWNER`, by id."""
        ...


class ByCommand:
    def __init__(self, server: Server, admin: str) -> None:
        self._server = server

    def _run(self, *arguments: str) -> Any:
        return json.loads(hokusai_auth(self._server, "keys", *arguments, "--json"))

    def create(self, limit: int) -> tuple[str, str]:
        arguments = ["--owner", OWNER, "--scope", "model:write", "--rate-limit", str(limit)]
        made = self._run("create", *arguments)
        return made["key_id"], made["key"]

    def unlimit(self, key_id: str) -> None:
        self._run("edit", key_id, "--rate-limit", "none")

    def rotate(self, key_id: str, overlap: int) -> tuple[str, str]:
        made = self._run("rotate", key_id, "--overlap", f"{overlap}s")
        return made["key_id"], made["key"]

    def revoke(self, key_id: str) -> None:
        self._run("revoke", key_id, "--wait")

    def states(self) -> dict[str, str]:
        keys = self._run("list", "--owner", OWNER)["keys"]
        return {key["key_id"]: key["state"] for key in keys}


class ByRest:
    def __init__(self, server: Server, admin: str) -> None:
        self._server, self._admin = server, admin

    def _call(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        status, _, answer = self._server.request(
            method, f"/mlflow/api/2.0/hokusai/keys{path}", key=self._admin, body=data
        )
        assert status in (200, 201), answer
        return json.loads(answer)

    def create(self, limit: int) -> tuple[str, str]:
        body = {"owner": OWNER, "scopes": ["model:write"], "rate_limit_per_hour": limit}
        made = self._call("POST", "", body)
        return made["key_id"], made["key"]

    def unlimit(self, key_id: str) -> None:
        self._call("PATCH", f"/{key_id}", {"rate_limit_per_hour": None})

    def rotate(self, key_id: str, overlap: int) -> tuple[str, str]:
        made = self._call("POST", f"/{key_id}/rotate", {"overlap": overlap})
        return made["key_id"], made["key"]

    def revoke(self, key_id: str) -> None:
        self._call("DELETE", f"/{key_id}?wait=true")

    def states(self) -> dict[str, str]:
        keys = self._call("GET", "?owner=ACME%20Corp.")["keys"]
        return {key["key_id"]: key["state"] for key in keys}


class ByPython:
    def __init__(self, server: Server, admin: str) -> None:
        self._client = mlflow.server.get_app_client("hokusai-auth", tracking_uri=server.origin)
        self._admin = admin

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOKUSAI_API_KEY", self._admin)
            patch.setenv("HOKUSAI_ALLOWED_ORIGINS", self._client.tracking_uri)
            return getattr(self._client, method)(*arguments, **options)

    def create(self, limit: int) -> tuple[str, str]:
        made = self._call("create_key", OWNER, ["model:write"], rate_limit_per_hour=limit)
        return made["key_id"], made["key"]

    def unlimit(self, key_id: str) -> None:
        self._call("edit_key", key_id, rate_limit_per_hour=None)

    def rotate(self, key_id: str, overlap: int) -> tuple[str, str]:
        made = self._call("rotate_key", key_id, overlap=overlap)
        return made["key_id"], made["key"]

    def revoke(self, key_id: str) -> None:
        self._call("revoke_key", key_id, wait=True)

    def states(self) -> dict[str, str]:
        return {key["key_id"]: key["state"] for key in self._call("list_keys", owner=OWNER)}


class ByPage:
    """With a browser, signed in as an administrator, under a prefix."""

    def __init__(self, server: Server, admin: str) -> None:
        sync_api = pytest.importorskip("playwright.sync_api")
        if not CHROMIUM.exists():
            pytest.skip(f"{CHROMIUM} is missing (Debian: apt install chromium)")
        self._playwright = sync_api.sync_playwright().start()
        chromium = self._playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=list(CHROMIUM_ARGS)
        )
        self._page = chromium.new_page()
        self._home = f"{server.origin}/api/mlflow/hokusai/keys"
        self._page.goto(self._home)
        self._page.get_by_label("API key").fill(admin)
        self._page.keyboard.press("Enter")
        self._page.wait_for_url(self._home)

    def close(self) -> None:
        self._playwright.stop()

    def _row(self, key_id: str) -> Any:
        return self._page.locator(f"tr#{key_id}")

    def _made(self) -> tuple[str, str]:
        dialog = self._page.get_by_role("dialog", name="Copy the key now")
        key = dialog.get_by_label("Key of").input_value()
        dialog.get_by_role("button", name="Done").click()
        self._page.goto(self._home)
        return self._page.locator("tbody tr").first.get_attribute("id"), key

    def create(self, limit: int) -> tuple[str, str]:
        self._page.get_by_role("button", name="New key").click()
        dialog = self._page.get_by_role("dialog", name="New key")
        dialog.get_by_label("Owner").fill(OWNER)
        dialog.get_by_label("model:write").check()
        dialog.get_by_label("Requests per hour").fill(str(limit))
        dialog.get_by_role("button", name="Create key").click()
        return self._made()

    def unlimit(self, key_id: str) -> None:
        self._row(key_id).get_by_role("button", name="Edit").click()
        dialog = self._page.get_by_role("dialog", name="Edit")
        dialog.get_by_label("Requests per hour").fill("")
        dialog.get_by_role("button", name="Save").click()
        dialog.wait_for(state="hidden")

    def rotate(self, key_id: str, overlap: int) -> tuple[str, str]:
        self._row(key_id).get_by_role("button", name="Rotate").click()
        dialog = self._page.get_by_role("dialog", name="Rotate")
        assert overlap == 3600
        dialog.get_by_label("1 hour").check()
        dialog.get_by_role("button", name="Rotate key").click()
        return self._made()

    def revoke(self, key_id: str) -> None:
        self._row(key_id).get_by_role("button", name="Revoke").click()
        dialog = self._page.get_by_role("dialog", name="Revoke")
        dialog.get_by_role("button", name="Revoke key").click()
        dialog.wait_for(state="hidden")
        time.sleep(REVOKED_EVERYWHERE)  # the page promises no more than "within a second"

    def states(self) -> dict[str, str]:
        self._page.goto(f"{self._home}?query=ACME&state=any")
        rows = [
            json.loads(row.get_attribute("data-key") or "{}")
            for row in self._page.locator("tbody tr").all()
        ]
        return {row["key_id"]: row["state"] for row in rows}


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Four workers that count limits together, in Redis."""
    folder = tmp_path_factory.mktemp("lifecycle")
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed, without which each worker counts for itself")
    with ExitStack() as stack:
        port = free_port()
        stack.enter_context(redis_server(folder, "--port", str(port)))
        yield stack.enter_context(
            serve(
                folder,
                SERVERS["workers"],
                HOKUSAI_AUTH_REDIS_URL=f"redis://127.0.0.1:{port}/0",
                HOKUSAI_AUTH_SECRET_KEY="not secret, as this is a test, but long",
            )
        )


class Connections:
    """As many connections at once as it takes for every worker to be asked."""

    def __init__(self, server: Server) -> None:
        self._port = server.port

    def ask(self, key: str) -> list[tuple[int, dict[str, Any], http.client.HTTPMessage]]:
        path, headers = "/api/2.0/mlflow/registered-models/search", {"X-API-Key": key}
        connections = [http.client.HTTPConnection("127.0.0.1", self._port) for _ in range(24)]
        for connection in connections:
            connection.request("GET", path, headers=headers)
        found = []
        for connection in connections:
            response = connection.getresponse()
            found.append((response.status, json.loads(response.read()), response.headers))
            connection.close()
        return found

    def statuses(self, key: str) -> set[int]:
        return {status for status, _, _ in self.ask(key)}


@pytest.mark.parametrize("way", [ByCommand, ByRest, ByPython, ByPage])
def test_a_key_s_life(
    everywhere: Server,
    way: type[Managed],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    admin = everywhere.key("mlflow:admin")
    managed = way(everywhere, admin)
    if isinstance(managed, ByPage):
        request.addfinalizer(managed.close)
    connections = Connections(everywhere)

    # Create and use: the real client registers a model with it.
    key_id, key = managed.create(LIMIT)
    monkeypatch.setenv("HOKUSAI_API_KEY", key)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{everywhere.origin}/api/mlflow")
    MlflowClient().create_registered_model(f"by {way.__name__}")

    # Limit: as many requests as it has left pass, over all workers.
    answers = connections.ask(key)
    assert [status for status, _, _ in answers].count(200) == LIMIT - 1
    refused = next(answer for answer in answers if answer[0] == 429)
    assert refused[1]["error"] == "RATE_LIMITED" and refused[2]["RateLimit-Remaining"] == "0"
    assert 0 < int(refused[2]["Retry-After"]) <= 60
    managed.unlimit(key_id)
    _within_a_second(lambda: connections.statuses(key) == {200})

    # Rotate with overlap: both work, and the old one says that it will end.
    began = time.time()
    new_id, new = managed.rotate(key_id, OVERLAP)
    rotated = time.time()
    assert connections.statuses(new) == {200}
    _within_a_second(lambda: all(h["Sunset"] for _, _, h in connections.ask(key)))
    status, _, headers = connections.ask(key)[0]
    assert status == 200 and headers["Deprecation"].startswith("@")
    ends = parsedate_to_datetime(headers["Sunset"]).timestamp()
    assert began - 1 <= ends - OVERLAP <= rotated
    assert {key_id: "deprecated", new_id: "active"}.items() <= managed.states().items()

    # The old one ends, here by an administrator who does not wait that long.
    path = f"/api/2.0/hokusai/keys/{key_id}"
    status, _, answer = everywhere.request("PATCH", path, key=admin, body=b'{"expires_in": 1}')
    assert status == 200, answer
    time.sleep(max(0, json.loads(answer)["expires_at"] - time.time()))
    _within_a_second(
        lambda: {body.get("error") for _, body, _ in connections.ask(key)} == {"KEY_EXPIRED"}
    )
    assert connections.statuses(new) == {200}

    # Revoke: refused everywhere by the time that is said to be done.
    managed.revoke(new_id)
    assert {body.get("error") for _, body, _ in connections.ask(new)} == {"KEY_REVOKED"}
    assert {key_id: "expired", new_id: "revoked"}.items() <= managed.states().items()


def _within_a_second(holds: Callable[[], bool]) -> None:
    """`holds` must, for what is asked later than a second from now."""
    deadline = time.monotonic() + 1
    while True:
        asked = time.monotonic()
        if holds():
            return
        assert asked < deadline


def test_a_key_replaces_itself_without_being_an_administrator_s(server: Server) -> None:
    record, key = server.store.create(owner="Supplier", scopes=["model:write"])
    other = server.store.create(owner="other", scopes=["mlflow:write"])[0]

    def rotate(key_id: str, body: object = None) -> tuple[int, dict[str, Any]]:
        data = None if body is None else json.dumps(body).encode()
        path = f"/api/2.0/hokusai/keys/{key_id}/rotate"
        status, _, answer = server.request("POST", path, key=key, body=data)
        return status, json.loads(answer)

    assert rotate(other.key_id)[0] == 403
    assert rotate(record.key_id, {"scopes": ["mlflow:admin"]})[0] == 400
    began = time.time()
    status, made = rotate(record.key_id)
    assert status == 201 and made["scopes"] == ["model:write"] and made["expires_at"] is None
    assert made["replaces"]["replaced_by"] == made["key_id"]
    assert began <= made["replaces"]["expires_at"] - 86400 <= time.time()
    # What leaked in the meantime makes no further keys.
    assert rotate(record.key_id)[0] == 409
    for method, path in (("GET", "keys"), ("POST", "keys"), ("PATCH", f"keys/{record.key_id}")):
        assert server.request(method, f"/api/2.0/hokusai/{path}", key=made["key"])[0] == 403


def test_a_key_keeps_to_its_networks(tmp_path: Path) -> None:
    with serve(tmp_path, HOKUSAI_AUTH_TRUSTED_PROXIES="127.0.0.1") as server:
        store = server.store
        key = store.create(owner="a", scopes=["mlflow:read"], networks=("198.51.100.0/24",))[1]

        def ask(address: str) -> tuple[int, dict[str, Any]]:
            headers = {"X-Forwarded-For": address}
            path = "/api/2.0/hokusai/whoami"
            status, _, body = server.request("GET", path, key=key, headers=headers)
            return status, json.loads(body)

        assert ask("198.51.100.7")[0] == 200
        # What stands left of the proxy's own word, a client may have written.
        status, body = ask("198.51.100.7, 203.0.113.9")
        assert status == 403 and body["error"] == "ADDRESS_REFUSED"
        assert "203.0.113.9" in body["message"]
        # Another server that asks is told by the address that it names.
        for address, expected in (("198.51.100.9", 200), ("203.0.113.9", 401)):
            status, _, answer = server.request(
                "POST",
                "/api/v1/keys/validate",
                headers={"Authorization": f"Bearer {key}"},
                body=json.dumps({"client_ip": address}).encode(),
            )
            assert status == expected, answer


def test_uses_are_counted_in_the_background_and_told(server: Server) -> None:
    record, key = server.store.create(owner="counted", scopes=["mlflow:read"])
    began = time.time()
    for _ in range(3):
        assert server.request("GET", "/version", key=key)[0] == 200

    def shown() -> dict[str, Any]:
        path = f"/api/2.0/hokusai/keys/{record.key_id}"
        found: dict[str, Any] = json.loads(
            server.request("GET", path, key=server.key("mlflow:admin"))[2]
        )
        return found

    wait_until(lambda: sum(shown().get("uses_by_hour", ())) == 3)
    last = shown()["last_used_at"]
    assert last % 60 == 0 and began - 60 < last <= time.time()

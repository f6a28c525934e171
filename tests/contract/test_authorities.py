"""One contract for every authority over keys: both databases, the auth service, and our own endpoint.

What holds for one must hold for all, so that the gate need not know which it asks. Below it, what is
the endpoint's own: how `POST /api/v1/keys/validate` answers callers other than our client.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import flask
import pytest
import sqlalchemy as sa
from werkzeug.serving import make_server

from mlflow_hokusai_auth.authorities import Backend
from mlflow_hokusai_auth.authorities.service import AuthService
from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.core.policy import Policy, settle
from mlflow_hokusai_auth.core.prefixes import Prefixes
from mlflow_hokusai_auth.core.types import (
    Access,
    Allow,
    Credential,
    NeedKey,
    Operation,
    Principal,
    Rejected,
)
from mlflow_hokusai_auth.server.gate.cors import Cors
from mlflow_hokusai_auth.server.gate.gate import Gate
from mlflow_hokusai_auth.server.gate.wsgi import wsgi_gate
from mlflow_hokusai_auth.server.observe.decision_log import DecisionLog
from mlflow_hokusai_auth.server.web import validate_key
from mlflow_hokusai_auth.store.keys import LocalStore
from tests.conftest import Postgresql
from tests.standin import Standin

#: Seconds after which something is wrong, however busy the machine is.
LONG = 60


@dataclass
class World:
    """An authority, and the means to change what it says."""

    authority: Backend
    #: A new key: owner, scopes, and the seconds after which it expires, or None.
    add: Callable[[str, list[str], float | None], str]
    #: End the key with this text.
    revoke: Callable[[str], None]
    #: Make the authority fail for a while.
    down: Callable[[], contextlib.AbstractContextManager[None]]


# Worlds


def _store_world(
    store: LocalStore, down: Callable[[], contextlib.AbstractContextManager[None]]
) -> World:
    ids: dict[str, str] = {}

    def add(owner: str, scopes: list[str], expires_in: float | None) -> str:
        until = None if expires_in is None else time.time() + expires_in
        record, key = store.create(owner=owner, scopes=scopes, expires_at=until)
        ids[key] = record.key_id
        return key

    def revoke(key: str) -> None:
        store.revoke(ids[key], force=True)

    return World(store, add, revoke, down)


def _sqlite(folder: Path) -> World:
    uri = f"sqlite:///{folder}/keys.db"
    store = LocalStore(uri)
    store.migrate()

    @contextlib.contextmanager
    def down() -> Iterator[None]:
        _rename(uri, "hokusai_auth_keys", "away")
        yield
        _rename(uri, "away", "hokusai_auth_keys")

    return _store_world(store, down)


def _rename(uri: str, old: str, new: str) -> None:
    engine = sa.create_engine(uri)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE {old} RENAME TO {new}")
    engine.dispose()


def _postgresql(cluster: Postgresql) -> World:
    store = LocalStore(cluster.uri)
    store.migrate()

    @contextlib.contextmanager
    def down() -> Iterator[None]:
        cluster.stop()
        try:
            yield
        finally:
            cluster.start()

    return _store_world(store, down)


def _standin(service: Standin) -> World:
    def add(owner: str, scopes: list[str], expires_in: float | None) -> str:
        # The service itself knows the time; the stand-in is told.
        expired = expires_in is not None and expires_in <= 0
        return service.add(user_id=owner, scopes=scopes, state="expired" if expired else "active")

    def revoke(key: str) -> None:
        service.grants[key].state = "revoked"

    return World(AuthService(service.url, timeout=LONG), add, revoke, lambda: _gone(service))


@contextlib.contextmanager
def _gone(service: Standin) -> Iterator[None]:
    service.go()
    try:
        yield
    finally:
        service.come_back()


class Uncached:
    """An authority that asks `store` each time, so that a change counts at once."""

    def __init__(self, store: Backend) -> None:
        self.lookup = store.lookup

    def peek(self, key: str, address: str) -> None:
        return None


@contextlib.contextmanager
def endpoint(store: Backend) -> Iterator[str]:
    """The URL of a server that has nothing but the endpoint, behind the gate, on `store`."""
    app = flask.Flask("endpoint")
    app.register_blueprint(validate_key.blueprint())
    gate = Gate(Uncached(store), Policy(), Prefixes(()), Cors((), ""), DecisionLog())
    server = make_server("127.0.0.1", 0, wsgi_gate(app, gate), threaded=True)
    # Else the end of the test waits for connections that are kept for a next request.
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(params=["sqlite", "postgresql", "service", "endpoint"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        if request.param == "sqlite":
            yield _sqlite(tmp_path)
        elif request.param == "postgresql":
            yield _postgresql(request.getfixturevalue("postgresql"))
        elif request.param == "service":
            yield _standin(stack.enter_context(Standin()))
        else:
            behind = _sqlite(tmp_path)
            url = stack.enter_context(endpoint(behind.authority))
            yield World(AuthService(url, timeout=LONG), behind.add, behind.revoke, behind.down)


def allowed(found: Principal | Rejected, access: Access = Access.PUBLIC) -> bool:
    """Whether the gate would let `found` do something that takes `access`."""
    need = NeedKey(Credential("k", ("X-API-Key",)), Operation(access, "runs", "GET /x"))
    return isinstance(settle(need, found, time.time(), Policy()), Allow)


# The contract


def test_a_good_key_is_its_owner_s_with_its_scopes(world: World) -> None:
    key = world.add("Zoë & 株式会社 <x>", ["mlflow:write", "mlflow:read"], None)
    other = world.add("Another", ["mlflow:read"], 3600)
    # Nobody listed the addresses that it may be sent from.
    for address in ("", "192.0.2.1", "2001:db8::1"):
        found = world.authority.lookup(key, address)
        assert isinstance(found, Principal)
        assert found.owner == found.owner_id == "Zoë & 株式会社 <x>" and found.key_id
        assert found.scopes == {"mlflow:write", "mlflow:read"}
        assert allowed(found, Access.WRITE) and not allowed(found, Access.ADMIN)
    also = world.authority.lookup(other, "192.0.2.1")
    assert isinstance(also, Principal) and also.owner == "Another"
    assert allowed(also, Access.READ) and not allowed(also, Access.WRITE)
    # A number that stays without changes.
    assert world.authority.generation() == world.authority.generation()


def test_a_key_is_found_by_all_of_its_text(world: World) -> None:
    key = world.add("ACME", ["mlflow:read"], None)
    for wrong in (key[:-1], key + "a", key.swapcase(), key[3:], "%", "' OR '1'='1", "x"):
        assert not allowed(world.authority.lookup(wrong, "")), wrong[-2:]
    assert isinstance(world.authority.lookup(keys.generate(), "192.0.2.1"), Rejected)


def test_a_key_that_is_revoked_or_expired_is_of_no_use(world: World) -> None:
    key = world.add("ACME", ["mlflow:admin"], None)
    assert allowed(world.authority.lookup(key, ""))
    world.revoke(key)
    for ended in (key, world.add("ACME", ["mlflow:admin"], -1)):
        assert not allowed(world.authority.lookup(ended, ""))


def test_an_outage_is_told_and_passes(world: World) -> None:
    key = world.add("ACME", ["mlflow:read"], None)
    assert allowed(world.authority.lookup(key, ""))
    with world.down():
        for asked in (key, keys.generate()):
            with pytest.raises(AuthorityUnavailable):
                world.authority.lookup(asked, "")
    assert allowed(world.authority.lookup(key, ""))


def test_no_key_is_in_a_log_or_an_error(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    good, bad = world.add("ACME", ["mlflow:read"], None), keys.generate()
    ended = world.add("ACME", ["mlflow:read"], -1)
    said = [repr(world.authority.lookup(key, "192.0.2.1")) for key in (good, bad, ended)]
    with world.down():
        for key in (good, bad):
            try:
                world.authority.lookup(key, "192.0.2.1")
            except AuthorityUnavailable:
                said.append(traceback.format_exc())
    assert len(said) == 5
    text = caplog.text + "".join(said)
    for key in (good, bad, ended):
        assert key not in text and keys.digest(key) not in text


# The endpoint


def call(url: str, headers: dict[str, str], body: bytes = b"{}") -> tuple[int, dict[str, object]]:
    request = Request(f"{url}/api/v1/keys/validate", data=body, headers=headers, method="POST")
    try:
        with urlopen(request, timeout=LONG) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[tuple[World, str]]:
    world = _sqlite(tmp_path)
    with endpoint(world.authority) as url:
        yield world, url


def test_the_endpoint_tells_the_contract_s_fields(behind: tuple[World, str]) -> None:
    world, url = behind
    key = world.add("ACME", ["model:write"], None)
    body = b'{"service_id": "prediction"}'
    for headers in ({"Authorization": f"Bearer {key}"}, {"X-API-Key": key}):
        status, answer = call(url, headers, body)
        assert status == 200
        assert answer.pop("key_id").startswith("key_")
        assert answer == {
            "is_valid": True,
            "user_id": "ACME",
            "service_id": "prediction",
            "scopes": ["model:write"],
            "email": None,
            "roles": [],
            "is_admin": False,
            "rate_limit_per_hour": None,
            "models": [],
            "no_delete": False,
            "billing_plan": None,
            "monthly_prediction_limit": None,
            "error": None,
        }


def test_the_endpoint_takes_any_body(behind: tuple[World, str]) -> None:
    world, url = behind
    key = world.add("ACME", [], None)
    for body in (b"", b"[]", b"null", b"not json", b'{"service_id": 5}'):
        status, answer = call(url, {"X-API-Key": key}, body)
        assert (status, answer["is_valid"], answer["service_id"]) == (200, True, "platform"), body


def test_regression_13_a_key_in_the_body_alone_does_not_count(behind: tuple[World, str]) -> None:
    world, url = behind
    key = world.add("ACME", ["mlflow:admin"], None)
    status, answer = call(url, {}, json.dumps({"api_key": key}).encode())
    assert (status, answer["error"]) == (401, "KEY_MISSING")
    assert key not in str(answer)

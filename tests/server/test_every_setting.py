"""Every setting that is read is documented, and every documented setting changes something.

Each case starts a server twice, by `create_app` and the environment, without and with the setting, and
sends it requests. A Flask application that returns the request's parts stands in for MLflow.
"""

from __future__ import annotations

import ast
import asyncio
import contextvars
import json
import logging
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flask
import mlflow.server
import pytest
from fastapi import FastAPI
from mlflow.exceptions import MlflowException
from mlflow.server import fastapi_app
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore
from pydantic import AliasChoices
from werkzeug.test import Client, TestResponse

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.trust import workload
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import app, metrics
from mlflow_hokusai_auth.server.caller import Caller, current
from mlflow_hokusai_auth.server.gate import interceptors
from mlflow_hokusai_auth.server.isolation import hooks
from mlflow_hokusai_auth.server.isolation.provenance import Provenance
from mlflow_hokusai_auth.server.settings import PREFIX, Settings
from mlflow_hokusai_auth.server.web import leak_reports
from mlflow_hokusai_auth.server.web.trust_schemas import GRANT_TYPE, TOKEN_TYPES
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.trusts import Trusts
from tests.authorities.test_service import certificate  # noqa: F401 - a fixture
from tests.harness import free_port
from tests.issuer import Issuer
from tests.server.compare_fast_path import ask
from tests.server.forked import watchers_rest
from tests.server.isolation.stores import unused_name
from tests.server.web import test_leak_reports as signed
from tests.standin import Grant, Standin

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "mlflow_hokusai_auth"
PAGES = "".join(page.read_text("utf-8") for page in sorted((ROOT / "docs").rglob("*.md")))
READ = "/version"
HERE = "https://registry.example.com"
WRITE = "/api/2.0/mlflow/experiments/create"
WHOAMI = "api/2.0/hokusai/whoami"
ADMIN = "/api/2.0/mlflow/webhooks"
TRUST = "/api/2.0/hokusai/trust"
ASSISTANT = "/ajax-api/3.0/mlflow/assistant/config"


def stand_in() -> flask.Flask:
    """The stand-in for MLflow."""
    made = flask.Flask("mlflow")

    @made.route("/<path:path>", methods=["GET", "POST"])
    def anything(path: str) -> flask.Response:
        return flask.jsonify(dict(flask.request.headers))

    return made


class Server:
    """The application that `create_app` returns, and its store."""

    def __init__(self, store: LocalStore) -> None:
        self.store = store
        self._client = Client(app.create_app(), use_cookies=False)

    def ask(self, path: str = READ, key: str = "", **more: Any) -> TestResponse:
        headers = {"X-API-Key": key, **more.pop("headers", {})}
        more["environ_overrides"] = {"REMOTE_ADDR": "127.0.0.1"}
        # The server reports the request only after the response has been read to its end.
        return self._client.open(path, headers=headers, buffered=True, **more)

    def status(self, path: str = READ, key: str = "", **more: Any) -> int:
        return self.ask(path, key, **more).status_code

    def key(self, *scopes: str, **grant: Any) -> str:
        return self.store.create(owner="test", scopes=scopes, **grant)[1]


@dataclass
class World:
    """The surroundings of the servers of one case."""

    folder: Path
    service: Standin
    patch: pytest.MonkeyPatch
    caplog: pytest.LogCaptureFixture
    fixture: Callable[[str], Any]

    def set(self, name: str, value: Value) -> None:
        self.patch.setenv(name, value if isinstance(value, str) else value(self))

    def start(self) -> Server:
        """Start like `mlflow server`: first the command, then a worker."""
        self.patch.setattr(mlflow.server, "app", stand_in())
        app.bootstrap({})
        return Server(LocalStore("sqlite:///hokusai_auth.db"))

    def logged(self, name: str) -> int:
        return sum(one.name == f"mlflow_hokusai_auth.{name}" for one in self.caplog.records)


Value = str | Callable[[World], str]


@dataclass(frozen=True)
class Case:
    """`look` sees `default` without the setting, and `changed` when it has the value `to`."""

    to: Value
    look: Callable[[World], object]
    default: object
    changed: object
    given: dict[str, Value] = field(default_factory=dict)


def service_url(world: World) -> str:
    return world.service.url


def redis_url(world: World) -> str:
    return str(world.fixture("redis_url"))


def certificate_file(world: World) -> str:
    return str(world.fixture("certificate"))


SERVICE: dict[str, Value] = {"BACKEND": "service", "SERVICE_URL": service_url}
REFUSED_TO_START = "refused to start"


def status(path: str = READ, *scopes: str, **more: Any) -> Callable[[World], int]:
    """Return the response to a request with a key that has these scopes."""

    def look(world: World) -> int:
        server = world.start()
        return server.status(path, server.key(*scopes), **more)

    return look


def by_service(path: str = READ, **grant: Any) -> Callable[[World], int]:
    """Return the response to a request with a key for which the service answers with these fields."""
    return lambda world: world.start().status(path, world.service.add(**grant))


def without_a_key(world: World) -> int:
    return world.start().status()


def whom_to_ask(world: World) -> list[bool]:
    """Return whether a refusal, the page of signing in, one's own page and whoami say whom to ask."""
    server = world.start()
    key = server.key("mlflow:read")
    answers = [server.ask(READ), server.ask("/hokusai/login")]
    answers += [server.ask(f"/{path}", key) for path in ("hokusai/keys", WHOAMI)]
    return ["ops@example.com" in answer.text for answer in answers]


def first_then(change: Callable[[World, str], object], known: bool = True) -> Any:
    """Return the response for a key that the service knew, or did not, at its first lookup."""

    def look(world: World) -> int:
        server = world.start()
        world.service.behave("strict")
        key = world.service.add() if known else keys.generate()
        assert server.status(key=key) == (200 if known else 401)
        change(world, key)
        time.sleep(0.1)
        return server.status(key=key)

    return look


def forget(world: World, key: str) -> None:
    del world.service.grants[key]


def learn(world: World, key: str) -> None:
    world.service.grants[key] = Grant()


def be_gone(world: World, key: str) -> None:
    world.service.behave("status", status=503)


def slow(world: World) -> int:
    world.service.behave("slow", seconds=0.5)
    return by_service()(world)


def secure(world: World) -> int:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_file(world))
    with Standin(tls=context) as service:
        world.set("HOKUSAI_AUTH_SERVICE_URL", service.url)
        return world.start().status(key=service.add())


def through_a_proxy(world: World) -> int:
    for name in ("NO_PROXY", "no_proxy"):
        world.set(name, "")
    world.set("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    return by_service()(world)


def calls_of_two_servers(world: World) -> int:
    key = world.service.add()
    before = len(world.service.calls)
    for _ in range(2):
        assert world.start().status(key=key) == 200
    return len(world.service.calls) - before


def other_store(world: World) -> int:
    other = LocalStore(f"sqlite:///{world.folder}/other.db")
    other.migrate()
    key = other.create(owner="test", scopes=["mlflow:read"])[1]
    return world.start().status(key=key)


def from_a_network(world: World) -> int:
    server = world.start()
    key = server.key("mlflow:read", networks=["192.0.2.0/24"])
    return server.status(key=key, headers={"X-Forwarded-For": "192.0.2.7"})


def failures(world: World) -> list[int]:
    world.fixture("one_minute")
    server = world.start()
    return [server.status(key=keys.generate()) for _ in range(2)]


def session(world: World) -> int:
    """Return the response to a session a moment after the sign-in."""
    server = world.start()
    form, here = {"key": server.key("mlflow:read")}, {"Origin": "http://localhost"}
    page = server.ask("/hokusai/login", method="POST", data=form, headers=here)
    assert page.status_code == 303, page.text
    cookie = page.headers["Set-Cookie"].partition(";")[0]
    time.sleep(0.6)
    return server.status(headers={"Cookie": cookie})


def lifetime_of_a_new_key(**body: object) -> Callable[[World], int]:
    """Return the seconds that a new key with these fields lives, or the status of a refusal."""

    def look(world: World) -> int:
        server = world.start()
        given = {"owner": "ACME", "scopes": ["model:write"], **body}
        path, key = "/api/2.0/hokusai/keys", server.key("mlflow:admin")
        made = server.ask(path, key, method="POST", json=given)
        if made.status_code != 201 or made.json is None:
            return made.status_code
        return round(made.json["expires_at"] - made.json["created_at"])

    return look


def with_an_exchanged_one(look: Callable[[World], int]) -> Callable[[World], tuple[int, int]]:
    """Return also the seconds that the key of a trust lives, which was added for 15 minutes."""

    def both(world: World) -> tuple[int, int]:
        first, server = look(world), world.start()
        with Issuer() as issuer:
            job = workload(issuer=issuer.url, claims={"sub": "job"}, single_use=True)
            trusts = Trusts(server.store.database)
            trusts.add(job, owner="ACME", scopes=("model:write",), ttl=900.0)
            body = {
                "grant_type": GRANT_TYPE,
                "subject_token_type": TOKEN_TYPES[0],
                "subject_token": issuer.token({"sub": "job", "aud": HERE}),
            }
            answer = server.ask("/api/2.0/hokusai/token", method="POST", json=body)
        assert answer.json is not None and "key_id" in answer.json, answer.text
        record = server.store.get(answer.json["key_id"])
        assert record.expires_at is not None
        return first, round(record.expires_at - record.created_at)

    return both


def leak_keys(world: World) -> str:
    path = world.folder / "public.json"
    path.write_text(json.dumps({"public_keys": [signed.entry("one", signed.pem(signed.SIGNER))]}))
    return str(path)


def leak(world: World) -> int:
    sent = {
        leak_reports.IDENTIFIER_HEADER: "one",
        leak_reports.SIGNATURE_HEADER: signed.sign(signed.BODY),
    }
    path = "/api/2.0/hokusai/keys/leaked"
    return world.start().status(path, method="POST", data=signed.BODY, headers=sent)


def an_exchange(world: World) -> int:
    return world.start().status("/api/2.0/hokusai/token", method="POST", data=b"{}")


def lines(name: str) -> Callable[[World], int]:
    """Return the lines that one successful read leaves in a log."""

    def look(world: World) -> int:
        assert status(READ, "mlflow:read")(world) == 200
        return world.logged(name)

    return look


METRICS = f"127.0.0.1:{free_port()}"


def metrics_elsewhere(world: World) -> object:
    world.start()
    try:
        with urllib.request.urlopen(f"http://{METRICS}/metrics") as answer:
            return answer.status
    except urllib.error.URLError:
        return "nobody there"


def broken_interceptor(world: World) -> int:
    def fail(_: object) -> None:
        raise RuntimeError

    point = SimpleNamespace(
        name="broken", value="broken", load=lambda: SimpleNamespace(on_request=fail)
    )
    world.patch.setattr(interceptors, "entry_points", lambda group: [point])
    return status(READ, "mlflow:read")(world)


def tenant_arrives(world: World) -> bool:
    server = world.start()
    sent = {"X-Tenant": "one", "User-Agent": "test"}
    return "X-Tenant" in server.ask(key=server.key("mlflow:read"), headers=sent).text


def key_in_query(world: World) -> int:
    server = world.start()
    return server.status(f"{READ}?api_key={server.key('mlflow:read')}")


def no_store(world: World) -> int:
    world.set("HOKUSAI_AUTH_DATABASE_URI", "sqlite:////nowhere/at/all.db")
    return without_a_key(world)


SHARED = {**SERVICE, "SECRET_KEY": "s" * 32}


def opens(location: str) -> Callable[[World], object]:
    """Return whether MLflow opens a location after the application is assembled."""

    def look(world: World) -> bool:
        world.start()
        try:
            return bool(get_artifact_repository(location))
        except MlflowException as error:
            assert error.json_kwargs["error"] == "LOCATION_REFUSED"
            return False

    return look


def registry_of(world: World) -> SqlAlchemyStore:
    """Start a server on a new database of MLflow's; return its registry."""
    uri = f"sqlite:///{world.folder}/mlflow.db"
    world.set("_MLFLOW_SERVER_FILE_STORE", uri)
    registry = SqlAlchemyStore(uri)
    world.start()
    return registry


def asker(owner: str, scope: str = "model:write") -> Caller:
    key = Principal(f"key_{owner}_{scope}", owner, frozenset({scope}), owner_id=owner)
    return Caller(key, "", "")


def answer(caller: Caller, act: Callable[[], object]) -> int:
    """Return the status with which MLflow would answer what `act` does for `caller`."""
    try:
        contextvars.Context().run(_as, caller, act)
    except MlflowException as error:
        return error.get_http_status_code()
    return 200


def a_foreign_change(world: World) -> int:
    """Return how MLflow's registry answers a supplier that changes another one's model."""
    registry, name = registry_of(world), unused_name()
    contextvars.Context().run(_as, asker("ACME"), registry.create_registered_model, name)
    return answer(asker("GLOBEX"), partial(registry.update_registered_model, name, "changed"))


def a_moved_alias(world: World) -> int:
    """Return how MLflow's registry answers a supplier that sets an alias of its own model."""
    registry, name = registry_of(world), unused_name()
    owner, staff = asker("ACME"), asker("ACME", "mlflow:admin")
    contextvars.Context().run(_as, owner, registry.create_registered_model, name)
    contextvars.Context().run(_as, staff, registry.create_model_version, name, "s3://a/b")
    return answer(owner, partial(registry.set_registered_model_alias, name, "champion", "1"))


def _as(caller: Caller, act: Callable[..., object], *arguments: object) -> None:
    current.set(caller)
    act(*arguments)


def stamps(world: World) -> bool:
    world.start()
    installed = hooks.installed(Provenance)
    assert installed is not None
    return installed.stamps


def past_fastapi(world: World) -> bool:
    """Return whether a request under uvicorn bypasses the middleware of the FastAPI application."""
    flask_app = stand_in()
    flask_app.add_url_rule(READ, "version", lambda: "1")
    whole, seen = FastAPI(), []

    @whole.middleware("http")
    async def workspace_context_middleware(request: Any, call_next: Any) -> Any:
        seen.append(request.url.path)
        return await call_next(request)

    whole.mount("/", fastapi_app._EfficientWSGIMiddleware(flask_app))
    world.patch.setenv("_MLFLOW_SGI_NAME", "uvicorn")
    world.patch.setattr(fastapi_app, "create_fastapi_app", lambda _: whole)
    world.patch.setattr(mlflow.server, "app", flask_app)
    app.bootstrap({})
    key = LocalStore("sqlite:///hokusai_auth.db").create(owner="x", scopes=["mlflow:read"])[1]
    scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": READ}
    scope |= {"query_string": b"", "headers": [(b"x-api-key", key.encode())]}
    status, _, body = asyncio.run(ask(app.create_app(), scope, b""))
    assert (status, body) == (200, b"1")
    return not seen


CASES: dict[str, Case] = {
    "mode": Case("off", without_a_key, 401, 200),
    "force_mode": Case("off", no_store, REFUSED_TO_START, 200),
    "isolation": Case("off", a_foreign_change, 404, 200),
    "backend": Case("service", by_service(), 401, 200, {"SERVICE_URL": service_url}),
    "contact": Case(" ops@example.com", whom_to_ask, [False] * 4, [True] * 4),
    "database_uri": Case(lambda w: f"sqlite:///{w.folder}/other.db", other_store, 401, 200),
    "policy": Case("authenticated", status(WRITE, "mlflow:read", method="POST"), 403, 200),
    "empty_scopes": Case("none", by_service(scopes=[]), 200, 403, SERVICE),
    "registry_admin_emails": Case(
        "a@example.com", by_service(ADMIN, extra={"email": "A@example.com"}), 403, 200, SERVICE
    ),
    "registry_admin_scopes": Case("ops", status(ADMIN, "ops"), 403, 200),
    "registry_admin_roles": Case(
        "chief", by_service(ADMIN, extra={"roles": ["chief"]}), 403, 200, SERVICE
    ),
    "assistant": Case("true", status(ASSISTANT, "mlflow:admin"), 403, 200),
    "service_url": Case(service_url, by_service(), REFUSED_TO_START, 200, {"BACKEND": "service"}),
    "service_id": Case("website", by_service(service_id="website"), 401, 200, SERVICE),
    "service_timeout": Case("0.2", slow, 200, 503, SERVICE),
    "service_ca_bundle": Case(certificate_file, secure, 503, 200, SERVICE),
    "service_environment_proxies": Case("true", through_a_proxy, 200, 503, SERVICE),
    "cache_ttl": Case("0.05", first_then(forget), 200, 401, SERVICE),
    "negative_cache_ttl": Case("0", first_then(learn, known=False), 401, 200, SERVICE),
    "stale_if_error": Case("60", first_then(be_gone), 503, 200, {**SERVICE, "CACHE_TTL": "0.05"}),
    "redis_url": Case(redis_url, calls_of_two_servers, 2, 1, SHARED),
    # Without a common secret, each of the two would make its own, and they would share no entries.
    "secret_key": Case(
        "s" * 32, calls_of_two_servers, REFUSED_TO_START, 1, {**SERVICE, "REDIS_URL": redis_url}
    ),
    "artifact_roots": Case("s3://team/models", opens("s3://team/models/1"), False, True),
    "trusted_proxies": Case("127.0.0.1", from_a_network, 403, 200),
    "prefixes": Case("/x", status(f"/x{READ}", "mlflow:read"), 403, 200),
    "failures_per_minute": Case("1", failures, [401, 401], [401, 429]),
    "public_urls": Case(HERE, an_exchange, 503, 400),
    "supplier_trust": Case("true", status(TRUST, "model:read"), 403, 200),
    "session_lifetime": Case("0.5", session, 200, 401),
    "key_lifetime": Case("3600", lifetime_of_a_new_key(), 365 * 86400, 3600),
    "key_lifetime_max": Case(
        "600",
        with_an_exchanged_one(lifetime_of_a_new_key(expires_in=7200)),
        (7200, 900),
        (400, 600),
        {"PUBLIC_URLS": HERE},
    ),
    "leak_public_keys": Case(leak_keys, leak, 404, 200),
    "log_reads": Case("1", lines("decisions"), 0, 1),
    "metrics_bind": Case(METRICS, metrics_elsewhere, "nobody there", 200),
    "protected_aliases": Case("champion", a_moved_alias, 200, 403),
    "provenance": Case("false", stamps, True, False),
    "shortcut": Case("false", past_fastapi, True, False),
    "interceptor_errors": Case("refuse", broken_interceptor, 200, 503),
    "forward_headers": Case("user-agent", tenant_arrives, True, False),
    "remove_headers": Case("x-tenant", tenant_arrives, True, False),
    "debug_headers": Case("true", lines("headers"), 0, 1),
    "query_key": Case("false", key_in_query, 200, 401),
}


@pytest.fixture
def world(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> Iterator[World]:
    """Undo, at the end, everything that a start changes in its process."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    (tmp_path / "metrics").mkdir()
    monkeypatch.setenv(metrics.DIRECTORY, str(tmp_path / "metrics"))
    for name in ("FORWARDED_ALLOW_IPS", *app.server_jobs._OURS):
        # monkeypatch restores only variables that it has set itself.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(logging, "_logRecordFactory", logging.getLogRecordFactory())
    for name in ("", ".audit", ".decisions", ".headers"):
        log = logging.getLogger(f"mlflow_hokusai_auth{name}")
        for what in ("handlers", "level", "propagate"):
            monkeypatch.setattr(log, what, copy(getattr(log, what)))
    # A full collection takes longer than the rest of a start.
    monkeypatch.setattr(app, "gc", SimpleNamespace(collect=int, freeze=int))
    # The thread would read the store of each server until the end of all tests.
    monkeypatch.setattr(app.live_settings, "follow", lambda *_: None)
    listening = []
    start = metrics.start_http_server

    def listen(*args: Any, **options: Any) -> None:
        listening.append(start(*args, **options)[0])

    monkeypatch.setattr(metrics, "start_http_server", listen)
    with watchers_rest(), Standin() as service:
        yield World(tmp_path, service, monkeypatch, caplog, request.getfixturevalue)
    for one in listening:
        one.shutdown()
        one.server_close()


def seen(world: World, case: Case) -> object:
    try:
        return case.look(world)
    except SystemExit:
        return REFUSED_TO_START


def test_every_setting_has_a_case() -> None:
    assert set(CASES) == set(Settings.model_fields)


@pytest.mark.parametrize("name", CASES)
def test_a_setting_changes_what_the_server_does(name: str, world: World) -> None:
    case, variable = CASES[name], PREFIX + name.upper()
    for other, value in case.given.items():
        world.set(PREFIX + other, value)
    assert variable not in os.environ
    assert seen(world, case) == case.default
    world.set(variable, case.to)
    assert seen(world, case) == case.changed


# The documentation


def variables() -> Iterator[tuple[str, str]]:
    """Yield module and name of each variable that the package may read: every text of that form, and
    the variables of the command line's options."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if re.fullmatch(r"_?HOKUSAI_[A-Z0-9_]+", node.value):
                    yield path.name, node.value
            elif isinstance(node, ast.keyword) and node.arg in ("envvar", "auto_envvar_prefix"):
                for name in ast.walk(node.value):
                    if isinstance(name, ast.Constant):
                        yield path.name, str(name.value)


def test_every_variable_that_is_read_is_documented() -> None:
    read = set(variables())
    # Only the settings' names are composed, and docs/operator/settings.md is made from the model.
    assert {(where, name) for where, name in read if name.endswith("_")} == {
        ("settings.py", PREFIX)
    }
    names = {name for _, name in read if name != PREFIX}
    for name, setting in Settings.model_fields.items():
        names.add(PREFIX + name.upper())
        if isinstance(setting.validation_alias, AliasChoices):
            names |= {str(name) for name in setting.validation_alias.choices[1:]}
    assert not {name for name in names if not re.search(rf"\b{name}\b", PAGES)}
    assert {"HOKUSAI_API_KEY", "AUTH_SERVICE_URL", "KEEP"} <= names

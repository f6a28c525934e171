"""No key and no session's token gets out: not into a log, an answer, a metric, a table or a process.

Each key here was made for one place and one failure, so that what is found somewhere tells from where
it came. All that a server says is kept while everything goes wrong once, and searched at the end.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.browser import csrf_token, login_location
from mlflow_hokusai_auth.core.types import Request
from mlflow_hokusai_auth.store.links import Links
from tests.e2e.parts import EXPERIMENT, interceptor, renamed
from tests.harness import Server, run_command, serve, wait_until
from tests.server.web.test_leak_reports import (
    SIGNER,
    entry,
    pem,
    sign,
)
from tests.standin import Standin

pytestmark = pytest.mark.servers

KEYS = "/api/2.0/hokusai/keys"
DEBUG = {
    "uvicorn": ("--workers", "1", "--uvicorn-opts", "--log-level debug"),
    "gunicorn": ("--workers", "2", "--gunicorn-opts", "--log-level debug --access-logfile -"),
}
#: An interceptor that quotes all that it is shown, as careless code does.
NOSY = """
class Nosy:
    def on_request(self, request):
        if "/boom" in request.path:
            raise RuntimeError(f"I was shown {request!r}")
    def on_response(self, request, status):
        if "/bang" in request.path:
            raise RuntimeError(f"I was shown {request!r}")
"""


def percent(text: str) -> str:
    """`text` with every character of it percent-encoded."""
    return "".join(f"%{ord(character):02X}" for character in text)


def forms(secret: str) -> Iterator[str]:
    """What to look for: the middle of the text, which is in all of it too, and it in disguise."""
    middle = secret[-33:-13]
    yield middle
    yield percent(middle)
    yield percent(middle).lower()
    for before in ("", ":", "u:"):  # each way in which it may lie across base64's groups of three
        encoded = base64.b64encode((before + secret).encode()).decode()
        yield encoded[16:-4]


class Told:
    """What a server has told, by where, and the secrets that must not be in it."""

    def __init__(self, server: Server, service: Standin) -> None:
        self.server = server
        self.service = service
        self.secrets: dict[str, str] = {}
        self.texts: list[tuple[str, str]] = []
        self.statuses: list[tuple[str, int]] = []
        self._numbers = itertools.count(1)

    def secret(self, label: str, key: str | None = None) -> str:
        """A new key that nobody knows, or `key`, to be looked for under `label`."""
        key = key or keys.generate()
        self.secrets[f"{label} #{next(self._numbers)}"] = key
        return key

    def made(self, label: str, **fields: object) -> str:
        """A key in the store."""
        given = {"owner": f"owner of {label}", "scopes": ["mlflow:admin"], **fields}
        return self.secret(label, self.server.store.create(**given)[1])

    def ask(
        self,
        what: str,
        method: str,
        path: str,
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
        shown: bool = False,
        cookie: bool = False,
    ) -> tuple[int, dict[str, str], bytes]:
        """One request from an address of its own.

        `shown`: its body holds a new key, once, or repeats its own path. `cookie`: it may begin a
        session.
        """
        number = next(self._numbers)
        sent = {"X-Forwarded-For": f"198.51.{number // 250}.{number % 250}", **(headers or {})}
        status, got, answer = self.server.request(method, path, headers=sent, body=body)
        where = f"the answer {status} to {what}: {method} {path[:40]}"
        kept = {n: v for n, v in got.items() if not (cookie and n == "set-cookie")}
        self.texts.append((where, json.dumps(kept)))
        if not shown:
            self.texts.append((where, answer.decode("latin-1")))
        self.statuses.append((what, status))
        return status, got, answer

    def run(self, *arguments: str, key: str = "", given: str = "", shown: bool = False) -> str:
        """`hokusai-auth`, where the server is or as its client; its output, without the first line
        if that is the new key."""
        client = {"MLFLOW_TRACKING_URI": self.server.origin, "HOKUSAI_API_KEY": key} if key else {}
        environ = {**self.server.environ, **client}
        done = run_command(self.server.folder, *arguments, environ=environ, given=given)
        said = done.stdout + done.stderr
        first, _, rest = said.partition("\n")
        self.texts.append((f"hokusai-auth {' '.join(arguments)}"[:60], rest if shown else said))
        return first

    def leaks(self) -> list[str]:
        """Where a secret is to be found after all."""
        database = self.server.folder / "hokusai_auth.db"
        for file in self.server.folder.glob("hokusai_auth.db*"):
            self.texts.append((file.name, file.read_bytes().decode("latin-1")))
        self.texts += [("the server's log", line) for line in self.server.log.splitlines()]
        for pid in [self.server.process.pid, *self.server.workers()]:
            command = Path(f"/proc/{pid}/cmdline").read_text()
            assert "mlflow" in command or "python" in command or "gunicorn" in command
            self.texts.append((f"the command line of {pid}", command))
        assert database.stat().st_size > 0
        everything = "\n".join(text for _, text in self.texts)
        wanted = [(label, form) for label, key in self.secrets.items() for form in forms(key)]
        return [
            f"{where}: {label}: …{text[max(text.find(form) - 160, 0) :][:200]}…"
            for label, form in wanted
            if form in everything
            for where, text in self.texts
            if form in text
        ]


def everywhere(told: Told, fault: str, make: Callable[[str], str], admin: str) -> None:
    """A key in each place of a request where somebody may put one. `make` makes it, for a label."""

    def ask(
        place: str,
        method: str,
        path: str,
        headers: dict[str, str] | None = None,
        repeats: bool = False,
    ) -> None:
        told.ask(f"{fault}, {place}", method, path, headers, shown=repeats)

    def basic(text: str) -> dict[str, str]:
        return {"Authorization": "Basic " + base64.b64encode(text.encode()).decode()}

    def key(place: str) -> str:
        return make(f"{fault}, {place}")

    good = {"X-API-Key": admin}
    page = {"Accept": "text/html"}
    ask("X-API-Key", "GET", EXPERIMENT, {"X-API-Key": key("X-API-Key")})
    ask("to write", "POST", "/api/2.0/mlflow/runs/create", {"X-API-Key": key("to write")})
    ask("a page", "GET", "/", {"X-API-Key": key("a page"), **page})
    ask("Bearer", "GET", EXPERIMENT, {"Authorization": f"Bearer {key('Bearer')}"})
    ask("a scheme", "GET", EXPERIMENT, {"Authorization": f"Token {key('a scheme')}"})
    ask("Basic", "GET", EXPERIMENT, basic(f"u:{key('Basic')}"))
    ask("Basic's user", "GET", EXPERIMENT, basic(f"{key('user')}:"))
    ask("the gateway's", "POST", "/gateway/x/y", {"X-MLflow-Authorization": f"Bearer {key('g')}"})
    ask("?api_key=", "GET", f"{EXPERIMENT}&api_key={key('?api_key=')}")
    ask("?api_key=, encoded", "GET", f"{EXPERIMENT}&api%5Fkey={percent(key('encoded'))}")
    ask("?api_key=, page", "GET", f"/mlflow?api_key={key('page')}&x=1", page)
    ask("?api_key=, page 2", "GET", f"/mlflow/?api_key={key('page 2')}&x=1", page)
    ask("cookie", "GET", EXPERIMENT, {"Cookie": f"hokusai_session={key('cookie')}"})
    ask("User-Agent", "GET", EXPERIMENT, {"User-Agent": key("UA"), "Referer": key("Referer")})
    ask("request id", "GET", EXPERIMENT, {"X-Request-Id": key("id"), **good})
    ask("request id, refused", "GET", EXPERIMENT, {"X-Request-Id": key("id, refused")})
    ask("a header's name", "GET", EXPERIMENT, {key("name"): "1", **good})
    # gunicorn refuses such a method itself, and repeats it.
    ask("method", key("method"), EXPERIMENT, good, True)
    ask("path", "GET", f"/{key('path')}")
    # "There is no such run: …", to the one who asked for it.
    ask("artifact", "GET", f"/api/2.0/mlflow-artifacts/artifacts/{key('artifact')}", good, True)
    ask("key id", "GET", f"{KEYS}/{key('key id')}", good, True)
    ask("run", "GET", f"/api/2.0/mlflow/runs/get?run_id={key('run id')}", good, True)
    ask("query, encoded", "GET", f"/version?x={percent(key('query, encoded'))}", good)
    ask(
        "Origin",
        "POST",
        "/api/2.0/mlflow/runs/create",
        {"Origin": f"http://{key('Origin')}", **good},
    )
    ask("path, encoded", "GET", f"/x/{percent(key('path, encoded'))}")
    ask("path, good", "GET", f"/{key('path, good')}/{percent(key('path, good 2'))}", good)
    ask("boom", "GET", f"/api/2.0/mlflow-artifacts/artifacts/boom/{key('boom')}", good)
    ask("bang", "GET", f"/bang/{key('bang')}", good)
    ask("Host", "GET", EXPERIMENT, {"Host": key("Host"), **good})
    form = urlencode({"key": key("form")}).encode()
    origin = {"Origin": told.server.origin, "Content-Type": "application/x-www-form-urlencoded"}
    signed_in = told.ask(f"{fault}, form", "POST", "/hokusai/login", origin, form, cookie=True)
    told.ask(f"{fault}, form's error", "POST", "/hokusai/login", origin, form + b"!", cookie=True)
    if cookie := signed_in[1].get("set-cookie"):
        told.secret(f"{fault}, session", re.search("hk_session_[^;]+", cookie)[0])  # type: ignore[index]
    body = {"key": key("import"), "owner": "x", "scopes": ["mlflow:read"]}
    told.ask(f"{fault}, import", "POST", f"{KEYS}/import", good, json.dumps(body).encode())
    find = json.dumps({"key": key("find")}).encode()
    told.ask(f"{fault}, find", "POST", f"{KEYS}/find", good, find)
    body = {"key": key("import's error"), "owner": "x", "scopes": []}
    told.ask(f"{fault}, import's error", "POST", f"{KEYS}/import", good, json.dumps(body).encode())


def links(told: Told, admin: str) -> None:
    """Codes of one-time links where they belong, and where people paste them by mistake."""
    made = Links(told.server.store.database).create(owner="x", scopes=["mlflow:read"])[1]
    for label, code in (
        ("a link's code", told.secret("a link's code", made)),
        ("an unknown link's code", told.secret("an unknown link's code", keys.link_code())),
    ):
        sent = {
            "Content-Type": "application/x-www-form-urlencoded",
            "Sec-Fetch-Site": "same-origin",
        }
        told.ask(f"{label} as key", "GET", EXPERIMENT, {"X-API-Key": code})
        told.ask(f"{label} in the query", "GET", f"/hokusai/link?code={code}&{code}")
        told.ask(
            f"{label} in the path", "GET", f"/hokusai/link/{code}", {"X-API-Key": admin}, shown=True
        )
        told.ask(
            f"{label} as key in the form", "POST", "/hokusai/login", sent, f"key={code}".encode()
        )
        form = f"code={code}".encode()
        told.ask(f"{label}, broken", "POST", "/hokusai/link", sent, form[:-1])
        for shown in (True, False):
            told.ask(f"{label}, opened", "POST", "/hokusai/link", sent, form, shown=shown)
    assert [one.owner for one in told.server.store.each()].count("x") >= 1
    told.run("links", "list")
    told.run("links", "revoke", keys.link_code())


@pytest.fixture(params=DEBUG)
def told(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Told]:
    """A server that says as much as it can be told to, with a stand-in of the auth service."""
    (tmp_path / "github.json").write_text(json.dumps({"public_keys": [entry("one", pem(SIGNER))]}))
    with (
        Standin() as service,
        serve(
            tmp_path / "server",
            DEBUG[request.param],
            PYTHONPATH=interceptor(tmp_path / "plugins", NOSY, "site_rule:Nosy"),
            MLFLOW_LOGGING_LEVEL="DEBUG",
            HOKUSAI_AUTH_BACKEND="local,service",
            HOKUSAI_AUTH_SERVICE_URL=service.url,
            HOKUSAI_AUTH_SERVICE_TIMEOUT="0.2",
            HOKUSAI_AUTH_TRUSTED_PROXIES="127.0.0.1",
            HOKUSAI_AUTH_DEBUG_HEADERS="true",
            HOKUSAI_AUTH_LOG_READS="1",
            HOKUSAI_AUTH_INTERCEPTOR_ERRORS="refuse",
            HOKUSAI_AUTH_LEAK_PUBLIC_KEYS=str(tmp_path / "github.json"),
            HOKUSAI_AUTH_PUBLIC_URLS="http://localhost",
        ) as server,
    ):
        told = Told(server, service)
        told.run("log-level", "debug")
        wait_until(lambda: "The log level is now DEBUG" in server.log)
        yield told


def test_no_secret_gets_out_whatever_goes_wrong(told: Told) -> None:
    server, service = told.server, told.service
    admin = told.made("the administrator")
    everywhere(told, "unknown", told.secret, admin)
    everywhere(told, "good", told.made, admin)
    everywhere(told, "expired", lambda at: told.made(at, expires_at=time.time() - 1), admin)
    everywhere(told, "scope", lambda at: told.made(at, scopes=["metrics:read"]), admin)
    everywhere(told, "network", lambda at: told.made(at, networks=["192.0.2.7/32"]), admin)
    everywhere(told, "the service's", lambda at: told.secret(at, service.add()), admin)
    everywhere(told, "misspelt", lambda at: told.secret(at, keys.generate()[:-1]), admin)

    def revoked(label: str) -> str:
        record, key = server.store.create(owner="x", scopes=["mlflow:admin"])
        server.store.revoke(record.key_id)
        return told.secret(label, key)

    everywhere(told, "revoked", revoked, admin)
    links(told, admin)
    conflict = [told.secret("conflict") for _ in range(2)]
    told.ask(
        "conflict",
        "GET",
        f"{EXPERIMENT}&api_key={conflict[0]}",
        {"Authorization": f"Bearer {conflict[1]}"},
    )
    limited = {"X-API-Key": told.made("limited", rate_limit_per_hour=1)}
    # Each of two workers counts for itself.
    for _ in range(3):
        told.ask("limited", "GET", EXPERIMENT, limited)
    for number in range(21):
        form = urlencode({"key": told.secret(f"attempt {number}")}).encode()
        told.ask("attempt", "POST", "/hokusai/login", {"X-Forwarded-For": "192.0.2.9"}, form)
    report_leaks(told)
    manage(told, admin)
    told.run("keys", "list", "--json")
    told.run("audit", "--json", "--limit", "100000")
    metrics = told.ask("metrics", "GET", "/hokusai/metrics", {"X-API-Key": admin})
    assert b"hokusai_auth_requests_total" in metrics[2]

    for kind, details in {
        "html": {},
        "status": {"status": 500, "body": "no"},
        "reset": {},
        "slow": {"seconds": 1.0},
    }.items():
        service.behave(kind, **details)
        everywhere(told, f"service {kind}", told.secret, admin)
    service.go()
    everywhere(told, "service down", told.secret, admin)
    service.come_back()

    with renamed(server.folder / "mlflow.db", "experiments"):
        everywhere(told, "MLflow down", told.made, admin)
    store = server.folder / "hokusai_auth.db"
    with contextlib.closing(sqlite3.connect(store, timeout=30)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        locked(told, admin)
        connection.rollback()
    with renamed(store, "hokusai_auth_keys"):
        everywhere(told, "no table", told.secret, admin)
        locked(told, admin)
    everywhere(told, "over", told.made, admin)
    told.ask("metrics", "GET", "/hokusai/metrics", {"X-API-Key": admin})

    provoked = {status for _, status in told.statuses}
    assert provoked >= {200, 201, 303, 400, 401, 403, 404, 409, 429, 503}
    log = server.log
    for said in ('"event": "headers"', '"reason": "INTERCEPTOR_FAILED"', '"mlflow_error"'):
        assert said in log
    assert re.search(r'"event": "key\.(rotated|created)"', log)
    leaks = told.leaks()
    assert not leaks, f"{len(leaks)} leaks:\n" + "\n".join(leaks[:60])


def report_leaks(told: Told) -> None:
    """One that nobody signed, one whose signature is a key, and a good one."""
    for signature in ("", "the key", "good"):
        key = told.made("leaked") if signature == "good" else told.secret("leak report")
        body = json.dumps([{"token": key, "type": key, "url": f"https://x/{key}", "source": key}])
        signed = {"": "", "the key": base64.b64encode(key.encode()).decode()}
        sent = {
            "Github-Public-Key-Identifier": "one" if signature else key,
            "Github-Public-Key-Signature": signed.get(signature) or sign(body.encode()),
        }
        told.ask(f"leak report, {signature}", "POST", f"{KEYS}/leaked", sent, body.encode())


def manage(told: Told, admin: str) -> None:
    """Keys made and replaced in all three ways, and looked at as their owners do."""
    good = {"X-API-Key": admin}
    new = b'{"owner": "somebody", "scopes": ["mlflow:read"]}'
    origin = {"Origin": told.server.origin}
    form = urlencode({"key": admin}).encode()
    typed = {"Content-Type": "application/x-www-form-urlencoded"}
    _, got, _ = told.ask(
        "sign-in", "POST", "/hokusai/login", {**origin, **typed}, form, cookie=True
    )
    session = told.secret("session", re.search("hk_session_[^;]+", got["set-cookie"])[0])  # type: ignore[index]
    by_page = {
        **origin,
        "Cookie": f"hokusai_session={session}",
        "X-CSRF-Token": csrf_token(session),
        "Sec-Fetch-Site": "same-origin",
    }
    for how, headers in (("REST", good), ("page", by_page)):
        made = json.loads(told.ask(how, "POST", KEYS, headers, new, shown=True)[2])
        told.secret(f"made by {how}", made["key"])
        path = f"{KEYS}/{made['key_id']}/rotate"
        rotated = json.loads(told.ask(how, "POST", path, headers, b"{}", shown=True)[2])
        told.secret(f"rotated by {how}", rotated["key"])
        find = json.dumps({"key": rotated["key"]}).encode()
        assert told.ask(how, "POST", f"{KEYS}/find", headers, find)[0] == 200
        told.ask(how, "GET", f"{KEYS}/{rotated['key_id']}", headers)
        told.ask(how, "PATCH", f"{KEYS}/{rotated['key_id']}", headers, b'{"note": "n"}')
        told.ask(how, "DELETE", f"{KEYS}/{rotated['key_id']}", headers)
        told.ask(how, "GET", KEYS, headers)
        told.ask(how, "GET", f"{KEYS}/export", headers)
        told.ask(how, "GET", "/hokusai/keys", headers)
        told.ask(how, "GET", f"{EXPERIMENT}", {**headers, "X-CSRF-Token": "wrong"})
        told.ask(how, "GET", f"/{session}", headers)
    made_here = told.run("keys", "create", "--owner", "cli", "--scope", "mlflow:read", shown=True)
    key = told.secret("made by command", made_here)
    assert keys.importable(key)
    (record,) = told.server.store.page(owner_filter("cli"))[0]
    told.secret("rotated by command", told.run("keys", "rotate", record.key_id, shown=True))
    told.run(
        "keys", "import", "--owner", "x", "--scope", "mlflow:read", given=told.secret("import")
    )
    told.run("keys", "import", "--owner", "x", "--scope", "mlflow:read", given=key)
    told.run("keys", "import", "--owner", "x", "--scope", "wrong", given=told.secret("import 2"))
    for one in (admin, told.secret("client"), key):
        told.run("whoami", key=one)
        told.run("doctor", key=one)
    told.ask("sign-out", "POST", "/hokusai/logout", by_page, b"")
    told.ask("signed out", "GET", EXPERIMENT, by_page)


def owner_filter(owner: str) -> object:
    from mlflow_hokusai_auth.store.records import KeyFilter

    return KeyFilter(owner=owner)


def locked(told: Told, admin: str) -> None:
    """What writes to the store; each waits for it in vain."""
    good = {"X-API-Key": admin}
    body = {"key": told.secret("import, locked"), "owner": "x", "scopes": ["mlflow:read"]}
    told.ask("locked", "POST", f"{KEYS}/import", good, json.dumps(body).encode())
    made = b'{"owner": "x", "scopes": ["mlflow:read"]}'
    assert told.ask("locked", "POST", KEYS, good, made)[0] == 503
    form = urlencode({"key": admin}).encode()
    headers = {"Origin": told.server.origin, "Content-Type": "application/x-www-form-urlencoded"}
    _, got, _ = told.ask("locked", "POST", "/hokusai/login", headers, form, cookie=True)
    if cookie := got.get("set-cookie"):
        told.secret("locked, session", re.search("hk_session_[^;]+", cookie)[0])  # type: ignore[index]
    told.run("keys", "import", "--owner", "x", "--scope", "mlflow:read", given=body["key"])


def test_the_way_to_sign_in_repeats_no_key() -> None:
    key = keys.generate()
    for place, query in ((f"/{key}", b""), ("/", f"token={key}".encode())):
        location = login_location(Request("GET", place, query, ()))
        assert key[8:] not in location and "next=" in location

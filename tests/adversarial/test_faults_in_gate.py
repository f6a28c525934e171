"""An exception anywhere in the gate lets nobody in, and the next request is served as if none had been.

Each request is sent once under a trace function, which writes down every line of the package that is
run for it, and then once for each of these lines, where the trace function raises. So nobody has to
list the places, and a new one is covered. `make test` raises on entry to every function, and
`make test-long` at every line, and every kind of error.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import io
import itertools
import json
import re
import sqlite3
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import flask
import pytest
from limits import RateLimitItemPerMinute

import mlflow_hokusai_auth
from mlflow_hokusai_auth.authorities.browser_session import SessionAuthority
from mlflow_hokusai_auth.authorities.cache import CachedBackend
from mlflow_hokusai_auth.authorities.chain import Chain
from mlflow_hokusai_auth.authorities.server_jobs import JobsAuthority
from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.addresses import networks
from mlflow_hokusai_auth.core.forwarding import HeaderPolicy
from mlflow_hokusai_auth.core.policy import Policy
from mlflow_hokusai_auth.core.prefixes import Prefixes
from mlflow_hokusai_auth.server import caller
from mlflow_hokusai_auth.server.gate import limits
from mlflow_hokusai_auth.server.gate.asgi import AsgiGate
from mlflow_hokusai_auth.server.gate.cors import Cors
from mlflow_hokusai_auth.server.gate.gate import Gate
from mlflow_hokusai_auth.server.gate.interceptors import Interceptors, Refusal, RequestView
from mlflow_hokusai_auth.server.gate.limits import Limits
from mlflow_hokusai_auth.server.gate.lookup_pool import LookupPool
from mlflow_hokusai_auth.server.gate.wsgi import wsgi_gate
from mlflow_hokusai_auth.server.observe.decision_log import DecisionLog
from mlflow_hokusai_auth.server.upstream.flask_bridge import FlaskBridge
from mlflow_hokusai_auth.server.web import account, keys_api, monitoring, pages, validate_key
from mlflow_hokusai_auth.store.database import NOBODY
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.sessions import Sessions
from mlflow_hokusai_auth.store.usage import UseCounter
from tests.server.sentinel import PREFIXES, UI, Wire, environ_of, scope_of

PACKAGE = str(Path(mlflow_hokusai_auth.__file__).parent)
ERRORS: list[type[BaseException]] = [
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    TimeoutError,
    asyncio.TimeoutError,
    MemoryError,
    asyncio.CancelledError,
]
#: Seconds for which a request waits for a lookup. A busy machine must not end one.
PATIENCE = 120.0
#: Threads that serve the request; others write counts, and ask for the store's generation.
_SERVING = re.compile(r"MainThread|.*_\d+")


class Place(NamedTuple):
    """A line, for the n-th time that a request comes to it."""

    file: str
    line: int
    function: str
    time: int


class Tracer:
    """Notes the places that a request comes by, and raises `error` at one of them.

    Lines that call nothing count for no place, as nothing can fail there; and neither does the end of a
    `with`: what is raised there comes before the lock is released, as no error can.
    """

    def __init__(self, place: Place | None = None, error: BaseException | None = None) -> None:
        self.places: dict[Place, bool] = {}
        self.raised = False
        self._at, self._error = place, error
        self._times: Counter[tuple[str, int]] = Counter()
        self._inside: dict[FrameType, set[int]] = {}

    def __enter__(self) -> Tracer:
        self._before = sys.gettrace()
        threading.settrace(self._called)
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        threading.settrace(self._before)  # type: ignore[arg-type]
        self._inside.clear()
        # A thread that began meanwhile, and idled, is traced for life: it must fail no later request.
        self._at = None

    def _called(self, frame: FrameType, event: str, _: object) -> Any:
        code = frame.f_code
        # Not templates, which jinja has as files of the package, too.
        if not code.co_filename.startswith(PACKAGE) or not code.co_filename.endswith(".py"):
            return None
        if not _SERVING.fullmatch(threading.current_thread().name):
            return None
        # Python 3.10 calls this for a generator that goes on, too, and ends it where this raises, with
        # nothing of its `finally` run, as no error can.
        if sys.version_info >= (3, 11) or frame.f_lasti < 0:
            self._come_by(frame, entry=True)
        return self._line

    def _line(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            inside = self._inside.setdefault(frame, set())
            if frame.f_lineno in inside:
                inside.remove(frame.f_lineno)
            else:
                withs, calls = _lines(frame.f_code.co_filename)
                if frame.f_lineno in withs:
                    inside.add(frame.f_lineno)
                if frame.f_lineno in calls:
                    self._come_by(frame, entry=False)
        return self._line

    def _come_by(self, frame: FrameType, *, entry: bool) -> None:
        file, line = frame.f_code.co_filename[len(PACKAGE) + 1 :], frame.f_lineno
        self._times[file, line] += 1
        place = Place(file, line, frame.f_code.co_name, self._times[file, line])
        self.places[place] = entry
        if place == self._at and not self.raised:
            self.raised = True
            assert self._error is not None
            raise self._error


@cache
def _lines(file: str) -> tuple[set[int], set[int]]:
    """Lines of `file` with a `with`, and lines that call something or look something up."""
    nodes = list(ast.walk(ast.parse(Path(file).read_text("utf-8"))))
    return (
        {node.lineno for node in nodes if isinstance(node, ast.With)},
        {node.lineno for node in nodes if isinstance(node, (ast.Call, ast.Subscript))},
    )


# A server, and requests to it


class Rule:
    """An interceptor that refuses one path, and adds a header elsewhere."""

    def on_request(self, request: RequestView) -> Refusal | dict[str, str]:
        return Refusal("Not here") if request.path.endswith("/webhooks") else {"X-Rule": "1"}

    def on_response(self, request: RequestView, status: int) -> dict[str, str]:
        return {"X-Rule": "1"}


@dataclass(frozen=True)
class Outcome:
    """What came of a request. The status is 500 if an exception left the gate, as servers have it."""

    status: int
    called: bool
    #: Whether the client was given a session.
    signed_in: bool = False


class Rig:
    """The gate with all its parts, our own views, and a sentinel for all of MLflow's."""

    def __init__(self, folder: Path, ttl: float) -> None:
        self.file = folder / f"keys-{ttl}.db"
        self.store = LocalStore(f"sqlite:///{self.file}")
        self.store.migrate()
        sessions = Sessions(self.store.database)
        made = self.store.create
        self.keys = {
            "read": made(owner="r", scopes=["mlflow:read"], rate_limit_per_hour=10**9)[1],
            "write": made(owner="w", scopes=["mlflow:write"])[1],
            "admin": made(owner="a", scopes=["mlflow:admin"])[1],
            "elsewhere": made(owner="e", scopes=["mlflow:admin"], networks=["192.0.2.0/24"])[1],
            "spent": made(owner="s", scopes=["mlflow:admin"], rate_limit_per_hour=1)[1],
            "expired": made(owner="x", scopes=["mlflow:admin"], expires_at=time.time() + 0.01)[1],
            "unknown": keys.generate(),
            "typo": keys.generate()[:-1] + "_",
            "jobs": "hk_jobs_" + "0" * 64,
        }
        record, self.keys["revoked"] = made(owner="v", scopes=["mlflow:admin"])
        self.store.revoke(record.key_id)
        self.keys["session"] = sessions.begin(self.keys["admin"], 9999, NOBODY)
        self.keys["ended"] = keys.session_token()
        cached = [
            CachedBackend(self.store, ttl=ttl, negative_ttl=ttl, secret=b"s" * 32, namespace=name)
            for name in ("one", "two")
        ]
        chain = JobsAuthority(Chain(cached), self.keys["jobs"].encode())
        self.gate = Gate(
            SessionAuthority(chain, sessions),
            Policy(),
            Prefixes(PREFIXES),
            Cors((UI,), "http://localhost"),
            limits=Limits(failures_per_minute=10**9),
            interceptors=Interceptors((("rule", Rule()),), refuse_on_error=True),
            header_policy=HeaderPolicy(remove=("x-tenant",)),
            observer=DecisionLog(debug_headers=True),
            count=UseCounter(self.store.database).add,
            lookups=LookupPool(PATIENCE),
            trusted=networks(["10.0.0.0/8"]),
        )
        self.called = False
        self.flask = flask.Flask("mlflow")
        for blueprint in (
            keys_api.blueprint(self.store, self.gate, {}),
            validate_key.blueprint(),
            pages.blueprint(self.store, sessions, self.gate, 60),
            account.blueprint(self.gate, sessions),
            monitoring.blueprint(self.store, lambda: None),
        ):
            self.flask.register_blueprint(blueprint)
        caller.install(self.flask)
        self.flask.add_url_rule("/", "root", self._mlflow, methods=METHODS)
        self.flask.add_url_rule("/<path:_>", "mlflow", self._mlflow, methods=METHODS)
        self._wsgi = wsgi_gate(self.flask, self.gate)

    def _mlflow(self, _: str = "") -> str:
        self.called = True
        return "MLflow"

    def contents(self) -> list[Any]:
        """What a request may change, but for the audit log."""
        with contextlib.closing(sqlite3.connect(self.file)) as connection:
            return [
                connection.execute(f"SELECT {columns} ORDER BY 1").fetchall()
                for columns in (
                    "digest, owner, scopes, expires_at, revoked_at FROM hokusai_auth_keys",
                    "digest, expires_at FROM hokusai_auth_sessions",
                )
            ]

    def wire(self, case: Case) -> Wire:
        def filled(text: str) -> str:
            return re.sub(r"\{(\w+)\}", lambda match: self.keys[match[1]], text)

        headers = [(name, filled(value)) for name, value in case.headers]
        if case.body:
            headers.append(("Content-Length", str(len(case.body))))
        return Wire(case.method, filled(case.target), tuple(headers))

    def through_wsgi(self, case: Case) -> Outcome:
        started: list[Any] = []
        body = io.BytesIO(case.body.encode())
        environ = environ_of(self.wire(case), REMOTE_ADDR="10.0.0.1", **{"wsgi.input": body})
        environ |= {"wsgi.url_scheme": "http", "SERVER_NAME": "localhost", "SERVER_PORT": "80"}
        environ |= {"wsgi.errors": io.StringIO(), "CONTENT_TYPE": case.content_type}
        answer = self._wsgi(environ, lambda *said: started.append(said))  # type: ignore[arg-type]
        try:
            for _ in answer:
                pass
        finally:
            getattr(answer, "close", lambda: None)()
        status, headers = started[-1][:2]
        return Outcome(int(status.split()[0]), self.called, "session=hk_" in str(headers))

    def through_asgi(self, case: Case) -> Outcome:
        sent: list[Any] = []
        wire = self.wire(case)

        messages = iter([{"type": "http.request", "body": case.body.encode()}])

        async def receive() -> dict[str, Any]:
            return next(messages, {"type": "http.disconnect"})

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = scope_of(wire, http_version="1.1", client=("10.0.0.1", 1))
        scope["headers"].append((b"content-type", case.content_type.encode()))
        # With threads of its own, as those that run already are not traced.
        asyncio.run(AsgiGate(FlaskBridge(self.flask), self.gate)(scope, receive, send))
        assert sent[-1]["type"] == "http.response.body"
        head = sent[0]
        return Outcome(head["status"], self.called, b"session=hk_" in str(head).encode())

    def ask_with_fault(
        self, adapter: str, case: Case, place: Place, error: BaseException
    ) -> Outcome:
        """Send `case` with `error` raised at `place`, and replace lookup threads that it has ended."""
        # What such a thread was to answer is waited for in vain. All other requests have the time that
        # a busy machine may need.
        self.gate.lookups.timeout = 3.0
        with Tracer(place, error):
            outcome = self.ask(adapter, case)
        self.gate.lookups.timeout = PATIENCE
        if self.gate.lookups._new._busy or self.gate.lookups._recent._busy:
            object.__setattr__(self.gate, "lookups", LookupPool(PATIENCE))
        return outcome

    def ask(self, adapter: str, case: Case) -> Outcome:
        self.called = False
        try:
            return {"asgi": self.through_asgi, "wsgi": self.through_wsgi}[adapter](case)
        except KeyboardInterrupt:
            raise
        except BaseException:
            return Outcome(500, self.called)


METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
CREATE = "/api/2.0/mlflow/experiments/create"
_BROWSER = (("Host", "localhost"), ("Accept", "text/html"), ("Origin", UI))
_COOKIE = (("Host", "localhost"), ("Cookie", "a=b; hokusai_session={session}"))


@dataclass(frozen=True)
class Case:
    name: str
    #: Whether it is to be refused, whatever else.
    refused: bool
    method: str
    target: str
    headers: tuple[tuple[str, str], ...] = ()
    body: str = ""
    content_type: str = "application/json"

    def __str__(self) -> str:
        return self.name


def refused(name: str, method: str, target: str, *headers: tuple[str, str], **more: str) -> Case:
    return Case(name, True, method, target, headers, **more)


def served(name: str, method: str, target: str, *headers: tuple[str, str], **more: str) -> Case:
    return Case(name, False, method, target, headers, **more)


def key(kind: str) -> tuple[str, str]:
    return ("X-API-Key", f"{{{kind}}}")


_FORM = "application/x-www-form-urlencoded"
_QUERY, _MUTATION = (json.dumps({"query": query}) for query in ("{ a }", "mutation { a }"))
CASES = [
    refused("nobody", "GET", "/mlflow/version", *_BROWSER),
    refused("nobody-writes", "POST", f"/api/mlflow{CREATE}?x=%2F", ("X-Forwarded-For", "192.0.2.9")),
    refused("nobody-asks-a-provider", "POST", "/gateway/mlflow/v1/chat/completions",
            ("Authorization", "Bearer sk-x")),
    refused("nobody-manages-keys", "POST", "/api/2.0/hokusai/keys", body='{"owner": "x"}'),
    refused("unknown", "GET", "/version?api_key={unknown}"),
    refused("typo", "GET", "/version", key("typo")),
    refused("revoked", "GET", "/version", key("revoked")),
    refused("expired", "GET", "/version", key("expired")),
    refused("elsewhere", "GET", "/version", key("elsewhere"), ("X-Forwarded-For", "192.0.2.9, ::1")),
    refused("spent", "GET", "/version", key("spent")),
    refused("two-keys", "GET", "/version", key("admin"), ("Authorization", "Bearer {write}")),
    refused("underscore", "GET", "/version", ("X_API_Key", "{unknown}")),
    refused("read-key-writes", "POST", CREATE, key("read")),
    refused("read-key-mutates", "POST", "/graphql", key("read"), body=_MUTATION),
    refused("read-key-on-no-route", "GET", "/nowhere", ("Authorization", "Bearer {read}")),
    refused("write-key-manages-keys", "POST", "/api/2.0/hokusai/keys", key("write"),
            body='{"owner": "x", "scopes": ["mlflow:admin"]}'),
    refused("jobs-delete", "POST", "/api/2.0/mlflow/experiments/delete", key("jobs")),
    refused("assistant", "GET", "/ajax-api/3.0/mlflow/assistant/config", key("admin")),
    refused("interceptor", "GET", "/api/2.0/mlflow/webhooks", key("admin")),
    refused("forged", "POST", CREATE, *_COOKIE, ("Origin", "https://evil.example")),
    refused("forged-keys", "POST", "/api/2.0/hokusai/keys", *_COOKIE, ("Origin", "http://localhost"),
            body='{"owner": "x"}'),
    refused("ended", "GET", "/version", ("Host", "localhost"), ("Cookie", "hokusai_session={ended}")),
    refused("sign-in", "POST", "/hokusai/login", ("Sec-Fetch-Site", "same-origin"),
            body="key=hk_live_" + "0" * 40, content_type=_FORM),
    refused("large", "POST", "/hokusai/login", body="x" * 5000, content_type=_FORM),
    served("health", "GET", "/mlflow/health"),
    served("preflight", "OPTIONS", CREATE, ("Origin", UI), ("Access-Control-Request-Method", "POST")),
    served("read", "GET", "/mlflow/version?api_key={read}", ("X-Tenant", "x")),
    served("write", "POST", CREATE, key("write"), ("Authorization", "Bearer {write}")),
    served("query", "POST", "/graphql", key("read"), body=_QUERY),
    served("session", "GET", "/version", *_COOKIE, ("Sec-Fetch-Site", "same-origin")),
    served("jobs", "GET", "/version", key("jobs")),
    served("provider", "POST", "/gateway/mlflow/v1/chat/completions",
           ("X-MLflow-Authorization", "Bearer {write}"), ("Authorization", "Bearer sk-x")),
]  # fmt: skip


@pytest.fixture(scope="module")
def rigs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Rig]]:
    """One that remembers whom keys belong to, and one that asks the store each time."""
    folder = tmp_path_factory.mktemp("rigs")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_SIGN_INS", "_ALL_SIGN_INS"):
            patch.setattr(limits, name, RateLimitItemPerMinute(10**9))
        yield {"remembers": Rig(folder, 3600), "asks": Rig(folder, 0)}


Faults = Callable[[dict[Place, bool]], Sequence[tuple[Place, BaseException]]]


def inject(rig: Rig, adapter: str, case: Case, faults: Faults) -> Iterator[str]:
    """Send `case` once for each of `faults`, the error raised there; what came of it that must not."""
    for _ in range(3):  # until what is remembered is
        expected = rig.ask(adapter, case)
    assert expected.called != case.refused and (expected.status >= 300) == case.refused, case
    with Tracer() as tracer:
        assert rig.ask(adapter, case) == expected, case
    for place, error in faults(tracer.places):
        before = rig.contents()
        outcome = rig.ask_with_fault(adapter, case, place, error)
        if case.refused:
            well = not outcome.called and outcome.status >= 300
            well = well and not outcome.signed_in and rig.contents() == before
        else:
            well = outcome.called or outcome.status >= 400
        after = rig.ask(adapter, case)
        if not well or after != expected:
            yield f"{case}: {error!r} at {place}: {outcome}, and after it {after}"


# A generator that is raised in while it is thrown away can tell nobody.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
each_way = pytest.mark.parametrize("adapter", ["asgi", "wsgi"])
each_rig = pytest.mark.parametrize("rig", ["remembers", "asks"])


@each_rig
@each_way
def test_failing_function_lets_no_request_in(rigs: dict[str, Rig], rig: str, adapter: str) -> None:
    #: Where an error was raised already, in a request of the same fate.
    tried: defaultdict[bool, set[Place]] = defaultdict(set)

    def faults(case: Case) -> Faults:
        def chosen(found: dict[Place, bool]) -> list[tuple[Place, BaseException]]:
            entries = {place for place, is_entry in found.items() if is_entry}
            new = sorted(entries - tried[case.refused])
            tried[case.refused] |= entries
            return [(place, ERRORS[i % len(ERRORS)]("injected")) for i, place in enumerate(new)]

        return chosen

    wrong = [one for case in CASES for one in inject(rigs[rig], adapter, case, faults(case))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.long
@each_rig
@each_way
@pytest.mark.parametrize("part", range(4))
def test_failing_line_lets_no_request_in(
    rigs: dict[str, Rig], rig: str, adapter: str, part: int
) -> None:
    # One to a line; others come to it in the other cases that pass it.
    errors = itertools.cycle(ERRORS)

    def faults(found: dict[Place, bool]) -> list[tuple[Place, BaseException]]:
        return [(place, next(errors)("injected")) for place in found]

    wrong = [one for case in CASES[part::4] for one in inject(rigs[rig], adapter, case, faults)]
    assert not wrong, "\n".join(wrong)

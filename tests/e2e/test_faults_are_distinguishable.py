"""What goes wrong is told apart: by one metric and one line of the log for each of eight faults.

And a request is found again by its X-Request-Id, and nothing that strangers send adds a series.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import random
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from mlflow_hokusai_auth.core import keys
from tests.e2e.parts import EXPERIMENT, METRICS, Samples, interceptor, read, renamed, scrape
from tests.harness import Server, serve, wait_until
from tests.standin import Standin

pytestmark = pytest.mark.servers

BROKEN = "/api/2.0/mlflow-artifacts/artifacts/broken"
RULE = """
def on_request(request):
    if request.path.endswith("/broken"):
        raise RuntimeError("a rule that fails")
"""


@pytest.fixture(scope="module")
def server(service: Standin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One worker with a rule of its site's, which fails; it asks the store, then the service."""
    folder = tmp_path_factory.mktemp("apart")
    with serve(
        folder,
        PYTHONPATH=interceptor(folder / "plugins", RULE),
        HOKUSAI_AUTH_BACKEND="local,service",
        HOKUSAI_AUTH_SERVICE_URL=service.url,
        HOKUSAI_AUTH_INTERCEPTOR_ERRORS="refuse",
    ) as running:
        # MLflow makes what tables it misses when it is first asked.
        assert running.request("GET", EXPERIMENT, key=running.key("mlflow:read"))[0] == 200
        yield running


@dataclass
class World:
    """Where faults are provoked; `ask` sends a request with an id of its own."""

    server: Server
    service: Standin
    ids: list[str]

    def ask(self, key: str, path: str = EXPERIMENT, **headers: str) -> int:
        request_id = f"told-apart-{random.getrandbits(64):x}"
        self.ids.append(request_id)
        headers = {"X-Request-Id": request_id, **headers}
        status, got, _ = self.server.request("GET", path, key=key, headers=headers)
        assert got["x-request-id"] == request_id
        return status


def wrong_key(world: World) -> int:
    return world.ask(keys.generate())


def missing_scope(world: World) -> int:
    return world.ask(world.server.key("metrics:read"))


def service_down(world: World) -> int:
    world.service.go()
    try:
        return world.ask(keys.generate())
    finally:
        world.service.come_back()


def store_down(world: World) -> int:
    with renamed(world.server.folder / "hokusai_auth.db", "hokusai_auth_keys"):
        return world.ask(keys.generate())


def mlflow_fails(world: World) -> int:
    with renamed(world.server.folder / "mlflow.db", "experiments"):
        return world.ask(world.server.key("mlflow:read"))


def bad_host(world: World) -> int:
    return world.ask(world.server.key("mlflow:read"), Host="evil.example")


def rate_limit(world: World) -> int:
    fields = {"owner": "often", "scopes": ["mlflow:read"], "rate_limit_per_hour": 1}
    key = world.server.store.create(**fields)[1]
    assert world.server.request("GET", EXPERIMENT, key=key)[0] == 200
    return world.ask(key)


def rule_fails(world: World) -> int:
    return world.ask(world.server.key("mlflow:read"), BROKEN)


@dataclass(frozen=True)
class Fault:
    """How it is brought about, what the client gets, and what tells it from all others."""

    provoke: Callable[[World], int]
    status: int
    metric: str
    labels: dict[str, str]
    outcome: str
    reason: str
    #: In the log besides, where two faults are one to whoever asks.
    says: str = ""

    def value(self, found: Samples) -> float:
        return read(found, self.metric, **self.labels)


DECISIONS, REQUESTS = "hokusai_auth_decisions_total", "hokusai_auth_requests_total"
CALLS, LIMITED = "hokusai_auth_authority_calls_total", "hokusai_auth_rate_limited_total"
RULES = "hokusai_auth_interceptor_errors_total"
UNASKED = "A request was refused with 503: "
FAULTS = [
    Fault(
        wrong_key, 401, DECISIONS, {"outcome": "refused", "reason": "KEY_UNKNOWN"},
        "refused", "KEY_UNKNOWN",
    ),
    Fault(
        missing_scope, 403, DECISIONS, {"outcome": "refused", "reason": "SCOPE_MISSING"},
        "refused", "SCOPE_MISSING",
    ),
    Fault(
        service_down, 503, CALLS, {"authority": "service", "result": "failed"},
        "unavailable", "AUTHORITY_UNAVAILABLE", UNASKED + "the auth service can't be reached",
    ),
    Fault(
        store_down, 503, CALLS, {"authority": "local", "result": "failed"},
        "unavailable", "AUTHORITY_UNAVAILABLE", UNASKED + "the key store can't be read",
    ),
    Fault(mlflow_fails, 503, REQUESTS, {"outcome": "mlflow_error"}, "mlflow_error", "ok"),
    Fault(bad_host, 403, REQUESTS, {"outcome": "host"}, "host", "ok"),
    Fault(rate_limit, 429, LIMITED, {"by": "key"}, "refused", "RATE_LIMITED"),
    Fault(rule_fails, 503, RULES, {"name": "site"}, "unavailable", "INTERCEPTOR_FAILED"),
]  # fmt: skip
TIMES = 3


def provoked(fault: Fault, server: Server, service: Standin) -> dict[str, object]:
    """What `fault`, brought about `TIMES` times, leaves with the client, in the metrics, in the log."""
    before, said = scrape(server), server.log
    world = World(server, service, [])
    statuses = {fault.provoke(world) for _ in range(TIMES)}
    wait_until(lambda: fault.value(scrape(server)) >= fault.value(before) + TIMES)
    after = scrape(server)
    rises = {one.provoke.__name__: one.value(after) - one.value(before) for one in FAULTS}
    log = server.log.removeprefix(said)
    lines = [json.loads(text) for text in log.splitlines() if text.startswith("{")]
    told = [one for one in lines if one.get("request_id") in world.ids]
    return {
        "statuses": statuses,
        "metrics": {name: rise for name, rise in rises.items() if rise},
        "all in the log": [one["request_id"] for one in told] == world.ids,
        "lines": {(one["outcome"], one["reason"]) for one in told},
        "said": {one.says: n for one in FAULTS if one.says and (n := log.count(one.says))},
    }


def test_a_fault_has_a_metric_and_a_line_of_its_own(server: Server, service: Standin) -> None:
    server.key("mlflow:read"), server.key("metrics:read")
    wrong = []
    for fault in FAULTS:
        got = provoked(fault, server, service)
        expected = {
            "statuses": {fault.status},
            "metrics": {fault.provoke.__name__: TIMES},
            "all in the log": True,
            "lines": {(fault.outcome, fault.reason)},
            "said": {fault.says: TIMES} if fault.says else {},
        }
        wrong += [
            f"{fault.provoke.__name__}: {what} {got[what]} instead of {expected[what]}"
            for what in expected
            if got[what] != expected[what]
        ]
    assert not wrong, "\n".join(wrong)


def test_the_faults_differ_in_what_tells_them_apart() -> None:
    for tells in (
        lambda one: (one.metric, *one.labels.items()),
        lambda one: (one.outcome, one.reason, one.says),
    ):
        assert len({tells(one) for one in FAULTS}) == len(FAULTS) == 8


# Series

MORE = 2000


def word() -> str:
    return "".join(random.choices(string.ascii_letters, k=random.randint(3, 12)))


METHODS = [*(lambda name=name: name for name in ("GET", "POST", "PUT", "DELETE")), word]
PATHS = [
    lambda: f"/{word()}",
    lambda: f"/mlflow/{word()}/{word()}",
    lambda: f"/api/mlflow/api/2.0/mlflow/{word()}",
    lambda: f"/api/2.0/mlflow/experiments/get?experiment_id={word()}",
    lambda: f"/api/2.0/mlflow-artifacts/artifacts/{word()}",
    lambda: f"/api/2.0/hokusai/keys/{word()}",
    lambda: f"/hokusai/{word()}",
    lambda: f"/ajax-api/2.0/mlflow/{word()}?{word()}={word()}",
]


def test_whatever_is_asked_for_makes_no_more_series(server: Server) -> None:
    good = server.key("mlflow:read")
    shapes = list(itertools.product(METHODS, PATHS, (lambda: good, keys.generate, word)))
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)

    def ask(shape: tuple[Callable[[], str], ...]) -> None:
        method, path, key = (make() for make in shape)
        agent = {"X-API-Key": key, "User-Agent": word(), "X-Request-Id": word(), word(): word()}
        connection.request(method, path, headers=agent)
        connection.getresponse().read()

    every = Fault(wrong_key, 0, REQUESTS, {}, "", "")
    started = every.value(scrape(server))
    with contextlib.closing(connection):
        for shape in shapes:
            ask(shape)
        # Until all is counted, the scrape at the beginning included.
        wait_until(lambda: every.value(scrape(server)) > started + len(shapes))
        before = scrape(server)
        for number in range(MORE):
            ask(shapes[number % len(shapes)])
        wait_until(lambda: every.value(scrape(server)) > every.value(before) + MORE)
    after = scrape(server)
    assert set(after) - set(before) == set()
    assert len(after) == len(before)


# Request ids

ANSWERS = {
    "health": ("/health", ""),
    "refused": (EXPERIMENT, "none"),
    "refused for good": ("/gateway/secrets", "mlflow:read"),
    "way to sign in": ("/", "page"),
    "sign-in": ("/hokusai/login", ""),
    "found": (EXPERIMENT, "mlflow:read"),
    "not found": ("/api/2.0/mlflow/runs/get?run_id=none", "mlflow:read"),
    "no such route": ("/no/such/route", "mlflow:admin"),
    "whoami": ("/api/2.0/hokusai/whoami", "mlflow:read"),
    "no such key": ("/api/2.0/hokusai/keys/none", "mlflow:admin"),
    "metrics": (METRICS, "metrics:read"),
    "a rule that fails": (BROKEN, "mlflow:read"),
    "bad host": (EXPERIMENT, "host"),
    "prefix": ("/mlflow", "mlflow:read"),
}


#: What is sent as X-Request-Id, and whether it is one.
IDS = {
    "aB3.-_:x": True,
    "x" * 64: True,
    "x" * 65: False,
    "a b": False,
    "a,b": False,
    "\xe4": False,
    keys.generate(): False,
    None: False,
}


def test_every_answer_has_the_request_s_id(server: Server) -> None:
    wrong = []
    for answer, (path, who) in ANSWERS.items():
        more = {"page": {"Accept": "text/html"}, "host": {"Host": "evil.example"}}.get(who, {})
        scope = "mlflow:read" if who == "host" else who
        key = server.key(scope) if ":" in scope else None
        for sent, plain in IDS.items():
            headers = more if sent is None else {**more, "X-Request-Id": sent}
            got = server.request("GET", path, key=key, headers=headers)[1].get("x-request-id", "")
            if not (got == sent if plain else re.fullmatch("[0-9a-f]{16}", got)):
                wrong.append(f"{answer}: {got!r} for {sent!r}")
    assert not wrong, "\n".join(wrong)

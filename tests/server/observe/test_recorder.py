"""Requests that are over are counted, and no count is lost."""

from __future__ import annotations

import atexit
import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flask
import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.core.types import Allow, Credential
from mlflow_hokusai_auth.server.observe import recorder
from mlflow_hokusai_auth.server.observe.decision_log import DecisionLog
from mlflow_hokusai_auth.server.observe.recorder import Recorder
from mlflow_hokusai_auth.server.web import monitoring
from mlflow_hokusai_auth.store.keys import LocalStore
from tests.server.forked import count_in, forked
from tests.server.observe.test_decision_log import (
    KEY,
    MISSING,
    READ,
    SOMEBODY,
    WRITE,
    allow,
    exchange,
)
from tests.server.sentinel import make_gate

MODEL = classify("POST", "/api/2.0/mlflow/registered-models/create")
VERSION = classify("POST", "/api/2.0/mlflow/model-versions/create")
PREFLIGHT = classify("OPTIONS", "/api/2.0/mlflow/model-versions/create")

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def now() -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith("hokusai_auth_") and not sample.name.endswith("_bucket")
    }


@pytest.fixture
def grown() -> Iterator[Callable[..., dict[str, float]]]:
    """A function that returns the growth of a metric's series, by the values of the named labels."""
    # The thread of another test might still count requests meanwhile.
    for left in [one for one in gc.get_objects() if type(one) is Recorder]:
        left.flush()
    before = now()

    def since(name: str, *labels: str) -> dict[str, float]:
        found = {}
        for (has, given), value in now().items():
            more = value - before.get((has, given), 0)
            if has == f"hokusai_auth_{name}" and more:
                found[" ".join(dict(given)[label] for label in labels)] = more
        return found

    yield since


def count(*made: Any) -> None:
    observer = DecisionLog()
    for one in made:
        observer.report(one)
    observer.flush()


def test_requests_are_counted_by_operation_and_outcome(grown: Any) -> None:
    count(
        exchange(allow()),
        exchange(allow(), prefix=""),
        exchange(allow(WRITE), 799),
        exchange(MISSING, 401, False, operation=None),
    )
    assert grown("requests_total", "kind", "access", "prefix", "status", "outcome") == {
        "experiments read /mlflow 200 allowed": 1,
        "experiments read / 200 allowed": 1,
        "runs write /mlflow other mlflow_error": 1,
        "unknown admin /mlflow 401 refused": 1,
    }


def test_verdicts_are_counted_by_reason(grown: Any) -> None:
    count(
        exchange(allow()),
        exchange(MISSING, 401, False),
        exchange(MISSING, 401, False),
        exchange(MISSING),
        exchange(None, 500, False),
    )
    assert grown("decisions_total", "outcome", "reason") == {
        "allowed ok": 1,
        "refused KEY_MISSING": 2,
        "would_refuse KEY_MISSING": 1,
    }


def test_keys_in_queries_are_counted(grown: Any) -> None:
    count(exchange(Allow(READ, SOMEBODY, Credential(KEY, ("X-API-Key",)))))
    assert grown("query_keys_total") == {}
    count(exchange(Allow(READ, SOMEBODY, Credential(KEY, ("?api_key=",)))))
    assert grown("query_keys_total") == {"": 1}


def test_registrations_by_step_and_end(grown: Any) -> None:
    count(
        exchange(allow(MODEL)),
        exchange(allow(MODEL), 400),
        exchange(allow(VERSION), 500),
        exchange(MISSING, 401, False, operation=MODEL),
        exchange(allow(VERSION), 503, False),
        exchange(allow(VERSION), 403, host_refusal=True),
        # A client that disconnects before it has sent the whole request counts for nothing.
        exchange(allow(MODEL), 0),
        # This route is no step of a registration.
        exchange(allow(PREFLIGHT)),
        exchange(allow(WRITE)),
        exchange(MISSING, 401, False, operation=None),
    )
    assert grown("registrations_total", "step", "result") == {
        "model tried": 3,
        "model succeeded": 1,
        "model rejected": 1,
        "model refused": 1,
        "version tried": 3,
        "version failed": 2,
        "version refused": 1,
    }


def test_times_of_the_gate_and_of_mlflow_are_observed(grown: Any) -> None:
    count(exchange(allow()), exchange(MISSING, 401, False))
    assert grown("gate_seconds_sum")[""] == pytest.approx(0.4, abs=0.01)
    assert grown("gate_seconds_count") == {"": 2}
    assert grown("mlflow_seconds_sum", "access")["read"] == pytest.approx(0.3, abs=0.01)
    assert grown("mlflow_seconds_count", "access") == {"read": 1}


def test_one_thread_counts_soon_and_skips_what_cannot_be_counted(grown: Any) -> None:
    def counting() -> int:
        return sum(one.name == "hokusai-auth-recorder" for one in threading.enumerate())

    before, mine, counted = counting(), Recorder(), threading.Event()
    flush = mine.flush

    def flushed() -> None:
        flush()
        if not counted.is_set() and grown("decisions_total", "outcome"):
            counted.set()

    mine.flush = flushed  # type: ignore[method-assign]
    mine.add(exchange(object(), prefix=[]), "allowed")  # type: ignore[arg-type]
    mine.add(exchange(allow()), "allowed")
    assert counted.wait(60)
    assert grown("decisions_total", "outcome") == {"allowed": 1}
    assert counting() == before + 1


def test_counting_continues_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, again = Recorder(), threading.Event()
    failures = iter([OSError("disk full")])

    def flush() -> None:
        for failure in failures:
            raise failure
        again.set()

    monkeypatch.setattr(mine, "flush", flush)
    mine.add(exchange(allow()), "allowed")
    assert again.wait(60)
    # The thread keeps running and would count this in the next test.
    mine._queue.clear()


def test_scrape_includes_every_request_that_is_over(
    grown: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "INTERVAL", 60)
    log = DecisionLog()
    gate = make_gate(observer=log)
    app = flask.Flask("mlflow")
    app.register_blueprint(
        monitoring.blueprint(LocalStore(f"sqlite:///{tmp_path}/none/k.db"), log.flush)
    )
    gate.observer.report(exchange(allow()))
    assert app.test_client().get("/hokusai/metrics").status_code == 200
    assert grown("decisions_total", "outcome") == {"allowed": 1}


def ends_before_it_has_counted() -> None:
    at_end: list[Callable[[], object]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atexit, "register", at_end.append)
        patch.setattr(recorder, "INTERVAL", 600)
        recorder.Recorder().add(exchange(allow()), "allowed")
        for one in at_end:
            one()


def counts_and_is_forked() -> None:
    """Count a request, and another one in a fork, which has no counting thread."""
    recorder.INTERVAL = 0.02
    made = recorder.Recorder()

    def count_one() -> None:
        made.add(exchange(allow()), "allowed")
        ends = time.monotonic() + 60
        while made._queue and time.monotonic() < ends:
            time.sleep(0.01)
        with made._flushing:  # Requests taken off the queue are counted by now.
            pass

    count_one()
    forked(count_one)


def test_no_count_is_lost_when_a_process_ends_or_forks(tmp_path: Path) -> None:
    for work, counted in ((ends_before_it_has_counted, 1), (counts_and_is_forked, 2)):
        folder = tmp_path / work.__name__
        folder.mkdir()

        def run(work: Callable[[], None] = work, folder: Path = folder) -> None:
            count_in(folder)
            work()

        forked(run)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        labels = {"outcome": "allowed", "reason": "ok"}
        found = registry.get_sample_value("hokusai_auth_decisions_total", labels)
        assert found == counted, work.__name__

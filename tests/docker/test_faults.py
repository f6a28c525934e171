"""Faults under load: nothing that a client was told is done is lost, and nobody gets in meanwhile.

Clients of MLflow, with its own retries, register all the time; askers ask once and never again, so that
each failure shows. A fault lasts until each of them was answered several times, so that nobody may wait
for its end. Times are printed, and nothing is decided by them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from tests.docker.stack import REPLICAS, Stack, until
from tests.harness import environment
from tests.registry import Registry

pytestmark = pytest.mark.docker

API = "/api/mlflow/api/2.0/mlflow"
EXPERIMENT = f"{API}/experiments/get?experiment_id=0"
ARTIFACTS = "/api/mlflow/api/2.0/mlflow-artifacts/artifacts"
HEALTH = "/api/health/mlflow/detailed"
#: MLflow's client tries seven times more after a lost connection, 408, 429, 500, 502, 503 or 504. What
#: reaches its user all the same: that the first attempt had been done, of which only the answer was
#: lost, and an answer that breaks off after its headers.
LEGITIMATE = ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST", "Connection broken")
#: Seconds that a load runs in a fault, at least.
WHILE = 8
#: The same with a database that is frozen.
FROZEN = 25
#: Seconds for answers to come in a fault, on a busy machine as well.
PATIENCE = 180


def facts(contents: dict[str, Any]) -> set[tuple[Any, ...]]:
    """`Registry.contents()` as single facts, in the form in which `load.py` tells of them."""
    found: set[tuple[Any, ...]] = {("experiment", *e) for e in contents["experiments"].items()}
    found |= {("artifact", *artifact) for artifact in contents["artifacts"].items()}
    found |= {("version", *name, *held) for name, held in contents["versions"].items()}
    for name, aliases in contents["models"].items():
        found |= {("model", name), *(("alias", name, *alias) for alias in aliases)}
    for run, (status, logged) in contents["runs"].items():
        found |= {("run", run), ("status", run, status)}
        found |= {("logged", run, kind, *item) for kind in logged for item in logged[kind]}
    return found


class Client:
    """`load.py` as a process of its own, and what it was told."""

    def __init__(self, stack: Stack, name: str, key: str, folder: Path) -> None:
        self.told: set[tuple[Any, ...]] = set()
        self.gone: set[tuple[Any, ...]] = set()
        self.calls: list[tuple[float, str]] = []
        self.failures: list[str] = []
        environ = {
            "MLFLOW_TRACKING_URI": f"{stack.url('nginx')}/api/mlflow",
            "HOKUSAI_API_KEY": key,
        }
        with (folder / f"{name}.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("load.py")), name],
                env=environment(folder, **environ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            kind, *told = json.loads(line)
            if kind == "gone":
                self.gone.add(tuple(told))
            elif kind in ("did", "failed"):
                call, seconds, *error = told
                self.calls.append((seconds, call))
                self.failures += [f"{call} after {seconds:.1f} s: {text}" for text in error]
            else:
                self.told.add((kind, *told))

    def stop(self) -> None:
        """Let it finish what it is doing, retries included."""
        assert self._process.stdin
        self._process.stdin.close()
        assert self._process.wait(400) == 0
        self._reader.join()


class Asker(threading.Thread):
    """Asks again and again, each time on a new connection, and keeps what is answered."""

    def __init__(self, ask: Callable[[], Any], pause: float = 0.05) -> None:
        super().__init__(daemon=True)
        self._ask, self._pause = ask, pause
        self._over = threading.Event()
        #: When it was sent, how long it took, and the answer or the kind of error.
        self.answers: list[tuple[float, float, Any]] = []
        self.start()

    def run(self) -> None:
        while not self._over.wait(self._pause):
            sent = time.monotonic()
            try:
                answer = self._ask()
            except (OSError, HTTPException) as error:
                answer = type(error).__name__
            self.answers.append((sent, time.monotonic() - sent, answer))

    def stop(self) -> None:
        self._over.set()
        self.join()

    def since(self, moment: float = 0.0) -> dict[Any, int]:
        """How often which answer came from then on."""
        return dict(Counter(answer for sent, took, answer in self.answers if sent + took >= moment))

    def answered(self, moment: float) -> int:
        """How often what was sent since then was answered."""
        return sum(sent >= moment and isinstance(answer, int) for sent, _, answer in self.answers)

    def longest(self, moment: float = 0.0) -> float:
        return max((took for sent, took, _ in self.answers if sent + took >= moment), default=0.0)

    def recovered(self, moment: float) -> float:
        """Seconds from `moment` until nothing but 200 was answered any more."""
        bad = [sent + took for sent, took, answer in self.answers if answer != 200]
        return max([moment, *bad]) - moment

    def good(self) -> bool:
        """Whether the last answers were all 200."""
        return [answer for _, _, answer in self.answers[-10:]] == [200] * 10


class Load:
    """Clients and askers at work, and others without a good key, whom nobody may let in."""

    def __init__(self, stack: Stack, folder: Path, keys: list[str]) -> None:
        self._stack = stack
        self._key = stack.key("mlflow:write")
        revoked = stack.new_key("mlflow:write")
        stack.exec("mlflow-1", "hokusai-auth", "keys", "revoke", revoked["key_id"], "--wait")
        name = f"load-{time.time_ns()}"
        made = json.loads(self._call("experiments/create", name=name)[1])
        experiment = made["experiment_id"]
        made = json.loads(self._call("runs/create", experiment_id=experiment)[1])
        run = made["run"]["info"]["run_id"]
        self._folder = f"{ARTIFACTS}/{experiment}/{run}/artifacts"
        number = itertools.count().__next__
        self.askers: dict[str, Asker] = {}
        self.watch("read", lambda: self.ask())
        self.watch("log", lambda: self._log(run, number()))
        self.watch("upload", lambda: self.ask(f"{self._folder}/{number()}", "PUT", b"x" * 30_000))
        # All of this comes from one address, which would be refused for a minute after 60 wrong keys.
        strangers = ((None, 0.2), (revoked["key"], 1.2))
        self.strangers = [Asker(lambda k=k: self.ask(key=k), pause) for k, pause in strangers]
        self.clients = [Client(stack, f"{name}-{n}", key, folder) for n, key in enumerate(keys)]

    def watch(self, name: str, ask: Callable[[], Any], pause: float = 0.05) -> Asker:
        self.askers[name] = Asker(ask, pause)
        return self.askers[name]

    def ask(
        self, path: str = EXPERIMENT, method: str = "GET", body: Any = None, key: str | None = ""
    ) -> int:
        """The status of one answer; by default to a good key."""
        key = self._key if key == "" else key
        return self._stack.request("nginx", method, path, key=key, body=body)[0]

    def _call(self, call: str, **fields: Any) -> tuple[int, Any]:
        status, _, body = self._stack.request(
            "nginx",
            "POST",
            f"{API}/{call}",
            key=self._key,
            headers={"Content-Type": "application/json"},
            body=json.dumps(fields),
        )
        return status, body

    def _log(self, run: str, number: int) -> int:
        metric = {"key": f"n {number}", "value": number, "timestamp": 0, "step": 0}
        return self._call("runs/log-batch", run_id=run, metrics=[metric])[0]

    def upload_slowly(self, begun: list[float]) -> int:
        """The status of an upload that takes six seconds; tells when it has begun."""

        def body() -> Iterator[bytes]:
            yield b"x" * 1000
            begun.append(time.monotonic())
            for _ in range(11):
                time.sleep(0.5)
                yield b"x" * 1000

        path, length = f"{self._folder}/slow-{time.time_ns()}", {"Content-Length": "12000"}
        return self._stack.request(
            "nginx", "PUT", path, key=self._key, headers=length, body=body()
        )[0]

    def good(self) -> bool:
        return all(asker.good() for asker in self.askers.values())

    def go_on(self, began: float, *askers: Asker, times: int = 20, seconds: float = WHILE) -> None:
        """Wait until each of these, or of all askers, was answered in the fault that `began`."""
        asked = askers or tuple(self.askers.values())
        time.sleep(seconds)
        until(lambda: all(asker.answered(began) >= times for asker in asked), PATIENCE)

    def recover(self, what: str, began: float, ended: float) -> None:
        """Wait until all is well again, and tell what was seen since the fault `began`."""
        until(lambda: time.monotonic() > ended + 1 and self.good(), 120)
        for name, asker in self.askers.items():
            print(
                f"{what}, {name}: {asker.since(began)}, longest {asker.longest(began):.1f} s, "
                f"good {asker.recovered(ended):.1f} s after the end"
            )

    @contextlib.contextmanager
    def during(self, what: str, fault: AbstractContextManager[None]) -> Iterator[float]:
        """Since when the fault lasts; all is well again at the end."""
        began = time.monotonic()
        with fault:
            yield began
            ended = time.monotonic()
        self.recover(what, began, ended)

    def stop(self) -> None:
        for asker in (*self.askers.values(), *self.strangers):
            asker.stop()
        for client in self.clients:
            client.stop()

    def compare(self) -> None:
        calls = [call for client in self.clients for call in client.calls]
        failures = [text for client in self.clients for text in client.failures]
        seconds, call = max(calls)
        print(f"{len(calls)} calls of MLflow's clients, longest {seconds:.1f} s ({call}); failed:")
        print(*failures or ["none"], sep="\n")
        print(f"without a key, with a revoked one: {[a.since() for a in self.strangers]}, longest")
        print([f"{asker.longest():.1f} s" for asker in self.strangers])
        uri = f"{self._stack.url('nginx')}/api/mlflow"
        there = facts(Registry(uri, self._key).contents())
        told = set().union(*(client.told for client in self.clients))
        gone = set().union(*(client.gone for client in self.clients))
        print(f"told {len(told)}, lost {len(told - there)}; deleted {len(gone)}")
        assert len(told) > 50 and len(gone) > 2
        assert not told - there
        assert not gone & there
        assert not [text for text in failures if not any(known in text for known in LEGITIMATE)]
        for asker in self.strangers:
            statuses = asker.since()
            assert 401 in statuses and not {s for s in statuses if isinstance(s, int) and s < 400}
        for asker in self.askers.values():
            assert not asker.since().keys() & {401, 403}


@contextlib.contextmanager
def load(stack: Stack, folder: Path, *keys: str, clients: int = 2) -> Iterator[Load]:
    """`clients` with a key of the store, one with each of `keys`, and askers; compared at the end."""
    at_work = Load(stack, folder, [stack.key("model:write")] * clients + list(keys))
    try:
        until(lambda: all(len(c.calls) > 12 for c in at_work.clients) and at_work.good())
        yield at_work
        stack.wait_healthy()
    finally:
        at_work.stop()
    at_work.compare()


@contextlib.contextmanager
def stopped(
    stack: Stack, service: str, stop: Callable[[Stack, str], None] = Stack.stop
) -> Iterator[None]:
    stop(stack, service)
    try:
        yield
    finally:
        stack.start(service)


def test_a_replica_is_killed(stack: Stack, tmp_path: Path) -> None:
    with load(stack, tmp_path, clients=3) as at_work:
        for replica in REPLICAS:
            began = time.monotonic()
            with stopped(stack, replica, Stack.kill):
                at_work.go_on(began)
                at_work.recover(f"{replica} killed", began, began)
            at_work.go_on(time.monotonic())
        assert set(at_work.askers["read"].since()) == {200}


def test_both_replicas_are_restarted_one_after_the_other(stack: Stack, tmp_path: Path) -> None:
    with ThreadPoolExecutor(6) as pool, load(stack, tmp_path) as at_work:
        for replica in REPLICAS:
            begun: list[float] = []
            uploads = [pool.submit(at_work.upload_slowly, begun) for _ in range(6)]
            until(lambda b=begun: len(b) == 6)
            began = time.monotonic()
            with stopped(stack, replica):
                print(f"{replica} stopped in {time.monotonic() - began:.1f} s")
            assert [upload.result() for upload in uploads] == [200] * 6
            at_work.recover(f"{replica} restarted", began, time.monotonic())
    assert not [text for client in at_work.clients for text in client.failures]
    assert set(at_work.askers["read"].since()) == {200}
    # A replica finishes what it has begun. What waits to be accepted just then, nginx can't send
    # anew for sure, as it changes something.
    for name in ("log", "upload"):
        answers = at_work.askers[name].since()
        assert set(answers) <= {200, 502} and answers.get(502, 0) < 10


def limited_key(stack: Stack) -> str:
    options = ("--owner", "test", "--scope", "mlflow:read", "--rate-limit", "100000", "--json")
    made = stack.exec("mlflow-1", "hokusai-auth", "keys", "create", *options).stdout
    return str(json.loads(made)["key"])


def test_redis_is_gone(stack: Stack, tmp_path: Path) -> None:
    asking, counted, service = (*(limited_key(stack) for _ in "12"), stack.service_key())
    fresh = iter([stack.service_key() for _ in range(1000)])

    def together() -> bool:
        """Whether all processes count as one."""
        answers = [stack.request("nginx", "GET", EXPERIMENT, key=counted)[1] for _ in range(8)]
        left = [int(answer["ratelimit-remaining"]) for answer in answers]
        return left == list(range(left[0], left[0] - 8, -1))

    with load(stack, tmp_path, service, clients=1) as at_work:
        at_work.watch("limited key", lambda: at_work.ask(key=asking))
        at_work.watch("key of the service", lambda: at_work.ask(key=service))
        at_work.watch("new key of the service", lambda: at_work.ask(key=next(fresh)), 0.3)
        assert together()
        for fault in (stopped, Stack.frozen, Stack.cut_off):
            with at_work.during(f"redis {fault.__name__}", fault(stack, "redis")) as began:
                at_work.go_on(began)
                assert not together()
            until(together)
    assert {answer for asker in at_work.askers.values() for answer in asker.since()} == {200}


def test_postgresql_is_stopped_and_frozen(stack: Stack, tmp_path: Path) -> None:
    with load(stack, tmp_path) as at_work:
        for fault in (stopped, Stack.frozen):
            with at_work.during(f"postgres {fault.__name__}", fault(stack, "postgres")) as began:
                # Past the gate MLflow waits for its own database; the gate itself does not.
                at_work.go_on(began, *at_work.strangers, times=5, seconds=FROZEN)
    for asker in at_work.askers.values():
        assert set(asker.since()) <= {200, 500, 503}


def test_the_auth_service_is_cut_off_and_frozen(stack: Stack, tmp_path: Path) -> None:
    known = stack.service_key()
    fresh = iter([stack.service_key() for _ in range(1000)])

    def unknown() -> Any:
        status, headers, _ = stack.request("nginx", "GET", EXPERIMENT, key=next(fresh))
        return status if status != 503 else (status, 0 < int(headers["retry-after"]) <= 30)

    with load(stack, tmp_path, known, clients=1) as at_work:
        of_service = at_work.watch("new key of the service", unknown, 0.3)
        for fault in (Stack.cut_off, Stack.frozen):
            until(at_work.good)
            verified = stack.service_key()
            assert at_work.ask(key=verified) == 200
            with at_work.during(f"auth {fault.__name__}", fault(stack, "auth")) as began:
                until(lambda b=began: (503, True) in of_service.since(b))
                assert at_work.ask(key=verified) == 200
                # Those who ask for unknown keys don't wait for the end of it.
                until(lambda b=began: of_service.since(b)[(503, True)] > 9, PATIENCE)
                if fault is Stack.cut_off:
                    until(lambda k=verified: at_work.ask(key=k) != 200, PATIENCE)
                    print(f"known for {time.monotonic() - began:.0f} s")
    assert set(of_service.since()) == {200, (503, True)}
    for name in ("read", "log", "upload"):
        assert set(at_work.askers[name].since()) == {200}


def test_nginx_is_restarted(stack: Stack, tmp_path: Path) -> None:
    with (
        load(stack, tmp_path) as at_work,
        at_work.during("nginx restarted", stopped(stack, "nginx")),
    ):
        time.sleep(1)
    assert not [text for client in at_work.clients for text in client.failures]


def test_one_replica_is_cut_off_from_all_but_nginx(stack: Stack, tmp_path: Path) -> None:
    """nginx sees nothing of it and goes on asking both; who must know asks for health."""
    admin = stack.key("mlflow:admin")

    def health(replica: str) -> int:
        return stack.ask(replica, "GET", HEALTH, key=admin)[0]

    with load(stack, tmp_path) as at_work:
        with at_work.during("mlflow-1 cut off", stack.cut_off("mlflow-1")) as began:
            until(lambda: health("mlflow-1") == 503)
            assert health("mlflow-2") == 200
            at_work.go_on(began, times=5, seconds=FROZEN)
        until(lambda: health("mlflow-1") == 200)
    for asker in at_work.askers.values():
        assert set(asker.since()) <= {200, 500, 503}

"""Clients who ask all the time while something fails, and what they were told."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.store.keys import LocalStore
from tests.harness import Server

EXPERIMENT = "/api/2.0/mlflow/experiments/get?experiment_id=0"
KEYS = "/api/2.0/hokusai/keys"
#: Seconds that a busy machine may add to a bound: a wait that never ends is longer.
SLACK = 30
#: Seconds, a little less than the patience with what fails.
LONG = 0.8


def create(server: Server, key: str) -> tuple[int, dict[str, str], bytes]:
    """Make a key over REST, as who has `key`."""
    body = json.dumps({"owner": "ACME", "scopes": ["mlflow:read"]}).encode()
    headers = {"Content-Type": "application/json"}
    return server.request("POST", KEYS, key=key, headers=headers, body=body)


@dataclass(frozen=True)
class Answer:
    """When it was asked for and how long that took, in seconds; status 0 for none."""

    sent: float
    took: float
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def over(self) -> float:
        return self.sent + self.took


class Asker(threading.Thread):
    """Asks again and again, on new connections."""

    def __init__(self, ask: Callable[[], Any], pause: float = 0.1) -> None:
        super().__init__(daemon=True)
        self._ask, self._pause = ask, pause
        self._over = threading.Event()
        self._news = threading.Condition()
        self.answers: list[Answer] = []
        self.start()

    def run(self) -> None:
        while not self._over.wait(self._pause):
            sent = time.monotonic()
            try:
                answer = self._ask()
            except (OSError, http.client.HTTPException) as error:
                answer = 0, {}, repr(error).encode()
            with self._news:
                self.answers.append(Answer(sent, time.monotonic() - sent, *answer))
                self._news.notify_all()

    def stop(self) -> None:
        self._over.set()
        self.join()

    def wait_for(self, status: int, since: float, seconds: float = 120) -> Answer:
        """The first answer with `status` to what was asked at `since` or later."""

        def found() -> Answer | None:
            fitting = (a for a in self.answers if a.status == status and a.sent >= since)
            return next(fitting, None)

        with self._news:
            answer = self._news.wait_for(found, seconds)
        assert answer, f"no {status} in {seconds} s, but {self.statuses(since)}"
        return answer

    def statuses(self, since: float = 0.0) -> dict[int, int]:
        return dict(Counter(a.status for a in self.answers if a.over >= since))

    def longest(self) -> float:
        return max(answer.took for answer in self.answers)


class Administrator:
    """Makes keys, ends every other one, and keeps what it was told is done."""

    def __init__(self, server: Server, store: LocalStore) -> None:
        self._server = server
        self._key = store.create(owner="admin", scopes=["mlflow:admin"])[1]
        self.created: list[str] = []
        self.revoked: list[str] = []

    def __call__(self) -> Any:
        if len(self.created) > 2 * len(self.revoked):
            key_id = self.created[2 * len(self.revoked)]
            answer = self._server.request("DELETE", f"{KEYS}/{key_id}", key=self._key)
            if answer[0] == 200:
                self.revoked.append(key_id)
        else:
            answer = create(self._server, self._key)
            if answer[0] == 201:
                self.created.append(json.loads(answer[2])["key_id"])
        return answer


class Crowd:
    """At `server`: whoever asks for `/health`, whom nobody may let in, and who has a good key."""

    def __init__(self, server: Server, revoked: str, known: str, fresh: Callable[[], str]) -> None:
        def ask(key: str | None) -> Any:
            return server.request("GET", EXPERIMENT, key=key)

        self.health = Asker(lambda: server.request("GET", "/health"))
        self.strangers = [Asker(lambda k=k: ask(k)) for k in (None, revoked)]
        self.strangers.append(Asker(lambda: ask(keys.generate())))
        self.known = Asker(lambda: ask(known))
        #: A good key that was never sent before, each time.
        self.fresh = Asker(lambda: ask(fresh()), 0.25)

    @property
    def all(self) -> list[Asker]:
        return [self.health, *self.strangers, self.known, self.fresh]

    def held_up(self) -> bool:
        """Whether requests that waited for what fails kept `/health` from being answered."""
        waited = [a for asker in self.all[1:] for a in asker.answers if a.took > LONG]
        return len(waited) >= 10 and not any(
            slow.sent < quick.sent and quick.over < slow.over
            for slow in waited
            for quick in self.health.answers
        )

    def tell(self, what: str, began: float, lifted: float) -> None:
        """Print what was seen since the fault `began`, for the record."""
        good = self.fresh.wait_for(200, lifted)
        last = max(a.sent for a in self.known.answers if a.status == 200 and a.over < lifted)
        print(
            f"\n{what}: new key {self.fresh.statuses(began)}, longest {self.fresh.longest():.1f} s; "
            f"known key {self.known.statuses(began)}, served for {last - began:.1f} s of "
            f"{lifted - began:.1f} s; unknown {self.strangers[-1].statuses(began)}, revoked "
            f"{self.strangers[1].statuses(began)}; /health longest {self.health.longest():.2f} s; "
            f"good {good.over - lifted:.1f} s after"
        )


@contextlib.contextmanager
def crowd(
    server: Server, *, revoked: str, known: str, fresh: Callable[[], str], bound: float
) -> Iterator[Crowd]:
    """The crowd at work; nobody may have waited for longer than `bound` seconds, or been let in."""
    at_work = Crowd(server, revoked, known, fresh)
    try:
        for good in (at_work.known, at_work.fresh):
            good.wait_for(200, 0.0)
        for stranger in at_work.strangers:
            stranger.wait_for(401, 0.0)
        yield at_work
    finally:
        for asker in at_work.all:
            asker.stop()
    assert set(at_work.health.statuses()) == {200}
    assert not at_work.held_up()
    for asker in at_work.all:
        assert asker.longest() < bound + SLACK
    for asker in at_work.strangers:
        assert set(asker.statuses()) <= {401, 503}
    for asker in (at_work.known, at_work.fresh):
        assert set(asker.statuses()) <= {200, 503}
    for refused in (a for asker in at_work.all for a in asker.answers if a.status == 503):
        told = json.loads(refused.body)
        assert told["error"] == "AUTHORITY_UNAVAILABLE" and "Try again" in told["message"]
        assert 1 <= int(refused.headers["retry-after"]) <= 30

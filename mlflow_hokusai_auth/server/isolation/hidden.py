"""Hidden reads: a supplier asked for something that exists, and got MLflow's own 404.

Operators must be able to tell "my run is gone" from isolation, and see who tries other teams' ids. So
after each 404 to a supplier, a thread sends the last statement of the request twice more, with and
without its shadows: rows that only the second one finds were hidden. The thread looks behind at most
`PER_SECOND` answers a second, and leaves out those that find too many waiting.

While isolation is `observe`, nothing is hidden. The thread then looks whether shadows would leave out
rows of an answer's statements, and counts such answers by key: `full` would hide those rows.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any, NamedTuple

import flask
from sqlalchemy.engine import Engine

from mlflow_hokusai_auth.core.isolation import HIDDEN
from mlflow_hokusai_auth.core.keys import redact
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server import metrics
from mlflow_hokusai_auth.server.caller import Caller
from mlflow_hokusai_auth.server.upstream.artifact_roots import Watch
from mlflow_hokusai_auth.store.dry_run import WouldRefuse

#: Answers that are looked behind in a second, at most.
PER_SECOND = 10
#: Answers that may wait to be looked behind, at most.
_WAITING = 100
#: Statements of a request that are remembered, at most.
_STATEMENTS = 20
_log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """A statement of a confined caller, as MLflow made it, with its values."""

    request_id: str
    engine: Engine
    text: str
    given: Any


class Answered(NamedTuple):
    """An answer to a confined caller, and the statements that it was made from."""

    asked: tuple[Asked, ...]
    caller: Caller
    rule: str


#: The last statements of this request that have shadows, or would have them.
_asked: ContextVar[tuple[Asked, ...]] = ContextVar("hokusai_asked", default=())
#: True while a statement gets shadows to see what they would hide.
_trying: ContextVar[bool] = ContextVar("hokusai_trying", default=False)


def asks(engine: Engine, text: str, given: Any) -> None:
    """Remember a statement of this request: the answer may come from it."""
    request = callers.current.get().request_id
    before = (one for one in _asked.get() if one.request_id == request)
    _asked.set((*before, Asked(request, engine, text, given))[-_STATEMENTS:])


def tries() -> bool:
    """Return whether statements get shadows now, though nothing is hidden."""
    return _trying.get()


class Hidden:
    """Looks behind answers to suppliers for rows that were hidden from them, or would be."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._answers: queue.Queue[Answered] = queue.Queue(_WAITING)

    def install(self, app: flask.Flask) -> None:
        """Look behind the answers of `app` from now on."""
        app.after_request(self._answered)

    def _answered(self, response: flask.Response) -> flask.Response:
        asked, caller = _asked.get(), callers.current.get()
        _asked.set(())
        looks = self._watch.observes or response.status_code == HTTPStatus.NOT_FOUND
        if looks and asked and caller.principal and asked[-1].request_id == caller.request_id:
            rule = f"{flask.request.method} {flask.request.url_rule}"
            try:
                self._answers.put_nowait(Answered(asked, caller, rule))
            except queue.Full:
                return response
            # A process that forks after it began would have no thread.
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._look_on, name="hokusai-auth-hidden", daemon=True
                    )
                    self._thread.start()
        return response

    def _look_on(self) -> None:
        while True:
            self.look(self._answers.get())
            time.sleep(1 / PER_SECOND)

    def look(self, answer: Answered) -> None:
        """Count and log the answer if it hid something, or if isolation `full` would hide something."""
        token = callers.current.set(answer.caller)
        try:
            if self._watch.observes:
                if any(map(_would_miss, answer.asked)):
                    self._observe(answer)
            elif not _finds(answer.asked[-1]):
                with callers.seeing_all("what was hidden"):
                    if _finds(answer.asked[-1]):
                        tell(answer.rule)
        except Exception as error:
            _log.debug("Whether %s hid something: %s", answer.rule, redact(str(error)))
        finally:
            callers.current.reset(token)

    def _observe(self, answer: Answered) -> None:
        """Count that isolation `full` would hide something from the caller."""
        principal = answer.caller.principal
        assert principal is not None, "others see everything"
        metrics.ISOLATION.labels(HIDDEN.lower(), "observed").inc()
        self._watch.observed(WouldRefuse.now(HIDDEN, answer.rule, principal, answer.caller.address))


def _finds(asked: Asked) -> bool:
    with asked.engine.connect() as connection:
        return connection.exec_driver_sql(asked.text, asked.given).first() is not None


def _would_miss(asked: Asked) -> bool:
    """Return whether shadows would leave out rows of a statement."""
    count = f"SELECT count(*) FROM ({asked.text}) AS found"  # noqa: S608 - MLflow's own statement
    with asked.engine.connect() as connection:
        with callers.seeing_all("what would be hidden"):
            every = connection.exec_driver_sql(count, asked.given).scalar_one()
        token = _trying.set(True)
        try:
            seen = connection.exec_driver_sql(count, asked.given).scalar_one()
        finally:
            _trying.reset(token)
    return bool(seen < every)


def tell(what: str) -> None:
    """Count and log that isolation hid something from the caller."""
    metrics.HIDDEN.inc()
    caller = callers.current.get()
    _log.warning(
        "HIDDEN from key %s of %s, request %s: what it asked for exists, and is not theirs (%s)",
        caller.principal.key_id if caller.principal else "none",
        ascii(redact(caller.principal.owner))[1:-1] if caller.principal else "nobody",
        caller.request_id or "none",
        what,
    )

"""Hidden reads: a supplier asked for something that exists, and got MLflow's own 404.

Operators must be able to tell "my run is gone" from isolation, and see who tries other teams' ids. So
after each 404 to a supplier, a thread sends the last statement of the request twice more, with and
without its shadows: what only the second one finds was hidden. The thread looks behind at most
`PER_SECOND` answers a second. If too many wait for it, the others are not looked at.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any, NamedTuple

import flask
from sqlalchemy.engine import Engine

from mlflow_hokusai_auth.core.keys import redact
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server import metrics
from mlflow_hokusai_auth.server.caller import Caller

#: Answers that are looked behind in a second, at most.
PER_SECOND = 10
#: Answers that may wait for that.
_WAITING = 100
_log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """A statement of a confined caller, as MLflow made it, with its values."""

    request_id: str
    engine: Engine
    text: str
    given: Any


class Answered(NamedTuple):
    """A 404 to a confined caller, and the last statement that it was made from."""

    asked: Asked
    caller: Caller
    rule: str


#: The last statement of this request that had shadows.
_last: ContextVar[Asked | None] = ContextVar("hokusai_asked", default=None)


def asks(engine: Engine, text: str, given: Any) -> None:
    """Remember a statement that gets shadows: the next answer may come from it."""
    _last.set(Asked(callers.current.get().request_id, engine, text, given))


class Hidden:
    """Looks, after a 404 to a supplier, whether what they asked for exists; counts and logs it."""

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        self._sleep = sleep
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._answers: queue.Queue[Answered] = queue.Queue(_WAITING)

    def install(self, app: flask.Flask) -> None:
        """Look behind the answers of `app` from now on."""
        app.after_request(self._answered)

    def _answered(self, response: flask.Response) -> flask.Response:
        asked, caller = _last.get(), callers.current.get()
        _last.set(None)
        if (
            response.status_code == HTTPStatus.NOT_FOUND
            and asked is not None
            and caller.principal is not None
            and asked.request_id == caller.request_id
        ):
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
            self._sleep(1 / PER_SECOND)

    def look(self, answer: Answered) -> None:
        """Count and log the answer if it hid something."""
        token = callers.current.set(answer.caller)
        try:
            if not _finds(answer.asked):
                with callers.seeing_all("what was hidden"):
                    if _finds(answer.asked):
                        tell(answer.rule)
        except Exception as error:
            _log.debug("Whether %s hid something: %s", answer.rule, redact(str(error)))
        finally:
            callers.current.reset(token)


def _finds(asked: Asked) -> bool:
    with asked.engine.connect() as connection:
        return connection.exec_driver_sql(asked.text, asked.given).first() is not None


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

"""`/api/health/mlflow`: whether this server can do its work, part by part.

`/health` is MLflow's own, public, and says only that the process lives: whoever restarts servers should
ask that one, as no restart helps when a database is down. Here the parts are looked at, at most once in
`FRESH` seconds however often somebody asks; what is found is told in detail to whoever has a key.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

import flask

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable, HokusaiAuthError
from mlflow_hokusai_auth.core.keys import redact
from mlflow_hokusai_auth.server.upstream import stores
from mlflow_hokusai_auth.store.keys import LocalStore

#: Seconds for which what was found is told again.
FRESH = 5.0
#: Seconds that a part may take to answer.
TIMEOUT = 3.0

Check = Callable[[], str]

_log = logging.getLogger(__name__)


class Unhealthy(HokusaiAuthError):
    """Raised if a part of the server can't do its work. The message says why."""


class Health:
    """Looks at `checks`, name -> what returns a few words on success, and raises otherwise."""

    def __init__(self, checks: dict[str, Check]) -> None:
        self._checks = checks
        self._asked: dict[str, Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._found: tuple[float, dict[str, Any]] | None = None

    def look(self) -> dict[str, Any]:
        """`{"status": "ok" or "failing", "checks": {name: {"ok", "latency_ms", "found"}}}`."""
        before = self._found
        # Whoever asks while somebody looks is told what was found before: this must not hold threads.
        if not self._lock.acquire(blocking=before is None):
            assert before is not None
            return before[1]
        try:
            if self._found is None or time.monotonic() - self._found[0] > FRESH:
                self._found = (time.monotonic(), self._look())
            return self._found[1]
        finally:
            self._lock.release()

    def _look(self) -> dict[str, Any]:
        began = time.monotonic()
        for name, check in self._checks.items():
            # A check that hangs is not asked again, or its threads would become ever more.
            if name not in self._asked or self._asked[name].done():
                self._asked[name] = _started(check)
        found = {}
        for name, future in self._asked.items():
            try:
                left = max(TIMEOUT - (time.monotonic() - began), 0.0)
                found[name] = future.result(left)
            except FutureTimeout:
                found[name] = _told(False, TIMEOUT, f"no answer within {TIMEOUT:g} s")
        healthy = all(part["ok"] for part in found.values())
        return {"status": "ok" if healthy else "failing", "checks": found}


def _started(check: Check) -> Future[dict[str, Any]]:
    future: Future[dict[str, Any]] = Future()
    # A daemon, unlike an executor's threads, so that one that hangs does not keep the process.
    threading.Thread(
        target=lambda: future.set_result(_timed(check)), name="hokusai-auth-health", daemon=True
    ).start()
    return future


def _timed(check: Check) -> dict[str, Any]:
    began = time.monotonic()
    try:
        ok, said = True, check()
    except (Unhealthy, AuthorityUnavailable) as error:
        ok, said = False, str(error)
    except Exception as error:
        # Its text may hold anything, an address with a password among it.
        _log.warning("A health check failed", exc_info=True)
        ok, said = False, type(error).__name__
    return _told(ok, time.monotonic() - began, said)


def _told(ok: bool, seconds: float, found: str) -> dict[str, Any]:
    return {"ok": ok, "latency_ms": round(seconds * 1000, 1), "found": redact(found)[:300]}


def checks(store: LocalStore, authority: Check) -> dict[str, Check]:
    """What there is to look at; `authority` asks whoever says whom keys belong to."""
    return {
        "key_store": lambda: f"generation {store.generation()}",
        "migrations": lambda: _migrations(store),
        "key_authority": authority,
        "mlflow_store": _mlflow_store,
        "artifact_root": _artifact_root,
    }


def _migrations(store: LocalStore) -> str:
    if not store.is_current():
        raise Unhealthy("the key store's tables are of another version; restart `mlflow server`")
    return "current"


def _mlflow_store() -> str:
    stores.query_tracking_store()
    return "answers"


def _artifact_root() -> str:
    served = stores.served_artifacts()
    if served is None:
        return "not served here"
    if isinstance(served, Path):
        return _look_at(served)
    # A folder that nobody has: the whole of a large store would take minutes to list.
    served.list_artifacts("hokusai-auth-health")
    return "can be listed"


def _look_at(folder: Path) -> str:
    """A folder here, for which MLflow's own list is empty whatever is the matter with it."""
    # MLflow makes it with the first artifact.
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise Unhealthy("the artifact folder is no folder")
    if not os.access(there, os.R_OK | os.W_OK | os.X_OK):
        raise Unhealthy("the artifact folder can't be read and written")
    return "can be written" if there == folder else "will be made with the first artifact"


def blueprint(health: Health) -> flask.Blueprint:
    """The routes. Status 200, or 503 if a part fails."""
    routes = flask.Blueprint("hokusai_health", __name__, url_prefix="/api/health/mlflow")

    @routes.get("")
    def summary() -> tuple[flask.Response, int]:
        status = health.look()["status"]
        return flask.jsonify(status=status), 200 if status == "ok" else 503

    @routes.get("/detailed")
    def detailed() -> tuple[flask.Response, int]:
        found = health.look()
        return flask.jsonify(found), 200 if found["status"] == "ok" else 503

    @routes.after_request
    def no_store(response: flask.Response) -> flask.Response:
        response.headers["Cache-Control"] = "no-store"
        return response

    return routes

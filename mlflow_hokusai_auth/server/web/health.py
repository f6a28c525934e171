"""`/api/health/mlflow`: readiness, with one check for each part that the server depends on.

`/health` is MLflow's own route. It is public and says only that the process lives, so it is the one for
liveness probes: a restart does not mend a database that is down. The checks here run at most once in
`FRESH` seconds. The status is public; `/detailed`, which takes a key, returns each check's result.
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
from mlflow_hokusai_auth.server.live_settings import Isolation
from mlflow_hokusai_auth.store.keys import LocalStore

from . import api

#: Seconds for which a result is returned again.
FRESH = 5.0
#: Seconds that all checks together may take.
TIMEOUT = 3.0

Check = Callable[[], str]

_log = logging.getLogger(__name__)


class Unhealthy(HokusaiAuthError):
    """Raised by a check whose part of the server does not work. The message says why."""


class Health:
    """Runs `checks`, by name. A check returns a few words, or raises if its part does not work."""

    def __init__(self, checks: dict[str, Check]) -> None:
        self._checks = checks
        self._running: dict[str, Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._last: tuple[float, dict[str, Any]] | None = None

    def result(self) -> dict[str, Any]:
        """Return `{"status": "ok" or "failing", "checks": {name: {"ok", "latency_ms", "found"}}}`."""
        before = self._last
        # While one thread runs the checks, others return the last result: they must not pile up.
        if not self._lock.acquire(blocking=before is None):
            assert before is not None
            return before[1]
        try:
            if self._last is None or time.monotonic() - self._last[0] > FRESH:
                self._last = (time.monotonic(), self._run())
            return self._last[1]
        finally:
            self._lock.release()

    def _run(self) -> dict[str, Any]:
        began = time.monotonic()
        for name, check in self._checks.items():
            # A check that hangs is not started again, or its threads would pile up.
            if name not in self._running or self._running[name].done():
                self._running[name] = _start(check)
        results = {}
        for name, future in self._running.items():
            try:
                left = max(TIMEOUT - (time.monotonic() - began), 0.0)
                results[name] = future.result(left)
            except FutureTimeout:
                results[name] = _outcome(False, TIMEOUT, f"no answer within {TIMEOUT:g} s")
        healthy = all(part["ok"] for part in results.values())
        return {"status": "ok" if healthy else "failing", "checks": results}


def _start(check: Check) -> Future[dict[str, Any]]:
    future: Future[dict[str, Any]] = Future()
    # A daemon thread, unlike an executor's, does not keep the process alive if it hangs.
    threading.Thread(
        target=lambda: future.set_result(_timed(check)), name="hokusai-auth-health", daemon=True
    ).start()
    return future


def _timed(check: Check) -> dict[str, Any]:
    began = time.monotonic()
    try:
        ok, found = True, check()
    except (Unhealthy, AuthorityUnavailable) as error:
        ok, found = False, str(error)
    except Exception as error:
        # The text may hold anything, such as a database URI with its password.
        _log.warning("A health check failed", exc_info=True)
        ok, found = False, type(error).__name__
    return _outcome(ok, time.monotonic() - began, found)


def _outcome(ok: bool, seconds: float, found: str) -> dict[str, Any]:
    return {"ok": ok, "latency_ms": round(seconds * 1000, 1), "found": redact(found)[:300]}


def checks(store: LocalStore, authority: Check, isolation: Isolation) -> dict[str, Check]:
    """Return the checks by name. `authority` checks the authority for keys.

    `isolation` never fails: a server without it serves, and its operator should know.
    """
    return {
        "key_store": lambda: f"generation {store.generation()}",
        "migrations": lambda: _migrations(store),
        "key_authority": authority,
        "mlflow_store": _mlflow_store,
        "artifact_root": _artifact_root,
        "isolation": lambda: isolation.described,
    }


def _migrations(store: LocalStore) -> str:
    if not store.is_current():
        raise Unhealthy("the key store's tables are of another version; restart `mlflow server`")
    return "current"


def _mlflow_store() -> str:
    from mlflow_hokusai_auth.server.upstream import stores

    stores.query_tracking_store()
    return "answers"


def _artifact_root() -> str:
    from mlflow_hokusai_auth.server.upstream import stores

    served = stores.served_artifacts()
    if served is None:
        return "not served here"
    if isinstance(served, Path):
        return _check_folder(served)
    # The folder does not exist: listing the whole of a large store would take minutes.
    served.list_artifacts("hokusai-auth-health")
    return "can be listed"


def _check_folder(folder: Path) -> str:
    """Check a local folder, for which MLflow returns an empty list even if it can't be read."""
    # MLflow creates the folder with the first artifact, so its nearest parent is checked until then.
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise Unhealthy("the artifact folder is not a folder")
    if not os.access(there, os.R_OK | os.W_OK | os.X_OK):
        raise Unhealthy("the artifact folder can't be read and written")
    return "can be written" if there == folder else "will be created with the first artifact"


def blueprint(health: Health) -> flask.Blueprint:
    """Return the routes. They answer 200, or 503 if a check fails."""
    routes = flask.Blueprint("hokusai_health", __name__, url_prefix="/api/health/mlflow")
    routes.after_request(api.no_store)

    @routes.get("")
    def summary() -> tuple[flask.Response, int]:
        status = health.result()["status"]
        return flask.jsonify(status=status), 200 if status == "ok" else 503

    @routes.get("/detailed")
    def detailed() -> tuple[flask.Response, int]:
        result = health.result()
        return flask.jsonify(result), 200 if result["status"] == "ok" else 503

    return routes

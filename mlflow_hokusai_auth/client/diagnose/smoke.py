"""`hokusai-auth smoke URL`: a supplier's whole job against a live server, which it then deletes.

It is safe in production: everything it makes has one new name, it deletes only by that name, and it
makes nothing unless the key may delete it. Every check runs in its own thread, so that no server can
hold the command longer than `DEADLINE`. Artifacts are sent only through the server.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import NamedTuple

from mlflow.exceptions import MlflowException

from mlflow_hokusai_auth.client import profile

from . import doctor, smoke_gate, smoke_job
from .environment import environment
from .smoke_job import OPERATOR, REQUEST, Failed, Job, Outcome

#: Seconds for the whole command, of which the last `CLEANING` are kept for cleaning up.
DEADLINE = 30.0
CLEANING = 8.0

_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class Check(NamedTuple):
    """One line of the report, as in doctor, with the seconds that the check took."""

    check: str
    ok: bool | None
    seconds: float
    found: str
    fix: str

    @property
    def warns(self) -> bool:
        """As in doctor."""
        return bool(self.ok and self.fix)


class Report(NamedTuple):
    """The result. `stuck` is true if a thread still waits for the server."""

    url: str
    ok: bool
    seconds: float
    checks: list[Check]
    stuck: bool


def smoke(url: str, report: Callable[[Check], object]) -> Report:
    """Do the job at `url`, and call `report` with each check when it is done.

    Sets the tracking URI of this process. Ctrl-C ends the job, but not the cleaning up.
    """
    job = Job(url.rstrip("/"))
    began = last = time.monotonic()
    checks: list[Check] = []

    def note(check: doctor.Check) -> None:
        nonlocal last
        now = time.monotonic()
        texts = (_name_url(text) for text in (check.found, check.fix))
        checks.append(Check(check.check, check.ok, round(now - last, 3), *texts))
        last = now
        report(checks[-1])

    with _environment(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        job.folder = Path(folder)
        job.until = began + DEADLINE - CLEANING
        try:
            for check in doctor.run(_CHECKS, job, _bounded):
                note(check)
        except KeyboardInterrupt:
            note(doctor.Check("finished", False, "interrupted", "Run it again."))
        job.over = True
        cleaning = _cleaning(began + DEADLINE)
        for check in doctor.run([("clean up", (), smoke_job.clean_up)], job, cleaning):
            note(check)
    ok = not any(check.ok is False for check in checks)
    stuck = any(thread.is_alive() for thread in job.threads)
    return Report(doctor.one_line(url, job.key), ok, round(last - began, 3), checks, stuck)


def _name_url(text: str) -> str:
    """Return a text of doctor's with the argument URL in place of the variable."""
    return re.sub(r"MLFLOW_TRACKING_URI\b", "URL", text)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Bound MLflow's requests, which only the environment can do, and silence its log."""
    # `restrict_origin` changes this one.
    origins = {profile.ALLOWED_ORIGINS: os.environ.get(profile.ALLOWED_ORIGINS)}
    # MLflow logs texts of the server, which may hold a key.
    log = logging.getLogger("mlflow")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with environment({**_ENVIRONMENT, **origins}):
            yield
    finally:
        log.setLevel(level)


def _bounded(look: Callable[[Job], Outcome], job: Job) -> Outcome:
    """Run `look` until `job.until` at most, in a thread, which can be abandoned if it hangs."""
    left = job.until - time.monotonic()
    if left <= 0:
        return False, "not done: the server was too slow", OPERATOR
    future: Future[Outcome] = Future()

    def work() -> None:
        try:
            future.set_result(look(job))
        except BaseException as error:
            future.set_exception(error)

    job.threads.append(threading.Thread(target=work, name="hokusai-auth-smoke", daemon=True))
    job.threads[-1].start()
    try:
        return future.result(left)
    except Failed as failed:
        found, fix = failed.args
        return False, found, fix
    except FutureTimeout:
        return False, f"no answer within {left:.0f} s", OPERATOR
    except MlflowException as error:
        return False, str(error), doctor.fix_for(error, OPERATOR)
    # MLflow lets other errors through: those of requests for artifacts, and of malformed replies.
    except Exception as error:
        return False, f"{type(error).__name__}: {error}", OPERATOR


def _cleaning(until: float) -> Callable[..., Outcome]:
    """Return a `call` for `doctor.run` that cleans up by `until`, and reports what may be left."""

    def call(look: Callable[[Job], Outcome], job: Job) -> Outcome:
        try:
            # A step may still be making something, which can't be deleted before it exists.
            if job.left:
                job.threads[-1].join(min(REQUEST, (until - time.monotonic()) / 2))
            job.until = until
            outcome = _bounded(look, job)
        except KeyboardInterrupt:
            outcome = False, "interrupted", ""
        if outcome[0] is False and job.left:
            return False, outcome[1], f"Delete these, as far as they exist: {', '.join(job.left)}."
        return outcome

    return call


#: Name, names of the checks that must have passed before, and the check.
_CHECKS: list[tuple[str, tuple[str, ...], Callable[[Job], Outcome]]] = [
    ("key", (), doctor.check_key),
    ("other credentials", ("key",), doctor.check_other_credentials),
    ("URL", (), smoke_gate.read_url),
    ("origin", ("URL",), smoke_gate.restrict_origin),
    ("plugin", (), doctor.check_plugin),
    ("server", ("URL",), doctor.check_server),
    ("health", ("server",), smoke_gate.health),
    ("refused without a key", ("server",), smoke_gate.no_key),
    ("refused with a wrong key", ("server",), smoke_gate.wrong_key),
    ("key accepted", ("key", "origin", "plugin", "server"), doctor.check_accepted),
    *(
        (f"prefix {prefix or '/'}", ("origin", "server"), smoke_gate.at_prefix(prefix))
        for prefix in smoke_gate.PREFIXES
    ),
    ("scope", ("key accepted",), smoke_gate.scope),
    *smoke_job.STEPS,
]

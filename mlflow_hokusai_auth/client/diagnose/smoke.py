"""`hokusai-auth smoke URL`: a supplier's whole job against a live server, and nothing of it left.

Safe in production: all that it makes has one new name, it deletes by that name and nothing else, and it
looks whether the key may delete before it makes anything. Every check has a thread of its own, so that
no server can hold the command longer than `DEADLINE`. Artifacts go through the server or not at all.
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
from .smoke_job import (
    OPERATOR,
    REQUEST,
    Failed,
    Job,
    Verdict,
)

#: Seconds for everything, the last of which are kept for cleaning up.
DEADLINE = 30.0
CLEANING = 8.0

_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class Check(NamedTuple):
    """One line of the report, as of doctor, with the seconds that it took."""

    check: str
    ok: bool | None
    seconds: float
    found: str
    fix: str


class Report(NamedTuple):
    """What came of it. `stuck` is whether a thread still waits for the server."""

    url: str
    ok: bool
    seconds: float
    checks: list[Check]
    stuck: bool


def smoke(url: str, tell: Callable[[Check], object]) -> Report:
    """Do the job at `url`, and call `tell` with each check when it is done.

    Sets the tracking URI of this process. Ctrl-C ends the job, not the cleaning up.
    """
    job = Job(url.rstrip("/"))
    began = last = time.monotonic()
    checks: list[Check] = []

    def note(found: doctor.Check) -> None:
        nonlocal last
        now = time.monotonic()
        texts = (_of_url(text) for text in (found.found, found.fix))
        checks.append(Check(found.check, found.ok, round(now - last, 3), *texts))
        last = now
        tell(checks[-1])

    with _environment(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        job.folder = Path(folder)
        job.until = began + DEADLINE - CLEANING
        try:
            for found in doctor.run(_CHECKS, job, _bounded):
                note(found)
        except KeyboardInterrupt:
            note(doctor.Check("finished", False, "interrupted", "Run it again."))
        job.over = True
        cleaning = _cleaning(began + DEADLINE)
        for found in doctor.run([("clean up", (), smoke_job.clean_up)], job, cleaning):
            note(found)
    ok = not any(check.ok is False for check in checks)
    stuck = any(thread.is_alive() for thread in job.threads)
    return Report(doctor.one_line(url, job.key), ok, round(last - began, 3), checks, stuck)


def _of_url(text: str) -> str:
    """`text`, which doctor has written for the variable, for the argument."""
    return re.sub(r"MLFLOW_TRACKING_URI\b", "URL", text)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Bounds for MLflow's requests, which it takes from the environment only; and it is silent."""
    names = (*_ENVIRONMENT, profile.ALLOWED_ORIGINS)
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(_ENVIRONMENT)
    # MLflow logs what a server says, in which there may be a key.
    log = logging.getLogger("mlflow")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _bounded(look: Callable[[Job], Verdict], job: Job) -> Verdict:
    """What `look` finds by `job.until`. In a thread, as nothing else can be left when it hangs."""
    left = job.until - time.monotonic()
    if left <= 0:
        return False, "not done: the server was too slow before", OPERATOR
    future: Future[Verdict] = Future()

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
    # Whatever MLflow lets through: requests' errors from artifacts, a reply of another shape.
    except Exception as error:
        return False, f"{type(error).__name__}: {error}", OPERATOR


def _cleaning(until: float) -> Callable[..., Verdict]:
    """How to clean up by `until`, whatever happens; says what may be left."""

    def call(look: Callable[[Job], Verdict], job: Job) -> Verdict:
        try:
            # What is being made must be there before it can be deleted.
            if job.left:
                job.threads[-1].join(min(REQUEST, (until - time.monotonic()) / 2))
            job.until = until
            verdict = _bounded(look, job)
        except KeyboardInterrupt:
            verdict = False, "interrupted", ""
        if verdict[0] is False and job.left:
            return False, verdict[1], f"Delete what there is of: {', '.join(job.left)}."
        return verdict

    return call


#: Name, what has to have passed before, and the check.
_CHECKS: list[tuple[str, tuple[str, ...], Callable[[Job], Verdict]]] = [
    ("key", (), doctor._key),
    ("other credentials", ("key",), doctor._other_credentials),
    ("URL", (), smoke_gate.read_url),
    ("origin", ("URL",), smoke_gate.settle_origin),
    ("plugin", (), doctor._plugin),
    ("server", ("URL",), doctor._server),
    ("health", ("server",), smoke_gate.health),
    ("refused without a key", ("server",), smoke_gate.no_key),
    ("refused with a wrong key", ("server",), smoke_gate.wrong_key),
    ("key accepted", ("key", "origin", "plugin", "server"), doctor._accepted),
    *(
        (f"prefix {prefix or '/'}", ("origin", "server"), smoke_gate.at_prefix(prefix))
        for prefix in smoke_gate.PREFIXES
    ),
    ("scope", ("key accepted",), smoke_gate.scope),
    *smoke_job.STEPS,
]

"""Forks for tests that need a process of their own, in which everything is imported already.

A lock that another thread holds at the fork stays locked there. So a thread that reads a store at
intervals should end with its test.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlflow_hokusai_auth.authorities import cache

#: Seconds after which a fork is taken for stuck, and ended.
TIMEOUT = 120


def forked(work: Callable[[], object]) -> Any:
    """Run `work` in a fork of this process and return its result, which passes through JSON.

    The fork ends without the exit functions of its parent.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(TIMEOUT)
            os.close(reading)
            try:
                answer = json.dumps(work())
                code = 0
            except BaseException:
                answer = traceback.format_exc()
            with os.fdopen(writing, "w") as pipe:
                pipe.write(answer)
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended == 0, f"a fork ended with {ended}: {said}"
    return json.loads(said)


@contextlib.contextmanager
def watchers_rest() -> Iterator[None]:
    """End the watcher threads of caches at the end of this context."""
    over, never = threading.Event(), threading.Event()

    def sleep(seconds: float) -> None:
        if over.wait(seconds):
            never.wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
        yield
    over.set()


def count_in(folder: Path) -> None:
    """Make this fork count in `folder`, from 0, like a worker that was started with it."""
    from prometheus_client import REGISTRY, values

    from mlflow_hokusai_auth.server import metrics
    from mlflow_hokusai_auth.server.observe import recorder
    from mlflow_hokusai_auth.store import metrics as events

    os.environ[metrics.DIRECTORY] = str(folder)
    values.ValueClass = values.get_value_class()  # type: ignore[no-untyped-call]
    for collector in list(REGISTRY._collector_to_names):
        REGISTRY.unregister(collector)
    # The module is changed in place, so that every importer sees the new counters.
    for module in (events, metrics, recorder):
        importlib.reload(module)

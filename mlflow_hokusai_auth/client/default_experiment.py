"""The `mlflow.default_experiment_provider` entry point: an experiment for runs that name none.

A server that isolates its suppliers takes no runs of theirs in MLflow's Default experiment, and names
another one in `whoami`. MLflow asks for it when it first needs an experiment, and only if neither
`MLFLOW_EXPERIMENT_NAME` nor `MLFLOW_EXPERIMENT_ID` is set and `set_experiment` was not called.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mlflow_hokusai_auth.core.job_rules import is_job

from . import profile

if TYPE_CHECKING:
    from mlflow import MlflowClient

#: MLflow's own default, which `mlflow.tracking.default_experiment` has as a constant.
_MLFLOWS_DEFAULT = "0"
#: Seconds that whoami may take, once and then once more: a run must not wait for minutes.
_TIMEOUT = 10.0
#: Seconds for which a server that has named no experiment is not asked again.
_NONE_FOR = 60.0
#: Answers that are remembered, at most.
_MOST = 16
#: MLflow sets this variable for the workers of a server.
_SERVER = "_MLFLOW_SGI_NAME"


class HokusaiDefaultExperimentProvider:
    """Gives MLflow the experiment that the server names for the current key.

    It is no subclass of MLflow's abstract provider, because MLflow loads this module during its own
    import, and this module imports nothing of MLflow.
    """

    def in_context(self) -> bool:
        """Return True if the server has named an experiment. Never raises."""
        return _current() is not None

    def get_experiment_id(self) -> str:
        """Return the id of that experiment, which is made if it is missing. Never raises."""
        return _current() or _MLFLOWS_DEFAULT


def find_or_make(client: MlflowClient, name: str) -> str:
    """Return the id of the experiment `name`. Raises MlflowException if the server refuses it."""
    if (experiment := client.get_experiment_by_name(name)) is None:
        from mlflow.exceptions import MlflowException

        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            # Another process has just made it.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    return str(experiment.experiment_id)


def _current() -> str | None:
    """Return the id for the current tracking URI and key, or None if MLflow's own default counts."""
    try:
        # A server asks for a default on behalf of its clients (3.4), and its jobs act as staff.
        key = None if _SERVER in os.environ or is_job(os.environ) else profile.api_key()
        if key is None:
            return None
        uri = profile.tracking_uri()
        return _answers.of(uri, key) if profile.origin_allowed(uri) else None
    except Exception as error:
        # The error's text may repeat what was sent.
        reason = getattr(error, "error_code", type(error).__name__)
        profile.warn_once(
            f"The default experiment of this Hokusai API key was not found ({reason}), so runs go to "
            "MLflow's Default experiment, which may refuse them. Set MLFLOW_EXPERIMENT_NAME, or run "
            "`hokusai-auth doctor` to find out why."
        )
        return None


class _Answers:
    """The answers of servers, for each tracking URI and key. Errors are not remembered.

    That a server names no experiment is asked again after a while, because its operator may have it
    keep suppliers apart while this program runs.
    """

    def __init__(self, timer: Callable[[], float] = time.monotonic) -> None:
        self.timer = timer
        self._kept: dict[tuple[str, str], tuple[str | None, float]] = {}

    def of(self, uri: str, key: str) -> str | None:
        """Return the id of the experiment that the server at `uri` names, or None."""
        experiment, at = self._kept.get((uri, key), (None, None))
        if experiment is not None or (at is not None and self.timer() - at < _NONE_FOR):
            return experiment
        from mlflow import MlflowClient

        name = _name(uri)
        experiment = None if name is None else find_or_make(MlflowClient(uri), name)
        if len(self._kept) >= _MOST:
            self._kept.clear()
        self._kept[uri, key] = (experiment, self.timer())
        return experiment


_answers = _Answers()


def _name(uri: str) -> str | None:
    from mlflow.exceptions import MlflowException

    from .admin import HokusaiAuthClient

    try:
        identity = HokusaiAuthClient(uri).whoami(timeout=_TIMEOUT, max_retries=1)
    except MlflowException as error:
        if error.get_http_status_code() == 404:
            return None  # The server is without this package, and isolates nobody.
        raise
    return identity.get("default_experiment") or None

"""The credential of MLflow's server-side jobs: made where the server starts, known to its workers.

`mlflow server` starts both its workers and the runner of its jobs, and both inherit its environment.
So `issue` puts a random secret there, where MLflow's client code in the jobs looks for credentials;
and `take`, in each worker, reads it and clears it away. A worker itself must not send it: MLflow would
give it to whatever host an artifact's address names (before 3.17 any user chose that), and the
assistant's programs inherit the worker's environment.

What is left: whoever may read `/proc/<pid>/environ` of the server's processes, such as those programs
and custom scorers, can still find it. It opens what `core.jobs` lists, until the server starts anew.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from mlflow_hokusai_auth.client.profile import KEY, api_key
from mlflow_hokusai_auth.core import job_rules
from mlflow_hokusai_auth.core.types import Principal, Rejected

from . import Authority

TOKEN = job_rules.TOKEN
USERNAME = "MLFLOW_TRACKING_USERNAME"
PASSWORD = "MLFLOW_TRACKING_PASSWORD"  # noqa: S105 - the name of a variable
_OURS = (TOKEN, USERNAME, PASSWORD, KEY)
_USER = "hokusai-jobs"


def issue(environ: MutableMapping[str, str] = os.environ) -> None:
    """Put a new secret into `environ`, for the workers and jobs that are about to be started.

    A username or password that the operator has set stays: it may be for a store of artifacts behind
    Basic, or a key made for the jobs. Jobs then use it, except those that were started with Basic.
    """
    secret = f"hk_jobs_{secrets.token_hex(32)}"
    # Never kept: the name is private to MLflow, and a value of a server above us, in whose job we
    # may run, is not ours to accept.
    environ[TOKEN] = secret
    if _set(environ, USERNAME) or _set(environ, PASSWORD):
        return
    environ[USERNAME] = _USER
    environ[PASSWORD] = secret
    if api_key():
        # This machine has a key of its own, which our client part would send beside the password;
        # two different keys in one request are refused.
        environ[KEY] = secret


def take(environ: MutableMapping[str, str] = os.environ) -> str | None:
    """The secret of `issue`, cleared from `environ`; None if this is not under `mlflow server`."""
    secret = environ.get(TOKEN, "")
    if not job_rules.well_formed(secret):
        return None
    ours = environ.get(PASSWORD) == secret
    for name in _OURS:
        if environ.get(name) == secret or (name == USERNAME and ours):
            del environ[name]
    return secret


@dataclass(frozen=True, slots=True)
class JobsAuthority:
    """Knows the jobs' secret, and asks `inner` about everything else."""

    inner: Authority
    secret: bytes

    def peek(self, key: str, address: str) -> Principal | Rejected | None:
        """See `Authority`."""
        return job_rules.PRINCIPAL if self._is_ours(key) else self.inner.peek(key, address)

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        """See `Authority`."""
        return job_rules.PRINCIPAL if self._is_ours(key) else self.inner.lookup(key, address)

    def _is_ours(self, key: str) -> bool:
        return hmac.compare_digest(key.encode("latin-1", "replace"), self.secret)


def recognised(inner: Authority) -> Authority:
    """`inner`, and the jobs' secret where `mlflow server` has made one."""
    secret = take()
    return inner if secret is None else JobsAuthority(inner, secret.encode("ascii"))


def _set(environ: Mapping[str, str], name: str) -> bool:
    return bool(environ.get(name, "").strip())

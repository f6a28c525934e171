"""The credential of MLflow's server-side jobs: made at the server's start, known to its workers.

`mlflow server` starts its workers and the runner of its jobs, and both inherit its environment. So
`issue` puts a random secret into the variables in which MLflow's client code looks for credentials, and
each worker reads and removes it with `take`. A worker must not send it: MLflow would send it to the
host that an artifact's URI names (before 3.17 any user chose that host), and the assistant's programs
inherit the worker's environment.

One risk remains: a program that may read `/proc/<pid>/environ` of the server's processes, such as the
assistant's programs and custom scorers, can find the secret. It permits what `core.job_rules` lists,
until the server restarts.
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
    """Put a new secret into `environ`, for the workers and jobs that will be started.

    A username or password that the operator has set stays: it may be for an artifact store that takes
    Basic authentication, or a key made for the jobs. Jobs then send the operator's value; a job that
    was started with Basic authentication still sends the token.
    """
    secret = f"hk_jobs_{secrets.token_hex(32)}"
    # An existing value is replaced: the name is private to MLflow, and if this server runs in a job of
    # another server, it must not accept that server's secret.
    environ[TOKEN] = secret
    if _set(environ, USERNAME) or _set(environ, PASSWORD):
        return
    environ[USERNAME] = _USER
    environ[PASSWORD] = secret
    if api_key():
        # This machine has a key in its profile, and our client code would send that key beside the
        # password. The gate refuses a request with two different keys.
        environ[KEY] = secret


def take(environ: MutableMapping[str, str] = os.environ) -> str | None:
    """Remove the secret from `environ` and return it; None if `mlflow server` has made none."""
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
    """Answers for the jobs' secret itself, and looks up every other key in `inner`."""

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


def with_jobs(inner: Authority) -> Authority:
    """Return `inner` with the jobs' secret in front of it, if `mlflow server` has made one."""
    secret = take()
    return inner if secret is None else JobsAuthority(inner, secret.encode("ascii"))


def _set(environ: Mapping[str, str], name: str) -> bool:
    return bool(environ.get(name, "").strip())

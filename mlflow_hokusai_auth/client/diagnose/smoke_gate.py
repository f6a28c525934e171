"""The checks of `hokusai-auth smoke` before it makes anything: the gate and the key's scopes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import mlflow
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.tracking._tracking_service.utils import _get_store

from mlflow_hokusai_auth.client import origin_guard, profile
from mlflow_hokusai_auth.client.admin import HokusaiAuthClient
from mlflow_hokusai_auth.core import keys

from . import doctor, network
from .smoke_job import DEFAULT, OPERATOR, REQUEST, Failed, Job, Outcome

_SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"
#: One route of each kind: MLflow's REST, artifacts, FastAPI's own. They change nothing.
_GUARDED = (
    ("GET", _SEARCH),
    ("GET", "/api/2.0/mlflow-artifacts/artifacts?path=hokusai-smoke"),
    ("POST", "/v1/traces"),
)
#: The default prefixes of a server.
PREFIXES = ("", "/mlflow", "/api/mlflow")
_MODE = "Its operator should run `hokusai-auth mode enforce`."
_MAX_BODY = 64 * 1024


class _Reply(NamedTuple):
    """A reply's status, WWW-Authenticate, and body; None if that is not a JSON object."""

    status: int
    challenge: str
    body: dict[str, Any] | None

    @property
    def code(self) -> object:
        return (self.body or {}).get("error")


def _fetch(job: Job, method: str, url: str, key: str = "") -> _Reply:
    """Send a request with `key` and no other credential. Raises Failed if there is no reply."""
    credentials = _get_store(job.uri).get_host_creds()
    try:
        with requests.request(
            method,
            url,
            headers={origin_guard.HEADER: key} if key else {},
            # Without this, `requests` would add credentials from ~/.netrc or the URL.
            auth=lambda request: request,
            timeout=REQUEST,
            verify=credentials.verify,
            cert=credentials.client_cert_path,
            allow_redirects=False,
            stream=True,
        ) as response:
            content = response.raw.read(_MAX_BODY, decode_content=True)
    except Exception as error:
        raise Failed(*network.describe_failure(url, REQUEST, error)) from error
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    challenge = response.headers.get("WWW-Authenticate", "")
    return _Reply(response.status_code, challenge, body if isinstance(body, dict) else None)


def _is_refusal(reply: _Reply, code: str, challenge: str) -> bool:
    return (
        reply.status == 401
        and reply.code == code
        and reply.challenge.startswith("Bearer ")
        and challenge in reply.challenge
    )


def _is_list(body: dict[str, Any]) -> bool:
    """Return True for MLflow's list of experiments, which may be empty."""
    return "experiments" in body or not body


def _not_refused(job: Job, what: str, reply: _Reply) -> Outcome:
    """Return the outcome on `reply`, to a request `what` that should have been refused."""
    found = f"{what} answered {reply.status}"
    if reply.status < 400:
        found = f"ANSWERS {what.upper()}: {found}"
    whoami = _fetch(job, "GET", f"{job.uri}/api/2.0/hokusai/whoami")
    if _is_refusal(whoami, "KEY_MISSING", "") and reply.status not in (401, 429):
        return False, f"{found}; the server is in mode observe or off and refuses no request", _MODE
    return False, f"{found}, not 401 as this package does", doctor.NOT_OURS


def read_url(job: Job) -> Outcome:
    """Check that the argument is a URL, and set MLflow's tracking URI to it."""
    outcome = doctor.check_tracking_uri(job)
    if outcome[0]:
        mlflow.set_tracking_uri(job.uri)
        mlflow.set_registry_uri(job.uri)
    return outcome


def restrict_origin(job: Job) -> Outcome:
    """Check that the key may be sent to the URL, and allow no other origin from now on."""
    outcome = doctor.check_origin(job)
    if outcome[0]:
        os.environ[profile.ALLOWED_ORIGINS] = str(profile.origin(job.uri))
    return outcome


def health(job: Job) -> Outcome:
    """Check the server's own health report."""
    reply = _fetch(job, "GET", f"{job.uri}/api/health/mlflow")
    if reply.status == 200 and reply.body == {"status": "ok"}:
        return True, "the server can do its work", ""
    found = f"/api/health/mlflow answered {reply.status}"
    if reply.status == 503:
        return False, found, "Its operator should read /api/health/mlflow/detailed, with a key."
    return False, found, doctor.NOT_OURS


def no_key(job: Job) -> Outcome:
    """Check that requests without a key are refused."""
    for method, path in _GUARDED:
        reply = _fetch(job, method, job.uri + path)
        if not _is_refusal(reply, "KEY_MISSING", ""):
            return _not_refused(job, "without a key", reply)
    return True, f"{len(_GUARDED)} of {len(_GUARDED)} routes answered 401 KEY_MISSING", ""


def wrong_key(job: Job) -> Outcome:
    """Check that a random key is refused."""
    reply = _fetch(job, "GET", job.uri + _SEARCH, keys.generate("test"))
    if _is_refusal(reply, "KEY_UNKNOWN", "invalid_token"):
        return True, "401 KEY_UNKNOWN", ""
    if reply.code == "RATE_LIMITED":
        return None, "429: too many wrong keys came from this address, so none is checked now", ""
    return _not_refused(job, "with a wrong key", reply)


def scope(job: Job) -> Outcome:
    """Check that the key may do all later steps and delete their results; if not, make nothing."""
    ok, found, fix = doctor.check_scope(job)
    if not ok or fix:
        return False, found, fix or OPERATOR
    if "write" in job.identity["can"] or job.identity.get("default_experiment"):
        return True, found, ""
    # model:write may make an experiment but not delete it, so the run goes to an existing one.
    try:
        stage = MlflowClient(job.uri, job.uri).get_experiment(DEFAULT).lifecycle_stage
    except MlflowException as error:
        stage = str(error)
    if stage != "active":
        found += f", but not delete an experiment; experiment {DEFAULT}: {stage}"
        return False, found, "Use a key with the scope mlflow:write. Nothing was made."
    job.experiment_id = DEFAULT
    return True, found, ""


def at_prefix(prefix: str) -> Callable[[Job], Outcome]:
    """Return a check that the server answers under `prefix` of the same host, but only with a key."""

    def look(job: Job) -> Outcome:
        base = f"{profile.origin(job.uri)}{prefix}"
        try:
            reply = _fetch(job, "GET", base + _SEARCH)
        except Failed as failed:
            return None, failed.args[0], ""
        # Any other reply with 200 may come from another service on the same host.
        if reply.status == 200 and reply.body is not None and _is_list(reply.body):
            found = f"{base} ANSWERS WITHOUT A KEY: {_SEARCH} answered 200"
            return (
                False,
                found,
                f"{_MODE} Or another server runs MLflow there without this package.",
            )
        if not _is_refusal(reply, "KEY_MISSING", ""):
            return None, f"not served there: {base} answered {reply.status}", ""
        if job.identity:
            identity = HokusaiAuthClient(base).whoami(timeout=REQUEST, max_retries=0)
            if identity.get("key_id") != job.identity["key_id"]:
                return False, f"{base} takes the key for {identity.get('key_id')}", OPERATOR
        return True, f"{base} answers", ""

    return look

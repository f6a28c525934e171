"""What `hokusai-auth smoke` looks at before it makes anything: the gate, and what the key may do."""

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
from .smoke_job import (
    DEFAULT,
    OPERATOR,
    REQUEST,
    Failed,
    Job,
    Verdict,
)

_SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"
#: One route of each kind: MLflow's REST, artifacts, FastAPI's own. Harmless where they answer.
_GUARDED = (
    ("GET", _SEARCH),
    ("GET", "/api/2.0/mlflow-artifacts/artifacts?path=hokusai-smoke"),
    ("POST", "/v1/traces"),
)
#: Where a server answers by default.
PREFIXES = ("", "/mlflow", "/api/mlflow")
_MODE = "Its operator should run `hokusai-auth mode enforce`."
_MAX_BODY = 64 * 1024


class _Reply(NamedTuple):
    """Its status, WWW-Authenticate, and what it said: None if that is no JSON object."""

    status: int
    challenge: str
    said: dict[str, Any] | None

    @property
    def code(self) -> object:
        return (self.said or {}).get("error")


def _ask(job: Job, method: str, url: str, key: str = "") -> _Reply:
    """The answer to a request that carries `key`, and no other credential. Raises Failed."""
    credentials = _get_store(job.uri).get_host_creds()
    try:
        with requests.request(
            method,
            url,
            headers={origin_guard.HEADER: key} if key else {},
            # Else requests takes some from ~/.netrc, or from the URL.
            auth=lambda request: request,
            timeout=REQUEST,
            verify=credentials.verify,
            cert=credentials.client_cert_path,
            allow_redirects=False,
            stream=True,
        ) as response:
            content = response.raw.read(_MAX_BODY, decode_content=True)
    except Exception as error:
        raise Failed(*network._failure(url, REQUEST, error)) from error
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        said = None
    challenge = response.headers.get("WWW-Authenticate", "")
    return _Reply(response.status_code, challenge, said if isinstance(said, dict) else None)


def _is_refusal(reply: _Reply, code: str, challenge: str) -> bool:
    return (
        reply.status == 401
        and reply.code == code
        and reply.challenge.startswith("Bearer ")
        and challenge in reply.challenge
    )


def _lists(said: dict[str, Any]) -> bool:
    """Whether this is MLflow's list of experiments, which may be empty."""
    return "experiments" in said or not said


def _not_refused(job: Job, what: str, reply: _Reply) -> Verdict:
    """`reply`, to a request `what` that should have been refused, in words."""
    found = f"{what} answered {reply.status}"
    if reply.status < 400:
        found = f"ANSWERS {what.upper()}: {found}"
    ours = _ask(job, "GET", f"{job.uri}/api/2.0/hokusai/whoami")
    if _is_refusal(ours, "KEY_MISSING", "") and reply.status not in (401, 429):
        return False, f"{found}; the server is in mode observe or off and refuses nobody", _MODE
    return False, f"{found}, not 401 as this package does", doctor.NOT_OURS


def read_url(job: Job) -> Verdict:
    """Whether the argument is a URL; MLflow is to use it from now on."""
    verdict = doctor._tracking_uri(job)
    if verdict[0]:
        mlflow.set_tracking_uri(job.uri)
        mlflow.set_registry_uri(job.uri)
    return verdict


def settle_origin(job: Job) -> Verdict:
    """Whether the key may go there; it goes nowhere else from now on."""
    verdict = doctor._origin(job)
    if verdict[0]:
        # Of several that may have the key, only this one is to see it now.
        os.environ[profile.ALLOWED_ORIGINS] = str(profile.origin(job.uri))
    return verdict


def health(job: Job) -> Verdict:
    """Whether the server thinks that it can do its work."""
    reply = _ask(job, "GET", f"{job.uri}/api/health/mlflow")
    if reply.status == 200 and reply.said == {"status": "ok"}:
        return True, "the server can do its work", ""
    found = f"/api/health/mlflow answered {reply.status}"
    if reply.status == 503:
        return False, found, "Its operator should look at /api/health/mlflow/detailed, with a key."
    return False, found, doctor.NOT_OURS


def no_key(job: Job) -> Verdict:
    """Whether requests without a key are refused."""
    for method, path in _GUARDED:
        reply = _ask(job, method, job.uri + path)
        if not _is_refusal(reply, "KEY_MISSING", ""):
            return _not_refused(job, "without a key", reply)
    return True, f"{len(_GUARDED)} of {len(_GUARDED)} routes answered 401 KEY_MISSING", ""


def wrong_key(job: Job) -> Verdict:
    """Whether a key that nobody has been given is refused."""
    reply = _ask(job, "GET", job.uri + _SEARCH, keys.generate("test"))
    if _is_refusal(reply, "KEY_UNKNOWN", "invalid_token"):
        return True, "401 KEY_UNKNOWN", ""
    if reply.code == "RATE_LIMITED":
        return None, "429: too many wrong keys came from here, so that none is looked at", ""
    return _not_refused(job, "with a wrong key", reply)


def scope(job: Job) -> Verdict:
    """Whether the key may do all that follows, and delete it; else nothing is made."""
    ok, found, fix = doctor._scope(job)
    if not ok:
        return False, found, fix or OPERATOR
    if "write" in job.identity["can"]:
        return True, found, ""
    # model:write makes an experiment and can't delete it, so the run goes to one that is there.
    try:
        stage = MlflowClient(job.uri, job.uri).get_experiment(DEFAULT).lifecycle_stage
    except MlflowException as error:
        stage = str(error)
    if stage != "active":
        found += f", and so delete no experiment of its own; experiment {DEFAULT}: {stage}"
        return False, found, "Use a key with the scope mlflow:write. Nothing was made."
    job.experiment_id = DEFAULT
    return True, found, ""


def at_prefix(prefix: str) -> Callable[[Job], Verdict]:
    """Whether the server answers under `prefix` of the same host, and to nobody without a key."""

    def look(job: Job) -> Verdict:
        base = f"{profile.origin(job.uri)}{prefix}"
        try:
            reply = _ask(job, "GET", base + _SEARCH)
        except Failed as failed:
            return None, failed.args[0], ""
        # Another page or service at the same host may answer anything else with 200.
        if reply.status == 200 and reply.said is not None and _lists(reply.said):
            found = f"{base} ANSWERS WITHOUT A KEY: {_SEARCH} answered 200"
            return False, found, f"{_MODE} Or something serves MLflow there without this package."
        if not _is_refusal(reply, "KEY_MISSING", ""):
            return None, f"not served there: {base} answered {reply.status}", ""
        if job.identity:
            seen = HokusaiAuthClient(base).whoami(timeout=REQUEST, max_retries=0)
            if seen.get("key_id") != job.identity["key_id"]:
                return False, f"{base} takes the key for {seen.get('key_id')}", OPERATOR
        return True, f"{base} answers", ""

    return look

"""The steps of `hokusai-auth smoke` that make something, and the clean-up.

Everything has the same new name, by which the clean-up finds it: an answer with its id may be lost.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from mlflow_hokusai_auth.client.default_experiment import find_or_make

from . import doctor

#: The experiment that every server has, for keys that may not delete one of their own.
DEFAULT = "0"

#: Seconds for which one request may wait for a byte.
REQUEST = 5

OPERATOR = "Send this line to the server's operator."

Outcome = doctor.Outcome

_MLMODEL = "artifact_path: model\nflavors: {}\n"
_METRIC = 0.91
_PROXY = (
    "The server's operator should start it with --artifacts-destination, so that it serves them."
)


class Failed(Exception):
    """Raised with two texts: the reason of a failure, and its fix."""


@dataclass
class Job(doctor.Results):
    """Results of earlier steps that later ones use."""

    folder: Path = Path()
    name: str = field(default_factory=lambda: f"hokusai-smoke-{secrets.token_hex(8)}")
    experiment_id: str = ""
    run: Any = None
    version: str = ""
    #: The objects that may exist and are not deleted yet.
    left: list[str] = field(default_factory=list)
    #: The deadline of a check, in seconds of the monotonic clock.
    until: float = 0.0
    over: bool = False
    threads: list[threading.Thread] = field(default_factory=list)

    def client(self) -> MlflowClient:
        """Return the client for a step's next request. Raises Failed once cleaning up has begun."""
        if self.over:
            raise Failed("too late", "")
        return MlflowClient(self.uri, self.uri)


def _experiment(job: Job) -> Outcome:
    if job.experiment_id:
        return True, f"{job.experiment_id}, as the key may not delete its own", ""
    name = job.identity.get("default_experiment")
    if name and "write" not in job.identity["can"]:
        job.experiment_id = find_or_make(job.client(), name)
        return True, f"{job.experiment_id}, {name}, as the key may not delete its own", ""
    job.left.append(f"experiment {job.name}")
    job.experiment_id = job.client().create_experiment(job.name)
    return True, f"{job.experiment_id}, {job.name}", ""


def _run(job: Job) -> Outcome:
    # A run in our own experiment is deleted with the experiment.
    if f"experiment {job.name}" not in job.left:
        job.left.append(f"run {job.name} in experiment {job.experiment_id}")
    job.run = job.client().create_run(job.experiment_id, run_name=job.name)
    run_id, uri = job.run.info.run_id, job.run.info.artifact_uri
    job.client().log_metric(run_id, "accuracy", _METRIC)
    metrics = job.client().get_run(run_id).data.metrics
    if metrics != {"accuracy": _METRIC}:
        return False, f"its metric came back as {metrics}", OPERATOR
    if not _is_served(uri):
        return False, f"its artifacts would go to {uri}, not through the server", _PROXY
    return True, f"{run_id}, with a metric", ""


def _artifacts(job: Job) -> Outcome:
    model = job.folder / "model"
    model.mkdir()
    (model / "MLmodel").write_text(_MLMODEL)
    (model / "weights.bin").write_bytes(secrets.token_bytes(4096))
    job.client().log_artifacts(job.run.info.run_id, str(model), "model")
    return True, "2 files uploaded", ""


def _model(job: Job) -> Outcome:
    job.left.append(f"registered model {job.name}")
    job.client().create_registered_model(job.name)
    return True, job.name, ""


def _version(job: Job) -> Outcome:
    info = job.run.info
    made = job.client().create_model_version(
        job.name, f"{info.artifact_uri}/model", info.run_id, await_creation_for=0
    )
    status = made.status
    while status == "PENDING_REGISTRATION":
        time.sleep(0.2)
        status = job.client().get_model_version(job.name, made.version).status
    job.version = str(made.version)
    found = f"version {job.version} is {status}"
    return (True, found, "") if status == "READY" else (False, found, OPERATOR)


def _alias(job: Job) -> Outcome:
    job.client().set_registered_model_alias(job.name, "smoke", job.version)
    found = job.client().get_model_version_by_alias(job.name, "smoke").version
    if str(found) != job.version:
        return False, f"the alias leads to version {found}, not {job.version}", OPERATOR
    return True, f"smoke leads to version {job.version}", ""


def _load(job: Job) -> Outcome:
    uri = f"models:/{job.name}/{job.version}"
    (job.folder / "loaded").mkdir()
    loaded = Path(download_artifacts(artifact_uri=uri, dst_path=str(job.folder / "loaded")))
    for file in (job.folder / "model").iterdir():
        if not (loaded / file.name).is_file():
            return False, f"{uri} has no {file.name}", OPERATOR
        if (loaded / file.name).read_bytes() != file.read_bytes():
            return False, f"{file.name} of {uri} has changed", OPERATOR
    return True, f"{uri}, byte for byte the same", ""


def _list(job: Job) -> Outcome:
    models = [one.name for one in job.client().search_registered_models(f"name = '{job.name}'")]
    runs = [one.info.run_name for one in _runs(job.client(), job)]
    files = [one.path for one in job.client().list_artifacts(job.run.info.run_id, "model")]
    if models != [job.name] or runs != [job.name] or len(files) != 2:
        return False, f"models {models}, runs {runs}, artifacts {files}", OPERATOR
    return True, "the model, the run and its files are listed", ""


def clean_up(job: Job) -> Outcome:
    """Delete everything with the job's name, and remove it from `job.left`."""
    if not job.left:
        return None, "nothing was made", ""
    client = MlflowClient(job.uri, job.uri)
    problems = []
    for what, remove in (
        ("registered model", _remove_model),
        ("run", _remove_runs),
        ("experiment", _remove_experiment),
    ):
        mine = [item for item in job.left if item.startswith(what)]
        try:
            if mine:
                remove(client, job)
        except Exception as error:
            problems.append(f"{what}: {error}")
        else:
            job.left = [item for item in job.left if item not in mine]
    if problems:
        return False, "; ".join(problems), ""
    gone = "the model and the artifacts are deleted, as far as they existed"
    kept = "MLflow keeps deleted runs and experiments until `mlflow gc`"
    return True, f"{gone}; {kept}", ""


def _remove_model(client: MlflowClient, job: Job) -> None:
    try:
        client.delete_registered_model(job.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _remove_runs(client: MlflowClient, job: Job) -> None:
    for run in _runs(client, job):
        client.delete_run(run.info.run_id)
        _remove_artifacts(run.info.artifact_uri.removesuffix("/artifacts"), run.info.run_id)


def _remove_experiment(client: MlflowClient, job: Job) -> None:
    experiment = client.get_experiment_by_name(job.name)
    if experiment is not None:
        client.delete_experiment(experiment.experiment_id)
        _remove_artifacts(experiment.artifact_location, experiment.experiment_id)


def _remove_artifacts(uri: str, owner: str) -> None:
    """Delete the folder `uri`, which must belong to `owner`, the id of a run or an experiment."""
    if not _is_served(uri):
        return  # there are none
    if not uri.endswith(f"/{owner}"):
        raise RuntimeError(f"its artifacts are at {uri}, perhaps with others")
    repository = get_artifact_repository(uri)
    if repository.list_artifacts():
        repository.delete_artifacts()


def _is_served(uri: str) -> bool:
    """Return True if `uri` goes through the server; with two slashes it may name another host."""
    return uri.startswith("mlflow-artifacts:/") and not uri.startswith("mlflow-artifacts://")


def _runs(client: MlflowClient, job: Job) -> list[Any]:
    return list(client.search_runs([job.experiment_id], f"tags.mlflow.runName = '{job.name}'"))


#: Name, names of the checks that must have passed before, and the step.
STEPS: list[tuple[str, tuple[str, ...], Callable[[Job], Outcome]]] = [
    ("experiment", ("scope",), _experiment),
    ("run", ("experiment",), _run),
    ("artifacts", ("run",), _artifacts),
    ("registered model", ("artifacts",), _model),
    ("model version", ("registered model",), _version),
    ("alias", ("model version",), _alias),
    ("load", ("model version",), _load),
    ("list", ("model version",), _list),
]

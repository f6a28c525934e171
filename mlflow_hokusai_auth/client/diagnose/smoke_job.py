"""The steps of `hokusai-auth smoke` that make something, and what takes it away again.

Nothing is found again by what an answer said, as an answer may be lost: all has the same new name.
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

from . import doctor

#: The experiment of every server, for keys that could not delete one of their own.
DEFAULT = "0"

#: Seconds for which one request may wait for a byte.
REQUEST = 5

OPERATOR = "Tell the server's operator what this line says."

Verdict = doctor._Verdict

_MLMODEL = "artifact_path: model\nflavors: {}\n"
_METRIC = 0.91
_PROXY = (
    "The server's operator should start it with --artifacts-destination, so that it serves them."
)


class Failed(Exception):
    """What was found, and the fix."""


@dataclass
class Job(doctor._Seen):
    """What later steps take from earlier ones."""

    folder: Path = Path()
    name: str = field(default_factory=lambda: f"hokusai-smoke-{secrets.token_hex(8)}")
    experiment_id: str = ""
    run: Any = None
    version: str = ""
    #: What may have been made and is not deleted yet.
    left: list[str] = field(default_factory=list)
    #: When a check has to have ended, in seconds of the monotonic clock.
    until: float = 0.0
    over: bool = False
    threads: list[threading.Thread] = field(default_factory=list)

    def client(self) -> MlflowClient:
        """For a step's next request. Raises Failed once cleaning up has begun: nobody would notice."""
        if self.over:
            raise Failed("too late", "")
        return MlflowClient(self.uri, self.uri)


def _experiment(job: Job) -> Verdict:
    if job.experiment_id:
        return True, f"{job.experiment_id}, as the key may not delete one of its own", ""
    job.left.append(f"experiment {job.name}")
    job.experiment_id = job.client().create_experiment(job.name)
    return True, f"{job.experiment_id}, {job.name}", ""


def _run(job: Job) -> Verdict:
    # One in our own experiment is deleted along with that.
    if job.experiment_id == DEFAULT:
        job.left.append(f"run {job.name} in experiment {DEFAULT}")
    job.run = job.client().create_run(job.experiment_id, run_name=job.name)
    run_id, uri = job.run.info.run_id, job.run.info.artifact_uri
    job.client().log_metric(run_id, "accuracy", _METRIC)
    metrics = job.client().get_run(run_id).data.metrics
    if metrics != {"accuracy": _METRIC}:
        return False, f"its metric came back as {metrics}", OPERATOR
    if not _is_served(uri):
        return False, f"its artifacts would go to {uri}, not through the server", _PROXY
    return True, f"{run_id}, with a metric", ""


def _artifacts(job: Job) -> Verdict:
    model = job.folder / "model"
    model.mkdir()
    (model / "MLmodel").write_text(_MLMODEL)
    (model / "weights.bin").write_bytes(secrets.token_bytes(4096))
    job.client().log_artifacts(job.run.info.run_id, str(model), "model")
    return True, "2 files uploaded", ""


def _model(job: Job) -> Verdict:
    job.left.append(f"registered model {job.name}")
    job.client().create_registered_model(job.name)
    return True, job.name, ""


def _version(job: Job) -> Verdict:
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


def _alias(job: Job) -> Verdict:
    job.client().set_registered_model_alias(job.name, "smoke", job.version)
    found = job.client().get_model_version_by_alias(job.name, "smoke").version
    if str(found) != job.version:
        return False, f"the alias leads to version {found}, not {job.version}", OPERATOR
    return True, f"smoke leads to version {job.version}", ""


def _load(job: Job) -> Verdict:
    uri = f"models:/{job.name}/{job.version}"
    (job.folder / "loaded").mkdir()
    loaded = Path(download_artifacts(artifact_uri=uri, dst_path=str(job.folder / "loaded")))
    for file in (job.folder / "model").iterdir():
        if not (loaded / file.name).is_file():
            return False, f"{uri} has no {file.name}", OPERATOR
        if (loaded / file.name).read_bytes() != file.read_bytes():
            return False, f"{file.name} of {uri} is not as it was", OPERATOR
    return True, f"{uri}, the same byte by byte", ""


def _list(job: Job) -> Verdict:
    models = [one.name for one in job.client().search_registered_models(f"name = '{job.name}'")]
    runs = [one.info.run_name for one in _runs(job.client(), job)]
    files = [one.path for one in job.client().list_artifacts(job.run.info.run_id, "model")]
    if models != [job.name] or runs != [job.name] or len(files) != 2:
        return False, f"models {models}, runs {runs}, artifacts {files}", OPERATOR
    return True, "the model, the run and its files are there", ""


def clean_up(job: Job) -> Verdict:
    """Delete all that has the job's name, each for itself. Takes out of `job.left` what is gone."""
    if not job.left:
        return None, "nothing was made", ""
    client = MlflowClient(job.uri, job.uri)
    problems = []
    for what, remove in (
        ("registered model", _remove_model),
        ("run", _remove_runs),
        ("experiment", _remove_experiment),
    ):
        mine = [one for one in job.left if one.startswith(what)]
        try:
            if mine:
                remove(client, job)
        except Exception as error:
            problems.append(f"{what}: {error}")
        else:
            job.left = [one for one in job.left if one not in mine]
    if problems:
        return False, "; ".join(problems), ""
    gone = "the model and the artifacts are deleted, as far as they were made"
    kept = "MLflow keeps a deleted run and experiment until `mlflow gc`"
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
    """Delete the folder `uri`, which must be that of `owner`, the id of a run or an experiment."""
    if not _is_served(uri):
        return  # none were made
    if not uri.endswith(f"/{owner}"):
        raise RuntimeError(f"its artifacts are at {uri}, and perhaps not alone there")
    repository = get_artifact_repository(uri)
    if repository.list_artifacts():
        repository.delete_artifacts()


def _is_served(uri: str) -> bool:
    """Whether what is at `uri` goes through the server: with two slashes it would be another's."""
    return uri.startswith("mlflow-artifacts:/") and not uri.startswith("mlflow-artifacts://")


def _runs(client: MlflowClient, job: Job) -> list[Any]:
    return list(client.search_runs([job.experiment_id], f"tags.mlflow.runName = '{job.name}'"))


#: Name, what has to have passed before, and the step.
STEPS: list[tuple[str, tuple[str, ...], Callable[[Job], Verdict]]] = [
    ("experiment", ("scope",), _experiment),
    ("run", ("experiment",), _run),
    ("artifacts", ("run",), _artifacts),
    ("registered model", ("artifacts",), _model),
    ("model version", ("registered model",), _version),
    ("alias", ("model version",), _alias),
    ("load", ("model version",), _load),
    ("list", ("model version",), _list),
]

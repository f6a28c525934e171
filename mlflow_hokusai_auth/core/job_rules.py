"""The rules that MLflow's server-side jobs may use with the credential that the server makes for them.

Evaluation, scorers, issue detection and prompt optimisation run in processes on the server's host and
call the server over HTTP. They act for the user who started them, and may run that user's scorers. So
the credential opens only the rules that the jobs' code calls, and none that deletes, administers, or
reaches a job or key. Scopes don't matter: a rule that is missing here is refused, whatever its class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .types import Operation, Principal

#: The environment variable with the credential, which jobs inherit from `mlflow server`. The name is
#: MLflow's: a job of a user with Basic authentication sends its value as the password.
TOKEN = "_MLFLOW_INTERNAL_GATEWAY_AUTH_TOKEN"  # noqa: S105 - the name of a variable
#: The environment variable that MLflow sets for the processes of jobs, and not for its workers.
_STARTED_BY = "MLFLOW_SERVER_PID"

#: The principal of the credential. It is compared with `is`, so that no authority can answer with it.
PRINCIPAL = Principal("jobs", "mlflow-jobs", frozenset({"internal:jobs"}), owner_id="mlflow-jobs")

# It begins with hk_, since on routes to providers only such a text counts as a key; and "jobs" is no
# environment, so that it can't be a key of the store.
_SHAPE = re.compile(r"hk_jobs_[0-9a-f]{64}", re.ASCII)

#: Lines of `METHOD base` and the paths that continue the base, spelt as in `routes.TABLE`.
_TABLE = """
GET /version
GET /api/3.0/mlflow/server-info

GET /api/2.0/mlflow/ experiments/get experiments/get-by-name
GET /api/2.0/mlflow/ runs/get metrics/get-history
POST /api/2.0/mlflow/ runs/search runs/create runs/update runs/set-tag runs/log-batch
POST /api/2.0/mlflow/ runs/log-metric runs/log-parameter runs/log-inputs runs/outputs

GET /api/2.0/mlflow/ traces/{request_id}/info
POST /api/2.0/mlflow/ traces traces/link-to-run traces/link-prompts
PATCH /api/2.0/mlflow/ traces/{request_id} traces/{request_id}/tags
GET /api/3.0/mlflow/ traces/get traces/batchGet traces/{trace_id}
GET /api/3.0/mlflow/ traces/{trace_id}/assessments/{assessment_id}
POST /api/3.0/mlflow/ traces traces/search traces/batchGetInfos traces/{trace_id}/assessments
PATCH /api/3.0/mlflow/ traces/{trace_id}/tags traces/{trace_id}/assessments/{assessment_id}
POST /v1/traces

GET /api/3.0/mlflow/ datasets/{dataset_id} datasets/{dataset_id}/records
GET /api/3.0/mlflow/ datasets/{dataset_id}/experiment-ids
GET /api/3.0/mlflow/ scorers/get scorers/list scorers/versions
GET /api/3.0/mlflow/ issues/{issue_id}
POST /api/3.0/mlflow/ issues issues/search

GET /api/2.0/mlflow/ logged-models/{model_id}
POST /api/2.0/mlflow/ logged-models/search

GET /api/2.0/mlflow/ registered-models/get registered-models/alias model-versions/get
GET /api/2.0/mlflow/ registered-models/search model-versions/search
POST /api/2.0/mlflow/ model-versions/create model-versions/set-tag

GET /api/2.0/mlflow/ artifacts/list
GET /api/2.0/mlflow-artifacts/ artifacts artifacts/{artifact_path:path}
GET /api/2.0/mlflow-artifacts/ presigned/{artifact_path:path}
PUT /api/2.0/mlflow-artifacts/ artifacts/{artifact_path:path}
POST /api/2.0/mlflow-artifacts/ mpu/create/{artifact_path:path} mpu/complete/{artifact_path:path}
POST /api/2.0/mlflow-artifacts/ mpu/abort/{artifact_path:path}

GET /api/3.0/mlflow/ gateway/endpoints/get
POST /gateway/ mlflow/v1/chat/completions {endpoint_name}/mlflow/invocations
POST /gateway/ openai/v1/chat/completions openai/v1/embeddings typesafe/v1/systemone
"""


def _rules() -> frozenset[str]:
    rules = []
    for line in filter(None, _TABLE.splitlines()):
        method, base, *paths = line.split()
        rules += [f"{method} {base}{path}" for path in paths or [""]]
    return frozenset(rules)


#: Every rule that the credential opens, in the form of `Operation.rule`.
RULES = _rules()


def allows(operation: Operation) -> bool:
    """Return whether a job may do `operation`."""
    return operation.rule in RULES


def is_job(environ: Mapping[str, str]) -> bool:
    """Return whether `environ` belongs to a process that runs jobs of a server with this package."""
    return _STARTED_BY in environ and well_formed(environ.get(TOKEN, ""))


def well_formed(secret: str) -> bool:
    """Return whether `secret` has the form of the credential: `hk_jobs_` and 256 bits in hex."""
    return bool(_SHAPE.fullmatch(secret))

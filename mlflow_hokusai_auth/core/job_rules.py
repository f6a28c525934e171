"""What MLflow's server-side jobs may do with the credential that the server makes for them.

Evaluation, scorers, issue detection and prompt optimisation run in processes of the server's host and
call it back over HTTP. They act for whoever started them, and run scorers' code where the operator
lets them, so the credential is worth as little as the work allows: what the code of those jobs calls,
and nothing that deletes, administers, or reaches a job or key. No scope is involved: a rule that is
missing here is refused, whatever its class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .types import Operation, Principal

#: The variable that holds the credential, which MLflow's jobs inherit from `mlflow server`. It is
#: MLflow's own: a job that was started with Basic takes it for the password.
TOKEN = "_MLFLOW_INTERNAL_GATEWAY_AUTH_TOKEN"  # noqa: S105 - the name of a variable
#: A variable of MLflow's that its jobs' processes have, and its workers have not.
_STARTED_BY = "MLFLOW_SERVER_PID"

#: Whom the credential stands for. Recognised by identity, so that no authority can answer with it.
PRINCIPAL = Principal("jobs", "mlflow-jobs", frozenset({"internal:jobs"}))

# Begins as our keys do, since on routes to providers only such a text is taken for one of ours; and
# holds no environment that a key of the store has, so that it can't be one.
_SHAPE = re.compile(r"hk_jobs_[0-9a-f]{64}", re.ASCII)

#: `METHOD base` and the paths that continue it, spelled as `routes.TABLE` spells them.
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
    found = []
    for line in filter(None, _TABLE.splitlines()):
        method, base, *paths = line.split()
        found += [f"{method} {base}{path}" for path in paths or [""]]
    return frozenset(found)


#: Every rule that the credential opens, as `Operation.rule` has it.
RULES = _rules()


def allows(operation: Operation) -> bool:
    """Whether a job may do `operation`."""
    return operation.rule in RULES


def is_job(environ: Mapping[str, str]) -> bool:
    """Whether `environ` is that of a process that runs jobs of a server with this package."""
    return _STARTED_BY in environ and well_formed(environ.get(TOKEN, ""))


def well_formed(secret: str) -> bool:
    """Whether `secret` is one that the server made: long and random, so not to be guessed."""
    return bool(_SHAPE.fullmatch(secret))

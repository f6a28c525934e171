"""The table of routes: the access that each route of an MLflow server needs. `operations` matches it.

A family is `[kind base]` and its rows, each `CLASS METHODS PATH…`. A path continues the base, and
`{api,ajax-api}` in a base stands for either, since MLflow serves most routes in several spellings.
In a path, `{x}` is one segment and `{x:path}` is the rest. If several rows with the same beginning
match, the first one counts, so rows with `{…:path}` stand in the order of MLflow's router. A `>` after
the class means that the server calls a provider, which may see the request's headers.

A rule of class KEY lets a key ask about itself. A rule of class WRITE changes data, spends money or
calls a provider. A rule of class ADMIN is one that MLflow's basic-auth keeps for administrators, or
touches credentials, other users or the host.
The table covers MLflow 3.4 to 3.17. A route of a later version is unknown, and so needs ADMIN.
"""

from __future__ import annotations

TABLE = """
# The one public route: load balancers and container probes have no key.
[server /]
PUBLIC  GET               health
READ    GET               version

# MLflow 3.9 has server-info at the root.
[server /]
READ    GET               server-info

[server /{api,ajax-api}/3.0/mlflow/]
READ    GET               server-info

# MLflow serves its metrics with --expose-prometheus only. They show everybody's traffic.
[server /]
ADMIN   GET               metrics

[ui]
READ    GET               /  /static-files/{path:path}  /build/{filename:path}

# With telemetry on, the GET fetches MLflow's settings once per process, and sends nothing from the
# request. The POST makes the server send the caller's records to MLflow's makers.
[ui /ajax-api/3.0/mlflow/]
READ    GET               ui-telemetry
WRITE   POST              ui-telemetry

# This row has the access of a mutation. A query needs READ; only the body tells them apart, in
# `operations.graphql`.
[graphql /]
WRITE   GET,POST          graphql

[hokusai /api/]
KEY     POST              v1/keys/validate
KEY     GET               2.0/hokusai/whoami  2.0/hokusai/openapi.json

# A key may rotate itself: the view checks that the path names the caller's own key. GitHub signs its
# reports of leaks.
[hokusai /api/2.0/hokusai/]
ADMIN   GET,POST          keys
ADMIN   POST              keys/import  keys/find  keys/revoke
ADMIN   GET               keys/export
PUBLIC  POST              keys/leaked
ADMIN   GET,PATCH,DELETE  keys/{key_id}
KEY     POST              keys/{key_id}/rotate

# Whoever opens a link has no key yet: its code is the credential.
[hokusai /api/2.0/hokusai/]
ADMIN   GET,POST          links
ADMIN   DELETE            links/{link_id}

[hokusai /hokusai/]
PUBLIC  GET,POST          link
PUBLIC  GET               static/link.js

# Owners share their own models: the view shows and ends no grant of anybody else.
[hokusai /api/2.0/hokusai/]
READ    GET               owners  owners/of  grants
WRITE   POST              grants
WRITE   DELETE            grants/{grant_id}
ADMIN   POST              owners/assign  owners/release
ADMIN   GET               owners/check
ADMIN   GET,POST,DELETE   prefixes
ADMIN   GET,POST          isolation
ADMIN   GET               audit  status

# A workload's identity token is the credential of its exchange for a key. `policy.operation_of` opens
# trusts to suppliers, if a setting says so.
[hokusai /api/2.0/hokusai/]
ADMIN   GET,POST          trust
ADMIN   PATCH,DELETE      trust/{trust_id}
PUBLIC  POST              token

# Signing in needs no key, since the key is pasted into that page.
[hokusai /hokusai/]
PUBLIC  GET,POST          login
PUBLIC  POST              logout
PUBLIC  GET               static/hokusai.css  static/hokusai.svg  static/login.js
KEY     GET               keys  static/keys.js

# An address that people type leads to the page of keys.
[hokusai]
KEY     GET               /hokusai  /hokusai/

[hokusai /hokusai/]
# Whose models are: each form needs the access of what it does by REST, such as POST grants.
READ    GET               models
WRITE   POST              models/share  models/unshare
ADMIN   POST              models/assign  models/reserve  models/unreserve

# Trusts: as by REST.
ADMIN   GET               trusts
ADMIN   POST              trusts/add  trusts/remove
ADMIN   GET,POST          trusts/{trust_id}/edit

# One-time links, for operators.
ADMIN   GET               links
ADMIN   POST              links/revoke

# The forms have the access of the REST API. As there, a key may rotate itself.
ADMIN   GET,POST          keys/new  keys/find
ADMIN   POST              keys/selected
ADMIN   GET               keys/{key_id}
ADMIN   GET,POST          keys/{key_id}/edit  keys/{key_id}/revoke
KEY     GET,POST          keys/{key_id}/rotate

ADMIN   GET               metrics

# Health: a single word for load balancers, and every part for callers with a key.
[hokusai /api/health/]
PUBLIC  GET               mlflow
KEY     GET               mlflow/detailed

# MLflow's pages ask here about the user who is signed in.
[ui /{api,ajax-api}/2.0/mlflow/]
KEY     GET               users/current
KEY     PATCH             users/update-password

[ui /{api,ajax-api}/3.0/mlflow/]
KEY     GET               users/current/permissions  users/roles/list

[experiments /{api,ajax-api}/2.0/mlflow/]
READ    GET               experiments/get  experiments/get-by-name  experiments/search
READ    POST              experiments/search
WRITE   POST              experiments/create  experiments/update  experiments/delete
WRITE   POST              experiments/restore  experiments/set-experiment-tag
WRITE   POST              experiments/delete-experiment-tag

[experiments /ajax-api/2.0/mlflow/]
READ    POST              experiments/search-datasets

# These twins lack a slash by a mistake in MLflow, which serves them.
[experiments /{api,ajax-api}/2.0mlflow/]
READ    POST              experiments/search-datasets

[runs /{api,ajax-api}/2.0/mlflow/]
READ    GET               runs/get  metrics/get-history  metrics/get-history-bulk-interval
READ    POST              runs/search
WRITE   POST              runs/create  runs/update  runs/delete  runs/restore  runs/set-tag
WRITE   POST              runs/delete-tag  runs/log-batch  runs/log-inputs  runs/log-metric
WRITE   POST              runs/log-model  runs/log-parameter  runs/outputs

[runs /ajax-api/2.0/mlflow/]
READ    GET               metrics/get-history-bulk
WRITE   POST              runs/create-promptlab-run

[logged-models /{api,ajax-api}/2.0/mlflow/]
READ    POST              logged-models/search
READ    GET               logged-models/{model_id}  logged-models/{model_id}/artifacts/directories
WRITE   POST              logged-models  logged-models/{model_id}/params
WRITE   PATCH             logged-models/{model_id}  logged-models/{model_id}/tags
WRITE   DELETE            logged-models/{model_id}  logged-models/{model_id}/tags/{tag_key}

[logged-models /ajax-api/2.0/mlflow/]
READ    GET               logged-models/{model_id}/artifacts/files

# A presigned URL works without a key, so getting one needs the access that its use needs.
[artifacts /{api,ajax-api}/2.0/mlflow/]
READ    GET               artifacts/list
READ    POST              artifacts/presigned-download-url
WRITE   POST              artifacts/presigned-upload-url

[artifacts /ajax-api/2.0/mlflow/]
WRITE   POST              upload-artifact

[artifacts /]
READ    GET               get-artifact

[artifacts /{api,ajax-api}/2.0/mlflow-artifacts/]
READ    GET               artifacts  artifacts/{artifact_path:path}
READ    GET               presigned/{artifact_path:path}
WRITE   PUT,DELETE        artifacts/{artifact_path:path}
WRITE   POST              mpu/create/{artifact_path:path}  mpu/complete/{artifact_path:path}
WRITE   POST              mpu/abort/{artifact_path:path}

[registered-models /{api,ajax-api}/2.0/mlflow/]
READ    GET               registered-models/get  registered-models/search  registered-models/alias
READ    GET               registered-models/get-latest-versions
READ    POST              registered-models/get-latest-versions
WRITE   POST              registered-models/create  registered-models/rename
WRITE   POST              registered-models/set-tag  registered-models/alias
WRITE   PATCH             registered-models/update
WRITE   DELETE            registered-models/delete  registered-models/delete-tag
WRITE   DELETE            registered-models/alias

[model-versions /{api,ajax-api}/2.0/mlflow/]
READ    GET               model-versions/get  model-versions/get-download-uri  model-versions/search
WRITE   POST              model-versions/create  model-versions/transition-stage
WRITE   POST              model-versions/set-tag
WRITE   PATCH             model-versions/update
WRITE   DELETE            model-versions/delete  model-versions/delete-tag

[model-versions /]
READ    GET               model-versions/get-artifact

# A webhook holds a URL that the server calls, and its secret.
[webhooks /{api,ajax-api}/2.0/mlflow/]
ADMIN   GET,POST          webhooks
ADMIN   GET,PATCH,DELETE  webhooks/{webhook_id}
ADMIN   POST              webhooks/{webhook_id}/test

[traces /]
WRITE   POST              v1/traces

[traces /{api,ajax-api}/{2.0,3.0}/mlflow/]
WRITE   POST              traces  traces/delete-traces

[traces /ajax-api/{2.0,3.0}/mlflow/]
READ    GET               get-trace-artifact

[traces /{api,ajax-api}/2.0/mlflow/]
READ    GET               traces  unified-traces  get-online-trace-details
READ    GET               traces/{request_id}/info
WRITE   POST              traces/link-prompts  traces/link-to-run
WRITE   PATCH             traces/{request_id}
WRITE   PATCH,DELETE      traces/{request_id}/tags

[traces /{api,ajax-api}/3.0/mlflow/]
READ    GET               traces/get  traces/batchGet  traces/{trace_id}
READ    POST              traces/search  traces/batchGetInfos  traces/metrics
READ    POST              traces/calculate-filter-correlation
WRITE   PATCH,DELETE      traces/{trace_id}/tags
WRITE   POST              traces/{trace_id}/assessments
READ    GET               traces/{trace_id}/assessments/{assessment_id}
WRITE   PATCH,DELETE      traces/{trace_id}/assessments/{assessment_id}

[datasets /{api,ajax-api}/3.0/mlflow/]
READ    GET               datasets/search  datasets/{dataset_id}  datasets/{dataset_id}/records
READ    GET               datasets/{dataset_id}/experiment-ids
READ    POST              datasets/search
WRITE   POST              datasets/create  datasets/{dataset_id}/add-experiments
WRITE   POST              datasets/{dataset_id}/remove-experiments
WRITE   POST,DELETE       datasets/{dataset_id}/records
WRITE   PATCH             datasets/{dataset_id}/tags
WRITE   DELETE            datasets/{dataset_id}  datasets/{dataset_id}/tags/{key}

[issues /{api,ajax-api}/3.0/mlflow/]
READ    POST              issues/search
READ    GET               issues/{issue_id}
WRITE   POST              issues
WRITE   PATCH             issues/{issue_id}

[label-schemas /{api,ajax-api}/3.0/mlflow/]
READ    GET               label-schemas/get  label-schemas/get-by-name  label-schemas/list
WRITE   POST              label-schemas/create
WRITE   PATCH             label-schemas/update
WRITE   DELETE            label-schemas/delete

# Review queues belong to an experiment, and in basic-auth its editors manage them, so WRITE is enough.
[review-queues /{api,ajax-api}/3.0/mlflow/]
READ    GET               review-queues/get  review-queues/get-by-name  review-queues/list
READ    GET               review-queues/items/list
WRITE   POST              review-queues/create  review-queues/update  review-queues/delete
WRITE   POST              review-queues/get-or-create-user  review-queues/items/add
WRITE   POST              review-queues/items/remove  review-queues/items/set-status

[scorers /{api,ajax-api}/3.0/mlflow/]
READ    GET               scorers/get  scorers/list  scorers/versions  scorers/online-configs
WRITE   POST              scorers/register
WRITE   PUT               scorers/online-config
WRITE   DELETE            scorers/delete

# Jobs run on the server's host, but only functions on MLflow's own list (scoring, prompt optimisation,
# issue detection, evaluation). They run a caller's code only if the operator has set
# MLFLOW_SERVER_ENABLE_CUSTOM_SCORERS. So WRITE is enough to start one.
[scorers /ajax-api/3.0/mlflow/]
WRITE   POST              scorer/invoke

[issues /ajax-api/3.0/mlflow/]
WRITE   POST              issues/invoke

[genai /ajax-api/3.0/mlflow/]
WRITE   POST              genai/evaluate/invoke

[jobs /ajax-api/3.0/mlflow/]
READ    GET               jobs/{job_id}
WRITE   PATCH             jobs/cancel/{job_id}

[jobs /ajax-api/3.0/]
READ    POST              jobs/search
READ    GET               jobs/{job_id}
WRITE   POST              jobs/
WRITE   PATCH             jobs/cancel/{job_id}

[prompt-optimization /{api,ajax-api}/3.0/mlflow/]
READ    GET,POST          prompt-optimization/jobs/search
READ    GET               prompt-optimization/jobs/{job_id}
WRITE   POST              prompt-optimization/jobs  prompt-optimization/jobs/{job_id}/cancel
WRITE   DELETE            prompt-optimization/jobs/{job_id}

[demo /ajax-api/3.0/mlflow/]
WRITE   POST              demo/generate
ADMIN   POST              demo/delete

[mcp-servers /{api,ajax-api}/3.0/mlflow/]
WRITE   POST              mcp-servers
READ    GET               mcp-servers  mcp-servers/endpoints
WRITE   POST              mcp-servers/{name:path}/versions/{version:path}/tags
WRITE   DELETE            mcp-servers/{name:path}/versions/{version:path}/tags/{key:path}
READ    GET               mcp-servers/{name:path}/versions/{version:path}
WRITE   PATCH,DELETE      mcp-servers/{name:path}/versions/{version:path}
WRITE   POST              mcp-servers/{name:path}/versions
READ    GET               mcp-servers/{name:path}/versions
WRITE   POST              mcp-servers/{name:path}/endpoints
READ    GET               mcp-servers/{name:path}/endpoints/{endpoint_id}
WRITE   PATCH,DELETE      mcp-servers/{name:path}/endpoints/{endpoint_id}
READ    GET               mcp-servers/{name:path}/endpoints
WRITE   POST              mcp-servers/{name:path}/tags
WRITE   DELETE            mcp-servers/{name:path}/tags/{key:path}
WRITE   POST              mcp-servers/{name:path}/aliases
READ    GET               mcp-servers/{name:path}/aliases/{alias:path}
WRITE   DELETE            mcp-servers/{name:path}/aliases/{alias:path}
READ    GET               mcp-servers/{name:path}
WRITE   PATCH,DELETE      mcp-servers/{name:path}

# Basic-auth shows a workspace to its members, and lets only administrators create or change one.
[workspaces /{api,ajax-api}/3.0/mlflow/]
READ    GET               workspaces  workspaces/{workspace_name}
ADMIN   POST              workspaces
ADMIN   PATCH,DELETE      workspaces/{workspace_name}

# These calls go to a provider, and cost money.
[gateway /gateway/]
READ    GET               mlflow/v1/models
WRITE>  POST              mlflow/v1/chat/completions  openai/v1/chat/completions
WRITE>  POST              openai/v1/embeddings  openai/v1/responses  openai/v1/responses/compact
WRITE>  POST              typesafe/v1/systemone  anthropic/v1/messages
WRITE>  POST              {endpoint_name}/mlflow/invocations
WRITE>  POST              gemini/v1beta/models/{endpoint_name}:generateContent
WRITE>  POST              gemini/v1beta/models/{endpoint_name}:streamGenerateContent
WRITE>  POST              proxy/{endpoint_name}/{path:path}

# The GET, too, sends a request to the deployments server.
[gateway /ajax-api/2.0/mlflow/]
WRITE>  GET,POST          gateway-proxy

# Endpoints and models are shown without their secrets. All other rules decide where credentials go.
[gateway /{api,ajax-api}/3.0/mlflow/]
READ    GET               gateway/endpoints/get  gateway/endpoints/list
READ    GET               gateway/endpoints/bindings/list
READ    GET               gateway/model-definitions/get  gateway/model-definitions/list
READ    GET               gateway/budgets/get  gateway/budgets/list  gateway/budgets/windows
READ    GET               gateway/guardrails/list-for-endpoint
ADMIN   GET               gateway/guardrails/get  gateway/guardrails/list
ADMIN   GET               gateway/secrets/get  gateway/secrets/list
ADMIN   POST              gateway/secrets/create  gateway/secrets/update
ADMIN   POST              gateway/endpoints/create  gateway/endpoints/update
ADMIN   POST              gateway/endpoints/set-tag  gateway/endpoints/bindings/create
ADMIN   POST              gateway/endpoints/models/attach  gateway/endpoints/models/detach
ADMIN   POST              gateway/model-definitions/create  gateway/model-definitions/update
ADMIN   POST              gateway/budgets/create  gateway/budgets/update
ADMIN   POST              gateway/guardrails/create  gateway/guardrails/add-to-endpoint
ADMIN   PATCH             gateway/guardrails/update-config
ADMIN   DELETE            gateway/secrets/delete  gateway/model-definitions/delete
ADMIN   DELETE            gateway/endpoints/delete  gateway/endpoints/delete-tag
ADMIN   DELETE            gateway/endpoints/bindings/delete  gateway/budgets/delete
ADMIN   DELETE            gateway/guardrails/delete  gateway/guardrails/remove-from-endpoint

# `secrets/config` shows whether secrets are encrypted with MLflow's well-known default passphrase.
[gateway /ajax-api/3.0/mlflow/]
READ    GET               gateway/supported-providers  gateway/supported-models
READ    GET               gateway/provider-config
ADMIN   GET               gateway/secrets/config

# The assistant runs command-line tools on the server's host, with the server's environment.
[assistant /ajax-api/3.0/mlflow/assistant/]
ADMIN>  GET,PUT           config
ADMIN>  GET               providers  providers/{provider}/health  providers/{provider}/models
ADMIN>  GET               sessions/{session_id}/stream
ADMIN>  PATCH             sessions/{session_id}
ADMIN>  POST              message  skills/install
ADMIN>  POST              sessions/{session_id}/permission  sessions/{session_id}/tool-result
"""

#: Root field of GraphQL in MLflow 3.4 to 3.17 -> the kinds of resource that its answer may contain.
#: A run's answer contains its experiment and its model versions if the query asks for them.
QUERY_FIELDS = {
    "__typename": ("server",),
    "mlflowGetExperiment": ("experiments",),
    "mlflowGetMetricHistoryBulkInterval": ("runs",),
    "mlflowGetRun": ("runs", "experiments", "model-versions"),
    "mlflowListArtifacts": ("artifacts",),
    "mlflowSearchModelVersions": ("model-versions",),
    "mlflowSearchRuns": ("runs", "experiments", "model-versions"),
}

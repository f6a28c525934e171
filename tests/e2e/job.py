"""The main job as a supplier writes it: plain MLflow, nothing of this package. Runs as a script.

Prints a JSON object a line. `python job.py NAME [URI …]`, with HOKUSAI_API_KEY set: registers NAME on
the server of MLFLOW_TRACKING_URI, or NAME-0, NAME-1, … on the servers that are named.
"""

import json
import logging
import sys
import warnings

import mlflow
from mlflow import MlflowClient


class Doubler(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return [2 * x for x in model_input["x"]]


def register(name: str) -> dict:
    """The steps of the bug report: experiment, run, metric, model, registration, load."""
    warnings.filterwarnings("ignore")
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    client = MlflowClient()
    experiment = client.create_experiment(f"experiment {name}")
    run = client.create_run(experiment)
    client.log_metric(run.info.run_id, "accuracy", 0.91)
    client.log_param(run.info.run_id, "depth", 3)
    client.log_batch(run.info.run_id, tags=[mlflow.entities.RunTag("team", "suppliers & co")])
    client.log_text(run.info.run_id, "10 % of a+b", "notes/a b+c %20.txt")
    with mlflow.start_run(run_id=run.info.run_id):
        # The argument has had two names; both go by position.
        logged = mlflow.pyfunc.log_model(
            "model", python_model=Doubler(), pip_requirements=["mlflow"]
        )
    model = client.create_registered_model(name)
    source = getattr(logged, "model_id", None)
    version = mlflow.register_model(f"models:/{source}" if source else logged.model_uri, name)
    client.set_registered_model_alias(name, "champion", version.version)
    loaded = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    trace = mlflow.start_span_no_context("predict")
    trace.end()
    mlflow.flush_trace_async_logging()
    return {
        "model": model.name,
        "version": str(version.version),
        "status": client.get_model_version(name, version.version).status,
        "prediction": loaded.predict({"x": [21]}),
        "listed": [m.name for m in client.search_registered_models(f"name = '{name}'")],
        "files": sorted(f.path for f in client.list_artifacts(run.info.run_id)),
        "text": mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/notes/a b+c %20.txt"),
        "metric": client.get_run(run.info.run_id).data.metrics["accuracy"],
        "run_id": run.info.run_id,
        "trace_id": trace.trace_id,
    }


if __name__ == "__main__":
    name, uris = sys.argv[1], sys.argv[2:]
    if not uris:
        print(json.dumps(register(name)))
    for number, uri in enumerate(uris):
        mlflow.set_tracking_uri(uri)
        print(json.dumps(register(f"{name}-{number}")))

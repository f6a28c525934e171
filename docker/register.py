"""A supplier's job in plain MLflow, where nothing but the client is installed.

`python register.py NAME` prints what it saw, as a JSON object.
"""

import json
import sys
from pathlib import Path

import mlflow
from mlflow import MlflowClient

name = sys.argv[1]
client = MlflowClient()
experiment = client.create_experiment(f"experiment {name}")
run = client.create_run(experiment)
client.log_metric(run.info.run_id, "accuracy", 0.91)
client.log_text(run.info.run_id, "weights of the model", "model/weights.txt")
client.create_registered_model(name)
source = f"{run.info.artifact_uri}/model"
version = client.create_model_version(name, source, run.info.run_id)
folder = Path(mlflow.artifacts.download_artifacts(f"models:/{name}/{version.version}"))
print(
    json.dumps(
        {
            "tracking_uri": mlflow.get_tracking_uri(),
            "experiment": experiment,
            "run": run.info.run_id,
            "metric": client.get_run(run.info.run_id).data.metrics["accuracy"],
            "model": name,
            "version": str(version.version),
            "status": client.get_model_version(name, version.version).status,
            "downloaded": {f.name: f.read_text() for f in folder.iterdir()},
        }
    )
)

"""What a team does that trains with scikit-learn: plain MLflow. Runs as a script.

`python team_job.py NAME`, with HOKUSAI_API_KEY and MLFLOW_TRACKING_URI set, prints JSON: the names of
all that the team then sees.
"""

import json
import logging
import sys
import warnings

import mlflow
import pandas as pd
from mlflow import MlflowClient
from sklearn.linear_model import LinearRegression


def train(name: str) -> dict:
    warnings.filterwarnings("ignore")
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    client = MlflowClient()
    mlflow.set_experiment(f"{name}-experiment")
    mlflow.autolog(silent=True, log_models=False)
    # Each team has the same data, so its datasets have the same names and digests.
    rows = pd.DataFrame({"x": [1.0, 2.0, 3.0], "y": [2.0, 4.0, 6.0]})
    with mlflow.start_run(run_name=f"{name}-run") as run:
        mlflow.log_input(mlflow.data.from_pandas(rows, name="everybody's"), context="training")
        fitted = LinearRegression().fit(rows[["x"]], rows["y"])
    mlflow.autolog(disable=True)
    with mlflow.start_run(run_id=run.info.run_id):
        # The argument has had two names; both go by position.
        mlflow.sklearn.log_model(
            fitted, "by-hand", registered_model_name=name, pip_requirements=["mlflow"]
        )
    client.set_registered_model_alias(name, "champion", "1")
    copied = client.copy_model_version(f"models:/{name}/1", f"{name}-copy")
    experiments = client.search_experiments()
    ids = [experiment.experiment_id for experiment in experiments]
    runs = client.search_runs(ids)
    loaded = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    return {
        "copied": f"{copied.name}/{copied.version}",
        "prediction": round(loaded.predict(rows[["x"]])[0]),
        "experiments": [experiment.name for experiment in experiments],
        "runs": [run.info.run_name for run in runs],
        "datasets": sorted(one.dataset.name for run in runs for one in run.inputs.dataset_inputs),
        "models": [model.name for model in client.search_registered_models()],
        "versions": [f"{one.name}/{one.version}" for one in client.search_model_versions()],
        "logged": [one.source_run_id for one in client.search_logged_models(ids)]
        if hasattr(client, "search_logged_models")
        else [],
        "run ids": [run.info.run_id for run in runs],
    }


if __name__ == "__main__":
    print(json.dumps(train(*sys.argv[1:])))

"""What a team does with a model that another team shared with it: plain MLflow. Runs as a script.

`python reader_job.py NAME COPY`, with HOKUSAI_API_KEY and MLFLOW_TRACKING_URI set, prints JSON.
"""

import json
import logging
import sys
import warnings

import mlflow
from mlflow import MlflowClient, MlflowException


def tried(way) -> str:
    """Return the code of the refusal, or what came back."""
    try:
        return str(way())
    except MlflowException as error:
        return error.error_code


def use(name: str, copy: str) -> dict:
    warnings.filterwarnings("ignore")
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    client = MlflowClient()
    version = client.get_model_version_by_alias(name, "champion")
    info = mlflow.models.get_model_info(f"models:/{name}@champion")
    loaded = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    copied = client.copy_model_version(f"models:/{name}/{version.version}", copy)
    registered = mlflow.register_model(f"models:/{name}/{version.version}", f"{copy}-again")
    return {
        "prediction": loaded.predict({"x": [21]}),
        "flavors": sorted(info.flavors),
        "listed": [m.name for m in client.search_registered_models()],
        "versions": [f"{v.name}/{v.version}" for v in client.search_model_versions()],
        "experiments": [e.name for e in client.search_experiments()],
        "copies": [f"{copied.name}/{copied.version}", f"{registered.name}/{registered.version}"],
        "copied": mlflow.pyfunc.load_model(f"models:/{copy}/1").predict({"x": [1]}),
        "run of the copy": copied.run_id,
        "run": tried(lambda: client.get_run(version.run_id)),
        "experiment of the run": tried(
            lambda: client.list_artifacts(version.run_id) if version.run_id else None
        ),
        "change": tried(lambda: client.set_registered_model_tag(name, "a", "b")),
        "key ids": [
            key
            for tags in (version.tags, client.get_registered_model(name).tags)
            for key in tags
            if key.endswith("key_id")
        ],
    }


if __name__ == "__main__":
    print(json.dumps(use(*sys.argv[1:])))

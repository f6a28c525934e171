"""A supplier's client that registers without end, in plain MLflow. It ends with standard input.

A line of JSON each: ["did", call, seconds], ["failed", call, seconds, error], and what is on the server
from now on, in the form of `test_faults.facts`. The latter only once the client was told.
"""

import hashlib
import json
import random
import sys
import threading
import time
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

# MLflow prints links to runs.
out, sys.stdout = sys.stdout, sys.stderr
over = threading.Event()
client = MlflowClient()


def tell(*line: Any) -> None:
    print(json.dumps(line), file=out, flush=True)


def do(call: str, *arguments: Any, **more: Any) -> Any:
    began = time.monotonic()
    try:
        done = getattr(client, call)(*arguments, **more)
    except Exception as error:
        tell("failed", call, time.monotonic() - began, f"{type(error).__name__}: {error}")
        raise
    tell("did", call, time.monotonic() - began)
    return done


def register(name: str) -> None:
    experiment = do("create_experiment", name)
    tell("experiment", experiment, name)
    run = do("create_run", experiment).info
    tell("run", run.run_id)

    metrics = [Metric(f"loss {n}", random.random(), 0, 0) for n in range(5)]
    do("log_batch", run.run_id, metrics, [Param("depth", "3")])
    for metric in metrics:
        tell("logged", run.run_id, "metrics", metric.key, metric.value)
    tell("logged", run.run_id, "params", "depth", "3")

    text = random.randbytes(50_000).hex()
    do("log_text", run.run_id, text, "model/weights.txt")
    folder = run.artifact_uri.removeprefix("mlflow-artifacts:/")
    digest = hashlib.sha256(text.encode()).hexdigest()
    tell("artifact", f"{folder}/model/weights.txt", digest)

    do("create_registered_model", name)
    tell("model", name)
    source = f"{run.artifact_uri}/model"
    kept = do("create_model_version", name, source, run.run_id)
    tell("version", name, kept.version, "READY", source, run.run_id)
    other = do("create_model_version", name, source, run.run_id)
    do("delete_model_version", name, other.version)
    tell("gone", "version", name, other.version, "READY", source, run.run_id)
    do("set_registered_model_alias", name, "champion", kept.version)
    tell("alias", name, "champion", kept.version)

    assert do("get_run", run.run_id).data.params == {"depth": "3"}
    assert do("get_model_version_by_alias", name, "champion").run_id == run.run_id
    do("set_terminated", run.run_id)
    tell("status", run.run_id, "FINISHED")


def main() -> None:
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    number = 0
    while not over.wait(0.7):
        try:
            register(f"{sys.argv[1]}-{number}")
        except AssertionError:
            raise
        except Exception:
            pass
        number += 1


if __name__ == "__main__":
    main()

"""`hokusai-auth demo`: a whole registration on this machine, with a real server and MLflow client."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

#: Seconds until the server must answer; imports from a slow disk may take minutes.
START_TIMEOUT = 240

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))

#: A supplier's program, which uses MLflow and nothing of this package.
CLIENT = textwrap.dedent(
    """
    import logging, warnings
    warnings.filterwarnings("ignore"); logging.disable(logging.WARNING)
    import mlflow

    class Doubler(mlflow.pyfunc.PythonModel):
        def predict(self, context, model_input: list[int], params=None) -> list[int]:
            return [2 * x for x in model_input]

    mlflow.set_experiment("hokusai-demo")
    with mlflow.start_run():
        mlflow.log_metric("accuracy", 0.91)
        mlflow.pyfunc.log_model(
            name="model", python_model=Doubler(), pip_requirements=["mlflow"],
            registered_model_name="doubler",
        )
    model = mlflow.pyfunc.load_model("models:/doubler/1")
    print("  registered:", [m.name for m in mlflow.search_registered_models()])
    print("  loaded models:/doubler/1, predict([21]) =", model.predict([21]))
    """
)


def run(*, keep: bool) -> int:
    """Run the demo and return the exit status. With `keep`, the server runs until Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="hokusai-demo-") as name:
        folder = Path(name)
        origin = f"http://127.0.0.1:{_free_port()}"
        uri = f"{origin}/api/mlflow"
        environment = _environment(folder)
        print(f"1. mlflow server --app-name hokusai-auth     ({origin})", flush=True)
        with _server(folder, origin, environment):
            print("2. hokusai-auth keys create --owner 'Demo supplier' --scope mlflow:write")
            created = subprocess.run(
                [*_hokusai_auth(), "keys", "create", "--owner", "Demo supplier"]
                + ["--scope", "mlflow:write", "--json"],
                env=environment,
                check=True,
                capture_output=True,
            )
            made = json.loads(created.stdout)
            print(f"  {made['key_id']}, shown only once; the server keeps its digest")

            print(f"3. Without the key, {uri} answers:")
            status, message = _without_key(f"{uri}/api/2.0/mlflow/experiments/get?experiment_id=0")
            print(f"  {message}")
            if status != 401:
                print(f"  That is {status}, not 401: the gate is missing.", file=sys.stderr)
                return 1

            print(f"4. HOKUSAI_API_KEY=… MLFLOW_TRACKING_URI={uri} python train.py", flush=True)
            client = subprocess.run(
                [sys.executable, "-c", CLIENT],
                cwd=folder,
                env={**environment, "HOKUSAI_API_KEY": made["key"], "MLFLOW_TRACKING_URI": uri},
                check=False,
            )
            if client.returncode:
                return client.returncode
            print(f"\nThe MLflow UI is at {origin}/ and {uri}/: sign in with the key.")
            if keep:
                print(f"The key: {made['key']}\nStop the server with Ctrl-C.", flush=True)
                with contextlib.suppress(KeyboardInterrupt):
                    while True:
                        time.sleep(3600)
            else:
                print("The server stops now; KEEP=1 keeps it running.")
    return 0


def _environment(folder: Path) -> dict[str, str]:
    mine = ("HOKUSAI_", "MLFLOW_", "PROMETHEUS_")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(mine)},
        "HOME": str(folder),
        "HOKUSAI_AUTH_DATABASE_URI": f"sqlite:///{folder}/hokusai_auth.db",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Requests to this machine must not use a proxy.
        **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1"),
    }


def _hokusai_auth() -> list[str]:
    return [sys.executable, "-m", "mlflow_hokusai_auth.cli"]


@contextlib.contextmanager
def _server(folder: Path, origin: str, environment: dict[str, str]) -> Iterator[None]:
    log = folder / "server.log"
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "hokusai-auth"]
    command += ["--host", "127.0.0.1", "--port", origin.rpartition(":")[2], "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        _wait(f"{origin}/health", process, log)
        yield
    finally:
        process.terminate()
        process.wait(30)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), _DIRECT.open(url, timeout=5):
            return
        time.sleep(0.2)
    raise SystemExit(f"The server did not start:\n{log.read_text(errors='replace')}")


def _without_key(url: str) -> tuple[int, str]:
    try:
        with _DIRECT.open(url, timeout=30) as response:
            return response.status, "it answered"
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["message"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

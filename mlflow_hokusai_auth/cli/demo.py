"""`hokusai-auth demo`: two suppliers on a server on this machine, with real MLflow clients."""

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
from collections.abc import Iterator, Mapping
from pathlib import Path

#: Seconds until the server must answer; imports from a slow disk may take minutes.
START_TIMEOUT = 240

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))

#: The beginning of a supplier's program, which uses MLflow and nothing of this package.
_CLIENT = textwrap.dedent(
    """
    import logging, warnings
    warnings.filterwarnings("ignore"); logging.disable(logging.WARNING)
    import mlflow

    class Doubler(mlflow.pyfunc.PythonModel):
        def predict(self, context, model_input: list[int], params=None) -> list[int]:
            return [2 * x for x in model_input]

    def register(model):
        with mlflow.start_run():
            mlflow.log_metric("accuracy", 0.91)
            mlflow.pyfunc.log_model(
                name="model", python_model=Doubler(), pip_requirements=["mlflow"],
                registered_model_name=model,
            )
        newest = mlflow.MlflowClient().search_model_versions(f"name = '{model}'")[0]
        print(f"  {model} version {newest.version}, created by {newest.user_id}")
    """
)
#: The first supplier registers a model and loads it.
FIRST = _CLIENT + textwrap.dedent(
    """
    register("doubler")
    model = mlflow.pyfunc.load_model("models:/doubler/1")
    print("  loaded models:/doubler/1, predict([21]) =", model.predict([21]))
    """
)
#: The second one registers its own model, and can't touch the first one's.
SECOND = _CLIENT + textwrap.dedent(
    """
    register("trebler")
    try:
        register("doubler")
    except mlflow.MlflowException as error:
        print(f"  doubler: {error.message}")
    else:
        raise SystemExit("GLOBEX changed ACME's model: suppliers are not kept apart.")
    """
)
#: The second one contributes a version to the first one's model.
CONTRIBUTION = _CLIENT + 'register("doubler")\n'


def run(*, keep: bool) -> int:
    """Run the demo and return the exit status. With `keep`, the server runs until Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="hokusai-demo-") as name:
        folder = Path(name)
        origin = f"http://127.0.0.1:{_free_port()}"
        uri = f"{origin}/api/mlflow"
        environment = _environment(folder)
        print(f"1. mlflow server --app-name hokusai-auth     ({origin})", flush=True)
        with _server(folder, origin, environment):
            keys = {}
            for owner in ("ACME", "GLOBEX"):
                print(f"2. hokusai-auth keys create --owner {owner} --scope model:write")
                made = _command(
                    environment, "keys", "create", "--owner", owner, "--scope", "model:write"
                )
                print(f"  {made['key_id']}, shown only once; the server keeps its digest")
                keys[owner] = str(made["key"])

            print(f"3. Without a key, {uri} answers:")
            status, message = _without_key(f"{uri}/api/2.0/mlflow/experiments/get?experiment_id=0")
            print(f"  {message}")
            if status != 401:
                print(f"  That is {status}, not 401: the gate is missing.", file=sys.stderr)
                return 1

            def python(owner: str, program: str) -> int:
                return subprocess.run(
                    [sys.executable, "-c", program], cwd=folder, env=using(owner), check=False
                ).returncode

            def using(owner: str) -> dict[str, str]:
                return {
                    **environment,
                    "HOKUSAI_API_KEY": keys[owner],
                    "MLFLOW_TRACKING_URI": uri,
                }

            print(
                f"4. ACME: HOKUSAI_API_KEY=… MLFLOW_TRACKING_URI={uri} python train.py", flush=True
            )
            if code := python("ACME", FIRST):
                return code
            print("5. GLOBEX registers a model of its own, and tries to change ACME's:", flush=True)
            if code := python("GLOBEX", SECOND):
                return code
            print("6. Each lists the registered models:")
            if not _sees(origin, keys, ACME="doubler", GLOBEX="trebler"):
                return 1
            print(
                "7. ACME: hokusai-auth grants add --owner GLOBEX --model doubler --level contribute"
            )
            grant = ("grants", "add", "--owner", "GLOBEX", "--model", "doubler")
            _command(using("ACME"), *grant, "--level", "contribute")
            if not _sees(origin, keys, ACME="doubler", GLOBEX="doubler, trebler"):
                return 1
            print("  GLOBEX tries again:", flush=True)
            if code := python("GLOBEX", CONTRIBUTION):
                return code
            print(f"\nThe MLflow UI is at {origin}/ and {uri}/: sign in with a key.")
            if keep:
                for owner, key in keys.items():
                    print(f"The key of {owner}: {key}")
                print("Stop the server with Ctrl-C.", flush=True)
                with contextlib.suppress(KeyboardInterrupt):
                    while True:
                        time.sleep(3600)
            else:
                print("The server stops now; KEEP=1 keeps it running.")
    return 0


def _command(environment: dict[str, str], *arguments: str) -> dict[str, object]:
    done = subprocess.run(
        [*_hokusai_auth(), *arguments, "--json"], env=environment, check=True, capture_output=True
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


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


def _sees(origin: str, keys: Mapping[str, str], **expected: str) -> bool:
    """Print which registered models each owner sees, and return whether it is as `expected`."""
    for owner, models in expected.items():
        request = urllib.request.Request(
            f"{origin}/api/2.0/mlflow/registered-models/search", headers={"X-API-Key": keys[owner]}
        )
        with _DIRECT.open(request, timeout=30) as response:
            found = json.load(response).get("registered_models", ())
        seen = ", ".join(model["name"] for model in found)
        print(f"  {owner} sees {seen}", flush=True)
        if seen != models:
            print(f"  It should see {models}: suppliers are not kept apart.", file=sys.stderr)
            return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

"""`hokusai-auth`, `mlflow` and `python`, in a fork of a process that has imported MLflow already.

Commands on pages find scripts of these names, which run `in_fork.py NAME PYTHONPATH …`, with the fork
server's PYTHONPATH. It asks that server for a fork with its own arguments, environment, folder, umask
and files, passes on signals, and ends as the fork does. Where a fork comes
too late, because something is read when MLflow is imported, it becomes the real program.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

# No package is installed for this process, which must start at once.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.forkserver import IMPORTED, SOCKET

_MODULES = {"hokusai-auth": ["-m", "mlflow_hokusai_auth.cli"], "mlflow": ["-m", "mlflow"]}


def main(name: str, python_path: str, *arguments: str) -> int:
    """Run the program and return its exit status."""
    environ = dict(os.environ)
    told = {*arguments, *environ} - {"PYTHONPATH"}
    changed = environ.get("PYTHONPATH", "") != python_path
    if changed or arguments[:1] == ("-m",) or not IMPORTED.isdisjoint(told):
        real = Path(sys.executable).with_name(name)
        os.execv(real, [str(real), *arguments])
    if name == "python" and arguments == ("-",):
        arguments = ("-c", sys.stdin.read())
    umask = os.umask(0)
    os.umask(umask)
    given, log, errors = (f"/proc/{os.getpid()}/fd/{number}" for number in range(3))
    request = {
        "command": [sys.executable, *_MODULES.get(name, []), *arguments],
        "environ": environ,
        "folder": str(Path.cwd()),
        "umask": umask,
        "given": given,
        "log": log,
        "errors": errors,
        "fork": True,
        "keep": False,
    }
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"{environ['SERVERS_OF_TESTS']}/{SOCKET}")
        connection.sendall(json.dumps(request).encode() + b"\n")
        answers = connection.makefile("rb")
        pid = int(answers.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        code = int(answers.readline() or -signal.SIGKILL)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

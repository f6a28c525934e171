"""`hokusai-auth`: keys and the audit log, what the gate decides and why, a demo of the whole.

What needs the server's extra is imported by the commands that need it, so that the others work on a
supplier's machine.
"""

from __future__ import annotations

import os

import click

from mlflow_hokusai_auth import __version__

from .keys import keys
from .server import audit, demo, explain, log_level, mode, routes
from .supplier import doctor, smoke, whoami


@click.group()
@click.version_option(__version__)
def main() -> None:
    """Hokusai API keys for MLflow."""
    # A server's; what a command counts would be files in its folder.
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)


for command in (keys, audit, mode, log_level, routes, explain, demo, whoami, doctor, smoke):
    main.add_command(command)

"""`hokusai-auth`: keys, owners and the audit log, the gate's decisions, diagnosis, and a demo.

Commands that need the server's extra import it when they run, so that the others work on a supplier's
machine.
"""

from __future__ import annotations

import os

import click

from mlflow_hokusai_auth import __version__

from .keys import keys
from .ownership import grants, owners, prefixes
from .server import audit, demo, explain, isolation, log_level, mode, routes, status
from .supplier import doctor, smoke, whoami
from .trust import trust


@click.group()
@click.version_option(__version__)
def main() -> None:
    """Hokusai API keys for MLflow."""
    # The variable is for servers: with it, a command would write metrics into a server's folder.
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)


_groups: tuple[click.Command, ...] = (keys, owners, grants, prefixes, trust)
_commands = (
    status,
    audit,
    mode,
    isolation,
    log_level,
    routes,
    explain,
    demo,
    whoami,
    doctor,
    smoke,
)
for command in (*_groups, *_commands):
    main.add_command(command)

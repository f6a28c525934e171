"""`hokusai-auth`: keys, owners and the audit log, the gate's decisions, diagnosis, and a demo.

Commands that need the server's extra import it when they run, so that the others work on a supplier's
machine.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import click

from mlflow_hokusai_auth import __version__
from mlflow_hokusai_auth.core.keys import redact

from .keys import keys
from .links import links
from .ownership import grants, owners, prefixes
from .server import audit, demo, explain, isolation, log_level, mode, routes, status
from .supplier import doctor, smoke, whoami
from .trust import trust

#: The secret with the URL of MLflow's database, which docker/entrypoint reads for the server.
BACKEND_STORE_URI = Path("/run/secrets/mlflow_backend_store_uri")


class _Commands(click.Group):
    """Commands whose errors show no key, as when one is given where a file's name belongs."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            error.message = redact(error.message)  # type: ignore[misc]  # final in stubs only
            raise


@click.group(cls=_Commands)
@click.version_option(__version__)
def main() -> None:
    """Hokusai API keys for MLflow."""
    # The variable is for servers: with it, a command would write metrics into a server's folder.
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    # `docker exec` runs a command beside the image's entry, which sets the variable for the server.
    if not os.environ.get("MLFLOW_BACKEND_STORE_URI"):
        with contextlib.suppress(OSError):
            os.environ["MLFLOW_BACKEND_STORE_URI"] = BACKEND_STORE_URI.read_text().strip()


_groups: tuple[click.Command, ...] = (keys, links, owners, grants, prefixes, trust)
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

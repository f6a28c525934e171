"""The embedded store, for the commands that work on it."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from mlflow_hokusai_auth.core.errors import HokusaiAuthError, StaffNarrowed

from .output import Mistake, printable

if TYPE_CHECKING:
    from mlflow_hokusai_auth.store.database import Actor
    from mlflow_hokusai_auth.store.keys import LocalStore


def require_server() -> None:
    """Raise Mistake, which says what to install, if the server's extra is missing."""
    try:
        import flask  # noqa: F401
        import pydantic_settings  # noqa: F401
        import sqlalchemy  # noqa: F401
    except ImportError as error:
        raise Mistake(
            f"this command needs {error.name}. Install the server's extra: "
            "pip install 'mlflow-hokusai-auth[server]'"
        ) from None


@contextmanager
def opened() -> Iterator[LocalStore]:
    """Open the store that the settings name. Errors of this package become Mistakes.

    StaffNarrowed becomes wrong usage.
    """
    require_server()
    from mlflow_hokusai_auth.server import settings
    from mlflow_hokusai_auth.store.keys import LocalStore

    try:
        uri = settings.load().database_uri.get_secret_value()
        store = LocalStore(uri)
        file = store.database.file
        created = file is not None and not file.exists()
        store.migrate()
        if file is not None and created:
            click.echo(
                f"hokusai-auth: made a new key store, {printable(file.resolve())}. Only "
                "servers with this HOKUSAI_AUTH_DATABASE_URI use it.",
                err=True,
            )
        yield store
    except StaffNarrowed as error:
        raise click.UsageError(str(error), click.get_current_context()) from None
    except HokusaiAuthError as error:
        raise Mistake(str(error)) from None


def actor() -> Actor:
    """Return the actor for the audit log: the user of this process."""
    from mlflow_hokusai_auth.store.database import Actor

    try:
        user = getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container may run with an id without a user
        user = "unknown"
    return Actor(name=f"cli:{printable(user)}")

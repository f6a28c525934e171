"""The key store, MLflow's database and the server, for the commands that work on them."""

from __future__ import annotations

import getpass
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlflow_hokusai_auth.core.errors import (
    Conflict,
    Forbidden,
    HokusaiAuthError,
    InvalidRequest,
    NotFound,
    StaffNarrowed,
)

from .output import F, Mistake, WrongValue, printable

if TYPE_CHECKING:
    import sqlalchemy as sa

    from mlflow_hokusai_auth.client.admin import HokusaiAuthClient
    from mlflow_hokusai_auth.core.lifetimes import Lifetimes
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
def opened(*, make: bool = False, migrate: bool = True) -> Iterator[LocalStore]:
    """Open the store that the settings name. Errors of this package become Mistakes.

    Those that only other values can avoid become WrongValues, and StaffNarrowed wrong usage. Only with
    `make`, a new file of SQLite is made: anywhere else, a command that finds none is in the wrong
    folder. Unless `migrate`, nothing is changed.
    """
    require_server()
    from mlflow_hokusai_auth.server import settings
    from mlflow_hokusai_auth.store.keys import LocalStore

    try:
        uri = settings.load().database_uri.get_secret_value()
        store = LocalStore(uri)
        file = store.database.file
        created = file is not None and not file.exists()
        if file is not None and created and not make:
            raise Mistake(
                f"there is no key store {printable(file.resolve())}. Run this on the server's host, in "
                "the server's folder or with its HOKUSAI_AUTH_DATABASE_URI"
            )
        if migrate:
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
    except (Conflict, Forbidden, NotFound) as error:
        raise Mistake(str(error)) from None
    except InvalidRequest as error:
        raise WrongValue(str(error)) from None
    except HokusaiAuthError as error:
        raise Mistake(str(error)) from None


def lifetimes() -> Lifetimes:
    """Return how long keys live by the settings. Raises SettingsError."""
    from mlflow_hokusai_auth.server import settings

    return settings.lifetimes_of(settings.load())


def database_option(help: str) -> Callable[[F], F]:
    """Return the option for the URI of MLflow's database, as the argument `uri`."""
    return click.option(
        "--backend-store-uri", "uri", envvar="MLFLOW_BACKEND_STORE_URI", metavar="URI", help=help
    )


@contextmanager
def database(uri: str) -> Iterator[sa.Engine]:
    """Yield an engine on MLflow's database at `uri`. Raises Mistake."""
    import sqlalchemy as sa

    try:
        url = sa.make_url(uri)
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
            # SQLite would make an empty database.
            raise Mistake(f"--backend-store-uri: there is no file {url.database}")
        try:
            engine = sa.create_engine(url)
        except ModuleNotFoundError:
            # SQLAlchemy's driver unless one is named is psycopg2; the extra `postgres` has psycopg.
            if url.drivername != "postgresql":
                raise
            engine = sa.create_engine(url.set(drivername="postgresql+psycopg"))
    except ModuleNotFoundError as error:
        raise Mistake(f"--backend-store-uri needs the package {error.name}") from None
    except (sa.exc.ArgumentError, ValueError):  # the latter quotes the URL
        raise Mistake(
            "--backend-store-uri (MLFLOW_BACKEND_STORE_URI) names no database, such as "
            "sqlite:///mlflow.db; leave it away to ask the server of MLFLOW_TRACKING_URI"
        ) from None
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def server(url: str | None = None) -> Iterator[HokusaiAuthClient]:
    """Yield a client of the server at `url`, or of MLFLOW_TRACKING_URI. Its refusals become Mistakes.

    `url` becomes the tracking URI of this process, so that it gets the key.
    """
    import mlflow
    from mlflow.exceptions import MlflowException, RestException

    from mlflow_hokusai_auth.client import profile
    from mlflow_hokusai_auth.client.admin import HokusaiAuthClient
    from mlflow_hokusai_auth.client.diagnose import doctor

    if url is not None:
        mlflow.set_tracking_uri(url)
    try:
        yield HokusaiAuthClient(str(mlflow.get_tracking_uri()))
    except MlflowException as error:
        # Without a server, MLflow's own errors have the same code.
        wrong = isinstance(error, RestException) and error.error_code == "INVALID_PARAMETER_VALUE"
        text = doctor.one_line(str(error), profile.api_key() or "")
        raise (WrongValue if wrong else Mistake)(text) from None


def actor() -> Actor:
    """Return the actor for the audit log: the user of this process."""
    from mlflow_hokusai_auth.store.database import Actor

    try:
        user = getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container may run with an id without a user
        user = "unknown"
    return Actor(name=f"cli:{printable(user)}")

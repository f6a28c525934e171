"""MLflow's own stores on a real database, called as some key's owner."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mlflow.entities import ExperimentTag, LoggedModelTag, RunTag
from mlflow.entities.model_registry import ModelVersionTag, RegisteredModelTag
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as Tracking
from mlflow.utils.time import get_current_time_millis

from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.caller import Caller
from mlflow_hokusai_auth.server.upstream.stores import open_by_itself

ACME = Principal("key_acme", "ACME", frozenset({"model:write"}), owner_id="ACME")
GLOBEX = Principal("key_globex", "GLOBEX", frozenset({"model:write"}), owner_id="GLOBEX")
STAFF = Principal("key_staff", "STAFF", frozenset({"mlflow:admin"}), owner_id="STAFF")


def unused_name() -> str:
    """Return a name that nothing has yet, in no process of the tests."""
    return f"scorer-{uuid.uuid4().hex}"


@contextmanager
def calling(principal: Principal | None) -> Iterator[dict[str, str]]:
    """Act as `principal`; yield what the decision log would name."""
    named: dict[str, str] = {}
    token = callers.current.set(Caller(principal, "", "", [], named))
    try:
        yield named
    finally:
        callers.current.reset(token)


class Made(NamedTuple):
    """One of each thing that has an owner."""

    experiment: str
    run: str
    logged: str
    model: str
    version: str


class Stores:
    """MLflow's stores on one database."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri = uri
        #: The root of all artifacts.
        self.folder = folder
        # Another test of this process may have installed the refusal of what has no caller.
        open_by_itself()
        self.tracking = Tracking(uri, folder.as_uri())
        self.registry = Registry(uri)
        #: The tags of the last run, as MLflow answered when it was made.
        self.answered: dict[str, str] = {}

    def make(self, tags: dict[str, str] | None = None) -> Made:
        """Make one of each with `tags`, under a new name."""

        def of(kind: Any) -> list[Any]:
            return [kind(key, value) for key, value in (tags or {}).items()]

        name = unused_name()
        experiment = self.tracking.create_experiment(name, tags=of(ExperimentTag))
        now = get_current_time_millis()
        run = self.tracking.create_run(experiment, "somebody", now, of(RunTag), "run")
        self.answered = run.data.tags
        logged = self.tracking.create_logged_model(experiment, name, tags=of(LoggedModelTag))
        self.registry.create_registered_model(name, of(RegisteredModelTag))
        version = self.registry.create_model_version(
            name, "s3://bucket/x", run.info.run_id, of(ModelVersionTag)
        )
        return Made(experiment, run.info.run_id, logged.model_id, name, version.version)

    def tags(self, made: Made) -> list[dict[str, str]]:
        """Return the tags of each."""
        return [
            self.tracking.get_experiment(made.experiment).tags,
            self.tracking.get_run(made.run).data.tags,
            self.tracking.get_logged_model(made.logged).tags,
            self.registry.get_registered_model(made.model).tags,
            self.registry.get_model_version(made.model, made.version).tags,
        ]

    def users(self, made: Made) -> list[str | None]:
        """Return the users of the run and of the version."""
        return [
            self.tracking.get_run(made.run).info.user_id,
            self.registry.get_model_version(made.model, made.version).user_id,
        ]

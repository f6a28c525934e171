"""The facts about something of MLflow's on which it depends who sees it, for `core.sight`."""

from __future__ import annotations

import sqlalchemy as sa

from mlflow_hokusai_auth.core.ownership import name_problem
from mlflow_hokusai_auth.core.sight import Shared, Thing

from . import ownership
from .owners import MLFLOW_RUNS, usable
from .ownership import MLFLOW_EXPERIMENTS, MLFLOW_MODELS
from .ownership_tables import GRANTS, MODEL_ACCESS, MODELS

#: The id of an experiment has fewer digits.
_DIGITS = 10


def find(engine: sa.Engine, kind: str, name: str, me: str) -> Thing:
    """Return what MLflow's database says of the "model", "run" or "experiment" called `name`.

    `me` is the owner who may have grants on it. Raises AuthorityUnavailable.
    """
    if name_problem(name) is not None:
        return Thing(kind, name, exists=False)
    with usable(), engine.connect() as connection:
        if kind == "model":
            return _model(connection, name, me)
        if kind == "run":
            query = sa.select(MLFLOW_RUNS.c.experiment_id).where(MLFLOW_RUNS.c.run_uuid == name)
        elif name.isascii() and name.isdecimal() and len(name) < _DIGITS:
            column = MLFLOW_EXPERIMENTS.c.experiment_id
            query = sa.select(column).where(column == int(name))
        else:
            return Thing(kind, name, exists=False)
        number = connection.execute(query).scalar()
        if number is None:
            return Thing(kind, name, exists=False)
        owner = ownership.experiment_owner(connection, number)
        return Thing(kind, name, exists=True, owner=owner, experiment=number)


def _model(connection: sa.Connection, name: str, me: str) -> Thing:
    made = sa.select(MLFLOW_MODELS.c.name).where(MLFLOW_MODELS.c.name == name)
    owned = sa.select(MODELS.c.owner, MODELS.c.gone_at).where(MODELS.c.name == name)
    shared = (
        sa.select(
            MODEL_ACCESS.c.grant_id,
            sa.func.coalesce(GRANTS.c.granted_by, ""),
            MODEL_ACCESS.c.level,
            MODEL_ACCESS.c.expires_at,
        )
        .select_from(MODEL_ACCESS.outerjoin(GRANTS, GRANTS.c.id == MODEL_ACCESS.c.grant_id))
        .where(MODEL_ACCESS.c.grantee == me, MODEL_ACCESS.c.name == name)
        .order_by(MODEL_ACCESS.c.grant_id)
    )
    owner, gone_at = connection.execute(owned).one_or_none() or (None, None)
    return Thing(
        "model",
        name,
        exists=connection.execute(made).first() is not None,
        owner=owner,
        gone=gone_at is not None,
        shared=tuple(Shared(*row) for row in connection.execute(shared)),
    )

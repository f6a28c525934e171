"""Those of MLflow's tables that ownership is about, without MLflow's migrations, which take long."""

from __future__ import annotations

import sqlalchemy as sa


def make(engine: sa.Engine) -> None:
    """Make them in an empty database. MLflow's models can't make all of its tables."""
    from mlflow.store.model_registry.dbmodels import models as registry
    from mlflow.store.tracking.dbmodels import models as tracking

    used = (
        tracking.SqlExperiment,
        tracking.SqlRun,
        tracking.SqlLoggedModel,
        registry.SqlRegisteredModel,
        registry.SqlModelVersion,
        tracking.SqlExperimentTag,
        tracking.SqlTag,
        registry.SqlRegisteredModelTag,
        registry.SqlModelVersionTag,
    )
    made = sa.MetaData()
    for model in used:
        table = model.__table__.to_metadata(made)
        # MLflow's migrations, if they ran in this process, have added checks to its models twice.
        for constraint in list(table.constraints):
            if isinstance(constraint, sa.CheckConstraint):
                table.constraints.remove(constraint)
    made.create_all(engine)

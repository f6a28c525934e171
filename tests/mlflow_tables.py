"""Those of MLflow's tables that ownership is about, without MLflow's migrations, which take long."""

from __future__ import annotations

import sqlalchemy as sa


def make(engine: sa.Engine) -> None:
    """Make them in an empty database. MLflow's models can't make all of its tables."""
    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.model_registry.dbmodels import models as registry
    from mlflow.store.tracking.dbmodels import models as tracking

    used = (
        tracking.SqlExperiment,
        tracking.SqlRun,
        tracking.SqlLoggedModel,
        registry.SqlRegisteredModel,
        registry.SqlModelVersion,
    )
    Base.metadata.create_all(engine, [model.__table__ for model in used])

"""A registry of the size of isolation.md, made by SQL: MLflow's own methods would take an hour."""

from __future__ import annotations

from typing import NamedTuple

import sqlalchemy as sa

from mlflow_hokusai_auth.store import ownership


class Size(NamedTuple):
    """How many of each there are."""

    owners: int = 1_000
    experiments: int = 10_000
    runs: int = 300_000
    models: int = 100_000
    versions: int = 200_000


FULL = Size()
#: A hundredth of it.
SMALL = Size(10, 100, 3_000, 1_000, 2_000)

_NUMBERS = {
    "sqlite": "INSERT INTO bulk_numbers WITH RECURSIVE n(i) AS "
    "(SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {most}) SELECT i FROM n",
    "postgresql": "INSERT INTO bulk_numbers SELECT generate_series(0, {most})",
}
_RUN = {"sqlite": "printf('%032x', {0})", "postgresql": "lpad(to_hex({0}), 32, '0')"}


def fill(engine: sa.Engine, root: str, size: Size = FULL) -> None:
    """Add so many of each to MLflow's tables and ours; the files of everything are below `root`."""
    dialect = engine.dialect.name

    def run(number: str) -> str:
        return _RUN[dialect].format(number)

    first = 1_000  # after what tests have made
    run_of_version = f"{run(f'(i % {size.runs})')}"
    with engine.begin() as connection:
        do = connection.exec_driver_sql
        do("CREATE TEMPORARY TABLE bulk_numbers (i INTEGER PRIMARY KEY)")
        do(_NUMBERS[dialect].format(most=max(size)))
        for table, columns, values, count in (
            (
                "experiments",
                "experiment_id, name, artifact_location, lifecycle_stage, creation_time",
                f"i + {first}, 'bulk ' || i, '{root}/' || (i + {first}), 'active', 1000",
                size.experiments,
            ),
            (
                "hokusai_experiments",
                "experiment_id, owner, key_id, experiment_created_at",
                f"i + {first}, 'owner ' || (i % {size.owners}), '', 1000",
                size.experiments,
            ),
            (
                "runs",
                "run_uuid, name, source_type, user_id, status, start_time, lifecycle_stage, "
                "artifact_uri, experiment_id",
                f"{run('i')}, 'r', 'LOCAL', 'u', 'FINISHED', 1000, 'active', "
                f"'{root}/' || (i % {size.experiments} + {first}) || '/' || {run('i')} || "
                f"'/artifacts', i % {size.experiments} + {first}",
                size.runs,
            ),
            (
                "registered_models",
                "name, creation_time, last_updated_time",
                "'bulk-' || i, 1000, 1000",
                size.models,
            ),
            (
                "hokusai_models",
                "name, owner, key_id, created_at",
                f"'bulk-' || i, 'owner ' || (i % {size.owners}), '', 1.0",
                size.models,
            ),
            (
                "registered_model_aliases",
                "name, alias, version",
                "'bulk-' || i, 'champion', 1",
                size.models,
            ),
            (
                "model_versions",
                "name, version, creation_time, current_stage, run_id, source, storage_location",
                f"'bulk-' || (i % {size.models}), i / {size.models} + 1, 1000, 'None', "
                f"{run_of_version}, '{root}/' || (i % {size.experiments} + {first}) || '/' || "
                f"{run_of_version} || '/artifacts/model', '{root}/' || "
                f"(i % {size.experiments} + {first}) || '/' || {run_of_version} || "
                "'/artifacts/model'",
                size.versions,
            ),
            (
                "hokusai_prefixes",
                "prefix, kind, owner",
                "'prefix' || i || '-', 'model', 'owner ' || i",
                size.owners,
            ),
            (
                "hokusai_grants",
                "id, grantee, granted_by, pattern, level, key_id, created_at",
                f"'bulk-' || i, 'owner ' || ((i + 1) % {size.owners}), 'owner ' || "
                f"(i % {size.owners}), 'bulk-' || i, 'contribute', '', 1.0",
                2 * size.owners,
            ),
            (
                "hokusai_model_access",
                "grant_id, name, grantee, level",
                f"'bulk-' || i, 'bulk-' || i, 'owner ' || ((i + 1) % {size.owners}), 'contribute'",
                2 * size.owners,
            ),
        ):
            chosen = f"SELECT {values} FROM bulk_numbers WHERE i < {count}".replace("%", "%%")
            if dialect == "sqlite":
                chosen = chosen.replace("%%", "%")
            do(f"INSERT INTO {table} ({columns}) {chosen}")
        do("DROP TABLE bulk_numbers")
        if dialect == "postgresql":
            last = first + size.experiments
            do(f"SELECT setval(pg_get_serial_sequence('experiments', 'experiment_id'), {last})")
    ownership.catch_up(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("ANALYZE")

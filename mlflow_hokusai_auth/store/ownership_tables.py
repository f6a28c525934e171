"""The tables of who made what, and of who may change what, in MLflow's database.

Ownership stands in tables and not in MLflow's tags, because clients can set tags while no gate is
there. No foreign key points into MLflow's tables: MLflow changes their keys between versions. Times are
in seconds since the epoch, except `experiment_created_at`.
"""

from __future__ import annotations

import sqlalchemy as sa

#: The length of the name of a registered model, as in MLflow's tables.
NAME = sa.String(256)
OWNER = sa.String(255)
KEY_ID = sa.String(255)
#: As long as in MLflow's tables. Compared by bytes, so that the index finds a beginning, too.
LOCATION = sa.String(500).with_variant(sa.String(500, collation="C"), "postgresql")

METADATA = sa.MetaData()
#: The first owner of each name of a registered model, for good: a deleted or renamed model keeps its
#: row.
MODELS = sa.Table(
    "hokusai_models",
    METADATA,
    sa.Column("name", NAME, primary_key=True),
    sa.Column("owner", OWNER, nullable=False),
    sa.Column("key_id", KEY_ID, nullable=False),
    sa.Column("created_at", sa.Float(53), nullable=False),
    sa.Column("gone_at", sa.Float(53)),
    sa.Index("hokusai_models_owner", "owner", "name"),
)
EXPERIMENTS = sa.Table(
    "hokusai_experiments",
    METADATA,
    sa.Column("experiment_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("owner", OWNER, nullable=False),
    sa.Column("key_id", KEY_ID, nullable=False),
    # MLflow's `experiments.creation_time`, in milliseconds. SQLite uses ids again, so the row counts
    # only while both are equal.
    sa.Column("experiment_created_at", sa.BigInteger),
    sa.Index("hokusai_experiments_owner", "owner", "experiment_id"),
)
#: All versions that are not deleted: the owner of those that nobody is known to have made is "".
VERSIONS = sa.Table(
    "hokusai_versions",
    METADATA,
    sa.Column("name", NAME, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("owner", OWNER, nullable=False),
    sa.Column("key_id", KEY_ID, nullable=False),
    sa.Column("created_at", sa.Float(53), nullable=False),
    # The source as the client sent it.
    sa.Column("source", sa.Text, nullable=False),
    # The place of the files by MLflow's row, without slashes at the end; "" if MLflow has nothing, and
    # NULL if a program that doesn't know this column has made the row.
    sa.Column("location", LOCATION),
    sa.Index("hokusai_versions_location", "location"),
)
#: Beginnings of names that are reserved for an owner. No prefix begins with that of another owner.
PREFIXES = sa.Table(
    "hokusai_prefixes",
    METADATA,
    sa.Column("prefix", NAME, primary_key=True),
    sa.Column("kind", sa.String(16), primary_key=True),  # model or experiment
    sa.Column("owner", OWNER, nullable=False),
)
GRANTS = sa.Table(
    "hokusai_grants",
    METADATA,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("grantee", OWNER, nullable=False),
    # The owner whose models the grant covers; "" if an operator gave it, for models of any owner.
    sa.Column("granted_by", OWNER, nullable=False),
    sa.Column("pattern", NAME, nullable=False),
    sa.Column("level", sa.String(16), nullable=False),  # read or contribute
    sa.Column("expires_at", sa.Float(53)),
    sa.Column("key_id", KEY_ID, nullable=False),
    sa.Column("created_at", sa.Float(53), nullable=False),
    sa.Index("hokusai_grants_grantee", "grantee"),
    sa.Index("hokusai_grants_granted_by", "granted_by"),
)
#: The models that each grant covers now, expanded when a grant or a model is made.
MODEL_ACCESS = sa.Table(
    "hokusai_model_access",
    METADATA,
    sa.Column("grant_id", sa.String(32), primary_key=True),
    sa.Column("name", NAME, primary_key=True),
    sa.Column("grantee", OWNER, nullable=False),
    sa.Column("level", sa.String(16), nullable=False),
    sa.Column("expires_at", sa.Float(53)),
    sa.Index("hokusai_model_access_grantee", "grantee", "name"),
    sa.Index("hokusai_model_access_name", "name"),
)
#: The version of these tables, in one row.
VERSION = sa.Table(
    "hokusai_auth_isolation_version",
    METADATA,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    # The isolation that was decided when the tables were made, unless a person says otherwise. It is
    # NULL until a server has decided.
    sa.Column("isolation", sa.String(16)),
)

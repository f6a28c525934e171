"""A key's own narrowing: the names that it may change, and whether it may delete."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_KEYS = "hokusai_auth_keys"


def upgrade() -> None:
    op.add_column(_KEYS, sa.Column("models", sa.JSON, nullable=False, server_default="[]"))
    op.add_column(
        _KEYS, sa.Column("no_delete", sa.Boolean, nullable=False, server_default=sa.false())
    )


def downgrade() -> None:
    for column in ("models", "no_delete"):
        op.drop_column(_KEYS, column)

"""Requests that mode observe would have refused; the first version that can use these tables."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "hokusai_auth_observed",
        sa.Column("reason", sa.String(32), primary_key=True),
        sa.Column("rule", sa.String(255), primary_key=True),
        sa.Column("key_id", sa.String(255), primary_key=True),
        sa.Column("address", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("first_at", sa.Float(53), nullable=False),
        sa.Column("last_at", sa.Float(53), nullable=False),
    )
    # A later migration raises this to its own number only if older code can't use its tables.
    op.execute("INSERT INTO hokusai_auth_state (name, value) VALUES ('usable_since', 3)")


def downgrade() -> None:
    op.drop_table("hokusai_auth_observed")
    op.execute("DELETE FROM hokusai_auth_state WHERE name = 'usable_since'")

"""The notices about keys that end soon or are unused, each of which is given once."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

_NOTICES = "hokusai_auth_notices"


def upgrade() -> None:
    op.create_table(
        _NOTICES,
        sa.Column("key_id", sa.String(32), primary_key=True),
        sa.Column("notice", sa.String(16), primary_key=True),
        sa.Column("about", sa.Float(53), nullable=False),
    )


def downgrade() -> None:
    op.drop_table(_NOTICES)

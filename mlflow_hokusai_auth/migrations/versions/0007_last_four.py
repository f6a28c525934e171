"""The last four characters of each new key, to find it by; and the audit log's rows by a key, fast."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

_KEYS, _INDEX = "hokusai_auth_keys", "hokusai_auth_audit_actor_key"


def upgrade() -> None:
    op.add_column(_KEYS, sa.Column("last_four", sa.String(4)))
    op.create_index(_INDEX, "hokusai_auth_audit", ["actor_key_id"])


def downgrade() -> None:
    op.drop_index(_INDEX, "hokusai_auth_audit")
    op.drop_column(_KEYS, "last_four")

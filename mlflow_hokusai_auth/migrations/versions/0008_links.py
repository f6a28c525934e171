"""One-time links, each of which makes a key for the first person who opens it."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

_LINKS = "hokusai_auth_links"


def upgrade() -> None:
    op.create_table(
        _LINKS,
        sa.Column("link_id", sa.String(32), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("fields", sa.JSON, nullable=False),
        sa.Column("replaces", sa.String(32)),
        sa.Column("overlap", sa.Float(53), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("created_by", sa.String(255), nullable=False),
        sa.Column("expires_at", sa.Float(53), nullable=False),
        sa.Column("revoked_at", sa.Float(53)),
        sa.Column("opened_at", sa.Float(53)),
        sa.Column("opened_from", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(32)),
        sa.Column("refused", sa.BigInteger, nullable=False),
        sa.Column("refused_at", sa.Float(53)),
    )
    op.create_index("hokusai_auth_links_end", _LINKS, ["expires_at"])


def downgrade() -> None:
    op.drop_table(_LINKS)

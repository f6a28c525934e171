"""Trusted workloads, the keys that are exchanged for their identity tokens, and tokens used up."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_KEYS = "hokusai_auth_keys"
_TRUSTS = "hokusai_auth_trusts"
_USED = "hokusai_auth_used_tokens"


def upgrade() -> None:
    op.add_column(_KEYS, sa.Column("trust_id", sa.String(32)))
    op.add_column(_KEYS, sa.Column("source", sa.Text, nullable=False, server_default=""))
    op.add_column(_KEYS, sa.Column("token_digest", sa.String(64)))
    exchanged = sa.text("trust_id IS NOT NULL")
    op.create_index(
        "hokusai_auth_keys_exchanged",
        _KEYS,
        ["expires_at"],
        sqlite_where=exchanged,
        postgresql_where=exchanged,
    )
    op.create_table(
        _TRUSTS,
        sa.Column("trust_id", sa.String(32), primary_key=True),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("issuer", sa.String(255), nullable=False),
        sa.Column("claims", sa.JSON, nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("models", sa.JSON, nullable=False),
        sa.Column("no_delete", sa.Boolean, nullable=False),
        sa.Column("ttl", sa.Float(53), nullable=False),
        sa.Column("single_use", sa.Boolean, nullable=False),
        sa.Column("pins", sa.JSON, nullable=False),
        sa.Column("jwks", sa.Text),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("last_used_at", sa.Float(53)),
        sa.Column("exchanges", sa.BigInteger, nullable=False),
    )
    op.create_index("hokusai_auth_trusts_issuer", _TRUSTS, ["issuer"])
    op.create_table(
        _USED,
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("ends_at", sa.Float(53), nullable=False),
    )
    op.create_index("hokusai_auth_used_tokens_end", _USED, ["ends_at"])


def downgrade() -> None:
    op.drop_table(_USED)
    op.drop_table(_TRUSTS)
    op.drop_index("hokusai_auth_keys_exchanged", _KEYS)
    op.execute("DELETE FROM hokusai_auth_keys WHERE trust_id IS NOT NULL")
    for column in ("trust_id", "source", "token_digest"):
        op.drop_column(_KEYS, column)

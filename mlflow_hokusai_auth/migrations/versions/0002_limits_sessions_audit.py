"""Limits, replacement and uses of keys; sessions; the audit log."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_AUDIT = "hokusai_auth_audit"


def upgrade() -> None:
    keys = "hokusai_auth_keys"
    op.add_column(keys, sa.Column("note", sa.Text, nullable=False, server_default=""))
    op.add_column(keys, sa.Column("networks", sa.JSON, nullable=False, server_default="[]"))
    op.add_column(keys, sa.Column("rate_limit_per_hour", sa.Integer))
    op.add_column(keys, sa.Column("deprecated_at", sa.Float(53)))
    op.add_column(keys, sa.Column("replaced_by", sa.String(32)))
    op.add_column(keys, sa.Column("last_used_at", sa.Float(53)))
    op.create_index("hokusai_auth_keys_created", keys, ["created_at", "key_id"])
    op.create_index("hokusai_auth_keys_owner", keys, ["owner", "created_at", "key_id"])
    op.create_table(
        "hokusai_auth_uses",
        sa.Column("key_id", sa.String(32), primary_key=True),
        sa.Column("minute", sa.BigInteger, primary_key=True),
        sa.Column("uses", sa.BigInteger, nullable=False),
    )
    op.create_index("hokusai_auth_uses_minute", "hokusai_auth_uses", ["minute"])
    op.create_table(
        "hokusai_auth_sessions",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(255), nullable=False),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("sealed_key", sa.Text, nullable=False),
        sa.Column("expires_at", sa.Float(53), nullable=False),
    )
    op.create_table(
        _AUDIT,
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("event", sa.String(32), nullable=False),
        sa.Column("actor", sa.String(255), nullable=False),
        sa.Column("actor_key_id", sa.String(255), nullable=False),
        sa.Column("address", sa.String(64), nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(255), nullable=False),
        sa.Column("detail", sa.JSON, nullable=False),
    )
    op.create_index("hokusai_auth_audit_key", _AUDIT, ["key_id"])
    if op.get_context().dialect.name == "sqlite":
        for change in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {_AUDIT}_no_{change.lower()} BEFORE {change} ON {_AUDIT} "
                "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
            )
    else:
        op.execute(
            f"CREATE FUNCTION {_AUDIT}_append_only() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$"
        )
        op.execute(
            f"CREATE TRIGGER {_AUDIT}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {_AUDIT} "
            f"FOR EACH STATEMENT EXECUTE FUNCTION {_AUDIT}_append_only()"
        )


def downgrade() -> None:
    for table in (_AUDIT, "hokusai_auth_sessions", "hokusai_auth_uses"):
        op.drop_table(table)
    if op.get_context().dialect.name != "sqlite":
        op.execute(f"DROP FUNCTION {_AUDIT}_append_only()")
    op.drop_index("hokusai_auth_keys_owner", "hokusai_auth_keys")
    op.drop_index("hokusai_auth_keys_created", "hokusai_auth_keys")
    for column in (
        "note",
        "networks",
        "rate_limit_per_hour",
        "deprecated_at",
        "replaced_by",
        "last_used_at",
    ):
        op.drop_column("hokusai_auth_keys", column)

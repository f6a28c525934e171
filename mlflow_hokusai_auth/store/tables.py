"""The tables of the store. Times are in seconds since the epoch."""

from __future__ import annotations

import sqlalchemy as sa

_metadata = sa.MetaData()
KEYS = sa.Table(
    "hokusai_auth_keys",
    _metadata,
    sa.Column("key_id", sa.String(32), primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False, unique=True),
    sa.Column("environment", sa.String(8), nullable=False),
    sa.Column("owner", sa.String(255), nullable=False),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float(53), nullable=False),
    sa.Column("expires_at", sa.Float(53)),
    sa.Column("revoked_at", sa.Float(53)),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("networks", sa.JSON, nullable=False),
    sa.Column("rate_limit_per_hour", sa.Integer),
    sa.Column("deprecated_at", sa.Float(53)),
    sa.Column("replaced_by", sa.String(32)),
    sa.Column("last_used_at", sa.Float(53)),
    sa.Column("models", sa.JSON, nullable=False),
    sa.Column("no_delete", sa.Boolean, nullable=False),
    # If the key was exchanged for an identity token: the trust, the job, and the digest of a token
    # that may be exchanged again.
    sa.Column("trust_id", sa.String(32)),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("token_digest", sa.String(64)),
    sa.Column("last_four", sa.String(4)),
)
#: The workloads whose identity tokens are exchanged for keys.
TRUSTS = sa.Table(
    "hokusai_auth_trusts",
    _metadata,
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
#: Identity tokens that were exchanged, and may not be again.
USED_TOKENS = sa.Table(
    "hokusai_auth_used_tokens",
    _metadata,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("ends_at", sa.Float(53), nullable=False),
)
#: One-time links. `fields` are those of the key that the link makes, unless it replaces one.
LINKS = sa.Table(
    "hokusai_auth_links",
    _metadata,
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
STATE = sa.Table(
    "hokusai_auth_state",
    _metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)
#: Uses of a key by the minute (minutes since the epoch).
USES = sa.Table(
    "hokusai_auth_uses",
    _metadata,
    sa.Column("key_id", sa.String(32), primary_key=True),
    sa.Column("minute", sa.BigInteger, primary_key=True),
    sa.Column("uses", sa.BigInteger, nullable=False),
)
SESSIONS = sa.Table(
    "hokusai_auth_sessions",
    _metadata,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("key_id", sa.String(255), nullable=False),
    sa.Column("owner", sa.String(255), nullable=False),
    sa.Column("sealed_key", sa.Text, nullable=False),
    sa.Column("expires_at", sa.Float(53), nullable=False),
)
AUDIT = sa.Table(
    "hokusai_auth_audit",
    _metadata,
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
#: Requests that mode observe would have refused.
OBSERVED = sa.Table(
    "hokusai_auth_observed",
    _metadata,
    sa.Column("reason", sa.String(32), primary_key=True),
    sa.Column("rule", sa.String(255), primary_key=True),
    sa.Column("key_id", sa.String(255), primary_key=True),
    sa.Column("address", sa.String(64), primary_key=True),
    sa.Column("owner", sa.String(255), nullable=False),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("first_at", sa.Float(53), nullable=False),
    sa.Column("last_at", sa.Float(53), nullable=False),
)
#: The last notice of each kind about each key. `about` is the key's end, or its last use.
NOTICES = sa.Table(
    "hokusai_auth_notices",
    _metadata,
    sa.Column("key_id", sa.String(32), primary_key=True),
    sa.Column("notice", sa.String(16), primary_key=True),
    sa.Column("about", sa.Float(53), nullable=False),
)

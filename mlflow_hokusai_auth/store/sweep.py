"""Deletes what is over, and what nobody asks for any more.

Counts of uses and reports of mode observe, which their writers keep short, are not among it.
"""

from __future__ import annotations

import time

import sqlalchemy as sa

from . import links, trusts
from .database import Database
from .tables import KEYS, LINKS, SESSIONS, USED_TOKENS

_BEFORE = sa.bindparam("before", type_=sa.Float)
#: Statements, and the seconds for which each leaves what is over.
_SWEEP = (
    (sa.delete(SESSIONS).where(SESSIONS.c.expires_at <= _BEFORE), 0.0),
    (sa.delete(USED_TOKENS).where(USED_TOKENS.c.ends_at < _BEFORE), trusts.KEPT),
    (
        sa.delete(KEYS).where(KEYS.c.trust_id.is_not(None), KEYS.c.expires_at < _BEFORE),
        trusts.KEPT,
    ),
    (sa.delete(LINKS).where(LINKS.c.expires_at < _BEFORE), links.KEPT),
)


def sweep(database: Database) -> None:
    """Delete ended sessions, used tokens, exchanged keys and links.

    Each table has a transaction of its own, so that others wait for a short time only. Raises
    AuthorityUnavailable.
    """
    now = time.time()
    for statement, kept in _SWEEP:
        with database.changing(generation=False) as change:
            change.connection.execute(statement, {"before": now - kept})

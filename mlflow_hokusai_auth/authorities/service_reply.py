"""Reads a reply of the auth service: the contract as a pure function, without the transport.

Contract: Hokusai's `auth_openapi.json` and its validation guide. `email`, `roles`, `is_admin` and
`user` are in neither, but Hokusai's own middleware reads them. `models` and `no_delete` are of our own
endpoint, if another server of this package is the authority. Balances are ignored.
"""

from __future__ import annotations

import email.utils
import json
import logging
import time
from collections.abc import Mapping
from datetime import timezone
from typing import Any, NamedTuple

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable, Throttled, UnusableReply
from mlflow_hokusai_auth.core.keys import one_line
from mlflow_hokusai_auth.core.ownership import problem
from mlflow_hokusai_auth.core.types import Principal, Rejected

#: Most characters of a text field in a reply.
MAX_TEXT = 255

_log = logging.getLogger(__name__)


class Reply(NamedTuple):
    """The status, the headers (their names in any case) and the whole body of a reply."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def read_reply(reply: Reply, key: str) -> Principal | Rejected:
    """Return the answer for `key` that `reply` holds.

    Raises Throttled for a 429, UnusableReply for a reply that the service may give to this key alone,
    and AuthorityUnavailable for any other.
    """
    content = _json(reply.body)
    fields: dict[str, Any] = content if isinstance(content, dict) else {}
    reason = fields.get("error") or fields.get("detail")
    quote = _quoted(reason if isinstance(reason, str) else "", key)
    if reply.status == 429:
        raise Throttled("the auth service limits its requests", retry_after=_wait(reply) or 1.0)
    if reply.status == 401 or (reply.status == 200 and fields.get("is_valid") is False):
        # This line is the only trace of a wrong service_id, with which the service rejects all keys.
        _log.info("The auth service rejects a key: %s", quote or "(no reason given)")
        return Rejected(quote)
    if reply.status != 200:
        quote = quote or _quoted(reply.body[:4096].decode("utf-8", "replace"), key)
        message = f"the auth service answers {reply.status}: {quote}"
        # A 4xx in JSON may concern this key alone, such as its length, so it is no outage. A reply that
        # is not JSON comes from something in front of the service.
        from_service = reply.status < 500 and isinstance(content, dict)
        raise (UnusableReply if from_service else AuthorityUnavailable)(
            message, retry_after=_wait(reply)
        )
    if content is None:
        raise AuthorityUnavailable("the auth service's reply is not JSON")
    try:
        return _principal(fields)
    except _WrongShape as problem:
        raise UnusableReply(f"the auth service's reply has a wrong {problem}") from None


class _WrongShape(Exception):
    """Raised if a reply breaks the contract; the text is the field's name, never its value."""


def _principal(fields: dict[str, Any]) -> Principal:
    user = {} if fields.get("user") is None else fields["user"]
    if fields.get("is_valid") is not True:
        raise _WrongShape("is_valid")
    if not isinstance(user, dict):
        raise _WrongShape("user")
    key_id = _text("key_id", fields.get("key_id"))
    # The key's id becomes a header of the request to MLflow.
    if not key_id or not key_id.isascii():
        raise _WrongShape("key_id")
    # Every field is checked, even one that is not used because another has precedence.
    addresses = [_text("email", part.get("email")) for part in (fields, user)]
    names = [_text("user_id", fields.get("user_id")), _text("user id", user.get("id"))]
    address = addresses[0] or addresses[1]
    return Principal(
        key_id,
        address or names[0] or names[1] or key_id,
        _texts("scopes", fields.get("scopes")),
        email=address,
        roles=_texts("roles", fields.get("roles")) | _texts("roles", user.get("roles")),
        # Only the boolean counts: "false" and 1 make no administrator.
        is_admin=fields.get("is_admin") is True or user.get("is_admin") is True,
        rate_limit_per_hour=_limit(fields.get("rate_limit_per_hour")),
        # Never the address: it changes, and a reply may lack it.
        owner_id=names[0] or names[1],
        models=_patterns(fields.get("models")),
        no_delete=_flag("no_delete", fields.get("no_delete")),
    )


def _limit(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _WrongShape("rate_limit_per_hour")
    return value


def _patterns(value: object) -> tuple[str, ...]:
    """Return the patterns of names in the list `value`, none for None. Raises _WrongShape."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _WrongShape("models")
    for item in value:
        if not isinstance(item, str) or problem(item) is not None:
            raise _WrongShape("models")
    return tuple(value)


def _flag(name: str, value: object) -> bool:
    """Return the boolean `value`, False for None. Raises _WrongShape with `name`."""
    if not isinstance(value, bool | None):
        raise _WrongShape(name)
    return bool(value)


def _text(name: str, value: object) -> str:
    """Return `value` if it is printable text of at most MAX_TEXT characters, "" for None.

    Raises _WrongShape with `name`.
    """
    if value is None:
        return ""
    if not isinstance(value, str) or not value.isprintable() or len(value) > MAX_TEXT:
        raise _WrongShape(name)
    return value


def _texts(name: str, value: object) -> frozenset[str]:
    """Return the set of texts in the list `value`, empty for None. Raises _WrongShape with `name`."""
    if value is None:
        return frozenset()
    if not isinstance(value, list) or None in value:
        raise _WrongShape(name)
    return frozenset(_text(name, item) for item in value)


def _json(body: bytes) -> object:
    try:
        return json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _quoted(text: str, key: str) -> str:
    """Return `text` as it may be logged: printable, at most 200 characters, without keys."""
    return one_line(text.replace(key, "***"))[:200]


def _wait(reply: Reply) -> float | None:
    """Return the seconds in Retry-After (RFC 9110, 10.2.3), from 1 to 60, or None without one."""
    value = reply.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(min(max(int(value[:9]), 1), 60))
    try:
        date = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    # A date without a zone is in UTC, as all dates of HTTP are.
    seconds = (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp() - time.time()
    return min(max(seconds, 1.0), 60.0)

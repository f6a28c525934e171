"""What a reply of the auth service says: the contract as a pure function, apart from how it came.

Contract: Hokusai's `auth_openapi.json` and its validation guide. `email`, `roles`, `is_admin` and
`user` are in neither, but Hokusai's own middleware reads them. Balances are not looked at.
"""

from __future__ import annotations

import email.utils
import json
import logging
import time
from collections.abc import Mapping
from datetime import timezone
from typing import Any, NamedTuple

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable, NoVerdict, Throttled
from mlflow_hokusai_auth.core.keys import redact
from mlflow_hokusai_auth.core.types import Principal, Rejected

#: Characters of the service's own words, or of a name in its reply, that are taken.
MAX_TEXT = 255

_log = logging.getLogger(__name__)


class Reply(NamedTuple):
    """What came back: the status, the headers by any case of their names, and the whole body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def verdict(reply: Reply, key: str) -> Principal | Rejected:
    """What `reply` says of `key`. Raises AuthorityUnavailable, or Throttled, if it is no verdict."""
    content = _json(reply.body)
    fields: dict[str, Any] = content if isinstance(content, dict) else {}
    reason = fields.get("error") or fields.get("detail")
    words = _quoted(reason if isinstance(reason, str) else "", key)
    if reply.status == 429:
        raise Throttled("the auth service is asked too often", retry_after=_wait(reply) or 1.0)
    if reply.status == 401 or (reply.status == 200 and fields.get("is_valid") is False):
        # The one trace of a wrong service_id, for which the service rejects every key there is.
        _log.info("The auth service rejects a key: %s", words or "(no reason given)")
        return Rejected(words)
    if reply.status != 200:
        said = words or _quoted(reply.body[:4096].decode("utf-8", "replace"), key)
        message = f"the auth service answers {reply.status}: {said}"
        # What is wrong with one key, such as its length, is no outage. What does not speak JSON is not
        # the service, but something that stands in for it.
        spoke = reply.status < 500 and isinstance(content, dict)
        raise (NoVerdict if spoke else AuthorityUnavailable)(message, retry_after=_wait(reply))
    if content is None:
        raise AuthorityUnavailable("the auth service's reply is no JSON")
    try:
        return _principal(fields)
    except _WrongShape as problem:
        raise NoVerdict(f"the auth service's reply has a wrong {problem}") from None


class _WrongShape(Exception):
    """A reply breaks the contract; the text is the field's name, never its value."""


def _principal(fields: dict[str, Any]) -> Principal:
    user = {} if fields.get("user") is None else fields["user"]
    if fields.get("is_valid") is not True:
        raise _WrongShape("is_valid")
    if not isinstance(user, dict):
        raise _WrongShape("user")
    key_id = _text("key_id", fields.get("key_id"))
    # It becomes a header of the request that MLflow gets.
    if not key_id or not key_id.isascii():
        raise _WrongShape("key_id")
    # All are looked at, also those that another one goes before.
    addresses = [_text("email", part.get("email")) for part in (fields, user)]
    names = [_text("user_id", fields.get("user_id")), _text("user id", user.get("id"))]
    address = addresses[0] or addresses[1]
    return Principal(
        key_id,
        address or names[0] or names[1] or key_id,
        _texts("scopes", fields.get("scopes")),
        email=address,
        roles=_texts("roles", fields.get("roles")) | _texts("roles", user.get("roles")),
        # "false" and 1 are no yes.
        is_admin=fields.get("is_admin") is True or user.get("is_admin") is True,
        rate_limit_per_hour=_limit(fields.get("rate_limit_per_hour")),
    )


def _limit(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _WrongShape("rate_limit_per_hour")
    return value


def _text(name: str, value: object) -> str:
    """`value` if it is printable text of bounded length, "" for None; raises _WrongShape."""
    if value is None:
        return ""
    if not isinstance(value, str) or not value.isprintable() or len(value) > MAX_TEXT:
        raise _WrongShape(name)
    return value


def _texts(name: str, value: object) -> frozenset[str]:
    """`value` if it is a list of such texts, none for None; raises _WrongShape."""
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
    """`text` fit for a log line: printable, at most 200 characters, no key (of any shape)."""
    clean = redact(text.replace(key, "***"))
    return " ".join("".join(c if c.isprintable() else " " for c in clean).split())[:200]


def _wait(reply: Reply) -> float | None:
    """Seconds that Retry-After asks for (RFC 9110, 10.2.3), from 1 to 60; None without one."""
    value = reply.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(min(max(int(value[:9]), 1), 60))
    try:
        date = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    # A date without a zone is in UTC, as HTTP's dates all are.
    seconds = (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp() - time.time()
    return min(max(seconds, 1.0), 60.0)

"""Pages of a list of keys: the orders that the list can have, and the tokens of its pages.

A token holds a row's place in the order, so a page begins where the one before it ended, whatever has
been made, used or revoked in between. With the number of a row as the place, a script that revokes the
keys of each page would skip as many on the next.
"""

from __future__ import annotations

import base64
import json
from typing import Any, NamedTuple

import sqlalchemy as sa

from mlflow_hokusai_auth.core.errors import InvalidRequest
from mlflow_hokusai_auth.core.suggest import did_you_mean

from .records import KeyRecord, state_number
from .tables import KEYS

#: The fields by which keys can be ordered.
FIELDS = ("created_at", "expires_at", "last_used_at", "name", "owner", "scopes", "state")
_TEXTS = ("name", "owner", "scopes")
#: Characters by which texts are ordered: a token holds them.
_COMPARED = 64
#: Characters of a token, at most.
MAX_TOKEN = 512
#: The place of a key that never expires, and of one that was never used.
_FOREVER, _NEVER = 1e300, -1.0


class Order(NamedTuple):
    """The order of a list of keys; keys with the same value are ordered by their ids."""

    field: str
    descending: bool

    def __str__(self) -> str:
        return f"{self.field} {'DESC' if self.descending else 'ASC'}"


NEWEST_FIRST = Order("created_at", descending=True)


class KeyPage(NamedTuple):
    """A page of a list of keys."""

    records: list[KeyRecord]
    #: The tokens of the pages beside this one; None where there is none.
    next_page_token: str | None
    previous_page_token: str | None
    #: The number of keys on all pages, and on those before this one.
    total: int
    before: int


class Place(NamedTuple):
    """The place of a key in an order, and the side of it on which a page lies."""

    value: float | str
    key_id: str
    #: True for the page that ends just before the key, False for the one that begins after it.
    back: bool = False


def order(text: str) -> Order:
    """Return the order that `text` names, such as "created_at DESC". Raises InvalidRequest."""
    field, *direction = text.split() or [""]
    if field not in FIELDS:
        raise InvalidRequest(
            f"order_by must begin with one of {', '.join(FIELDS)}.{did_you_mean(field, FIELDS)}"
        )
    if [word.upper() for word in direction] not in ([], ["ASC"], ["DESC"]):
        raise InvalidRequest(f"After {field}, order_by takes ASC or DESC.")
    return Order(field, bool(direction) and direction[0].upper() == "DESC")


def expression(by: Order, now: float) -> sa.ColumnElement[float | str]:
    """Return the value by which keys are ordered, which is never NULL."""
    if by.field == "state":
        return state_number(now)
    if by.field == "expires_at":
        return sa.func.coalesce(KEYS.c.expires_at, _FOREVER)
    if by.field == "last_used_at":
        return sa.func.coalesce(KEYS.c.last_used_at, _NEVER)
    if by.field == "created_at":
        return KEYS.c.created_at
    text: sa.ColumnElement[str] = sa.func.lower(sa.cast(KEYS.c[by.field], sa.Text))
    if by.field == "name":
        # Lists show the owner of a key without a name.
        text = sa.func.coalesce(sa.func.nullif(text, ""), sa.func.lower(KEYS.c.owner))
    return sa.func.substr(text, 1, _COMPARED)


def ordered(
    by: Order, value: sa.ColumnElement[float | str], *, back: bool
) -> list[sa.UnaryExpression[Any]]:
    """Return the columns to order by; `back` turns the order round."""
    columns = (value, KEYS.c.key_id)
    return [one.desc() if by.descending != back else one.asc() for one in columns]


def beyond(by: Order, value: sa.ColumnElement[float | str], place: Place) -> sa.ColumnElement[bool]:
    """Return the condition that a key lies on `place`'s side of it."""
    row, there = sa.tuple_(value, KEYS.c.key_id), sa.tuple_(place.value, place.key_id)
    return row < there if by.descending != place.back else row > there


def token(by: Order, place: Place) -> str:
    """Return the token of the page at `place`."""
    content = json.dumps([str(by), *place], ensure_ascii=False, separators=(",", ":"))
    return base64.urlsafe_b64encode(content.encode()).decode().rstrip("=")


def place(by: Order, text: str) -> Place:
    """Return the place in the token `text`, of a list in the order `by`. Raises InvalidRequest."""
    try:
        if len(text) > MAX_TOKEN:
            raise ValueError
        padded = text.encode("ascii") + b"=" * (-len(text) % 4)
        name, value, key_id, back = json.loads(base64.b64decode(padded, b"-_", validate=True))
        number = isinstance(value, int | float) and -_FOREVER <= value <= _FOREVER
        known = isinstance(value, str) and value.isprintable() if by.field in _TEXTS else number
        if not (known and isinstance(key_id, str) and key_id.isprintable() and back in (0, 1)):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise InvalidRequest("page_token is not one of this server's.") from None
    if name != str(by):
        raise InvalidRequest("page_token belongs to a list with another order_by.")
    return Place(value, key_id, bool(back))

"""The bodies and replies of the REST API of one-time links, as pydantic models."""

from __future__ import annotations

import time
from typing import Annotated, Any

from pydantic import BaseModel, Field, StrictStr

from mlflow_hokusai_auth.store.links import LIFETIME, MAX_LIFETIME, LinkRecord

from .schemas import MAX_OVERLAP, Body, NewKey


class NewLink(Body):
    """A one-time link: to a new `key`, or to one that replaces the key with the id `replaces`."""

    key: NewKey | None = Field(
        None, description="The key that the link makes; its lifetime begins when it is made."
    )
    replaces: Annotated[StrictStr, Field(max_length=255)] | None = Field(
        None, description="The id of the key that the new one replaces."
    )
    overlap: Annotated[float, Field(ge=0, le=MAX_OVERLAP, strict=True)] | None = Field(
        None, description="Seconds for which the replaced key stays valid; null: a day."
    )
    expires_in: Annotated[
        float,
        Field(
            gt=0,
            le=MAX_LIFETIME,
            strict=True,
            description="Seconds for which the link can be opened.",
        ),
    ] = LIFETIME


class Link(BaseModel):
    """A one-time link, without its code. Times are seconds since the epoch."""

    link_id: str
    state: str = Field(
        description="waiting, opened, revoked or expired; or void: the key that it would replace has "
        "ended, was replaced, or belongs to somebody else, so it makes no key."
    )
    owner: str
    name: str
    scopes: list[str] = Field(description="Those of the key; empty if it replaces one.")
    replaces: str | None = Field(description="The id of the key that the new one replaces.")
    created_at: float
    created_by: str
    expires_at: float
    revoked_at: float | None
    opened_at: float | None
    opened_from: str = Field(description="The address of whoever opened it.")
    key_id: str | None = Field(description="The id of the key that was made.")
    refused: int = Field(description="Attempts to open it that were refused.")
    refused_at: float | None


class MadeLink(Link):
    """A new link. `url` is the link itself, which is returned only here."""

    url: str


class LinkList(BaseModel):
    """All links, newest first. Each stays for 30 days after it has expired, opened or not."""

    links: list[Link]


def describe(link: LinkRecord) -> dict[str, Any]:
    """Return `link` as the REST API shows it."""
    values = {name: getattr(link, name) for name in Link.model_fields if hasattr(link, name)}
    of_key = {
        "name": link.fields.get("name", ""),
        "scopes": list(link.fields.get("scopes", ())),
        "state": link.state(time.time()),
    }
    return Link(**{**values, **of_key}).model_dump()

"""The bodies and replies of the REST API of trusts and of the exchange, as pydantic models.

The models give the types. `core.trust` judges what a trust asks for, for the command line as well.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, Field, StrictBool, StrictStr

from mlflow_hokusai_auth.authorities import key_sets
from mlflow_hokusai_auth.core.errors import InvalidRequest
from mlflow_hokusai_auth.core.lifetimes import Lifetimes
from mlflow_hokusai_auth.core.trust import MAX_CLAIMS, MAX_TTL, MAX_VALUE, MIN_TTL, TTL
from mlflow_hokusai_auth.store.trusts import TrustRecord

from .schemas import Body, Models, NoDelete, Owner, Scopes

#: Bytes of a key set that is given, at most.
MAX_JWKS = 64 * 1024
GRANT_TYPE = "urn:ietf:params:oauth:grant-type:token-exchange"
TOKEN_TYPES = (
    "urn:ietf:params:oauth:token-type:id_token",
    "urn:ietf:params:oauth:token-type:jwt",
)
ISSUED_TYPE = "urn:ietf:params:oauth:token-type:access_token"

_Text = Annotated[StrictStr, Field(min_length=1, max_length=MAX_VALUE)]
Ttl = Annotated[
    float,
    Field(ge=MIN_TTL, le=MAX_TTL, strict=True, description="Seconds for which a key lives."),
]
Jwks = Annotated[
    dict[str, Any] | None,
    Field(description="The issuer's JSON Web Key Set, for networks without a way to the issuer."),
]


class NewTrust(Body):
    """A workload to trust: one of `github`, `gitlab` and `issuer` with `claims`; and its keys."""

    owner: Annotated[
        Owner | None,
        Field(description="The owner of the keys. A supplier leaves it out, or names its own."),
    ] = None
    scopes: Scopes
    github: _Text | None = Field(None, description="A repository, such as org/repo.")
    gitlab: _Text | None = Field(None, description="A project, such as group/project.")
    issuer: _Text | None = Field(
        None,
        description="The exact URL in the claim iss; with github and gitlab, of your own server.",
    )
    workflow: _Text | None = Field(
        None, description="The workflow's file: release.yml, or .gitlab-ci.yml."
    )
    environment: _Text | None = Field(None, description="The job's environment.")
    claims: dict[_Text, _Text] = Field(
        default={},
        max_length=MAX_CLAIMS,
        description="Claims and their exact values, or beginnings and `*`.",
    )
    single_use: StrictBool | None = Field(
        None, description="True: each token is exchanged once only. Null: as the issuer mints them."
    )
    ttl: Ttl = TTL
    models: Models = Field(default=[])
    no_delete: NoDelete = False
    jwks: Jwks = None


class TrustChanges(Body):
    """Changes of a trust. A field that is left out stays as it is, so no default is ever used."""

    scopes: Scopes = Field(default=[])
    models: Models = Field(default=[])
    no_delete: NoDelete = False
    ttl: Ttl = TTL
    jwks: Jwks = None
    forget_ids: StrictBool = Field(
        False, description="Pin the repository's ids anew at the next exchange."
    )


class Trust(BaseModel):
    """A trusted workload. Times are seconds since the epoch."""

    trust_id: str
    owner: str
    kind: str
    issuer: str
    claims: dict[str, str]
    #: The numbers of the repository, from the first exchange on.
    pins: dict[str, str]
    scopes: list[str]
    models: list[str]
    no_delete: bool
    ttl: float
    single_use: bool
    #: True if the trust has a key set of its own.
    jwks: bool
    created_at: float
    last_used_at: float | None
    exchanges: int


class TrustList(BaseModel):
    """All trusts, oldest first."""

    trusts: list[Trust]


class ExchangedKey(BaseModel):
    """The answer of RFC 8693: `access_token` is the key, which is returned only here."""

    access_token: str
    issued_token_type: str
    token_type: str
    #: Seconds.
    expires_in: int
    scope: str
    key_id: str
    owner: str
    source: str


def describe(record: TrustRecord) -> dict[str, Any]:
    """Return `record` as the REST API shows it."""
    trust = record.trust
    return Trust(
        trust_id=trust.trust_id,
        owner=trust.owner,
        kind=trust.kind,
        issuer=trust.issuer,
        claims=dict(trust.claims),
        pins=dict(trust.pins),
        scopes=list(trust.scopes),
        models=list(trust.models),
        no_delete=trust.no_delete,
        ttl=trust.ttl,
        single_use=trust.single_use,
        jwks=trust.jwks is not None,
        created_at=record.created_at,
        last_used_at=record.last_used_at,
        exchanges=record.exchanges,
    ).model_dump()


def fields(body: NewTrust, lifetimes: Lifetimes) -> dict[str, Any]:
    """Return the arguments of `Trusts.add` in `body`, without the workload. Raises InvalidRequest.

    As for keys, a default lifetime above the maximum counts as the maximum.
    """
    if body.owner is None:
        raise InvalidRequest("owner: Name the owner of the keys.", {"owner": "Name the owner."})
    return {
        "owner": body.owner,
        "scopes": tuple(body.scopes),
        "models": tuple(body.models),
        "no_delete": body.no_delete,
        "ttl": body.ttl if "ttl" in body.model_fields_set else lifetimes.within(body.ttl),
        "jwks": checked_jwks(body.jwks),
    }


def changes(body: TrustChanges) -> tuple[dict[str, Any], bool]:
    """Return the changes in `body`, and whether to pin anew. Raises InvalidRequest without any."""
    given = {name: getattr(body, name) for name in body.model_fields_set}
    forget = given.pop("forget_ids", False)
    if not given and not forget:
        raise InvalidRequest(f"Nothing to change. Known: {', '.join(TrustChanges.model_fields)}.")
    if "jwks" in given:
        given["jwks"] = checked_jwks(given["jwks"])
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }, forget


def checked_jwks(content: dict[str, Any] | None) -> str | None:
    """Return a key set as text. Raises InvalidRequest for one that verifies nothing."""
    if content is None:
        return None
    text = json.dumps(content)
    if len(text) > MAX_JWKS:
        raise InvalidRequest(f"jwks has more than {MAX_JWKS} bytes.")
    try:
        key_sets.parse(text)
    except ValueError as error:
        raise InvalidRequest(f"jwks can't be used: {error}.") from None
    return text

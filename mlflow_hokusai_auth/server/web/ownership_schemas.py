"""The bodies and replies of the REST API of owners, grants and prefixes, as pydantic models.

The models give the types. `store.owners` checks the values, for the command line as well.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, StrictBool, StrictStr

from mlflow_hokusai_auth.core.ownership import KINDS, LEVELS
from mlflow_hokusai_auth.core.types import ISOLATION
from mlflow_hokusai_auth.store.owners import MAX_LIFETIME

from .schemas import Body

#: Rows of `names` in one assignment, at most.
MAX_NAMES = 10_000

Owner = Annotated[StrictStr, Field(min_length=1, max_length=255)]
Pattern = Annotated[
    StrictStr,
    Field(min_length=1, max_length=256, description="A name, or a beginning and `*`."),
]
Kind = Annotated[StrictStr, Field(json_schema_extra={"enum": list(KINDS)})]


class Owned(BaseModel):
    """A name and its owner, null for none. `gone_at` is set for the name of a model that is gone."""

    kind: str
    name: str
    experiment_id: int | None
    owner: str | None
    #: The key that made it, for its owner and for operators.
    key_id: str | None
    gone_at: float | None


class Listed(Owned):
    """A name in a list. If an operator asks for names without an owner, who may be the owner.

    `suggested` are names that MLflow keeps, which clients may have set: decide yourself.
    """

    suggested: list[str]


class OwnedPage(BaseModel):
    """A page of names with their owners, and the token of the next page, or null."""

    owners: list[Listed]
    next_page_token: str | None


class OwnedNames(BaseModel):
    """The registered model and the experiment of one name."""

    owners: list[Owned]


class NameToAssign(Body):
    """A name for an assignment; `owner` is the assignment's unless it is given here."""

    kind: Kind = KINDS[0]
    name: Annotated[StrictStr, Field(min_length=1, max_length=1000)]
    owner: Owner | None = None


class Assignment(Body):
    """The new owner, and what it gets: `models`, `experiments`, `names`, or all of `from_owner`."""

    owner: Owner | None = None
    models: Pattern | None = None
    experiments: Pattern | None = None
    names: list[NameToAssign] = Field(default=[], max_length=MAX_NAMES)
    from_owner: Owner | None = None
    apply: StrictBool = False
    keep_grants: StrictBool = False


class Change(Owned):
    """A name that gets another owner, and the one before, or null.

    With `from_owner`, the `kind` may be "model prefix" or "experiment prefix", too.
    """

    before: str | None


class ForeignSource(BaseModel):
    """A model version whose files are not its model's owner's; `source_owner` is null if unknown."""

    name: str
    version: int
    source: str
    source_owner: str | None


class Assigned(BaseModel):
    """The changes of an assignment, which are made if it is `applied`."""

    applied: bool
    changed: int
    unchanged: int
    changes: list[Change]
    missing: list[str]
    foreign_sources: list[ForeignSource]


class ModelName(Body):
    """The name of a registered model."""

    name: Annotated[StrictStr, Field(min_length=1, max_length=256)]


class Problem(BaseModel):
    """Something that is wrong with the tables, and what to do."""

    problem: str
    kind: str
    name: str
    advice: str


class Problems(BaseModel):
    """All problems, none if the list is empty."""

    problems: list[Problem]


class NewGrant(Body):
    """A new grant."""

    grantee: Owner
    pattern: Pattern
    level: Annotated[StrictStr, Field(json_schema_extra={"enum": list(LEVELS)})] = LEVELS[0]
    expires_in: Annotated[
        Annotated[float, Field(gt=0, le=MAX_LIFETIME, strict=True)] | None,
        Field(description="Seconds from now until the grant ends; null for never."),
    ] = None


class Grant(BaseModel):
    """A grant; `granted_by` is "" for an operator's, `models` the number of models that it covers."""

    id: str
    grantee: str
    granted_by: str
    pattern: str
    level: str
    expires_at: float | None
    #: The key that gave it, for its giver and for operators.
    key_id: str | None
    created_at: float
    models: int


class GrantPage(BaseModel):
    """A page of grants, and the token of the next page, or null."""

    grants: list[Grant]
    next_page_token: str | None


class NewPrefix(Body):
    """A new prefix."""

    prefix: Annotated[StrictStr, Field(min_length=1, max_length=256)]
    owner: Owner
    kind: Kind = KINDS[0]


class Prefix(BaseModel):
    """A beginning of names that is reserved for an owner."""

    prefix: str
    kind: str
    owner: str


class Prefixes(BaseModel):
    """All prefixes."""

    prefixes: list[Prefix]


class NewIsolation(Body):
    """The isolation that all servers of this key store are to have."""

    isolation: Annotated[StrictStr, Field(json_schema_extra={"enum": [*ISOLATION, "default"]})]


class IsolationNow(BaseModel):
    """The isolation of this server. It is `in_effect` only while the `mode` is enforce."""

    isolation: str
    in_effect: str
    mode: str
    #: True if nobody has set it: it was decided when the server first used MLflow's database.
    by_default: bool
    #: The reason why this server can't know owners, or null.
    obstacle: str | None

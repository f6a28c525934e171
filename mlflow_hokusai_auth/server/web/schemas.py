"""The bodies and replies of the REST API as pydantic models, which also make the OpenAPI document."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
)

from mlflow_hokusai_auth.core import ownership
from mlflow_hokusai_auth.core import scopes as known_scopes
from mlflow_hokusai_auth.core.addresses import networks as parsed_networks
from mlflow_hokusai_auth.core.errors import InvalidRequest
from mlflow_hokusai_auth.core.keys import ENVIRONMENTS, redact
from mlflow_hokusai_auth.core.lifetimes import Lifetimes
from mlflow_hokusai_auth.core.suggest import did_you_mean
from mlflow_hokusai_auth.server.settings import MAX_KEY_LIFETIME
from mlflow_hokusai_auth.store.keys import OVERLAP
from mlflow_hokusai_auth.store.records import KeyRecord, columns

#: Maximum overlap of a rotation (90 days), in seconds.
MAX_OVERLAP = 90 * 86400

_Model = TypeVar("_Model", bound=BaseModel)


def _printable(text: str) -> str:
    text = text.strip()
    if not text.isprintable():
        raise ValueError("must be printable text")
    return text


def _owner(text: str) -> str:
    if not _printable(text):
        raise ValueError("must name the owner of the key")
    return _printable(text)


def _note(text: str) -> str:
    if not all(c.isprintable() or c in "\n\t" for c in text):
        raise ValueError("must be printable text")
    return text.strip()


def _scope(text: str) -> str:
    if text not in known_scopes.KNOWN:
        raise ValueError(
            f"unknown scope {redact(text)!r}; known: {', '.join(sorted(known_scopes.KNOWN))}"
            + did_you_mean(text, known_scopes.KNOWN).replace(" Did", ". Did")
        )
    return text


def _environment(text: str) -> str:
    if text not in ENVIRONMENTS:
        hint = did_you_mean(text, ENVIRONMENTS).replace(" Did", ". Did")
        raise ValueError(f"must be one of {', '.join(ENVIRONMENTS)}{hint}")
    return text


def _network(text: str) -> str:
    (network,) = parsed_networks([text.strip()])
    return str(network)


def _pattern(text: str) -> str:
    text = text.strip()
    if problem := ownership.problem(text):
        shown = redact(text if text and text.isprintable() else ascii(text))[:80]
        raise ValueError(
            f"{shown} is neither a name nor a beginning and `*`, such as `acme-*`: {problem}"
        )
    return text


Owner = Annotated[StrictStr, Field(min_length=1, max_length=255), AfterValidator(_owner)]
Name = Annotated[StrictStr, Field(max_length=255), AfterValidator(_printable)]
Note = Annotated[StrictStr, Field(max_length=2000), AfterValidator(_note)]
Scopes = Annotated[
    list[
        Annotated[
            StrictStr,
            AfterValidator(_scope),
            Field(json_schema_extra={"enum": sorted(known_scopes.KNOWN)}),
        ]
    ],
    Field(min_length=1, max_length=32),
]
Networks = Annotated[
    list[Annotated[StrictStr, Field(max_length=64), AfterValidator(_network)]],
    Field(
        max_length=64, description="Addresses and networks (CIDR) that the key may be used from."
    ),
]
RateLimit = Annotated[
    Annotated[StrictInt, Field(ge=1, le=10**9)] | None, Field(description="Requests in any hour.")
]
Models = Annotated[
    list[Annotated[StrictStr, AfterValidator(_pattern)]],
    Field(
        max_length=64,
        description="Names of the registered models that the key may change, or beginnings and `*`, "
        "such as `acme-*`; empty for all.",
    ),
]
NoDelete = Annotated[StrictBool, Field(description="Whether the key may not delete anything.")]
_Seconds = Annotated[float, Field(gt=0, le=MAX_KEY_LIFETIME, strict=True)]
Lifetime = Annotated[
    _Seconds | None, Field(description="Seconds from now until the key ends; null for never.")
]


class Body(BaseModel):
    """The body of a request: unknown fields are mistakes."""

    model_config = ConfigDict(extra="forbid")


class _Fields(Body):
    owner: Owner
    scopes: Scopes
    name: Name = ""
    note: Note = ""
    expires_in: Lifetime = None
    networks: Networks = []
    rate_limit_per_hour: RateLimit = None
    models: Models = []
    no_delete: NoDelete = False


class NewKey(_Fields):
    """A new key."""

    environment: Annotated[
        StrictStr,
        AfterValidator(_environment),
        Field(json_schema_extra={"enum": list(ENVIRONMENTS)}),
    ] = "live"
    expires_in: Annotated[
        _Seconds | None,
        Field(
            description="Seconds until the key ends; null for never. Without it, the key gets the "
            "server's HOKUSAI_AUTH_KEY_LIFETIME.",
            json_schema_extra=lambda schema: schema.pop("default", None),
        ),
    ] = None


class ExistingKey(_Fields):
    """An existing key to import."""

    key: Annotated[StrictStr, Field(max_length=256)]


class KeyChanges(_Fields):
    """Changes of a key. A field that is left out stays as it is, so no default is ever used."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    owner: Owner = ""
    scopes: Scopes = []


class Rotation(Body):
    """Options of a rotation."""

    overlap: Annotated[
        float,
        Field(
            ge=0,
            le=MAX_OVERLAP,
            strict=True,
            description="Seconds for which the old key stays valid.",
        ),
    ] = OVERLAP


class KeyToFind(Body):
    """A key whose record is wanted, or the last four characters of one."""

    key: Annotated[StrictStr, Field(min_length=1, max_length=300)]


class Revocation(Body):
    """The owner whose valid keys, waiting one-time links and trusts are to end, all at once."""

    owner: Owner
    apply: Annotated[
        StrictBool, Field(description="Do it; otherwise only say which keys would end.")
    ] = False
    force: Annotated[
        StrictBool, Field(description="Revoke even the last key that may manage keys.")
    ] = False
    wait: Annotated[
        StrictBool, Field(description="Answer only once every server process refuses the keys.")
    ] = False


class Key(BaseModel):
    """A key's record, without the key itself. Times are seconds since the epoch."""

    key_id: str
    owner: str
    name: str
    note: str
    environment: str
    scopes: list[str]
    state: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    deprecated_at: float | None
    replaced_by: str | None
    networks: list[str]
    rate_limit_per_hour: int | None
    last_used_at: float | None
    models: list[str]
    no_delete: bool
    #: The trust and the job, if the key was exchanged for an identity token.
    trust_id: str | None
    source: str
    last_four: str | None = Field(
        description="The last four characters of the key; null for a key that an earlier version made."
    )


class KeyWithUses(Key):
    """A key's record, with its uses in each of the last 24 hours, the current hour last."""

    uses_by_hour: list[int]


class MadeKey(Key):
    """A new key. `key` is the key itself, which is returned only here."""

    key: str


class ReplacingKey(MadeKey):
    """A new key, and the record of the one that it replaces."""

    replaces: Key


class KeyPage(BaseModel):
    """A page of keys, the token of the next page, or null, and the number of keys on all pages."""

    keys: list[KeyWithUses]
    next_page_token: str | None
    total: int


class FoundKeys(BaseModel):
    """The records of the keys that were looked for; none if this server has no such key."""

    keys: list[Key]


class Revoked(BaseModel):
    """The keys, links and trusts of an owner that were ended, if it is `applied`, or would be."""

    applied: bool
    keys: list[Key]
    kept: list[str] = Field(description="Why each of the owner's other valid keys stays.")
    links: list[str] = Field(
        description="The ids of waiting one-time links that were revoked, or would be."
    )
    trusts: list[str] = Field(
        description="The ids of trusts that were removed, or would be; jobs got this owner's keys."
    )


class AuditEvent(BaseModel):
    """A row of the audit log: `actor` did `event` at the time `at`, to the key `key_id` if to one."""

    id: int
    at: float
    event: str
    actor: str
    actor_key_id: str
    address: str
    request_id: str
    key_id: str
    detail: dict[str, Any]


class AuditPage(BaseModel):
    """Events, oldest first, and the token of the page of older ones, or null."""

    events: list[AuditEvent]
    next_page_token: str | None


class HealthPart(BaseModel):
    """The result of one check."""

    ok: bool
    latency_ms: float
    found: str


class HealthNow(BaseModel):
    """The results of the checks of a server; `status` is ok or failing."""

    status: str
    checks: dict[str, HealthPart]


class Status(BaseModel):
    """The mode, isolation, keys, links and health of a server."""

    version: str
    mode: str
    mode_by: str = Field(
        description="The source of the mode: `force_mode` (HOKUSAI_AUTH_FORCE_MODE), `store` (set with "
        "`hokusai-auth mode`) or `setting` (HOKUSAI_AUTH_MODE, or its default)."
    )
    isolation: str
    isolation_by: str = Field(
        description="The source of the isolation: `store` (set with `hokusai-auth isolation`), "
        "`setting` (HOKUSAI_AUTH_ISOLATION) or `decision` (what the server found in MLflow's database)."
    )
    isolation_in_effect: str = Field(description="off unless the mode is enforce.")
    keys: dict[str, int] | None = Field(
        description="The number of keys in each state; null if the key store can't be used."
    )
    keys_ending_soon: int | None = Field(
        description="The number of active keys that end within 14 days."
    )
    links_waiting: int | None = Field(description="The number of one-time links that wait.")
    links_refused: int | None = Field(
        description="The number of one-time links with refused attempts: they had been opened or "
        "revoked, had expired, or could not make their key."
    )
    links_tried_again: int | None = Field(
        description="The number of those that had been opened: somebody else may have been first."
    )
    migrations_current: bool
    health: HealthNow


class LimitLeft(BaseModel):
    """The rest of a key's rate limit; `reset` is in seconds."""

    limit: int
    remaining: int
    reset: int


class Identity(BaseModel):
    """A key's own record, as `GET whoami` returns it."""

    key_id: str
    owner: str
    name: str
    scopes: list[str]
    can: list[str]
    expires_at: float | None
    deprecated_at: float | None
    networks: list[str]
    rate_limit: LimitLeft | None
    models: list[str]
    no_delete: bool
    #: The job whose identity token was exchanged for the key, "" for any other key.
    source: str
    contact: str | None = Field(
        description="The contact for questions about keys, if the operator has set one."
    )
    default_experiment: str | None = Field(
        description="The experiment for runs that name none; null: MLflow's Default."
    )


class Error(BaseModel):
    """An error in MLflow's own form."""

    error_code: str
    message: str
    fields: dict[str, str] | None = Field(
        None, description="Of a body: each wrong field, and what is wrong with it."
    )


def read_json(data: bytes) -> object:
    """Parse `data` as JSON; None if it is malformed."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def parse(model: type[_Model], body: object) -> _Model:
    """Validate `body`, a request's JSON; raises InvalidRequest, which names up to ten mistakes."""
    if not isinstance(body, dict):
        raise InvalidRequest("Send a JSON object.")
    try:
        return model.model_validate(body)
    except ValidationError as error:
        mistakes: list[str] = []
        wrong_fields: dict[str, str] = {}
        for item in error.errors(include_url=False, include_input=False, include_context=False):
            where = [redact(str(part))[:80] for part in item["loc"]]
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                message = f"unknown; known: {', '.join(_beside(model, item['loc']))}"
            else:
                # A list is one field, whichever of its items is wrong.
                names = itertools.takewhile(lambda part: isinstance(part, str), item["loc"])
                wrong_fields.setdefault(".".join(where[: len(list(names))]), message)
            # The message about an item of a list shows the item itself.
            item_shown = item["type"] == "value_error" and isinstance(item["loc"][-1], int)
            mistakes.append(message if item_shown else f"{'.'.join(where)}: {message}")
        text = "; ".join(mistakes[:10])
        raise InvalidRequest(text if text.endswith("?") else f"{text}.", wrong_fields) from None


def _beside(model: type[BaseModel], path: Sequence[int | str]) -> Iterable[str]:
    """Return the fields that a body of `model` has beside the one at `path`."""
    for name in path[:-1]:
        field = model.model_fields.get(str(name))  # The place in a list is none.
        model = next(_models_in(field.annotation), model) if field else model
    return model.model_fields


def _models_in(kind: Any) -> Iterator[type[BaseModel]]:
    """Yield the models in the type of a field."""
    if inner := get_args(kind):
        yield from itertools.chain.from_iterable(map(_models_in, inner))
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind


def new_fields(body: NewKey, lifetimes: Lifetimes) -> dict[str, Any]:
    """Return the arguments of `LocalStore.create` that `body` holds. Raises InvalidRequest."""
    ends = _expires_at(_lifetime(body, lifetimes))
    return {**fields(body), "environment": body.environment, "expires_at": ends}


def link_fields(body: NewKey, lifetimes: Lifetimes) -> dict[str, Any]:
    """Return the arguments of `Links.create` that `body` holds. Raises InvalidRequest."""
    seconds = _lifetime(body, lifetimes)
    same = {name: value for name, value in fields(body).items() if name != "expires_at"}
    return {**same, "environment": body.environment, "lifetime": seconds}


def _lifetime(body: NewKey, lifetimes: Lifetimes) -> float | None:
    """Return the seconds that the key of `body` lives; None for ever. Raises InvalidRequest."""
    seconds = body.expires_in if "expires_in" in body.model_fields_set else lifetimes.usual
    lifetimes.check(seconds)
    return seconds


def fields(body: _Fields) -> dict[str, Any]:
    """Return the arguments of `LocalStore.add` that `body` holds."""
    same = body.model_dump(include=_Fields.model_fields.keys() - {"expires_in"})
    lists = {"networks": tuple(body.networks), "models": tuple(body.models)}
    return {**same, **lists, "expires_at": _expires_at(body.expires_in)}


def changes(body: KeyChanges, lifetimes: Lifetimes) -> dict[str, Any]:
    """Return the `changes` of `LocalStore.edit`.

    Raises InvalidRequest if `body` has no field, and for an expiry beyond the maximum from now on.
    """
    changed: dict[str, Any] = {}
    for name in (name for name in KeyChanges.model_fields if name in body.model_fields_set):
        value = getattr(body, name)
        if name == "expires_in":
            lifetimes.check(value)
            changed["expires_at"] = _expires_at(value)
        else:
            changed[name] = tuple(value) if isinstance(value, list) else value
    if not changed:
        raise InvalidRequest(f"Nothing to change. Known: {', '.join(KeyChanges.model_fields)}.")
    return changed


def describe(record: KeyRecord) -> dict[str, Any]:
    """Return `record` as the REST API shows it: its fields and current state, never the key."""
    values = {name: getattr(record, name) for name in record.__slots__}
    return Key(**columns(values), state=record.state(time.time())).model_dump()


def _expires_at(seconds: float | None) -> float | None:
    return None if seconds is None else time.time() + seconds

"""The OpenAPI 3.1 description of our endpoints, made from the models that validate them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from mlflow_hokusai_auth import __version__
from mlflow_hokusai_auth.authorities.identity_tokens import MAX_TOKEN as MAX_TOKEN_LENGTH
from mlflow_hokusai_auth.core.keys import ENVIRONMENTS, EPHEMERAL
from mlflow_hokusai_auth.core.ownership import KINDS
from mlflow_hokusai_auth.core.scopes import KNOWN
from mlflow_hokusai_auth.store.key_pages import FIELDS, MAX_TOKEN, NEWEST_FIRST
from mlflow_hokusai_auth.store.keys import MAX_RESULTS
from mlflow_hokusai_auth.store.records import STATE_FILTERS

from . import link_schemas as linked
from . import ownership_schemas as owned
from . import schemas
from . import trust_schemas as trusted

_BASE = "/api/2.0/hokusai/"
_REF = "#/components/schemas/{model}"
_ERRORS = {
    "400": "A parameter, the body or the way in which the key was sent is wrong.",
    "401": "The key is missing or not valid.",
    "403": "The key may not do this, or not from this address.",
    "404": "There is no such key, owner, name, grant, prefix, trust or link.",
    "409": "What exists does not allow this, such as the state of a key.",
    "413": "The body is too large.",
    "429": "Too many requests; Retry-After says how long to wait.",
    "503": "Keys can't be checked, or the key store or MLflow's database can't be used.",
}
#: The errors that every operation may answer with.
_ALWAYS = ("400", "401", "403", "429", "503")


class _Row(NamedTuple):
    """An operation. `route` is its method and its path below `_BASE`; `extra` is added unchanged."""

    route: str
    name: str
    summary: str
    answer: type[BaseModel] | None
    status: str = "200"
    errors: tuple[str, ...] = ()
    body: type[BaseModel] | None = None
    extra: Mapping[str, Any] = {}
    media: str = "application/json"


def _parameter(
    name: str, description: str, *, where: str = "query", **schema: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "in": where,
        "required": where == "path",
        "schema": {"type": "string", **schema},
        "description": description,
    }


def _content(schema: dict[str, Any], media: str = "application/json") -> dict[str, Any]:
    return {"content": {media: {"schema": schema}}}


def _ref(model: type[BaseModel] | None) -> dict[str, Any]:
    return {"$ref": _REF.format(model=model.__name__)} if model else {}


_KEY_ID = _parameter("key_id", "The key's public id.", where="path", pattern="^key_[0-9a-f]{16}$")
_GRANT_ID = _parameter("grant_id", "The grant's id.", where="path", pattern="^grant_[0-9a-f]{16}$")
_TRUST_ID = _parameter("trust_id", "The trust's id.", where="path", pattern="^trust_[0-9a-f]{16}$")
_LINK_ID = _parameter("link_id", "The link's id.", where="path", pattern="^link_[0-9a-f]{16}$")
_IN_PATH = {
    "{key_id}": _KEY_ID,
    "{grant_id}": _GRANT_ID,
    "{trust_id}": _TRUST_ID,
    "{link_id}": _LINK_ID,
}
_PAGE = [
    _parameter(
        "max_results",
        "The number of rows on a page.",
        type="integer",
        minimum=1,
        maximum=MAX_RESULTS,
        default=100,
    ),
    _parameter("page_token", "The next_page_token of the previous page.", maxLength=MAX_TOKEN),
]
_KIND = _parameter("kind", "Registered models, or experiments.", enum=list(KINDS), default=KINDS[0])
_NAME = _parameter("name", "The name of a registered model or an experiment.")
_OF_OWNERS = [
    _KIND,
    _parameter("owner", "Only those of exactly this owner.", maxLength=255),
    _parameter("unowned", "Only those that nobody owns.", type="boolean"),
    *_PAGE,
]
_PREFIX = _parameter("prefix", "The prefix, as it was added.", maxLength=256)
_FILTERS = [
    _parameter("owner", "Only keys of exactly this owner.", maxLength=255),
    _parameter(
        "environment",
        f"Only keys of this environment; {EPHEMERAL}: those that were exchanged for identity tokens, "
        "which are left out otherwise.",
        enum=[*ENVIRONMENTS, EPHEMERAL],
    ),
    _parameter(
        "state",
        "Only keys in this state; valid keys are active or deprecated, ended ones the others.",
        enum=list(STATE_FILTERS),
    ),
    _parameter("query", "Only keys with this text in their owner, name or id.", maxLength=255),
    _parameter("scope", "Only keys with this scope, among others.", enum=sorted(KNOWN)),
    _parameter(
        "expires_within",
        "Only valid keys that expire within so many seconds.",
        type="integer",
        minimum=0,
    ),
    _parameter(
        "unused_for",
        "Only valid keys that were neither used nor made within so many seconds.",
        type="integer",
        minimum=0,
    ),
    _parameter(
        "order_by",
        f"One of {', '.join(FIELDS)}; DESC after it turns the order round. A page_token belongs to "
        "its order.",
        default=str(NEWEST_FIRST),
    ),
    *_PAGE,
]
_OF_AUDIT = [
    _parameter(
        "since", "Only events from this time on, in seconds since the epoch.", type="number"
    ),
    _parameter("event", "Only events whose name begins so.", maxLength=255),
    _parameter("key_id", "Only events by this key or about it.", maxLength=255),
    _parameter("actor", "Only events by exactly this actor.", maxLength=255),
    _parameter("after", "The id of an event: the first ones after it, to follow.", type="integer"),
    *_PAGE,
]
_REVOCATION = [
    _parameter("wait", "Answer only once every server process refuses the key.", type="boolean"),
    _parameter("force", "Revoke even the last key that may manage keys.", type="boolean"),
]
_SIGNED_REPORT = {
    "security": [],
    "parameters": [
        _parameter(
            "Github-Public-Key-Identifier", "The identifier of the signing key.", where="header"
        ),
        _parameter(
            "Github-Public-Key-Signature",
            "The ECDSA signature of the body, DER in base64.",
            where="header",
        ),
    ],
    "requestBody": _content({"type": "array", "items": {"type": "object"}}),
}
_EXCHANGE = {
    "security": [],
    "requestBody": {
        "required": True,
        "content": {
            media: {
                "schema": {
                    "type": "object",
                    "required": ["grant_type", "subject_token", "subject_token_type"],
                    "properties": {
                        "grant_type": {"type": "string", "const": trusted.GRANT_TYPE},
                        "subject_token": {"type": "string", "maxLength": MAX_TOKEN_LENGTH},
                        "subject_token_type": {
                            "type": "string",
                            "enum": list(trusted.TOKEN_TYPES),
                        },
                    },
                }
            }
            for media in ("application/x-www-form-urlencoded", "application/json")
        },
    },
}
# fmt: off
_ROWS = (
    _Row("GET whoami", "whoami", "The key in use, and what it may do.", schemas.Identity),
    _Row("GET keys", "listKeys", "Keys, and how many there are.", schemas.KeyPage,
         extra={"parameters": _FILTERS}),
    _Row("POST keys", "createKey", "Make a key.", schemas.MadeKey, "201", ("409",), schemas.NewKey),
    _Row("POST keys/import", "importKey", "Import an existing key.", schemas.Key, "201", ("409",),
         schemas.ExistingKey),
    _Row("GET keys/export", "exportKeys",
         "All keys, without the keys themselves: one JSON object per line.", None,
         media="application/x-ndjson"),
    _Row("GET keys/{key_id}", "getKey", "One key.", schemas.KeyWithUses, errors=("404",)),
    _Row("PATCH keys/{key_id}", "editKey", "Change a key.", schemas.Key, errors=("404", "409"),
         body=schemas.KeyChanges),
    _Row("DELETE keys/{key_id}", "revokeKey", "Revoke a key for good.", schemas.Key,
         errors=("404", "409"), extra={"parameters": _REVOCATION}),
    _Row("POST keys/find", "findKeys",
         "Find the record of a key, or those of all keys that end in four characters.",
         schemas.FoundKeys, body=schemas.KeyToFind),
    _Row("POST keys/revoke", "revokeKeys",
         "End all keys, waiting links and trusts of an owner; without `apply`, only say which.",
         schemas.Revoked, errors=("404",), body=schemas.Revocation),
    _Row("POST keys/{key_id}/rotate", "rotateKey",
         "Replace a key; the old one stays valid for a while. A key may replace itself.",
         schemas.ReplacingKey, "201", ("404", "409"), schemas.Rotation),
    _Row("POST keys/leaked", "reportLeaks",
         "GitHub's secret scanning reports keys that it found in public.", None,
         errors=("404", "413"), extra=_SIGNED_REPORT),
    _Row("GET links", "listLinks", "One-time links to new keys, without their codes.",
         linked.LinkList, errors=("404",)),
    _Row("POST links", "createLink",
         "Make a one-time link: whoever opens it first gets a new key, made at that moment.",
         linked.MadeLink, "201", ("404", "409"), linked.NewLink),
    _Row("DELETE links/{link_id}", "revokeLink", "Revoke a link: nobody can open it any more.",
         linked.Link, errors=("404", "409")),
    _Row("GET owners", "listOwners", "Registered models or experiments, and whose they are.",
         owned.OwnedPage, errors=("409",), extra={"parameters": _OF_OWNERS}),
    _Row("GET owners/of", "ownersOf", "Whose a name is.", owned.OwnedNames, errors=("404", "409"),
         extra={"parameters": [{**_NAME, "required": True}]}),
    _Row("POST owners/assign", "assignOwner",
         "Give models or experiments to an owner; without `apply`, only say what would change.",
         owned.Assigned, errors=("409",), body=owned.Assignment),
    _Row("POST owners/release", "releaseName",
         "Release the name of a model, which has no owner then.", owned.Owned,
         errors=("404", "409"), body=owned.ModelName),
    _Row("GET owners/check", "checkOwners", "What is wrong with the tables of ownership.",
         owned.Problems, errors=("409",)),
    _Row("GET grants", "listGrants", "The grants that the caller gave or still has; all for operators.",
         owned.GrantPage, errors=("409",), extra={"parameters": _PAGE}),
    _Row("POST grants", "addGrant",
         "Share models: an owner's grant covers that owner's models, an operator's any.",
         owned.Grant, "201", ("409",), owned.NewGrant),
    _Row("DELETE grants/{grant_id}", "removeGrant", "End a grant that the caller gave.",
         owned.Grant, errors=("404", "409")),
    _Row("GET prefixes", "listPrefixes", "The beginnings of names that are reserved for owners.",
         owned.Prefixes, errors=("409",)),
    _Row("POST prefixes", "addPrefix", "Reserve new names that begin so for an owner.",
         owned.Prefix, "201", ("409",), owned.NewPrefix),
    _Row("DELETE prefixes", "removePrefix", "End the reservation of a prefix.", owned.Prefix,
         errors=("404", "409"), extra={"parameters": [{**_PREFIX, "required": True}, _KIND]}),
    _Row("GET isolation", "getIsolation", "Whether suppliers are kept apart.", owned.IsolationNow),
    _Row("POST isolation", "setIsolation",
         "Keep suppliers apart, or not: on all servers with this key store, within two seconds.",
         owned.IsolationNow, errors=("409",), body=owned.NewIsolation),
    _Row("GET trust", "listTrusts",
         "The workloads whose identity tokens are exchanged for keys; a supplier sees its own.",
         trusted.TrustList, errors=("404",)),
    _Row("POST trust", "addTrust",
         "Trust a workload. A supplier does so for its own owner, where the server allows it.",
         trusted.Trust, "201", ("404", "409"), trusted.NewTrust),
    _Row("PATCH trust/{trust_id}", "editTrust",
         "Change a trust; its keys end within a second, unless only its ttl changes.",
         trusted.Trust, errors=("404",), body=trusted.TrustChanges),
    _Row("DELETE trust/{trust_id}", "removeTrust",
         "Remove a trust; its keys end within a second.", trusted.Trust, errors=("404",)),
    _Row("POST token", "exchangeToken",
         "Exchange a workload's identity token for a key (RFC 8693). It needs no key.",
         trusted.ExchangedKey, errors=("404", "413"), extra=_EXCHANGE),
    _Row("GET status", "getStatus", "The mode, isolation, keys, links and health of this server.",
         schemas.Status),
    _Row("GET audit", "listAudit", "The last events of the audit log, oldest first.",
         schemas.AuditPage, extra={"parameters": _OF_AUDIT}),
)
# fmt: on


@lru_cache(maxsize=1)
def document() -> dict[str, Any]:
    """Return the OpenAPI document, ready for JSON."""
    models: list[type[BaseModel]] = [schemas.Error]
    for row in _ROWS:
        models += [model for model in (row.answer, row.body) if model and model not in models]
    _, definitions = models_json_schema(
        [(model, "validation") for model in models], ref_template=_REF
    )
    paths: dict[str, dict[str, Any]] = {}
    for row in _ROWS:
        method, path = row.route.split()
        named = [parameter for segment, parameter in _IN_PATH.items() if segment in path]
        shared = {"parameters": named} if named else {}
        paths.setdefault(_BASE + path, shared)[method.lower()] = _operation(row)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mlflow-hokusai-auth",
            "version": __version__,
            "description": "Keys of an MLflow server, and owners of what is on it. Every path also "
            "answers under the prefixes.",
        },
        "security": [{"key": []}, {"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _operation(row: _Row) -> dict[str, Any]:
    answer = {"description": row.summary, **_content(_ref(row.answer), row.media)}
    responses: dict[str, Any] = {row.status: answer}
    for code in sorted({*_ALWAYS, *row.errors}):
        # MLflow itself answers 404 for a path without a route, in its own form.
        schema = {"type": "object"} if code == "404" else _ref(schemas.Error)
        responses[code] = {"description": _ERRORS[code], **_content(schema)}
    operation = {"operationId": row.name, "summary": row.summary, "responses": responses}
    if row.body is not None:
        # Only the options of a rotation may be left out as a whole.
        required = row.body is not schemas.Rotation
        operation["requestBody"] = {"required": required, **_content(_ref(row.body))}
    return {**operation, **row.extra}

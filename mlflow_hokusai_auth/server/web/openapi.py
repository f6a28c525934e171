"""The OpenAPI 3.1 description of our endpoints, made from the models that validate them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from mlflow_hokusai_auth import __version__
from mlflow_hokusai_auth.core.keys import ENVIRONMENTS
from mlflow_hokusai_auth.store.keys import MAX_RESULTS
from mlflow_hokusai_auth.store.records import STATES

from . import schemas

_BASE = "/api/2.0/hokusai"
_REF = "#/components/schemas/{model}"
_MODELS = (
    schemas.NewKey,
    schemas.ExistingKey,
    schemas.KeyChanges,
    schemas.Rotation,
    schemas.MadeKey,
    schemas.ReplacingKey,
    schemas.KeyPage,
    schemas.Identity,
    schemas.Error,
)
_ERRORS = {
    "400": "A parameter, the body or the way in which the key was sent is wrong.",
    "401": "The key is missing or not valid.",
    "403": "The key may not do this, or not from this address.",
    "404": "There is no such key.",
    "409": "The state of the key does not allow this.",
    "429": "Too many requests; Retry-After says how long to wait.",
    "503": "Keys can't be checked, or the key store can't be used, at the moment.",
}
_ALWAYS = ("400", "401", "403", "429", "503")


@lru_cache(maxsize=1)
def document() -> dict[str, Any]:
    """The OpenAPI document, ready for JSON."""
    _, definitions = models_json_schema(
        [(model, "validation") for model in _MODELS], ref_template=_REF
    )
    key_id = _parameter(
        "key_id",
        "path",
        {"type": "string", "pattern": "^key_[0-9a-f]{16}$"},
        "The key's public id.",
        required=True,
    )
    key = f"{_BASE}/keys/{{key_id}}"
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mlflow-hokusai-auth",
            "version": __version__,
            "description": "Keys of an MLflow server. Every path also answers under the prefixes.",
        },
        "security": [{"key": []}, {"bearer": []}],
        "paths": {
            f"{_BASE}/whoami": {
                "get": _operation("whoami", "The key in use, and what it may do.", schemas.Identity)
            },
            f"{_BASE}/keys": {
                "get": _operation(
                    "listKeys",
                    "Keys, newest first.",
                    schemas.KeyPage,
                    parameters=_filters(),
                ),
                "post": _operation(
                    "createKey", "Make a key.", schemas.MadeKey, "201", body=schemas.NewKey
                ),
            },
            f"{_BASE}/keys/import": {
                "post": _operation(
                    "importKey",
                    "Import an existing key.",
                    schemas.Key,
                    "201",
                    body=schemas.ExistingKey,
                    errors=("409",),
                ),
            },
            f"{_BASE}/keys/export": {
                "get": _operation(
                    "exportKeys",
                    "All keys, without the keys themselves: one JSON object per line.",
                    None,
                    media="application/x-ndjson",
                ),
            },
            key: {
                "parameters": [key_id],
                "get": _operation("getKey", "One key.", schemas.KeyWithUses, errors=("404",)),
                "patch": _operation(
                    "editKey",
                    "Change a key.",
                    schemas.Key,
                    body=schemas.KeyChanges,
                    errors=("404", "409"),
                ),
                "delete": _operation(
                    "revokeKey",
                    "Revoke a key for good.",
                    schemas.Key,
                    errors=("404", "409"),
                    parameters=[
                        _parameter(
                            "wait",
                            "query",
                            {"type": "boolean"},
                            "Answer only once every server process refuses the key.",
                        ),
                        _parameter(
                            "force",
                            "query",
                            {"type": "boolean"},
                            "Revoke even the last key that may manage keys.",
                        ),
                    ],
                ),
            },
            f"{key}/rotate": {
                "parameters": [key_id],
                "post": _operation(
                    "rotateKey",
                    "Replace a key; the old one stays valid for a while. A key may replace itself.",
                    schemas.ReplacingKey,
                    "201",
                    body=schemas.Rotation,
                    body_required=False,
                    errors=("404", "409"),
                ),
            },
            f"{_BASE}/keys/leaked": {
                "post": {
                    **_operation(
                        "reportLeaks",
                        "GitHub's secret scanning reports keys that it found in public.",
                        None,
                        errors=("404", "413"),
                    ),
                    "security": [],
                    "parameters": [
                        _parameter(
                            "Github-Public-Key-Identifier",
                            "header",
                            {"type": "string"},
                            "The identifier of the signing key.",
                        ),
                        _parameter(
                            "Github-Public-Key-Signature",
                            "header",
                            {"type": "string"},
                            "The ECDSA signature of the body, DER in base64.",
                        ),
                    ],
                    "requestBody": _content({"type": "array", "items": {"type": "object"}}),
                }
            },
        },
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _operation(
    name: str,
    summary: str,
    answer: type[BaseModel] | None,
    status: str = "200",
    *,
    body: type[BaseModel] | None = None,
    body_required: bool = True,
    errors: tuple[str, ...] = (),
    parameters: list[dict[str, Any]] | None = None,
    media: str = "application/json",
) -> dict[str, Any]:
    responses: dict[str, Any] = {
        status: {
            "description": summary,
            "content": {media: {"schema": _ref(answer) if answer else {}}},
        }
    }
    for code in sorted({*_ALWAYS, *errors}):
        described = _ERRORS.get(code, "The body is too large.")
        # MLflow itself answers 404 for a path without a route, in its own form.
        schema = {"type": "object"} if code == "404" else _ref(schemas.Error)
        responses[code] = {"description": described, **_content(schema)}
    operation: dict[str, Any] = {"operationId": name, "summary": summary, "responses": responses}
    if body is not None:
        operation["requestBody"] = {"required": body_required, **_content(_ref(body))}
    if parameters:
        operation["parameters"] = parameters
    return operation


def _filters() -> list[dict[str, Any]]:
    text = {"type": "string", "maxLength": 255}
    return [
        _parameter("owner", "query", text, "Only keys of exactly this owner."),
        _parameter(
            "environment",
            "query",
            {"type": "string", "enum": list(ENVIRONMENTS)},
            "Only keys of this environment.",
        ),
        _parameter(
            "state", "query", {"type": "string", "enum": list(STATES)}, "Only keys in this state."
        ),
        _parameter("query", "query", text, "Only keys with this text in their owner, name or id."),
        _parameter(
            "max_results",
            "query",
            {"type": "integer", "minimum": 1, "maximum": MAX_RESULTS, "default": 100},
            "The number of keys on a page.",
        ),
        _parameter("page_token", "query", text, "The next_page_token of the previous page."),
    ]


def _parameter(
    name: str, where: str, schema: dict[str, Any], description: str, *, required: bool = False
) -> dict[str, Any]:
    return {
        "name": name,
        "in": where,
        "required": required,
        "schema": schema,
        "description": description,
    }


def _content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def _ref(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": _REF.format(model=model.__name__)}

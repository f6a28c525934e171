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
    "400": "A parameter, the body, or the way in which the key was sent is wrong.",
    "401": "No key, or not a good one.",
    "403": "The key may not do this, or not from there.",
    "404": "There is no such key.",
    "409": "The key is not in a state in which this can be done.",
    "429": "Too many requests; Retry-After says how long to wait.",
    "503": "Keys can't be checked, or the store can't be used, for the moment.",
}
_ALWAYS = ("400", "401", "403", "429", "503")


@lru_cache(maxsize=1)
def document() -> dict[str, Any]:
    """The description, as JSON has it."""
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
                "get": _operation("whoami", "What the key in use is and may do.", schemas.Identity)
            },
            f"{_BASE}/keys": {
                "get": _operation(
                    "listKeys",
                    "Keys, the newest first.",
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
                    "Take in a key that was handed out before.",
                    schemas.Key,
                    "201",
                    body=schemas.ExistingKey,
                    errors=("409",),
                ),
            },
            f"{_BASE}/keys/export": {
                "get": _operation(
                    "exportKeys",
                    "Every key without its secret, one JSON object a line.",
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
                    "End a key for good.",
                    schemas.Key,
                    errors=("404", "409"),
                    parameters=[
                        _parameter(
                            "wait",
                            "query",
                            {"type": "boolean"},
                            "Answer once it is refused by every server process.",
                        ),
                        _parameter(
                            "force",
                            "query",
                            {"type": "boolean"},
                            "Even the last key that may manage keys.",
                        ),
                    ],
                ),
            },
            f"{key}/rotate": {
                "parameters": [key_id],
                "post": _operation(
                    "rotateKey",
                    "Replace a key; the old one goes on for a while. A key may replace itself.",
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
                            "Which key signed.",
                        ),
                        _parameter(
                            "Github-Public-Key-Signature",
                            "header",
                            {"type": "string"},
                            "ECDSA over the body, DER in base64.",
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
        # A path that is none at all is answered by MLflow, in its own words.
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
        _parameter("owner", "query", text, "Exactly this owner."),
        _parameter(
            "environment", "query", {"type": "string", "enum": list(ENVIRONMENTS)}, "Of this one."
        ),
        _parameter("state", "query", {"type": "string", "enum": list(STATES)}, "In this state."),
        _parameter("query", "query", text, "A part of the owner, the name or the id."),
        _parameter(
            "max_results",
            "query",
            {"type": "integer", "minimum": 1, "maximum": MAX_RESULTS, "default": 100},
            "Keys on a page.",
        ),
        _parameter("page_token", "query", text, "next_page_token of the page before."),
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

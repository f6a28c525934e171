"""The page of the REST API, made from the OpenAPI description; and helpers for the other pages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mlflow_hokusai_auth.core.scopes import KNOWN
from mlflow_hokusai_auth.server.web import openapi

_JSON = "-H 'Content-Type: application/json'"
#: An example of each operation, in the order of the page. Tests run them in that order.
_EXAMPLES = {
    "whoami": 'curl -fsS "$SERVER/api/2.0/hokusai/whoami" -H "X-API-Key: $KEY"',
    "createKey": f"""curl -fsS "$SERVER/api/2.0/hokusai/keys" -H "X-API-Key: $KEY" {_JSON} \\
  -d '{{"owner": "ACME", "scopes": ["model:write"], "expires_in": 7776000}}' > made.json
KEY_ID=$(sed -n 's/.*"key_id": *"\\([^"]*\\)".*/\\1/p' made.json)""",
    "listKeys": """curl -fsS --get "$SERVER/api/2.0/hokusai/keys" -H "X-API-Key: $KEY" \\
  -d owner=ACME -d state=active -d max_results=10""",
    "getKey": 'curl -fsS "$SERVER/api/2.0/hokusai/keys/$KEY_ID" -H "X-API-Key: $KEY"',
    "findKeys": f"""sed -n 's/.*"\\(key": *"hk_[^"]*"\\).*/{{"\\1}}/p' made.json |
  curl -fsS "$SERVER/api/2.0/hokusai/keys/find" -H "X-API-Key: $KEY" {_JSON} -d @-""",
    "editKey": f"""curl -fsS -X PATCH "$SERVER/api/2.0/hokusai/keys/$KEY_ID" \\
  -H "X-API-Key: $KEY" {_JSON} \\
  -d '{{"rate_limit_per_hour": 1000, "networks": ["192.0.2.0/24"]}}'""",
    "rotateKey": f"""curl -fsS "$SERVER/api/2.0/hokusai/keys/$KEY_ID/rotate" \\
  -H "X-API-Key: $KEY" {_JSON} \\
  -d '{{"overlap": 604800}}' > rotated.json""",
    "revokeKey": """curl -fsS -X DELETE "$SERVER/api/2.0/hokusai/keys/$KEY_ID?wait=true" \\
  -H "X-API-Key: $KEY\"""",
    "revokeKeys": f"""curl -fsS "$SERVER/api/2.0/hokusai/keys/revoke" -H "X-API-Key: $KEY" {_JSON} \\
  -d '{{"owner": "ACME"}}'  # with "apply": true it revokes them""",
    "importKey": f"""OLD_KEY=hk_live_$(head -c 20 /dev/urandom | od -An -v -tx1 | tr -d ' \\n')
curl -fsS "$SERVER/api/2.0/hokusai/keys/import" -H "X-API-Key: $KEY" {_JSON} \\
  -d '{{"key": "'$OLD_KEY'", "owner": "ACME", "scopes": ["model:read"]}}'""",
    "exportKeys": 'curl -fsS "$SERVER/api/2.0/hokusai/keys/export" -H "X-API-Key: $KEY" > keys.ndjson',
    "reportLeaks": f"""curl -sS "$SERVER/api/2.0/hokusai/keys/leaked" {_JSON} \\
  -d '[]'  # refused: it has no signature""",
    "addGrant": f"""curl -fsS "$SERVER/api/2.0/hokusai/grants" -H "X-API-Key: $KEY" {_JSON} \\
  -d '{{"grantee": "GLOBEX", "pattern": "lead-*", "level": "contribute"}}' > grant.json
GRANT_ID=$(sed -n 's/.*"id": *"\\(grant_[^"]*\\)".*/\\1/p' grant.json)""",
    "listGrants": 'curl -fsS "$SERVER/api/2.0/hokusai/grants" -H "X-API-Key: $KEY"',
    "removeGrant": """curl -fsS -X DELETE "$SERVER/api/2.0/hokusai/grants/$GRANT_ID" \\
  -H "X-API-Key: $KEY\"""",
    "addPrefix": f"""curl -fsS "$SERVER/api/2.0/hokusai/prefixes" -H "X-API-Key: $KEY" {_JSON} \\
  -d '{{"prefix": "acme-", "owner": "ACME"}}'""",
    "listPrefixes": 'curl -fsS "$SERVER/api/2.0/hokusai/prefixes" -H "X-API-Key: $KEY"',
    "removePrefix": """curl -fsS -X DELETE "$SERVER/api/2.0/hokusai/prefixes?prefix=acme-" \\
  -H "X-API-Key: $KEY\"""",
    "assignOwner": f"""curl -fsS "$SERVER/api/2.0/hokusai/owners/assign" -H "X-API-Key: $KEY" {_JSON} \\
  -d '{{"owner": "ACME", "models": "acme-*"}}'""",
    "listOwners": """curl -fsS --get "$SERVER/api/2.0/hokusai/owners" -H "X-API-Key: $KEY" \\
  -d kind=experiment -d unowned=true""",
    "ownersOf": """curl -fsS --get "$SERVER/api/2.0/hokusai/owners/of" -H "X-API-Key: $KEY" \\
  -d name=Default""",
    "releaseName": f"""curl -sS "$SERVER/api/2.0/hokusai/owners/release" -H "X-API-Key: $KEY" {_JSON} \\
  -d '{{"name": "acme-old"}}'  # refused unless somebody owns this name""",
    "getIsolation": 'curl -fsS "$SERVER/api/2.0/hokusai/isolation" -H "X-API-Key: $KEY"',
    "setIsolation": f"""curl -fsS "$SERVER/api/2.0/hokusai/isolation" -H "X-API-Key: $KEY" {_JSON} \\
  -d '{{"isolation": "writes"}}'""",
    "getStatus": 'curl -fsS "$SERVER/api/2.0/hokusai/status" -H "X-API-Key: $KEY"',
    "createLink": f"""curl -fsS "$SERVER/api/2.0/hokusai/links" -H "X-API-Key: $KEY" {_JSON} \\
  -d '{{"key": {{"owner": "ACME", "scopes": ["model:write"]}}, "expires_in": 86400}}' > link.json
LINK_ID=$(sed -n 's/.*"link_id": *"\\([^"]*\\)".*/\\1/p' link.json)""",
    "listLinks": 'curl -fsS "$SERVER/api/2.0/hokusai/links" -H "X-API-Key: $KEY"',
    "revokeLink": """curl -fsS -X DELETE "$SERVER/api/2.0/hokusai/links/$LINK_ID" \\
  -H "X-API-Key: $KEY\"""",
    "addTrust": f"""curl -fsS "$SERVER/api/2.0/hokusai/trust" -H "X-API-Key: $KEY" {_JSON} \\
  -d '{{"owner": "ACME", "github": "acme/models", "workflow": "release.yml",
       "scopes": ["model:write"], "models": ["acme-*"]}}' > trust.json
TRUST_ID=$(sed -n 's/.*"trust_id": *"\\([^"]*\\)".*/\\1/p' trust.json)""",
    "listTrusts": 'curl -fsS "$SERVER/api/2.0/hokusai/trust" -H "X-API-Key: $KEY"',
    "editTrust": f"""curl -fsS -X PATCH "$SERVER/api/2.0/hokusai/trust/$TRUST_ID" \\
  -H "X-API-Key: $KEY" {_JSON} \\
  -d '{{"ttl": 600}}'""",
    "removeTrust": """curl -fsS -X DELETE "$SERVER/api/2.0/hokusai/trust/$TRUST_ID" \\
  -H "X-API-Key: $KEY\"""",
    "exchangeToken": """curl -sS --retry 3 "$SERVER/api/2.0/hokusai/token" \\
  --data-urlencode grant_type=urn:ietf:params:oauth:grant-type:token-exchange \\
  --data-urlencode subject_token_type=urn:ietf:params:oauth:token-type:id_token \\
  --data-urlencode subject_token=TOKEN_OF_YOUR_CI  # refused: it is no token""",
    "listAudit": """curl -fsS --get "$SERVER/api/2.0/hokusai/audit" -H "X-API-Key: $KEY" \\
  -d event=key. -d max_results=10""",
    "checkOwners": 'curl -fsS "$SERVER/api/2.0/hokusai/owners/check" -H "X-API-Key: $KEY"',
}

_INTRODUCTION = """# REST API

Send the key as `X-API-Key` or `Authorization: Bearer`. All operations need a key with
`mlflow:admin`, except `whoami`, the rotation of a key by itself, `grants`, `listOwners` and `ownersOf`;
`exchangeToken` needs none.
Every path answers under the prefixes, too. Times are seconds since the epoch, durations are seconds.
`GET /api/2.0/hokusai/openapi.json` gives any key the same as OpenAPI 3.1.

Other routes are `POST /api/v1/keys/validate`
([authorities](../operator/authorities.md#serve-other-servers)), and health and metrics
([monitoring](../operator/monitoring.md)).

The commands run in this order. `-f` makes curl fail when the server refuses.

```bash
SERVER=https://registry.example.com
KEY=hk_live_YOUR_KEY
curl -fsS "$SERVER/api/2.0/hokusai/openapi.json" -H "X-API-Key: $KEY" > openapi.json
```
"""


def rest() -> Iterator[str]:
    """Yield the page: every operation, the errors, every schema."""
    document = openapi.document()
    found: dict[str, tuple[str, str, dict[str, Any]]] = {}
    for path, item in document["paths"].items():
        shared = item.get("parameters", [])
        for method in item.keys() - {"parameters"}:
            parameters = [*shared, *item[method].get("parameters", [])]
            operation = {**item[method], "parameters": parameters}
            found[operation["operationId"]] = (method.upper(), path, operation)
    missing = found.keys() ^ _EXAMPLES.keys()
    if missing:
        raise SystemExit(f"docs/generate_rest.py: give examples for {', '.join(sorted(missing))}")
    yield _INTRODUCTION
    for name, example in _EXAMPLES.items():
        yield from _operation(*found[name], example)
    errors = {
        status: answer["description"]
        for _, _, operation in found.values()
        for status, answer in operation["responses"].items()
        if status >= "400"
    }
    yield """
## Errors

The body is an [Error](#error), in MLflow's own form. The gate's refusals also have `detail`, and
`error` with a code: [errors](../supplier/errors.md).

"""
    yield table(("status", "meaning"), sorted(errors.items()))
    schemas = document["components"]["schemas"]
    for name in sorted(schemas):
        yield from _schema(name, schemas)


def _operation(method: str, path: str, operation: Mapping[str, Any], example: str) -> Iterator[str]:
    yield f"\n## {operation['operationId']}\n\n`{method} {path}`: {operation['summary']}\n\n"
    yield f"```bash\n{example}\n```\n\n"
    if operation["parameters"]:
        rows = [
            (f"`{one['name']}`", one["in"], kind_of(one["schema"]), one["description"])
            for one in operation["parameters"]
        ]
        yield table(("parameter", "in", "value", "meaning"), rows) + "\n"
    if body := operation.get("requestBody"):
        optional = "" if body.get("required", True) else " (may be left out)"
        yield f"Body: {kind_of(body['content']['application/json']['schema'])}{optional}.\n\n"
    answers = operation["responses"]
    status = min(answers)
    ((media, content),) = answers[status]["content"].items()
    shape = kind_of(content["schema"]) if content["schema"] else "JSON"
    shape = shape if media == "application/json" else f"`{media}`, a [Key](#key) a line"
    failures = ", ".join(code for code in sorted(answers) if code != status)
    yield f"Answer: {status}, {shape}. [Errors](#errors): {failures}.\n"


def _schema(name: str, schemas: Mapping[str, Any]) -> Iterator[str]:
    schema = schemas[name]
    properties, required = schema["properties"], schema.get("required", ())
    yield f"\n## {name}\n\n{' '.join(schema['description'].split())}"
    # Fields that it shares with another schema are shown there.
    within = [
        other
        for other in schemas
        if other != name and schemas[other]["properties"].items() < properties.items()
    ]
    base = max(within, key=lambda other: len(schemas[other]["properties"]), default=None)
    if base:
        yield f" All of [{base}](#{base.lower()}), and:"
    yield "\n\n"
    rows = []
    for field, value in properties.items():
        if base and field in schemas[base]["properties"]:
            continue
        default = f"; `{value['default']!r}` if left out" if value.get("default") else ""
        kind = kind_of(value) + default
        needed = "always" if field in required else ""
        rows.append((f"`{field}`", needed, kind.replace("'", '"'), value.get("description", "")))
    yield table(("field", "given", "value", "meaning"), rows)


def kind_of(schema: Mapping[str, Any]) -> str:
    """Return a description of the values that a JSON schema allows."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(sorted(kind_of(one) for one in schema["anyOf"]))
    if schema.get("type") == "array":
        return f"list of {kind_of(schema['items'])}" + _bounds(schema, "Items", " items")
    if "enum" in schema:
        if set(schema["enum"]) == KNOWN:
            return "[scopes](../operator/scopes.md)"
        return ", ".join(f"`{value}`" for value in schema["enum"] if value)
    names = {"null": "`null`", "boolean": "`true`, `false`"}
    kind = names.get(schema["type"], schema["type"])
    text = f" `{schema['pattern']}`" if "pattern" in schema else ""
    return kind + text + _bounds(schema, "Length", " characters") + _bounds(schema, "imum", "")


def _bounds(schema: Mapping[str, Any], what: str, unit: str) -> str:
    least, above, most = (schema.get(f"{end}{what}") for end in ("min", "exclusiveMin", "max"))
    if least is not None and most is not None:
        return f", {least} to {most}{unit}"
    words = (("at least", least), ("more than", above), ("at most", most))
    return "".join(f", {word} {number}{unit}" for word, number in words if number is not None)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)

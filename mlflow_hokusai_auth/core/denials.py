"""Refusals as clients see them: the table of codes, and the bytes of a response.

The body is MLflow's own error JSON (`error_code`, `message`), so that MLflow's client raises a
RestException with the message. Clients of the old proxy read its `detail` and `error`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache

from .times import wait
from .types import Deny

REALM = "Hokusai MLflow"
#: Seconds of a Retry-After by default. MLflow's client retries 503 for up to four minutes.
RETRY_AFTER = 1
#: Seconds: a longer Retry-After of an authority is cut to this.
MAX_RETRY_AFTER = 60

_BAD_KEY = "Invalid or expired API key"


@dataclass(frozen=True, slots=True)
class Code:
    """The HTTP status, MLflow's error code and the short text of a denial code."""

    status: int
    error_code: str
    detail: str


CODES = {
    "KEY_MISSING": Code(401, "UNAUTHENTICATED", "API key required"),
    "KEY_MALFORMED": Code(401, "UNAUTHENTICATED", _BAD_KEY),
    "KEY_UNKNOWN": Code(401, "UNAUTHENTICATED", _BAD_KEY),
    "KEY_EXPIRED": Code(401, "UNAUTHENTICATED", _BAD_KEY),
    "KEY_REVOKED": Code(401, "UNAUTHENTICATED", _BAD_KEY),
    "SESSION_ENDED": Code(401, "UNAUTHENTICATED", "Session ended"),
    "KEY_CONFLICT": Code(400, "BAD_REQUEST", "More than one API key"),
    "SCOPE_MISSING": Code(403, "PERMISSION_DENIED", "Scope missing"),
    "ADDRESS_REFUSED": Code(403, "PERMISSION_DENIED", "Address not allowed"),
    "CROSS_SITE": Code(403, "PERMISSION_DENIED", "Cross-site request refused"),
    "LOCATION_REFUSED": Code(403, "PERMISSION_DENIED", "Artifact location not allowed"),
    "SOURCE_REFUSED": Code(403, "PERMISSION_DENIED", "Model source not allowed"),
    "NOT_OWNER": Code(403, "PERMISSION_DENIED", "Another owner's"),
    "NAME_TAKEN": Code(403, "PERMISSION_DENIED", "Name taken"),
    "NAME_RESERVED": Code(403, "PERMISSION_DENIED", "Name reserved"),
    "NAME_REFUSED": Code(403, "PERMISSION_DENIED", "Name not allowed for this key"),
    "DELETE_REFUSED": Code(403, "PERMISSION_DENIED", "Deleting not allowed for this key"),
    "EXPERIMENT_REFUSED": Code(403, "PERMISSION_DENIED", "Experiment not allowed"),
    "ALIAS_PROTECTED": Code(403, "PERMISSION_DENIED", "Alias protected"),
    "ARTIFACT_FROZEN": Code(403, "PERMISSION_DENIED", "Artifacts are registered"),
    "ISOLATED": Code(403, "PERMISSION_DENIED", "Not open to this key"),
    "TAG_RESERVED": Code(403, "PERMISSION_DENIED", "Tag not allowed"),
    "INTERCEPTED": Code(403, "PERMISSION_DENIED", "Refused by a rule of this server"),
    "INTERCEPTOR_FAILED": Code(503, "TEMPORARILY_UNAVAILABLE", "A rule of this server failed"),
    "HEADER_MALFORMED": Code(400, "BAD_REQUEST", "Header malformed"),
    "HEADERS_TOO_LARGE": Code(431, "BAD_REQUEST", "Headers too large"),
    "BODY_TIMEOUT": Code(408, "BAD_REQUEST", "Body incomplete"),
    "NOT_CONFIGURED": Code(404, "RESOURCE_DOES_NOT_EXIST", "Not configured on this server"),
    "BODY_TOO_LARGE": Code(413, "INVALID_PARAMETER_VALUE", "Body too large"),
    "EXCHANGE_MALFORMED": Code(400, "BAD_REQUEST", "Exchange malformed"),
    "GRANT_UNSUPPORTED": Code(400, "BAD_REQUEST", "Grant type not supported"),
    "TOKEN_INVALID": Code(400, "BAD_REQUEST", "Identity token not usable"),
    "TOKEN_UNTRUSTED": Code(400, "BAD_REQUEST", "Workload not trusted"),
    "TOKEN_AUDIENCE": Code(400, "BAD_REQUEST", "Identity token for another audience"),
    "TOKEN_EXPIRED": Code(400, "BAD_REQUEST", "Identity token expired"),
    "TOKEN_NOT_YET_VALID": Code(400, "BAD_REQUEST", "Identity token not valid yet"),
    "TOKEN_KEY_UNKNOWN": Code(400, "BAD_REQUEST", "Identity token with an unknown key"),
    "TOKEN_USED": Code(400, "BAD_REQUEST", "Identity token used already"),
    "PULL_REQUEST_REFUSED": Code(400, "BAD_REQUEST", "Pull requests get no key"),
    "REPOSITORY_CHANGED": Code(400, "BAD_REQUEST", "Another repository of this name"),
    "ISSUER_UNAVAILABLE": Code(503, "TEMPORARILY_UNAVAILABLE", "Issuer unavailable"),
    "AUTHORITY_UNAVAILABLE": Code(
        503, "TEMPORARILY_UNAVAILABLE", "Authentication service unavailable"
    ),
    "RATE_LIMITED": Code(429, "REQUEST_LIMIT_EXCEEDED", "Rate limit exceeded"),
    "MISCONFIGURED": Code(503, "TEMPORARILY_UNAVAILABLE", "Server misconfigured"),
}

#: Codes with 401 or 403 about which there is nobody to ask: the user or an interceptor knows best.
NOBODY_HELPS = frozenset({"SESSION_ENDED", "CROSS_SITE", "INTERCEPTED"})


@dataclass(frozen=True, slots=True)
class Response:
    """A response of the gate's own, ready to be sent."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


def full_message(code: str, message: str, contact: str = "") -> str:
    """Return the message of a refusal with its status and code, as clients show it.

    `contact` is whom to ask; it is left out where the server's people can't help.
    """
    known = CODES[code]
    helps = contact and known.status in (401, 403) and code not in NOBODY_HELPS
    return f"{known.detail} ({known.status} {code}). {message}" + (
        f" Contact: {contact}" if helps else ""
    )


def advice(deny: Deny) -> str:
    """Return the message of `deny`, and the time to wait, which no message holds itself."""
    if deny.retry_after is None:
        return deny.message
    return f"{deny.message} Try again in {wait(deny.retry_after)}."


def retry_after(seconds: float | None = None) -> str:
    """Return the value of Retry-After of a 429 or 503 (RFC 9110). None: the refusal knows no time."""
    return str(min(max(math.ceil(RETRY_AFTER if seconds is None else seconds), 1), MAX_RETRY_AFTER))


@lru_cache(maxsize=256)
def render(deny: Deny, contact: str = "") -> Response:
    """Return the response for `deny`. The format of the challenge is RFC 6750's.

    `contact` is whom to ask about keys, or "".
    """
    code = CODES[deny.code]
    content: dict[str, object] = {
        "error_code": code.error_code,
        "message": full_message(deny.code, advice(deny), contact),
        "detail": code.detail,
        "error": deny.code,
    }
    if deny.required_scope is not None:
        content["required_scope"] = deny.required_scope
    if deny.current_scopes is not None:
        content["current_scopes"] = list(deny.current_scopes)
    body = json.dumps(content).encode()
    headers = [
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
        ("X-Content-Type-Options", "nosniff"),
        ("Cache-Control", "no-store"),
    ]
    if code.status == 401:
        # No challenge for Basic, though it is accepted: browsers would open a password dialog.
        problem = "" if deny.code == "KEY_MISSING" else ', error="invalid_token"'
        headers.append(("WWW-Authenticate", f'Bearer realm="{REALM}"{problem}'))
    elif deny.code == "SCOPE_MISSING":
        scope = f', scope="{deny.required_scope}"' if deny.required_scope else ""
        headers.append(
            ("WWW-Authenticate", f'Bearer realm="{REALM}", error="insufficient_scope"{scope}')
        )
    elif code.status in (429, 503):
        headers.append(("Retry-After", retry_after(deny.retry_after)))
    return Response(code.status, (*headers, *deny.headers), body)


def redirect(location: str) -> Response:
    """Return a 303 that sends a browser to `location` (relative) instead of a refusal."""
    headers = (("Location", location), ("Content-Length", "0"), ("Cache-Control", "no-store"))
    return Response(303, headers, b"")

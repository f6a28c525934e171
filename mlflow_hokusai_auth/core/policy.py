"""The only two decisions: what a request needs, and whether a key has it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from email.utils import formatdate

from . import (
    browser,
    credentials,
    job_rules,
    keys,
    scopes,
)
from .addresses import inside
from .artifact_paths import explained, listed
from .folders import BY_NUMBER, Folders
from .operations import classify
from .types import Access, Allow, Deny, NeedKey, Operation, Principal, Rejected, Request

_SCOPE_FOR = {
    Access.READ: "mlflow:read",
    Access.WRITE: "mlflow:write",
    Access.ADMIN: "mlflow:admin",
}
#: Another server's question about a key, which the view answers for the address in the body.
_VALIDATE = "POST /api/v1/keys/validate"
#: For whoever looks at a page that is open still after its session has ended.
SIGNED_OUT = "You are signed out. Reload this page to sign in."
#: Rules of MLflow's static files, of which those that the policy lists are public.
_STATIC_FILES = frozenset({"GET /static-files/{path:path}", "OPTIONS /static-files/{path:path}"})
_PREFLIGHT = Operation(Access.PUBLIC, "server", "OPTIONS preflight")


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings that decisions depend on."""

    #: Whether a key in `?api_key=` counts.
    query_key: bool = True
    #: "scopes", "authenticated" (every good key may read and write) or "admin" (only
    #: administrators may do anything, as upstream since 2026-06).
    kind: str = "scopes"
    #: What a key without any scope may do.
    empty_scopes: Access = Access.READ
    #: Who is an administrator besides the holders of an admin scope. All empty by default: a
    #: default address was a way in once, and a role named admin says nothing of the registry.
    admin_emails: frozenset[str] = frozenset()
    admin_scopes: frozenset[str] = frozenset()
    admin_roles: frozenset[str] = frozenset()
    #: Whether the assistant, which runs programs on the server's host, answers at all.
    assistant: bool = False
    #: Paths of MLflow's own static files, which need no key: a page that is open loads parts of itself
    #: after its session has ended.
    static_files: frozenset[str] = frozenset()


def operation_of(method: str, path: str, policy: Policy, folders: Folders = BY_NUMBER) -> Operation:
    """The operation of `method` on `path`. MLflow's own static files are public.

    `folders` are those of experiments, as far as they are known.
    """
    operation = classify(method, path, folders)
    if operation.rule in _STATIC_FILES and path in policy.static_files:
        return replace(operation, access=Access.PUBLIC)
    return operation


def plan(request: Request, policy: Policy, folders: Folders = BY_NUMBER) -> Allow | Deny | NeedKey:
    """What must be known before `request` may reach MLflow.

    `folders` are those of experiments, as far as they are known.
    """
    operation = operation_of(request.method, request.path, policy, folders)
    if operation.access is Access.PUBLIC:
        return Allow(operation)
    # Exactly so: `options` would pass MLflow's CORS check by and be answered by Flask.
    if request.method == "OPTIONS" and _is_preflight(request):
        return Allow(_PREFLIGHT)
    found = credentials.find(request, outbound=operation.outbound, query_key=policy.query_key)
    if isinstance(found, Deny):
        return replace(found, operation=operation)
    if found is None:
        if browser.of_our_page(request):
            return Deny("KEY_MISSING", SIGNED_OUT, operation=operation)
        return Deny(
            "KEY_MISSING",
            "Set HOKUSAI_API_KEY where the MLflow client runs, with mlflow-hokusai-auth installed "
            "there (if it is set, a warning in the client's output says why it was not sent); or "
            "send the key as X-API-Key, as Authorization: Bearer (MLFLOW_TRACKING_TOKEN) or as the "
            f"password of Basic.{_hint(operation.rule)}",
            operation=operation,
        )
    if found.session and browser.forged(request, operation, found.key):
        return Deny(
            "CROSS_SITE",
            "The browser sent this, with the cookie of its session, for a page of another site. "
            "Open MLflow itself and do it there; programs should send a key instead of the cookie.",
            operation=operation,
        )
    if problem := keys.problem(found.key):
        return Deny(
            "KEY_MALFORMED",
            f"The key in {found.places[0]} can't be right: {problem}. Copy it again, whole.",
            operation=operation,
        )
    if operation.kind == "artifacts":
        operation = listed(operation, request.query, has_body(request), folders)
    return NeedKey(found, operation, request.address, request if operation.unsure else None)


def _hint(rule: str) -> str:
    """What to add for a route that is mostly asked by other programs than MLflow's client."""
    path = rule.partition(" ")[2]
    if path.startswith("/v1/"):
        return (
            " OpenTelemetry's own exporters take it from "
            "OTEL_EXPORTER_OTLP_HEADERS=x-api-key=YOUR_KEY."
        )
    if path.startswith("/gateway/"):
        return (
            " SDKs of model makers take it as their api_key. MLflow's judges and scorers take "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where the package is not, and "
            "no token."
        )
    return ""


def settle(
    need: NeedKey, principal: Principal | Rejected, now: float, policy: Policy
) -> Allow | Deny:
    """Whether `principal`, whom the key of `need` belongs to, may do what was asked.

    `now` is seconds since the epoch.
    """
    operation = need.operation
    if need.credential.session and _has_ended(principal, now):
        return Deny("SESSION_ENDED", SIGNED_OUT, operation=operation)
    if isinstance(principal, Rejected):
        return Deny(
            "KEY_UNKNOWN",
            f"The key in {need.credential.places[0]} is not known here"
            f"{_in_its_words(principal.reason)}. Check that it was copied whole and that it is the "
            "key for this server, or ask the server's operator for a new one.",
            operation=operation,
        )
    # Whenever that was: the clock may have been set back, or another host's be ahead.
    if principal.revoked_at is not None:
        return Deny(
            "KEY_REVOKED",
            f"Key {principal.key_id} was revoked. Ask the server's operator for a new one.",
            operation=operation,
        )
    if principal.expires_at is not None and principal.expires_at <= now:
        return Deny(
            "KEY_EXPIRED",
            f"Key {principal.key_id} has expired. Ask the server's operator for a new one.",
            operation=operation,
        )
    if (
        principal.networks
        and operation.rule != _VALIDATE
        and not inside(need.address, principal.networks)
    ):
        return Deny(
            "ADDRESS_REFUSED",
            f"Key {principal.key_id} may not be used from {need.address or 'where this came from'}. "
            "Ask the server's operator to add the address to the key's networks.",
            operation=operation,
        )
    if principal is job_rules.PRINCIPAL:
        if job_rules.allows(operation):
            return Allow(operation, principal, need.credential)
        return Deny(
            "SCOPE_MISSING",
            f"{operation.rule or 'A route that MLflow is not known to have'} is nothing that "
            "MLflow's server-side jobs need, so their credential does not open it.",
            current_scopes=tuple(sorted(principal.scopes)),
            operation=operation,
        )
    if operation.kind == "assistant" and not policy.assistant:
        return Deny(
            "SCOPE_MISSING",
            "MLflow's assistant is switched off here, as it runs programs on the server's host. "
            "The operator may set HOKUSAI_AUTH_ASSISTANT=true.",
            operation=operation,
        )
    may = max(access(principal, operation, policy), Access.KEY)
    if may < operation.access:
        scope = _scope_for(operation, principal, policy)
        what = _named(operation) or (
            "A route that MLflow is not known to have (is the path of MLFLOW_TRACKING_URI right?)"
        )
        return Deny(
            "SCOPE_MISSING",
            f"{what} needs the scope {scope}; key {principal.key_id} has "
            f"{', '.join(sorted(principal.scopes)) or 'none'}.{explained(operation)} Ask the server's "
            "operator for a key with that scope.",
            required_scope=scope,
            current_scopes=tuple(sorted(principal.scopes)),
            operation=operation,
        )
    return Allow(operation, principal, need.credential, _sunset(principal))


def _named(operation: Operation) -> str:
    """The rule, and for GraphQL which part of it; "" where MLflow is not known to have the route."""
    if operation.kind != "graphql":
        return operation.rule
    if operation.access is Access.READ:
        return f"A query to {operation.rule}"
    return f"A mutation to {operation.rule}, or a body that can't be read as a query,"


def _scope_for(operation: Operation, principal: Principal, policy: Policy) -> str:
    """The scope to ask for: one of the registry's for a key of that kind, where it is enough."""
    if policy.kind == "admin":
        return _SCOPE_FOR[Access.ADMIN]
    if policy.kind == "scopes":
        if operation.rule == scopes.METRICS_RULE:
            return scopes.METRICS
        if not principal.scopes.isdisjoint(scopes.REGISTRY):
            for scope in scopes.REGISTRY:
                if scopes.granted(frozenset({scope}), operation) >= operation.access:
                    return scope
    return _SCOPE_FOR[operation.access]


def access(principal: Principal, operation: Operation, policy: Policy) -> Access:
    """The most that `principal` may do on the kind of resource that `operation` is about."""
    if is_admin(principal, policy):
        return Access.ADMIN
    if policy.kind == "admin":
        return Access.PUBLIC
    if policy.kind == "authenticated":
        return Access.WRITE
    if not principal.scopes:
        return policy.empty_scopes
    return scopes.granted(principal.scopes, operation)


def abilities(principal: Principal, policy: Policy) -> list[str]:
    """What `principal` may do, in four words: "read", "register" models, "write", "admin"."""
    wanted = {
        "read": ("GET", "/api/2.0/mlflow/registered-models/search"),
        "register": ("POST", "/api/2.0/mlflow/model-versions/create"),
        "write": ("POST", "/api/2.0/mlflow/experiments/delete"),
        "admin": ("GET", "/api/2.0/hokusai/keys"),
    }
    operations = {word: classify(*route) for word, route in wanted.items()}
    return [
        word
        for word, operation in operations.items()
        if access(principal, operation, policy) >= operation.access
    ]


def has_body(request: Request) -> bool:
    """Whether a body follows the headers, by what they say (RFC 9112, 6.3)."""
    return (
        request.header(b"content-length") not in (None, b"0")
        or request.header(b"transfer-encoding") is not None
    )


def is_admin(principal: Principal, policy: Policy) -> bool:
    """Whether `principal` may do anything, the management of keys included."""
    return (
        principal.is_admin
        or not principal.scopes.isdisjoint(scopes.ADMIN | policy.admin_scopes)
        or not principal.roles.isdisjoint(policy.admin_roles)
        or principal.email.casefold() in policy.admin_emails
    )


def _has_ended(principal: Principal | Rejected, now: float) -> bool:
    if isinstance(principal, Rejected) or principal.revoked_at is not None:
        return True
    return principal.expires_at is not None and principal.expires_at <= now


def _sunset(principal: Principal) -> tuple[tuple[str, str], ...]:
    """What tells a client that its key was replaced: RFC 9745 and RFC 8594."""
    if principal.deprecated_at is None or principal.expires_at is None:
        return ()
    return (
        ("Deprecation", f"@{int(principal.deprecated_at)}"),
        ("Sunset", formatdate(principal.expires_at, usegmt=True)),
    )


def _in_its_words(reason: str) -> str:
    """What an authority said of a key, fit to be quoted: one line, of bounded length, no key."""
    words = " ".join(keys.redact(reason).split())[:200] if reason else ""
    return f" ({words})" if words else ""


def _is_preflight(request: Request) -> bool:
    """A browser's question before a cross-origin request (Fetch standard, CORS-preflight)."""
    return (
        bool(request.header(b"origin"))
        and bool(request.header(b"access-control-request-method"))
        and not has_body(request)
    )

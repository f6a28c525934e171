"""The two decisions on a request: which access it needs, and whether a principal has it.

`locations` decides on locations in MLflow's rows, which only MLflow can find in a request.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from email.utils import formatdate
from functools import lru_cache

from . import browser, credentials, job_rules, keys, scopes
from .addresses import inside
from .artifact_paths import explain_kind, refine_artifact_listing
from .folders import BY_NUMBER, Folders
from .isolation import UNKNOWN
from .operations import classify
from .types import Access, Allow, Deny, NeedKey, Operation, Principal, Rejected, Request

_SCOPE_FOR = {
    Access.READ: "mlflow:read",
    Access.WRITE: "mlflow:write",
    Access.ADMIN: "mlflow:admin",
}
#: Another server has a key checked here. The view compares the key's networks with `client_ip` of the
#: body, not with the caller's address.
_VALIDATE = "POST /api/v1/keys/validate"
#: The message for a page that is still open after its session has ended.
SIGNED_OUT = "You are signed out. Reload this page to sign in."
#: Rules of MLflow's static files. Only the files in `Policy.static_files` are public.
_STATIC_FILES = frozenset({"GET /static-files/{path:path}", "OPTIONS /static-files/{path:path}"})
#: Rules about trusts that suppliers reach, if `Policy.supplier_trust`, with the access that they need
#: then. Without it, the rules need ADMIN. As with grants, a key that only reads changes nothing.
_OF_SUPPLIERS = {
    "GET /api/2.0/hokusai/trust": Access.READ,
    "POST /api/2.0/hokusai/trust": Access.WRITE,
    "PATCH /api/2.0/hokusai/trust/{trust_id}": Access.WRITE,
    "DELETE /api/2.0/hokusai/trust/{trust_id}": Access.WRITE,
    "GET /hokusai/trusts": Access.READ,
    "POST /hokusai/trusts/add": Access.WRITE,
    "POST /hokusai/trusts/remove": Access.WRITE,
    "GET /hokusai/trusts/{trust_id}/edit": Access.WRITE,
    "POST /hokusai/trusts/{trust_id}/edit": Access.WRITE,
}
_PREFLIGHT = Operation(Access.PUBLIC, "server", "OPTIONS preflight")


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings on which decisions depend."""

    #: True if a key in `?api_key=` counts.
    query_key: bool = True
    #: "scopes", "authenticated" (every good key may read and write) or "admin" (only
    #: administrators may do anything, as in Hokusai's middleware since 2026-06).
    kind: str = "scopes"
    #: The access that a key without any scope has.
    empty_scopes: Access = Access.READ
    #: Administrators beside the holders of an admin scope. All are empty by default: a default email
    #: address was a way in once, and a role "admin" may have nothing to do with the registry.
    admin_emails: frozenset[str] = frozenset()
    admin_scopes: frozenset[str] = frozenset()
    admin_roles: frozenset[str] = frozenset()
    #: True if MLflow's assistant, which runs programs on the server's host, is switched on.
    assistant: bool = False
    #: True if suppliers manage the trusts of their own owner.
    supplier_trust: bool = False
    #: True while isolation keeps suppliers to the kinds of resource that registry scopes reach.
    isolated: bool = False
    #: The least access that is closed to suppliers, because the server does not know whose things are;
    #: None if it knows.
    closed_from: Access | None = None
    #: Paths of MLflow's own static files. They need no key, because an open page loads parts of itself
    #: after its session has ended.
    static_files: frozenset[str] = frozenset()


def operation_of(method: str, path: str, policy: Policy, folders: Folders = BY_NUMBER) -> Operation:
    """Return the operation of `method` on `path`, with the access that it needs by `policy`.

    MLflow's own static files are public, and suppliers may reach the routes of trusts. `folders` are
    the known folders of experiments.
    """
    operation = classify(method, path, folders)
    if operation.rule in _STATIC_FILES and path in policy.static_files:
        return replace(operation, access=Access.PUBLIC)
    if policy.supplier_trust and (access := _OF_SUPPLIERS.get(operation.rule)) is not None:
        return replace(operation, access=access)
    return operation


def plan(request: Request, policy: Policy, folders: Folders = BY_NUMBER) -> Allow | Deny | NeedKey:
    """Allow or refuse `request` if that needs no lookup; otherwise return the NeedKey to look up.

    `folders` are the known folders of experiments.
    """
    operation = operation_of(request.method, request.path, policy, folders)
    if operation.access is Access.PUBLIC:
        return Allow(operation)
    # The method is compared exactly: MLflow's CORS check ignores `options`, and Flask answers it.
    if request.method == "OPTIONS" and _is_preflight(request):
        return Allow(_PREFLIGHT)
    credential = credentials.find(request, outbound=operation.outbound, query_key=policy.query_key)
    if isinstance(credential, Deny):
        return replace(credential, operation=operation)
    if credential is None:
        if browser.of_our_page(request):
            return Deny("KEY_MISSING", SIGNED_OUT, operation=operation)
        return _key_missing(operation)
    if credential.session and browser.forged(request, operation, credential.key):
        return Deny(
            "CROSS_SITE",
            "A page of another site made the browser send this request, with its session's cookie. "
            "Open MLflow itself and do it there; programs should send a key instead of the cookie.",
            operation=operation,
        )
    if problem := keys.problem(credential.key):
        return Deny(
            "KEY_MALFORMED",
            f"The key in {credential.places[0]} can't be right: {problem}. Copy it again, whole.",
            operation=operation,
        )
    if operation.kind == "artifacts":
        operation = refine_artifact_listing(operation, request.query, has_body(request), folders)
    return NeedKey(credential, operation, request.address, request if operation.unsure else None)


@lru_cache(maxsize=1024)
def _key_missing(operation: Operation) -> Deny:
    """Return the refusal of a program's request without a key; made once for each operation."""
    return Deny(
        "KEY_MISSING",
        "Set HOKUSAI_API_KEY where the MLflow client runs, with mlflow-hokusai-auth installed "
        "there (if it is set, a warning in the client's output says why it was not sent); or "
        "send the key as X-API-Key, as Authorization: Bearer (MLFLOW_TRACKING_TOKEN) or as the "
        f"password of Basic.{_hint(operation.rule)}",
        operation=operation,
    )


def _hint(rule: str) -> str:
    """Return advice, after a space, for a route that other programs than MLflow's client use."""
    path = rule.partition(" ")[2]
    if path.startswith("/v1/"):
        return (
            " OpenTelemetry's own exporters take it from "
            "OTEL_EXPORTER_OTLP_HEADERS=x-api-key=YOUR_KEY."
        )
    if path.startswith("/gateway/"):
        return (
            " SDKs of model makers take it as their api_key. Without this package, MLflow's judges "
            "and scorers take MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, but no token."
        )
    return ""


def settle(
    need: NeedKey, principal: Principal | Rejected, now: float, policy: Policy
) -> Allow | Deny:
    """Allow or deny the operation of `need` for `principal`, the answer of the lookup.

    `now` is in seconds since the epoch.
    """
    operation = need.operation
    if need.credential.session and _has_ended(principal, now):
        return Deny("SESSION_ENDED", SIGNED_OUT, operation=operation)
    if isinstance(principal, Rejected):
        return Deny(
            "KEY_UNKNOWN",
            f"The key in {need.credential.places[0]} is not known here"
            f"{_quoted(principal.reason)}. Check that it was copied whole and that it is the "
            "key for this server, or ask the server's operator for a new one.",
            operation=operation,
        )
    # Ignore the time of revocation: clocks are set back, and hosts disagree.
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
            f"Key {principal.key_id} may not be used from {need.address or 'an unknown address'}. "
            "Ask the server's operator to add the address to the key's networks.",
            operation=operation,
        )
    if principal is job_rules.PRINCIPAL:
        if job_rules.allows(operation):
            return Allow(operation, principal, need.credential)
        return Deny(
            "SCOPE_MISSING",
            f"{operation.rule or 'A route that MLflow is not known to have'} is not among the "
            "routes that MLflow's server-side jobs need, so their credential does not open it.",
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
    if (
        policy.closed_from is not None
        and operation.access >= policy.closed_from
        and is_confined(principal, policy)
    ):
        return Deny("ISOLATED", UNKNOWN.message, operation=operation)
    if policy.isolated and _is_closed(principal, operation, policy):
        return _closed_to_suppliers(operation)
    enough = access(principal, operation, policy) >= operation.access
    if not enough and operation.access > Access.KEY:
        return _scope_missing(operation, principal, policy)
    return Allow(operation, principal, need.credential, _sunset(principal))


#: The advice on a path that is probably wrong.
_UNKNOWN_ROUTE = (
    "MLflow is not known to have this route: is the path of MLFLOW_TRACKING_URI right? It is "
    "/api/mlflow, /mlflow or none, unless you were given another; `hokusai-auth doctor` finds it."
)


def _closed_to_suppliers(operation: Operation) -> Deny:
    """Return the refusal of an operation that isolation closes."""
    if operation.rule in _OF_SUPPLIERS:
        message = (
            "Only the server's operator manages trusts here. Ask the operator to trust your jobs, or "
            "to let suppliers do so (HOKUSAI_AUTH_SUPPLIER_TRUST=true)."
        )
    elif not operation.rule:
        message = f"{_UNKNOWN_ROUTE} Such a route is closed to suppliers."
    elif operation.access is Access.ADMIN:
        message = (
            f"{_subject(operation)} is for this server's administrators only. Ask its operator to do "
            "there what you need."
        )
    else:
        message = (
            f"{_subject(operation)} is closed to suppliers, because this server keeps them apart. If "
            "you need it, ask its operator for a key with a scope such as "
            f"{_SCOPE_FOR[Access.WRITE]}, and without model:write."
        )
    return Deny("ISOLATED", message, operation=operation)


def _scope_missing(operation: Operation, principal: Principal, policy: Policy) -> Deny:
    """Return the refusal of an operation for which the key has no scope."""
    scope = _scope_for(operation, principal, policy)
    # A wrong path is the usual reason, and no reason to ask for an administrator's key.
    return Deny(
        "SCOPE_MISSING",
        f"{_subject(operation)} needs the scope {scope}; key {principal.key_id} has "
        f"{', '.join(sorted(principal.scopes)) or 'none'}.{explain_kind(operation)} Ask the "
        "server's operator for a key with that scope."
        if operation.rule
        else f"{_UNKNOWN_ROUTE} Such a route is for administrators only.",
        required_scope=scope,
        current_scopes=tuple(sorted(principal.scopes)),
        operation=operation,
    )


def _is_closed(principal: Principal, operation: Operation, policy: Policy) -> bool:
    """Return whether isolation closes the operation, to which the key's scopes may reach."""
    # Jobs, for example, act for whoever starts them, with a credential that is not confined.
    if operation.rule == scopes.METRICS_RULE:
        return False
    reached = max(scopes.for_suppliers(operation), Access.KEY)
    return reached < operation.access and is_confined(principal, policy)


def _subject(operation: Operation) -> str:
    """Return the rule, and for GraphQL which part of it; "" for an unknown route."""
    if operation.kind != "graphql":
        return operation.rule
    if operation.access is Access.READ:
        return f"A query to {operation.rule}"
    return f"A mutation to {operation.rule}, or a body that can't be read as a query,"


def _scope_for(operation: Operation, principal: Principal, policy: Policy) -> str:
    """Return the scope to ask for.

    A key with a registry scope is told another registry scope, if that is enough.
    """
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
    """Return the highest access that `principal` has on `operation`'s kind of resource."""
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
    """Return those of "read", "register" (models), "write" and "admin" that `principal` may do."""
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
    """Return whether the headers announce a body (RFC 9112, 6.3)."""
    return (
        request.header(b"content-length") not in (None, b"0")
        or request.header(b"transfer-encoding") is not None
    )


def is_admin(principal: Principal, policy: Policy) -> bool:
    """Return whether `principal` may do everything, including the management of keys.

    A narrowed key never may, whoever its authority or a setting says that its holder is: it could make
    itself another key.
    """
    return not principal.narrowed and (
        principal.is_admin
        or not principal.scopes.isdisjoint(scopes.ADMIN | policy.admin_scopes)
        or not principal.roles.isdisjoint(policy.admin_roles)
        or principal.email.casefold() in policy.admin_emails
    )


def is_confined(principal: Principal, policy: Policy) -> bool:
    """Return whether isolation keeps `principal` to what its owner made or may change.

    All are confined but administrators, the server's jobs, and staff by their scopes. `Policy.kind` and
    `Policy.empty_scopes` don't matter: they say what a key may do, and not with whose. A narrowed key
    is confined, because nothing would keep staff to the narrowing.
    """
    staff = (
        principal is job_rules.PRINCIPAL
        or is_admin(principal, policy)
        or scopes.are_staff(principal.scopes)
    )
    return principal.narrowed or not staff


def _has_ended(principal: Principal | Rejected, now: float) -> bool:
    if isinstance(principal, Rejected) or principal.revoked_at is not None:
        return True
    return principal.expires_at is not None and principal.expires_at <= now


def _sunset(principal: Principal) -> tuple[tuple[str, str], ...]:
    """Return the headers that warn a client that its key was replaced (RFC 9745 and RFC 8594)."""
    if principal.deprecated_at is None or principal.expires_at is None:
        return ()
    return (
        ("Deprecation", f"@{int(principal.deprecated_at)}"),
        ("Sunset", formatdate(principal.expires_at, usegmt=True)),
    )


def _quoted(reason: str) -> str:
    """Return an authority's `reason` in brackets: one line of at most 200 characters, without keys."""
    words = " ".join(keys.redact(reason).split())[:200] if reason else ""
    return f" ({words})" if words else ""


def _is_preflight(request: Request) -> bool:
    """Return whether `request` is a CORS preflight (Fetch standard, CORS-preflight fetch)."""
    return (
        bool(request.header(b"origin"))
        and bool(request.header(b"access-control-request-method"))
        and not has_body(request)
    )

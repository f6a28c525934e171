"""The only two decisions: what a request needs, and whether a key has it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from . import credentials, keys
from .operations import classify
from .types import Access, Allow, Deny, NeedKey, Operation, Principal, Request

#: What each scope grants. The first three are ours; the others are what Hokusai's keys carry today
#: (its middleware's write and admin sets, and its documentation's `read`).
GRANTS = {
    "mlflow:read": Access.READ,
    "mlflow:write": Access.WRITE,
    "mlflow:admin": Access.ADMIN,
    "read": Access.READ,
    "model:read": Access.READ,
    "write": Access.WRITE,
    "model:write": Access.WRITE,
    "mlflow:access": Access.WRITE,
    "full_access": Access.WRITE,
    "admin": Access.ADMIN,
    "registry:admin": Access.ADMIN,
    "model-registry:admin": Access.ADMIN,
}
_SCOPE_FOR = {
    Access.READ: "mlflow:read",
    Access.WRITE: "mlflow:write",
    Access.ADMIN: "mlflow:admin",
}
_PREFLIGHT = Operation(Access.PUBLIC, "server", "OPTIONS preflight")


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings that decisions depend on."""

    #: Whether a key in `?api_key=` counts.
    query_key: bool = True


def plan(request: Request, policy: Policy) -> Allow | Deny | NeedKey:
    """What must be known before `request` may reach MLflow."""
    operation = classify(request.method, request.path)
    if operation.access is Access.PUBLIC:
        return Allow(operation)
    # Exactly so: `options` would pass MLflow's CORS check by and be answered by Flask.
    if request.method == "OPTIONS" and _is_preflight(request):
        return Allow(_PREFLIGHT)
    found = credentials.find(request, outbound=operation.outbound, query_key=policy.query_key)
    if isinstance(found, Deny):
        return found
    if found is None:
        return Deny(
            "KEY_MISSING",
            "Set HOKUSAI_API_KEY where the MLflow client runs, with mlflow-hokusai-auth installed "
            "there (if it is set, a warning in the client's output says why it was not sent); or "
            "send the key as X-API-Key, as Authorization: Bearer (MLFLOW_TRACKING_TOKEN) or as the "
            "password of Basic.",
        )
    if problem := keys.problem(found.key):
        return Deny(
            "KEY_MALFORMED",
            f"The key in {found.places[0]} can't be right: {problem}. Copy it again, whole.",
        )
    return NeedKey(found, operation)


def settle(need: NeedKey, principal: Principal | None, now: float) -> Allow | Deny:
    """Whether `principal`, whom the key of `need` belongs to, may do what was asked.

    `principal` is None for a key that its authority does not know; `now` is seconds since the epoch.
    """
    if principal is None:
        return Deny(
            "KEY_UNKNOWN",
            f"The key in {need.credential.places[0]} is not known here. Check that it is the key "
            "for this server, or ask the server's operator for a new one.",
        )
    if principal.revoked_at is not None and principal.revoked_at <= now:
        return Deny(
            "KEY_REVOKED",
            f"Key {principal.key_id} was revoked. Ask the server's operator for a new one.",
        )
    if principal.expires_at is not None and principal.expires_at <= now:
        return Deny(
            "KEY_EXPIRED",
            f"Key {principal.key_id} has expired. Ask the server's operator for a new one.",
        )
    needed = need.operation.access
    if granted(principal.scopes) < needed:
        scope = _SCOPE_FOR[needed]
        what = need.operation.rule or "A route that MLflow is not known to have"
        return Deny(
            "SCOPE_MISSING",
            f"{what} needs the scope {scope}; key {principal.key_id} has "
            f"{', '.join(sorted(principal.scopes)) or 'none'}. Ask the server's operator for a key "
            "with that scope.",
            required_scope=scope,
            current_scopes=tuple(sorted(principal.scopes)),
        )
    return Allow(need.operation, principal, need.credential)


@lru_cache(maxsize=1024)
def granted(scopes: frozenset[str]) -> Access:
    """The most that `scopes` allow; PUBLIC, which is nothing, when none of them is known."""
    return max((GRANTS.get(scope, Access.PUBLIC) for scope in scopes), default=Access.PUBLIC)


def _is_preflight(request: Request) -> bool:
    """A browser's question before a cross-origin request (Fetch standard, CORS-preflight)."""
    headers = dict(request.headers)
    return (
        bool(headers.get(b"origin"))
        and bool(headers.get(b"access-control-request-method"))
        and headers.get(b"content-length", b"0") == b"0"
        and b"transfer-encoding" not in headers
    )

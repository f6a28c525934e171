"""The trusts that a supplier may add and change: nothing that they give is beyond the supplier's key.

`policy.operation_of` opens the routes, if the operator allows it. `store.trusts` shows a supplier the
trusts of its own owner only.
"""

from __future__ import annotations

from .ownership import within
from .policy import Policy, is_admin, is_confined
from .scopes import GENERAL, REGISTRY
from .trust import Trust
from .types import Access, Principal


def problem(trust: Trust, caller: Principal, policy: Policy) -> str | None:
    """Return why the key `caller` may not give `trust`, or None if it may.

    The key is no administrator's, and has the trust's owner.
    """
    if caller.networks or caller.rate_limit_per_hour is not None:
        return (
            "This key is limited to networks or to requests per hour, and keys of a trust would not "
            "be. Ask the server's operator to add the trust."
        )
    if beyond := sorted(scope for scope in trust.scopes if not covers(caller.scopes, scope)):
        return (
            f"This key does not have the scopes {', '.join(beyond)}, so it can't pass them on. Leave "
            "them out, or ask the server's operator to add the trust."
        )
    if too_wide := names_problem(trust, caller):
        return too_wide
    if caller.no_delete and not trust.no_delete:
        return "This key may not delete anything, so its trusts need no_delete."
    # A general scope alone makes a key of the server's staff, and beside a registry scope it does not.
    given = Principal(
        "",
        trust.owner,
        frozenset(trust.scopes),
        owner_id=trust.owner,
        models=trust.models,
        no_delete=trust.no_delete,
    )
    if is_admin(given, policy) or (is_confined(caller, policy) and not is_confined(given, policy)):
        return (
            f"With {', '.join(trust.scopes)} alone, the keys would be those of the server's staff. "
            "Give model:read or model:write as well."
        )
    return None


def names_problem(trust: Trust, caller: Principal) -> str | None:
    """Return why the key `caller` may not give, change or remove `trust` for its models, or None.

    An edit and a removal end the keys of the trust's jobs, which may register other models.
    """
    if not caller.models or (
        trust.models and all(within(pattern, caller.models) for pattern in trust.models)
    ):
        return None
    names = " or ".join(sorted(caller.models))
    return f"This key may change only models named {names}, so its trusts need models within these."


def covers(scopes: frozenset[str], scope: str) -> bool:
    """Return whether a key with `scopes` may pass on `scope`, because they allow all that it does."""
    general = max((GENERAL.get(one, Access.PUBLIC) for one in scopes), default=Access.PUBLIC)
    registry = max((REGISTRY.get(one, Access.PUBLIC) for one in scopes), default=Access.PUBLIC)
    return (
        scope in scopes
        or GENERAL.get(scope, Access.ADMIN) <= general
        or REGISTRY.get(scope, Access.ADMIN) <= max(general, registry)
    )

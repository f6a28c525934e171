"""Limits of the bodies that the gate reads before it decides."""

from __future__ import annotations

from mlflow_hokusai_auth.core.types import Access, Deny, Operation

#: Seconds in which a body that is read before the verdict must arrive.
BODY_SECONDS = 10.0
#: Rule -> bytes of a body that a request without a key may have: a form with a key or a link's code in
#: it, what GitHub reports, and an identity token (16 kB at most) with the fields of its exchange. By
#: any other rule such a request may have no body.
BODY_LIMITS = {
    "POST /hokusai/login": 4096,
    "POST /hokusai/logout": 4096,
    "POST /hokusai/link": 4096,
    "POST /api/2.0/hokusai/keys/leaked": 2**20,
    "POST /api/2.0/hokusai/token": 20_480,
}


def body_limit(operation: Operation) -> int | None:
    """Return the limit, in bytes, of the body of a public `operation`; None if it needs a key."""
    if operation.access is not Access.PUBLIC:
        return None
    return BODY_LIMITS.get(operation.rule, 0)


def too_large(operation: Operation) -> Deny:
    """Return the 413 for a body that is larger than `body_limit`."""
    limit = body_limit(operation)
    message = f"The limit is {limit} bytes here." if limit else "This route takes no body."
    return Deny("BODY_TOO_LARGE", message, operation=operation)


def incomplete(operation: Operation, seconds: float) -> Deny:
    """Return the 408 for a body that ended early or took longer than `seconds`."""
    message = f"The body must arrive whole, within {seconds:g} seconds."
    return Deny("BODY_TIMEOUT", message, operation=operation)

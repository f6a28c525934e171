"""The headers of a request that reach MLflow.

Headers reach MLflow as they were sent: a proxy that removed some broke the registration of models.
There are three exceptions. Only the gate sets identity headers, so a client's are removed in any
spelling. If MLflow passes a request's headers to a provider, or may do so because its route is
unknown, the headers with our key are removed. And a public request keeps a short list of headers, so
that callers without a key have no influence on MLflow (X-MLFLOW-WORKSPACE made /health answer 500).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote

from .types import Access, Allow

#: Headers without which HTTP can't read the message.
_NEEDED = frozenset(
    {"host", "content-length", "content-type", "content-encoding", "transfer-encoding"}
)
#: Headers that a public request keeps: those of the message; the origin, for CORS, a preflight and the
#: sign-in; the session to end; the accepted forms of the answer; GitHub's signature of a report.
_PUBLIC = frozenset(
    name.encode()
    for name in (
        *_NEEDED,
        *("origin", "sec-fetch-site", "cookie"),
        *("access-control-request-method", "access-control-request-headers"),
        "access-control-request-private-network",
        *("accept", "accept-encoding", "accept-language", "if-none-match", "if-modified-since"),
        *("github-public-key-identifier", "github-public-key-signature"),
    )
)
_PATTERN = re.compile(r"[a-z0-9!#$%&'+.^_`|~-]*\*?", re.ASCII)
_IDENTITY = b"x-hokusai-"


@dataclass(frozen=True, slots=True)
class HeaderPolicy:
    """The operator's settings about headers: lower-case names; a `*` at the end matches any ending.

    Headers in `remove` don't reach MLflow. Of the others, those in `forward` reach it, and so do always
    those that HTTP itself needs.
    """

    forward: tuple[str, ...] = ("*",)
    remove: tuple[str, ...] = ()

    def problem(self) -> str | None:
        """Return what is wrong with the settings, for the operator, or None."""
        for pattern in (*self.forward, *self.remove):
            if not _PATTERN.fullmatch(pattern):
                return f"{pattern!r} is not a header name such as x-tenant or x-forwarded-*"
        if removed := sorted(name for name in _NEEDED if _matches(name, self.remove)):
            return f"{', '.join(removed)} can't be removed: HTTP needs it"
        if any(pattern.replace("_", "-").startswith("x-hokusai-") for pattern in self.forward):
            return "x-hokusai-* can't be forwarded: only the gate may name a user to MLflow"
        return None


def dropped(
    names: Collection[bytes], allow: Allow, policy: HeaderPolicy | None = None
) -> frozenset[bytes]:
    """Return those of the header `names` (lower case) that must not reach MLflow."""
    own = _of_this_server(allow)
    public = allow.principal is None and allow.operation.access is Access.PUBLIC
    if public and policy is None:
        return frozenset(names) - _PUBLIC
    # For bytes, `find` takes half the time of `in`.
    if not own and policy is None and b" ".join([*names]).find(b"hokusai") < 0:
        return frozenset()
    removed = []
    for name in names:
        spelling = name.replace(b"_", b"-")
        if (
            spelling.startswith(_IDENTITY)
            or spelling in own
            or (public and name not in _PUBLIC)
            or (policy is not None and not _forwarded(spelling.decode("latin-1"), policy))
        ):
            removed.append(name)
    return frozenset(removed)


def identity_headers(allow: Allow) -> tuple[tuple[bytes, bytes], ...]:
    """Return the identity headers of a verified request; none if they would leave the server."""
    if allow.principal is None or _may_leave(allow):
        return ()
    return _identity(allow.principal.key_id, allow.principal.owner)


@lru_cache(maxsize=1024)
def _identity(key_id: str, owner: str) -> tuple[tuple[bytes, bytes], ...]:
    return (
        (b"x-hokusai-api-key-id", key_id.encode("ascii")),
        (b"x-hokusai-user-id", quote(owner, safe=" @:/+").encode("ascii")),
    )


def _forwarded(name: str, policy: HeaderPolicy) -> bool:
    if name in _NEEDED:
        return True
    return _matches(name, policy.forward) and not _matches(name, policy.remove)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether one of `patterns` matches `name`, which is spelt with hyphens."""
    return any(
        name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
        for pattern in (pattern.replace("_", "-") for pattern in patterns)
    )


def _of_this_server(allow: Allow) -> frozenset[bytes]:
    """Return the headers that a provider must not see: those with our key, and all cookies."""
    if not _may_leave(allow):
        return frozenset()
    places = allow.credential.places if allow.credential is not None else ()
    return frozenset({b"cookie", *(place.lower().encode("latin-1") for place in places)})


def _may_leave(allow: Allow) -> bool:
    return allow.operation.outbound or not allow.operation.rule

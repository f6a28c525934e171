"""Which headers of a request reach MLflow.

Headers are passed on as they were sent: the proxy that stripped them is what broke registration.
Three exceptions: identity headers are ours to set, so those a client sends are removed in any spelling;
a request whose headers MLflow passes on to a provider, or may pass on for all that is known of its
route, loses the headers that held our key; and a public answer is made from a few headers alone, so
that nobody without a key decides what MLflow reads (X-MLFLOW-WORKSPACE made a 500 of /health).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote

from .types import Access, Allow

#: What the message itself is understood by.
_NEEDED = frozenset(
    {"host", "content-length", "content-type", "content-encoding", "transfer-encoding"}
)
#: What a public answer is made from: the message; whose page asks, for CORS, the sign-in and a
#: preflight; the session to end; the form that the answer may have; GitHub's signature of a report.
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
    """What the operator says of headers: lower-case names, with `*` at the end for a beginning.

    Those of `remove` are kept from MLflow. Of the rest those of `forward` reach it, and always those
    that HTTP itself needs.
    """

    forward: tuple[str, ...] = ("*",)
    remove: tuple[str, ...] = ()

    def problem(self) -> str | None:
        """Why this can't be, in words for the operator, or None if it can."""
        for pattern in (*self.forward, *self.remove):
            if not _PATTERN.fullmatch(pattern):
                return f"{pattern!r} is no header's name, such as x-tenant or x-forwarded-*"
        if removed := sorted(name for name in _NEEDED if _matches(name, self.remove)):
            return f"{', '.join(removed)} can't be removed: HTTP needs it"
        if any(pattern.replace("_", "-").startswith("x-hokusai-") for pattern in self.forward):
            return "x-hokusai-* can't be forwarded: these tell MLflow whom the gate has verified"
        return None


def dropped(
    names: Collection[bytes], allow: Allow, policy: HeaderPolicy | None = None
) -> frozenset[bytes]:
    """The header `names` (lower case) that are kept from MLflow; `policy` is None without one."""
    own = _of_this_server(allow)
    public = allow.principal is None and allow.operation.access is Access.PUBLIC
    if public and policy is None:
        return frozenset(names) - _PUBLIC
    if not own and policy is None and b"hokusai" not in b" ".join(names):
        return frozenset()
    found = []
    for name in names:
        spelling = name.replace(b"_", b"-")
        if (
            spelling.startswith(_IDENTITY)
            or spelling in own
            or (public and name not in _PUBLIC)
            or (policy is not None and not _forwarded(spelling.decode("latin-1"), policy))
        ):
            found.append(name)
    return frozenset(found)


def identity_headers(allow: Allow) -> tuple[tuple[bytes, bytes], ...]:
    """The identity headers of a verified request; none where they would leave the server."""
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
    """Whether one of `patterns` means `name`, spelt with hyphens; both spellings are one header."""
    return any(
        name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
        for pattern in (pattern.replace("_", "-") for pattern in patterns)
    )


def _of_this_server(allow: Allow) -> frozenset[bytes]:
    """Headers that a provider must not be shown: our credential; our session, or a proxy's."""
    if not _may_leave(allow):
        return frozenset()
    places = allow.credential.places if allow.credential is not None else ()
    return frozenset({b"cookie", *(place.lower().encode("latin-1") for place in places)})


def _may_leave(allow: Allow) -> bool:
    return allow.operation.outbound or not allow.operation.rule

"""Which headers of a request reach MLflow.

Headers are passed on as they were sent: the proxy that stripped them is what broke registration.
Two exceptions: identity headers are ours to set, so those a client sends are removed in any spelling;
and a request whose headers MLflow passes on to a provider, or may pass on for all that is known of
its route, loses the headers that held our key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote

from .types import Allow

#: What the message itself is understood by.
_NEEDED = frozenset(
    {"host", "content-length", "content-type", "content-encoding", "transfer-encoding"}
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


def dropped(name: bytes, allow: Allow, policy: HeaderPolicy | None = None) -> bool:
    """Whether the header `name` (lower case) is kept from MLflow; `policy` is None without one."""
    spelling = name.replace(b"_", b"-") if b"_" in name else name
    if spelling.startswith(_IDENTITY):
        return True
    if policy is not None and not _forwarded(spelling.decode("latin-1"), policy):
        return True
    if not _may_leave(allow):
        return False
    # A provider would be shown them all, and all are this server's: our session, or a proxy's.
    if spelling == b"cookie":
        return True
    return allow.credential is not None and spelling.decode("latin-1") in {
        place.lower() for place in allow.credential.places
    }


def identity(allow: Allow) -> tuple[tuple[bytes, bytes], ...]:
    """The identity headers of a verified request; none where they would leave the server."""
    if allow.principal is None or _may_leave(allow):
        return ()
    return (
        (b"x-hokusai-api-key-id", allow.principal.key_id.encode("ascii")),
        (b"x-hokusai-user-id", quote(allow.principal.owner, safe=" @:/+").encode("ascii")),
    )


@lru_cache(maxsize=1024)
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


def _may_leave(allow: Allow) -> bool:
    return allow.operation.outbound or not allow.operation.rule

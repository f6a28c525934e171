"""Which headers of a request reach MLflow.

Headers are passed on as they were sent: the proxy that stripped them is what broke registration.
Two exceptions: identity headers are ours to set, so those a client sends are removed in any spelling;
and a request whose headers MLflow passes on to a provider, or may pass on for all that is known of
its route, loses the headers that held our key.
"""

from __future__ import annotations

from urllib.parse import quote

from .types import Allow

_IDENTITY = b"x-hokusai-"


def dropped(name: bytes, allow: Allow) -> bool:
    """Whether the header `name` (lower case) is kept from MLflow."""
    spelling = name.replace(b"_", b"-") if b"_" in name else name
    if spelling.startswith(_IDENTITY):
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


def _may_leave(allow: Allow) -> bool:
    return allow.operation.outbound or not allow.operation.rule

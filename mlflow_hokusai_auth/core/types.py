"""The values that the gate's decisions are made of. Frozen, and free of any framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

#: How the gate treats a request: "enforce"; "observe" (log what would be refused, and let it pass);
#: "off" (do not even look). Key stores keep a mode's place in this list.
MODES = ("enforce", "observe", "off")


class Access(IntEnum):
    """What an operation needs, in rising order: a key that may do one may do all below it."""

    PUBLIC = 0
    #: Any good key, whatever its scopes: what a key may ask about itself.
    KEY = 1
    READ = 2
    WRITE = 3
    ADMIN = 4


@dataclass(frozen=True, slots=True)
class Operation:
    """What a request does, by the route that MLflow will match for it."""

    access: Access
    #: Kind of resource, MLflow's own word: "experiments", "runs", "registered-models", …
    kind: str
    #: The rule that matched, such as "GET /api/2.0/mlflow/experiments/get"; "" when none did.
    rule: str
    #: MLflow passes this request's headers on to another provider (gateway, assistant).
    outbound: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One request, reduced to what decisions need.

    `path` is decoded once and has lost its alias prefix; `headers` keep their order, their
    duplicates and their bytes, names in lower case, as ASGI has them.
    """

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    #: The client's address, as `addresses.client_address` finds it.
    address: str = ""
    #: Name -> the last value, made once because a decision looks up several headers.
    _values: dict[bytes, bytes] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_values", dict(self.headers))

    def header(self, name: bytes) -> bytes | None:
        """The last value of the header `name` (lower case), or None if it was not sent."""
        return self._values.get(name)

    def text(self, name: bytes) -> str:
        """The last value of the header `name` (lower case) as Latin-1, or ""."""
        return self._values.get(name, b"").decode("latin-1")


@dataclass(frozen=True, slots=True)
class Credential:
    """The one key of a request, well-formed, and the places where it was found."""

    key: str
    places: tuple[str, ...]
    #: The text is no key but the token of a browser's session, which stands for one.
    session: bool = False

    def __repr__(self) -> str:
        return f"Credential(key=<redacted>, places={self.places!r})"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a key belongs to. A fact about the key, which may be cached; never a decision."""

    key_id: str
    owner: str
    scopes: frozenset[str]
    #: Seconds since the epoch, or None for a key that does not expire.
    expires_at: float | None = None
    #: Seconds since the epoch, or None for a key that was not revoked.
    revoked_at: float | None = None
    #: What the auth service says of the key's user beyond its scopes.
    email: str = ""
    roles: frozenset[str] = frozenset()
    is_admin: bool = False
    #: Addresses and networks (CIDR) that the key may be used from; none for everywhere.
    networks: tuple[str, ...] = ()
    #: Requests in any hour, or None without a limit.
    rate_limit_per_hour: int | None = None
    #: Seconds since the epoch when a key was made to replace this one, or None.
    deprecated_at: float | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """An authority does not accept a key. `reason` is its own word for why, or ""."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Allow:
    """The request may reach MLflow, as `principal` (None on a public route)."""

    operation: Operation
    principal: Principal | None = None
    credential: Credential | None = None
    #: What the response says beyond MLflow's own headers: that the key will end, what is left of it.
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Deny:
    """The request is refused. `code` is one of `denials.CODES`; `message` says what to do."""

    code: str
    message: str
    #: For a scope that is missing: what was needed and what the key has.
    required_scope: str | None = None
    current_scopes: tuple[str, ...] | None = None
    #: Seconds after which it is worth to ask again, for a refusal that passes.
    retry_after: float | None = None
    headers: tuple[tuple[str, str], ...] = ()
    #: Whose key was refused, where that is known.
    principal: Principal | None = None
    #: The operation that was asked for, None before it is known. The response doesn't show it, so two
    #: refusals that differ only in it are equal.
    operation: Operation | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class NeedKey:
    """The verdict depends on who `credential` belongs to: look it up, then `settle`."""

    credential: Credential
    operation: Operation
    address: str = ""

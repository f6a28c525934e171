"""The values of the gate's decisions: nobody changes them, and they are independent of any framework.

Those that every request makes are named tuples or plain classes with slots: a frozen dataclass takes
two to three times as long to make.
"""

from __future__ import annotations

from collections.abc import KeysView
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

#: "enforce" refuses requests; "observe" only logs those that it would refuse; "off" does not check.
#: The store keeps the position of the mode in this list, so the order must not change.
MODES = ("enforce", "observe", "off")
#: "off" keeps nobody from changing what is another owner's; "observe" only counts and logs such
#: changes; "writes" refuses them; "full" also hides what is another owner's. The store keeps the
#: position in this list, so the order must not change.
ISOLATION = ("off", "observe", "writes", "full")
#: Those that refuse something.
ISOLATING = ("writes", "full")
#: The most that isolation does. A database whose things all have an owner begins with it.
MOST_ISOLATION = "full"


class Access(IntEnum):
    """The access that an operation needs, in rising order; each includes those before it."""

    PUBLIC = 0
    #: Any good key has this access, whatever its scopes, to ask about itself.
    KEY = 1
    READ = 2
    WRITE = 3
    ADMIN = 4


@dataclass(frozen=True, slots=True)
class Operation:
    """The action of a request, by the route that MLflow will match for it."""

    access: Access
    #: Kind of resource, in MLflow's terms: "experiments", "runs", "registered-models", …
    kind: str
    #: The matching rule, such as "GET /api/2.0/mlflow/experiments/get"; "" if none matches.
    rule: str
    #: True if MLflow may pass the request's headers to a provider (gateway, assistant).
    outbound: bool = False
    #: True if an artifact's path is in no known folder of an experiment, so that the kind may change
    #: when the folders are read again.
    unsure: bool = False
    #: Kinds of resource that a GraphQL query reads; empty if its body was not read.
    reads: frozenset[str] = frozenset()


@dataclass(slots=True)
class Request:
    """The parts of a request that decisions depend on.

    `path` is decoded once and has no prefix. `headers` keep their order, duplicates and bytes, with
    names in lower case, as in ASGI.
    """

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    #: The client's address, from `addresses.client_address`.
    address: str = ""
    #: Name -> last value, built once because a decision reads several headers.
    _values: dict[bytes, bytes] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._values = dict(self.headers)

    def header(self, name: bytes) -> bytes | None:
        """Return the last value of the header `name` (lower case), or None if it was not sent."""
        return self._values.get(name)

    @property
    def names(self) -> KeysView[bytes]:
        """The names of all headers, each once."""
        return self._values.keys()

    @property
    def repeats(self) -> bool:
        """True if a header was sent more than once."""
        return len(self._values) < len(self.headers)

    def text(self, name: bytes) -> str:
        """Return the last value of the header `name` (lower case) as Latin-1, or ""."""
        return self._values.get(name, b"").decode("latin-1")


class Credential(NamedTuple):
    """The one key of a request, and the places that hold it."""

    key: str
    places: tuple[str, ...]
    #: True if `key` is the token of a browser's session, which stands for a key.
    session: bool = False

    def __repr__(self) -> str:
        return f"Credential(key=<redacted>, places={self.places!r})"


@dataclass(frozen=True, slots=True)
class Principal:
    """The owner of a known key, with its scopes: a fact that may be cached, and never a decision.

    Revoked and expired keys are known, too; `policy.settle` decides whether a key is still good.
    """

    key_id: str
    #: The owner's name for display. It may be an e-mail address, and may change.
    owner: str
    scopes: frozenset[str]
    #: Seconds since the epoch, or None for a key that does not expire.
    expires_at: float | None = None
    #: Seconds since the epoch, or None for a key that was not revoked.
    revoked_at: float | None = None
    #: `email`, `roles` and `is_admin` are the auth service's answer about the key's user.
    email: str = ""
    roles: frozenset[str] = frozenset()
    is_admin: bool = False
    #: Addresses and networks (CIDR) from which the key may be used; empty for all.
    networks: tuple[str, ...] = ()
    #: Requests in any hour, or None without a limit.
    rate_limit_per_hour: int | None = None
    #: Seconds since the epoch at which another key replaced this one, or None.
    deprecated_at: float | None = None
    #: The owner of what the key makes: compared exactly, and "" for an owner that is not known.
    owner_id: str = ""
    #: Patterns (`core.ownership`) of the registered models that the key may change; empty for all.
    models: tuple[str, ...] = ()
    #: True if the key may not delete anything.
    no_delete: bool = False
    #: The job whose identity token was exchanged for the key (`core.trust`), "" for any other key.
    source: str = ""

    @property
    def narrowed(self) -> bool:
        """True if the key itself is narrowed, which makes it a supplier's, whatever else it is."""
        return bool(self.models) or self.no_delete


@dataclass(frozen=True, slots=True)
class Rejected:
    """The answer of an authority that does not know a key; `reason` is in its own words, or "".

    The auth service may answer so for revoked and expired keys as well.
    """

    reason: str = ""


class Allow(NamedTuple):
    """The verdict that the request may reach MLflow, as `principal` (None on a public route)."""

    operation: Operation
    principal: Principal | None = None
    credential: Credential | None = None
    #: Headers to add to MLflow's response: when the key will end, and what is left of its rate limit.
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Deny:
    """The verdict that the request is refused; `code` is in `denials.CODES`, `message` gives advice."""

    code: str
    message: str
    #: If a scope is missing: the one that is needed, and those of the key.
    required_scope: str | None = None
    current_scopes: tuple[str, ...] | None = None
    #: Seconds after which the request may succeed, if the refusal is temporary.
    retry_after: float | None = None
    headers: tuple[tuple[str, str], ...] = ()
    #: The owner of the refused key, if known.
    principal: Principal | None = None
    #: The request's operation, None before it is known. The response doesn't show it, so refusals that
    #: differ only in it are equal.
    operation: Operation | None = field(default=None, compare=False)


class NeedKey(NamedTuple):
    """A verdict that depends on the principal of `credential`: look it up, then call `settle`."""

    credential: Credential
    operation: Operation
    address: str = ""
    #: The request, to plan it again with newer folders, if the operation is `unsure`.
    request: Request | None = None

    def __repr__(self) -> str:
        return f"NeedKey(credential={self.credential!r}, operation={self.operation!r})"

"""The authorities: they say who a key belongs to, the only thing the gate looks up elsewhere."""

from __future__ import annotations

from typing import Protocol

from mlflow_hokusai_auth.core.types import Principal, Rejected


class Backend(Protocol):
    """An authority without a cache: the key store, or the auth service."""

    #: The authority's name in caches, logs and metrics: "local", "service".
    name: str
    #: True if an answer holds only for the address that was looked up with the key.
    by_address: bool
    #: True if `generation` changes whenever an answer may have changed, so that a cache may rely on it.
    watched: bool

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        """Return the owner of `key` (well-formed text), which came from `address`.

        Raises AuthorityUnavailable or Throttled if there is no answer.
        """
        ...

    def generation(self) -> int:
        """Return the number that grows with each change of the store.

        An authority that is not watched returns a constant. Raises AuthorityUnavailable.
        """
        ...


class Authority(Protocol):
    """The authorities as the gate sees them: with their caches."""

    def peek(self, key: str, address: str) -> Principal | Rejected | None:
        """Return the answer for `key` if this process knows it already, or None. Does no I/O."""
        ...

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        """Return the owner of `key`; may block. Raises AuthorityUnavailable or Throttled."""
        ...

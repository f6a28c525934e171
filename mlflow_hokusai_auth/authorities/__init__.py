"""Who a key belongs to: the one question the gate asks of the outside world."""

from __future__ import annotations

from typing import Protocol

from mlflow_hokusai_auth.core.types import Principal, Rejected


class Backend(Protocol):
    """An authority over keys."""

    #: Tells authorities apart in caches, logs and metrics: "local", "service".
    name: str
    #: Whether an answer holds only for the address that was asked for.
    by_address: bool
    #: Whether `generation` tells of every change, so that answers may be kept for as long as it stays.
    watched: bool

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        """Whom `key` (well-formed text), sent from `address`, belongs to.

        Raises AuthorityUnavailable, or Throttled, when there is no answer.
        """
        ...

    def generation(self) -> int:
        """A number that changes whenever an answer of `lookup` may, by what the authority can tell.

        Raises AuthorityUnavailable. An authority that tells nothing returns a constant.
        """
        ...


class Authority(Protocol):
    """What the gate asks: backends behind their caches."""

    def peek(self, key: str, address: str) -> Principal | Rejected | None:
        """What is known here already of `key`, or None. Does no I/O."""
        ...

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        """Whom `key` belongs to; may block. Raises AuthorityUnavailable, or Throttled."""
        ...

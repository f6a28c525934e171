"""Several authorities, asked in order: `BACKEND=local,service`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from mlflow_hokusai_auth.core.types import Principal, Rejected

from . import Authority

_Answer = TypeVar("_Answer")


class Chain:
    """`authorities`, of which the first that knows a key decides about it.

    To know a key is final even if the key is revoked or expired there. An authority that can't be
    asked ends the question: a key that it revoked must not pass through the one after it.
    """

    def __init__(self, authorities: Sequence[Authority]) -> None:
        if not authorities:
            raise ValueError("a chain needs an authority")
        self._authorities = tuple(authorities)

    def peek(self, key: str, address: str) -> Principal | Rejected | None:
        """What `lookup` would answer, if all of that is known here already. Does no I/O."""
        return _first(authority.peek(key, address) for authority in self._authorities)

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        """Whom `key` belongs to. Raises AuthorityUnavailable, or Throttled."""
        return _first(authority.lookup(key, address) for authority in self._authorities)


def _first(answers: Iterable[_Answer | Rejected]) -> _Answer | Rejected:
    """The first answer that is no rejection, no later one being asked for; else the loudest of them."""
    rejections: list[Rejected] = []
    for answer in answers:
        if not isinstance(answer, Rejected):
            return answer
        rejections.append(answer)
    return _loudest(rejections)


def _loudest(rejections: Iterable[Rejected]) -> Rejected:
    """The last of `rejections` that says why, or one that does not."""
    said = [rejected for rejected in rejections if rejected.reason]
    return said[-1] if said else Rejected()

"""Several authorities in a row: `BACKEND=local,service`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from mlflow_hokusai_auth.core.types import Principal, Rejected

from . import Authority

_Answer = TypeVar("_Answer")


class Chain:
    """The first of `authorities` that knows a key decides about it.

    That is final, even if the key is revoked or expired there. If an authority is unavailable, the
    later ones get no lookup: a key that the first one revoked must not pass through the second.
    """

    def __init__(self, authorities: Sequence[Authority]) -> None:
        if not authorities:
            raise ValueError("a chain needs an authority")
        self._authorities = tuple(authorities)

    def peek(self, key: str, address: str) -> Principal | Rejected | None:
        """Return the answer of `lookup` if it takes no I/O, or None."""
        return _first(authority.peek(key, address) for authority in self._authorities)

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        """Return the owner of `key`. Raises AuthorityUnavailable or Throttled."""
        return _first(authority.lookup(key, address) for authority in self._authorities)


def _first(answers: Iterable[_Answer | Rejected]) -> _Answer | Rejected:
    """Return the first answer that is no rejection, or the last rejection with a reason.

    `answers` is consumed no further than that.
    """
    rejections: list[Rejected] = []
    for answer in answers:
        if not isinstance(answer, Rejected):
            return answer
        rejections.append(answer)
    return next((rejected for rejected in reversed(rejections) if rejected.reason), Rejected())

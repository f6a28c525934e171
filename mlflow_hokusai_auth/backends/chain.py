"""Several authorities, asked in order: `BACKEND=local,service`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mlflow_hokusai_auth.core.types import Principal, Rejected

from . import Authority


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
        rejections: list[Rejected] = []
        for authority in self._authorities:
            answer = authority.peek(key, address)
            if not isinstance(answer, Rejected):
                return answer
            rejections.append(answer)
        return _loudest(rejections)

    def lookup(self, key: str, address: str) -> Principal | Rejected:
        """Whom `key` belongs to. Raises BackendUnavailable, or Throttled."""
        rejections: list[Rejected] = []
        for authority in self._authorities:
            answer = authority.lookup(key, address)
            if not isinstance(answer, Rejected):
                return answer
            rejections.append(answer)
        return _loudest(rejections)


def _loudest(rejections: Iterable[Rejected]) -> Rejected:
    """The last of `rejections` that says why, or one that does not."""
    said = [rejected for rejected in rejections if rejected.reason]
    return said[-1] if said else Rejected()

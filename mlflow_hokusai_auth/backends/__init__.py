"""Who a key belongs to: the one question the gate asks of the outside world."""

from __future__ import annotations

from typing import Protocol

from mlflow_hokusai_auth.core.types import Principal


class BackendUnavailable(Exception):
    """The authority can't be asked now. The request is refused with 503, never let through."""


class Backend(Protocol):
    """An authority over keys."""

    def lookup(self, key: str) -> Principal | None:
        """Whom `key` (well-formed text) belongs to, or None; raises BackendUnavailable."""
        ...

    def generation(self) -> int:
        """A number that changes whenever an answer of `lookup` may; raises BackendUnavailable."""
        ...

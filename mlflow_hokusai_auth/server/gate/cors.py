"""Which pages of other origins may read the gate's own answers: those that may read MLflow's."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlflow_hokusai_auth.server.upstream import origins


@dataclass(frozen=True, slots=True)
class Cors:
    """Which origins MLflow lets read its answers, so that they can read a refusal too."""

    origins: tuple[str, ...]
    pattern: str
    enabled: bool = True

    def headers(self, origin: str) -> tuple[tuple[str, str], ...]:
        """The CORS headers for an answer to `origin`, the request's Origin header, or ""."""
        if not origin or not self.enabled:
            return ()
        if "*" in self.origins:
            return (("Access-Control-Allow-Origin", "*"),)
        if origin not in self.origins and not re.fullmatch(self.pattern, origin):
            return ()
        return (
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Allow-Credentials", "true"),
            ("Vary", "Origin"),
        )


def of_mlflow() -> Cors:
    """Return the rules that MLflow's own settings in the environment make."""
    allowed = origins.allowed()
    return Cors((), "", enabled=False) if allowed is None else Cors(*allowed)

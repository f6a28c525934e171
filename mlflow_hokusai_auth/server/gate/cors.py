"""CORS headers of the gate's own answers: an origin that may read MLflow's answers may read these."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlflow_hokusai_auth.server.upstream import origins


@dataclass(frozen=True, slots=True)
class Cors:
    """The origins that may read MLflow's answers: `origins`, and those that match `pattern`."""

    origins: tuple[str, ...]
    pattern: str
    enabled: bool = True

    def headers(self, origin: str) -> tuple[tuple[str, str], ...]:
        """Return the CORS headers for an answer to a request with the Origin header `origin`."""
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

"""A warning of a reverse proxy that the settings don't name."""

from __future__ import annotations

import logging

from mlflow_hokusai_auth.core.types import Request

_log = logging.getLogger(__name__)


class ProxyWarning:
    """Warns once in a process of `X-Forwarded-For` that comes although no proxy is trusted."""

    def __init__(self) -> None:
        self._warned = False

    def check(self, request: Request) -> None:
        """Warn if a proxy seems to have sent `request`."""
        if self._warned or request.header(b"x-forwarded-for") is None:
            return
        self._warned = True
        _log.warning(
            "A request from %s came with X-Forwarded-For, but HOKUSAI_AUTH_TRUSTED_PROXIES is empty. "
            "If that is a proxy, name it there. Otherwise all clients behind it count as one address, "
            "and one of them with wrong keys makes the others wait.",
            request.address or "an unknown address",
        )

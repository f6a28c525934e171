"""What both adapters share: the gate's parts, and how a refusal is dressed for its origin."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass, replace

from mlflow_hokusai_auth.backends import BackendUnavailable
from mlflow_hokusai_auth.backends.cache import CachedBackend
from mlflow_hokusai_auth.core.denials import Refusal, render
from mlflow_hokusai_auth.core.policy import Policy, plan, settle
from mlflow_hokusai_auth.core.types import Allow, Deny, NeedKey, Principal, Request

from .aliases import Prefixes

_log = logging.getLogger(__name__)

MISMOUNTED = Deny(
    "MISCONFIGURED",
    "The server was given a root path, which hokusai-auth does not support. Its operator should "
    "drop --root-path and name the path in HOKUSAI_AUTH_PREFIXES.",
)
_UNAVAILABLE = Deny(
    "AUTHORITY_UNAVAILABLE", "Keys can't be checked at the moment. Try again in a few seconds."
)


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


@dataclass(frozen=True, slots=True)
class Gate:
    """Everything a verdict takes. The adapters only translate to and from it."""

    backend: CachedBackend
    policy: Policy
    prefixes: Prefixes
    cors: Cors

    def plan(self, request: Request) -> Allow | Deny | NeedKey:
        """The first half of the verdict; does no I/O."""
        return plan(request, self.policy)

    def peek(self, need: NeedKey) -> Allow | Deny | None:
        """The verdict if the key is known here already, else None; does no I/O."""
        principal = self.backend.peek(need.credential.key)
        return None if principal is None else settle(need, principal, time.time())

    def ask(self, need: NeedKey) -> Allow | Deny:
        """The verdict after asking the authority; blocks. An authority that fails never allows."""
        try:
            principal: Principal | None = self.backend.lookup(need.credential.key)
        except BackendUnavailable as error:
            _log.error("A request was refused with 503: %s", error)
            return _UNAVAILABLE
        except Exception:
            _log.exception("A request was refused with 503")
            return _UNAVAILABLE
        return settle(need, principal, time.time())

    def refusal(self, deny: Deny, origin: str) -> Refusal:
        """The response for `deny`, to a request whose Origin header is `origin`, or ""."""
        refusal = render(deny)
        return replace(refusal, headers=refusal.headers + self.cors.headers(origin))

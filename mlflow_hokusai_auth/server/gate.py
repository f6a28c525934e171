"""What both adapters share: the gate's parts, and how a refusal is dressed for its origin."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from mlflow_hokusai_auth.backends import Authority, BackendUnavailable, Throttled
from mlflow_hokusai_auth.core import credentials
from mlflow_hokusai_auth.core.addresses import Network, client_address
from mlflow_hokusai_auth.core.denials import Refusal, render
from mlflow_hokusai_auth.core.keys import redact
from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.core.policy import Policy, plan, settle
from mlflow_hokusai_auth.core.types import Access, Allow, Credential, Deny, NeedKey, Request

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
_THROTTLED = Deny(
    "RATE_LIMITED", "This key, or its authority, is asked too often. Try again a little later."
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

    authority: Authority
    policy: Policy
    prefixes: Prefixes
    cors: Cors
    #: Proxies whose word on the client's address is taken.
    trusted: tuple[Network, ...] = ()
    #: "enforce", "observe" (log what would be refused, let it pass) or "off" (do not even look).
    mode: str = "enforce"

    def address(self, peer: str, forwarded_for: Sequence[bytes]) -> str:
        """The client's address, for a request from the socket address `peer`."""
        if not self.trusted:
            return _alone(peer)
        return client_address(peer, forwarded_for, self.trusted)

    def plan(self, request: Request) -> Allow | Deny | NeedKey:
        """The first half of the verdict; does no I/O."""
        if self.mode == "off" and not _is_ours(request):
            return self._let_pass(request)
        return plan(request, self.policy)

    def peek(self, need: NeedKey) -> Allow | Deny | None:
        """The verdict if the key is known here already, else None; does no I/O."""
        principal = self.authority.peek(need.credential.key, need.address)
        return None if principal is None else settle(need, principal, time.time(), self.policy)

    def ask(self, need: NeedKey) -> Allow | Deny:
        """The verdict after asking the authority; blocks. An authority that fails never allows."""
        try:
            principal = self.authority.lookup(need.credential.key, need.address)
        except Throttled as error:
            return replace(_THROTTLED, retry_after=error.retry_after)
        except BackendUnavailable as error:
            _log.error("A request was refused with 503: %s", error)
            return replace(_UNAVAILABLE, retry_after=error.retry_after or _soon())
        except Exception:
            _log.exception("A request was refused with 503")
            return replace(_UNAVAILABLE, retry_after=_soon())
        return settle(need, principal, time.time(), self.policy)

    def conclude(self, request: Request, verdict: Allow | Deny) -> Allow | Deny:
        """`verdict` as the mode has it: only "enforce" refuses."""
        if isinstance(verdict, Allow) or self.mode == "enforce" or _is_ours(request):
            return verdict
        _log.warning(
            "observe: would refuse %s %r: %s (%s)",
            request.method,
            redact(request.path),
            verdict.code,
            verdict.message,
        )
        return self._let_pass(request)

    def refusal(self, deny: Deny, origin: str) -> Refusal:
        """The response for `deny`, to a request whose Origin header is `origin`, or ""."""
        refusal = render(deny)
        return replace(refusal, headers=refusal.headers + self.cors.headers(origin))

    def _let_pass(self, request: Request) -> Allow:
        operation = classify(request.method, request.path)
        # The key was not checked, but it must not go on to a provider for that.
        found = credentials.find(request, outbound=operation.outbound, query_key=True)
        return Allow(operation, None, found if isinstance(found, Credential) else None)


def _is_ours(request: Request) -> bool:
    """Keys are managed by those who may in every mode: what is made in one outlives it."""
    return classify(request.method, request.path).kind == "hokusai"


def reads_only(need: NeedKey, verdict: Allow | Deny) -> NeedKey | None:
    """What to settle anew once the body is known to change nothing, where that may help.

    GraphQL has one route for all it does, so a key that may not write is refused there until its
    body, read only for a key that may read, turns out to hold nothing but queries.
    """
    refused = isinstance(verdict, Deny) and verdict.code == "SCOPE_MISSING"
    if not refused or need.operation.kind != "graphql":
        return None
    return replace(need, operation=replace(need.operation, access=Access.READ))


@lru_cache(maxsize=1024)
def _alone(peer: str) -> str:
    return client_address(peer, (), ())


def _soon() -> float:
    """Seconds to wait, spread so that all clients of an outage do not come back at once."""
    return random.uniform(1, 4)  # noqa: S311

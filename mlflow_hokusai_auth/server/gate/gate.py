"""The steps to a verdict, which `flow` puts in order, and the parts that they need."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from dataclasses import dataclass, field, replace
from functools import lru_cache

from mlflow_hokusai_auth.authorities import Authority
from mlflow_hokusai_auth.core import credentials
from mlflow_hokusai_auth.core.addresses import Network, client_address
from mlflow_hokusai_auth.core.denials import CODES
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable, Throttled
from mlflow_hokusai_auth.core.forwarding import HeaderPolicy
from mlflow_hokusai_auth.core.headers import malformed
from mlflow_hokusai_auth.core.operations import CLOSED, classify
from mlflow_hokusai_auth.core.policy import Policy, has_body, plan, settle
from mlflow_hokusai_auth.core.prefixes import Prefixes
from mlflow_hokusai_auth.core.types import (
    Access,
    Allow,
    Deny,
    NeedKey,
    Operation,
    Principal,
    Rejected,
    Request,
)
from mlflow_hokusai_auth.server.exchange import Exchange, Observer
from mlflow_hokusai_auth.server.live_settings import Isolation, Mode
from mlflow_hokusai_auth.server.upstream.experiment_folders import ExperimentFolders

from .bodies import BODY_SECONDS, body_limit, too_large
from .cors import Cors
from .interceptors import Interceptors
from .limits import Limits, client_network
from .lookup_pool import LookupPool, RecentKeys
from .outage import Outage
from .proxy_warning import ProxyWarning

_log = logging.getLogger(__name__)

MISMOUNTED = Deny(
    "MISCONFIGURED",
    "The server was given a root path, which hokusai-auth does not support. Its operator should "
    "drop --root-path and name the path in HOKUSAI_AUTH_PREFIXES.",
)
_UNAVAILABLE = Deny(
    "AUTHORITY_UNAVAILABLE",
    "Keys can't be checked at the moment, which says nothing about yours.",
)
_THROTTLED = Deny(
    "RATE_LIMITED",
    "This key is used too often, or the service that checks it is overloaded.",
)
_CROWDED = Deny(
    "RATE_LIMITED",
    "Too many requests from your address wait for their keys to be checked.",
    retry_after=5.0,
)
#: The header that every answer has in mode off, so that the mode can't be overlooked.
_OFF = ("X-Hokusai-Auth-Mode", "off")

#: Codes of refusals that hold in every mode, because MLflow could not answer such requests either.
_ALWAYS = frozenset({"MISCONFIGURED", "HEADER_MALFORMED"})


@dataclass(frozen=True, slots=True)
class Gate:
    """Everything that a verdict needs. `flow.flow` puts the methods in order."""

    authority: Authority
    policy: Policy
    prefixes: Prefixes
    cors: Cors
    observer: Observer
    limits: Limits = field(default_factory=Limits)
    interceptors: Interceptors = Interceptors()  # noqa: RUF009 - frozen
    #: The operator's rules for the headers that MLflow gets.
    header_policy: HeaderPolicy | None = None
    #: Called with the id of the key of each request that is allowed.
    count: Callable[[str], object] = lambda _: None
    lookups: LookupPool = field(default_factory=LookupPool)
    #: Keys that are looked up even if their address has sent many wrong keys.
    recent: RecentKeys = field(default_factory=RecentKeys)
    outage: Outage = field(default_factory=Outage)
    #: Seconds in which a body that is read before the verdict must arrive.
    body_seconds: float = BODY_SECONDS
    #: Public rules that are not configured -> the message of their refusal. Their body isn't read.
    absent: Mapping[str, str] = field(default_factory=dict)
    #: The contact for questions about keys, or "".
    contact: str = ""
    #: Proxies whose X-Forwarded-For is believed.
    trusted: tuple[Network, ...] = ()
    proxy_warning: ProxyWarning = field(default_factory=ProxyWarning)
    mode: Mode = field(default_factory=Mode)
    #: While `isolation.now` is "enforce", suppliers are kept apart.
    isolation: Isolation = field(default_factory=lambda: Isolation(Mode()))
    #: The folders of experiments, which decide on the paths of artifacts.
    folders: ExperimentFolders = field(default_factory=ExperimentFolders)
    #: `policy` while suppliers are kept apart, by the access that is closed to them.
    _isolated: Mapping[Access | None, Policy] = field(init=False)

    def __post_init__(self) -> None:
        isolated = {
            closed: replace(self.policy, isolated=True, closed_from=closed)
            for closed in (None, Access.READ, Access.WRITE)
        }
        object.__setattr__(self, "_isolated", isolated)

    def address(self, peer: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Return the client's address for a request from the socket address `peer`."""
        if not self.trusted:
            return _normalized(peer)
        forwarded = (value for name, value in headers if name == b"x-forwarded-for")
        return client_address(peer, forwarded, self.trusted)

    def plan(self, request: Request) -> Allow | Deny | NeedKey:
        """Return the verdict, or the key that it needs. Does no I/O."""
        if name := malformed(request):
            return Deny(
                "HEADER_MALFORMED",
                f"The {name} header can't be read as the name of a host.",
            )
        if self.mode.now == "off":
            operation = classify(request.method, request.path)
            if operation.kind not in CLOSED:
                return _let_pass(request, operation)
        step = plan(request, self.policy, self.folders.known)
        if isinstance(step, Allow) and step.operation.access is Access.PUBLIC:
            operation = step.operation
            if operation.rule in self.absent:
                message = self.absent[operation.rule]
                return Deny("NOT_CONFIGURED", message, operation=operation)
            if body_limit(operation) == 0 and has_body(request):
                return too_large(operation)
        return step

    def peek(self, need: NeedKey) -> Allow | Deny | None:
        """Return the verdict if it needs no I/O.

        Return None if the key is not in memory, if its limit is in Redis, or if newer folders may
        change the verdict.
        """
        principal = self.authority.peek(need.credential.key, need.address)
        if principal is None:
            return None
        if self.limits.does_io and getattr(principal, "rate_limit_per_hour", None) is not None:
            return None
        verdict = self._settle(need, principal)
        return None if need.operation.unsure and _may_change(verdict) else verdict

    def look_up(self, need: NeedKey) -> Allow | Deny:
        """Ask the authority and return the verdict. Blocks.

        If the authority fails, the verdict is a refusal.
        """
        try:
            principal = self.authority.lookup(need.credential.key, need.address)
            verdict = self._settle(need, principal)
            if need.request is not None and _may_change(verdict):
                self.folders.read()
                step = plan(need.request, self.policy, self.folders.known)
                verdict = self._settle(step, principal) if isinstance(step, NeedKey) else step
        except Throttled as error:
            return replace(_THROTTLED, retry_after=error.retry_after, operation=need.operation)
        except AuthorityUnavailable as error:
            _log.error("A request was refused with 503: %s", error)
            return self.unavailable(need, error.retry_after)
        except Exception:
            _log.exception("A request was refused with 503")
            return self.unavailable(need)
        self.outage.end()
        if isinstance(verdict, Allow) or CODES[verdict.code].status != 401:
            self.recent.add(need.credential.key)
        return verdict

    def refuse(self, need: NeedKey) -> Deny | None:
        """Return the 429 for a new key from an address that sent too many wrong keys, or None."""
        if need.credential.key in self.recent:
            return None
        wait = self.limits.wait_for(need.address)
        if wait is None:
            return None
        return _too_many(wait, need.operation, session=need.credential.session)

    def begin_lookup(self, need: NeedKey) -> futures.Future[Allow | Deny]:
        """Start `look_up` in a thread and return its future verdict.

        Keys that were good lately have threads of their own: see `lookup_pool`.
        """
        recent = need.credential.key in self.recent
        return self.lookups.begin(
            # `refuse` decides again when it is this key's turn: the keys before it may have been
            # wrong.
            lambda: self.refuse(need) or self.look_up(need),
            lambda: self.unavailable(need),
            client_network(need.address),
            crowded=lambda: replace(_CROWDED, operation=need.operation),
            recent=recent,
        )

    def lookup_timed_out(self, need: NeedKey) -> Deny:
        """Return the 503 for a request whose lookup takes too long.

        The lookup goes on in its thread; there are at most 2 × `lookup_pool.THREADS` threads.
        """
        _log.error("A request was refused with 503: no answer in %g s", self.lookups.timeout)
        return self.unavailable(need)

    def unavailable(self, need: NeedKey, retry_after: float | None = None) -> Deny:
        """Return the 503 for a key that no authority can check. `retry_after` is in seconds."""
        wait = retry_after or self.outage.wait()
        return replace(_UNAVAILABLE, retry_after=wait, operation=need.operation)

    def conclude(self, exchange: Exchange, verdict: Allow | Deny) -> Allow | Deny:
        """Apply the mode to `verdict`: only "enforce" refuses. Write the verdict to `exchange`."""
        exchange.decided = time.perf_counter()
        exchange.verdict = verdict
        request = exchange.request
        exchange.operation = verdict.operation or classify(
            request.method, request.path, self.folders.known
        )
        if isinstance(verdict, Deny):
            closed = exchange.operation.kind in CLOSED
            if verdict.code in _ALWAYS or self.mode.now == "enforce" or closed:
                exchange.verdict = self._count_wrong_key(request, verdict)
                return exchange.verdict
            verdict = _let_pass(request, exchange.operation)
        return self._intercepted(exchange, verdict) if self.interceptors.installed else verdict

    def answer_headers(self, exchange: Exchange) -> tuple[tuple[str, str], ...]:
        """Return the headers that every answer has."""
        request_id = ("X-Request-Id", exchange.request_id)
        return (request_id, _OFF) if self.mode.now == "off" else (request_id,)

    def _intercepted(self, exchange: Exchange, allow: Allow) -> Allow | Deny:
        answer = self.interceptors.on_request(exchange.view())
        if isinstance(answer, Deny):
            exchange.verdict = answer
            return answer
        exchange.added = [(n.lower().encode("ascii"), v.encode("ascii")) for n, v in answer]
        return allow

    @property
    def policy_now(self) -> Policy:
        """The policy for keys, as isolation is now."""
        if self.isolation.now != "enforce":
            return self.policy
        return self._isolated[self.isolation.closed_from]

    def _settle(self, need: NeedKey, principal: Principal | Rejected) -> Allow | Deny:
        verdict = settle(need, principal, time.time(), self.policy_now)
        if isinstance(verdict, Allow):
            verdict = self.limits.admit(verdict)
        if isinstance(principal, Principal):
            if isinstance(verdict, Deny):
                return replace(verdict, principal=principal, operation=need.operation)
            self.count(principal.key_id)
        return verdict

    def _count_wrong_key(self, request: Request, deny: Deny) -> Deny:
        """Count `deny` if it is for a wrong key. Return it, or 429 if the address sent too many."""
        if CODES[deny.code].status != 401 or deny.code == "KEY_MISSING":
            return deny
        wait = self.limits.failed(request.address)
        if wait is None:
            return deny
        refusal = _too_many(wait, deny.operation, session=deny.code == "SESSION_ENDED")
        return replace(refusal, principal=deny.principal)


def _too_many(wait: float, operation: Operation | None, *, session: bool) -> Deny:
    """Return the 429 for an address, in a browser user's words if `session`. `wait`: seconds."""
    effect = (
        "You may be signed out."
        if session
        else "A key that this server has not seen today is not checked now."
    )
    return Deny(
        "RATE_LIMITED",
        f"Too many requests with a wrong key came from your address. {effect}",
        retry_after=wait,
        operation=operation,
    )


def _let_pass(request: Request, operation: Operation) -> Allow:
    # Nobody checked the key, but MLflow's gateway must not send it to a provider all the same.
    credential = credentials.find(request, outbound=operation.outbound, query_key=True)
    if isinstance(credential, Deny):
        credential = credentials.ANYWHERE
    return Allow(operation, None, credential)


def _may_change(verdict: Allow | Deny) -> bool:
    """Return whether `verdict` on an unsure operation may change with newer folders of experiments."""
    return isinstance(verdict, Deny) and verdict.code == "SCOPE_MISSING"


@lru_cache(maxsize=1024)
def _normalized(peer: str) -> str:
    return client_address(peer, (), ())

"""The parts that a verdict takes, and the steps to it that `flow` puts in order."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from dataclasses import dataclass, field, replace
from functools import lru_cache

from mlflow_hokusai_auth.authorities import Authority
from mlflow_hokusai_auth.core import credentials, operations
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
from mlflow_hokusai_auth.server.live_settings import Mode
from mlflow_hokusai_auth.server.upstream.experiment_folders import ExperimentFolders

from . import graphql
from .cors import Cors
from .interceptors import Interceptors
from .limits import Limits, customer
from .lookup_pool import LookupPool, RecentKeys

_log = logging.getLogger(__name__)

#: Seconds that a client is asked to wait, at most, while keys can't be checked.
MAX_WAIT = 30.0
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
_CROWDED = Deny(
    "RATE_LIMITED",
    "Too many requests from your address wait for their keys to be checked. Try again in 5 s.",
    retry_after=5.0,
)
#: On every answer while nobody is asked for a key, so that it can't be overlooked.
_OFF = ("X-Hokusai-Auth-Mode", "off")

#: Seconds in which a body that is read before the verdict must be there.
BODY_SECONDS = 10.0
#: Refusals in every mode: what MLflow could not answer either.
_ALWAYS = frozenset({"MISCONFIGURED", "HEADER_MALFORMED"})

#: Bytes of a body that somebody without a key may send, by rule: a form with a key in it, and what
#: GitHub reports; none for any other.
BODY_LIMITS = {
    "POST /hokusai/login": 4096,
    "POST /hokusai/logout": 4096,
    "POST /api/2.0/hokusai/keys/leaked": 2**20,
}


class Outage:
    """How long to ask clients to wait: the longer keys can't be checked, the longer.

    MLflow's client tries seven times, and after exactly as long as it is told: with a second or two
    each time it would give up on an outage that its own growing pauses outlast.
    """

    def __init__(self, timer: Callable[[], float] = time.monotonic) -> None:
        self._timer = timer
        self._since: float | None = None

    def wait(self) -> float:
        """Seconds until the next try, spread so that clients do not come back all at once."""
        now = self._timer()
        since = self._since = self._since if self._since is not None else now
        return random.uniform(1, 2) * min(max(now - since, 1.0), MAX_WAIT / 2)  # noqa: S311

    def over(self) -> None:
        """Keys can be checked."""
        self._since = None


class Forwarded:
    """Warns, once, of a proxy whose word on the client's address is not taken."""

    def __init__(self) -> None:
        self._warned = False

    def notice(self, request: Request) -> None:
        """Look at `request`, which came straight from its address as far as the gate knows."""
        if self._warned or request.header(b"x-forwarded-for") is None:
            return
        self._warned = True
        _log.warning(
            "A request from %s came with X-Forwarded-For, but HOKUSAI_AUTH_TRUSTED_PROXIES is empty. "
            "If that is a proxy, name it there: else all clients behind it count as one address, and "
            "one of them with wrong keys makes the others wait.",
            request.address or "an unknown address",
        )


@dataclass(frozen=True, slots=True)
class Gate:
    """Everything that a verdict takes; `flow.flow` calls its methods in their order."""

    authority: Authority
    policy: Policy
    prefixes: Prefixes
    cors: Cors
    observer: Observer
    limits: Limits = field(default_factory=Limits)
    interceptors: Interceptors = Interceptors()  # noqa: RUF009 - frozen
    #: What the operator says of the headers that MLflow gets.
    headers: HeaderPolicy | None = None
    #: Called with the id of each key that opens a request.
    count: Callable[[str], object] = str
    lookups: LookupPool = field(default_factory=LookupPool)
    #: Keys that are looked up whatever else their address sends.
    recent: RecentKeys = field(default_factory=RecentKeys)
    outage: Outage = field(default_factory=Outage)
    #: Seconds in which a body that is read before the verdict must be there.
    body_seconds: float = BODY_SECONDS
    #: Public rules that are not configured here -> what to tell whoever sends one. They read no body.
    absent: Mapping[str, str] = field(default_factory=dict)
    #: Proxies whose word on the client's address is taken.
    trusted: tuple[Network, ...] = ()
    forwarded: Forwarded = field(default_factory=Forwarded)
    mode: Mode = field(default_factory=Mode)
    #: The folders of experiments, by which paths of artifacts are judged.
    folders: ExperimentFolders = field(default_factory=ExperimentFolders)

    def address(self, peer: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """The client's address, for a request from the socket address `peer`."""
        if not self.trusted:
            return _alone(peer)
        forwarded = (value for name, value in headers if name == b"x-forwarded-for")
        return client_address(peer, forwarded, self.trusted)

    def plan(self, request: Request) -> Allow | Deny | NeedKey:
        """The first half of the verdict; does no I/O."""
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
        """The verdict if the key is known here already, else None; does no I/O."""
        principal = self.authority.peek(need.credential.key, need.address)
        if principal is None:
            return None
        if self.limits.does_io and getattr(principal, "rate_limit_per_hour", None) is not None:
            return None
        verdict = self._settle(need, principal)
        return None if _may_change(need, verdict) else verdict

    def ask(self, need: NeedKey) -> Allow | Deny:
        """The verdict after asking the authority; blocks. An authority that fails never allows."""
        try:
            principal = self.authority.lookup(need.credential.key, need.address)
            verdict = self._settle(need, principal)
            if need.request is not None and _may_change(need, verdict):
                self.folders.read()
                anew = plan(need.request, self.policy, self.folders.known)
                verdict = self._settle(anew, principal) if isinstance(anew, NeedKey) else anew
        except Throttled as error:
            return replace(_THROTTLED, retry_after=error.retry_after, operation=need.operation)
        except AuthorityUnavailable as error:
            _log.error("A request was refused with 503: %s", error)
            return self.unavailable(need, error.retry_after)
        except Exception:
            _log.exception("A request was refused with 503")
            return self.unavailable(need)
        self.outage.over()
        if isinstance(verdict, Allow) or CODES[verdict.code].status != 401:
            self.recent.add(need.credential.key)
        return verdict

    def decide(self, need: NeedKey) -> Allow | Deny:
        """The verdict of `peek`, `refuse` or `ask`; blocks as long as a request may wait at most."""
        known = self.peek(need) or self.refuse(need)
        if known is not None:
            return known
        try:
            return self.begin(need).result(self.lookups.patience)
        except futures.TimeoutError:
            return self.late(need)

    def refuse(self, need: NeedKey) -> Deny | None:
        """The 429 for a new key from an address with too many wrong keys; None for any other."""
        return None if need.credential.key in self.recent else self._too_often(need)

    def begin(self, need: NeedKey) -> futures.Future[Allow | Deny]:
        """The verdict to come of `ask`, in a thread.

        Keys that were good here lately have threads of their own, see `lookups`.
        """
        recent = need.credential.key in self.recent
        return self.lookups.begin(
            # Refused when it is this key's turn, too: the keys before it may have been wrong.
            lambda: self.refuse(need) or self.ask(need),
            lambda: self.unavailable(need),
            customer(need.address),
            crowded=lambda: replace(_CROWDED, operation=need.operation),
            recent=recent,
        )

    def late(self, need: NeedKey) -> Deny:
        """The refusal of a request that `ask` has no answer for in time.

        The thread of that goes on waiting; there are twice `lookups.THREADS` at most.
        """
        _log.error("A request was refused with 503: no answer in %g s", self.lookups.patience)
        return self.unavailable(need)

    def unavailable(self, need: NeedKey, retry_after: float | None = None) -> Deny:
        """The 503 for a key that no authority can check. `retry_after` is in seconds."""
        wait = retry_after or self.outage.wait()
        return replace(_UNAVAILABLE, retry_after=wait, operation=need.operation)

    def conclude(self, exchange: Exchange, verdict: Allow | Deny) -> Allow | Deny:
        """Apply the mode to `verdict`: only "enforce" refuses. Notes the verdict in `exchange`."""
        exchange.decided = time.perf_counter()
        exchange.verdict = verdict
        request = exchange.request
        exchange.operation = verdict.operation or classify(
            request.method, request.path, self.folders.known
        )
        if isinstance(verdict, Deny):
            closed = exchange.operation.kind in CLOSED
            if verdict.code in _ALWAYS or self.mode.now == "enforce" or closed:
                exchange.verdict = self._or_too_often(request, verdict)
                return exchange.verdict
            verdict = _let_pass(request, exchange.operation)
        return self._intercepted(exchange, verdict) if self.interceptors else verdict

    def marks(self, exchange: Exchange) -> tuple[tuple[str, str], ...]:
        """The headers that every answer has."""
        request_id = ("X-Request-Id", exchange.request_id)
        return (request_id, _OFF) if self.mode.now == "off" else (request_id,)

    def _intercepted(self, exchange: Exchange, allow: Allow) -> Allow | Deny:
        answer = self.interceptors.on_request(exchange.view())
        if isinstance(answer, Deny):
            exchange.verdict = answer
            return answer
        exchange.added = [(n.lower().encode("ascii"), v.encode("ascii")) for n, v in answer]
        return allow

    def _settle(self, need: NeedKey, principal: Principal | Rejected) -> Allow | Deny:
        verdict = settle(need, principal, time.time(), self.policy)
        if isinstance(verdict, Allow):
            verdict = self.limits.admit(verdict)
        if isinstance(principal, Principal):
            if isinstance(verdict, Deny):
                return replace(verdict, principal=principal, operation=need.operation)
            self.count(principal.key_id)
        return verdict

    def _or_too_often(self, request: Request, deny: Deny) -> Deny:
        """`deny`, counted if it is for a wrong key; 429 for an address that sent too many."""
        if CODES[deny.code].status != 401 or deny.code == "KEY_MISSING":
            return deny
        wait = self.limits.failed(request.address)
        if wait is None:
            return deny
        refusal = _too_many(wait, deny.operation, session=deny.code == "SESSION_ENDED")
        return replace(refusal, principal=deny.principal)

    def _too_often(self, need: NeedKey) -> Deny | None:
        wait = self.limits.over(need.address)
        if wait is None:
            return None
        return _too_many(wait, need.operation, session=need.credential.session)


def _too_many(wait: float, operation: Operation | None, *, session: bool) -> Deny:
    """The 429 for an address, in a browser user's words for a `session`; `wait` is in seconds."""
    seconds = math.ceil(wait)
    next_step = (
        f"You may be signed out: reload this page in {seconds} s."
        if session
        else f"A key that this server has not seen today is checked again in {seconds} s."
    )
    return Deny(
        "RATE_LIMITED",
        f"Too many requests with a wrong key came from your address. {next_step}",
        retry_after=wait,
        operation=operation,
    )


def _let_pass(request: Request, operation: Operation) -> Allow:
    # The key was not checked, but it must not go on to a provider for that.
    found = credentials.find(request, outbound=operation.outbound, query_key=True)
    return Allow(operation, None, credentials.ANYWHERE if isinstance(found, Deny) else found)


def body_limit(operation: Operation) -> int | None:
    """Bytes of a body that `operation` reads from somebody without a key; None if it takes a key."""
    if operation.access is not Access.PUBLIC:
        return None
    return BODY_LIMITS.get(operation.rule, 0)


def too_large(operation: Operation) -> Deny:
    """The refusal of a body that is larger than `body_limit`."""
    limit = body_limit(operation)
    message = f"The limit is {limit} bytes here." if limit else "This route takes no body."
    return Deny("BODY_TOO_LARGE", message, operation=operation)


def incomplete(operation: Operation) -> Deny:
    """The refusal of a body that ended early, or took too long."""
    message = f"The body must arrive whole, within {BODY_SECONDS:g} seconds."
    return Deny("BODY_TIMEOUT", message, operation=operation)


def _may_change(need: NeedKey, verdict: Allow | Deny) -> bool:
    """Whether `verdict` may be another one once the folders of experiments are read anew."""
    return need.operation.unsure and isinstance(verdict, Deny) and verdict.code == "SCOPE_MISSING"


def any_query(need: NeedKey) -> NeedKey | None:
    """`need`, of a GraphQL request, for the query that takes the least; None for another request.

    Who may not send that one may send nothing there. Of others the body is read, as only that tells a
    query from a mutation: see `read_graphql`.
    """
    operation = need.operation
    if operation.kind != "graphql" or operation.access is not Access.WRITE:
        return None
    return replace(need, operation=operations.graphql(operation, ("__typename",)))


def read_graphql(need: NeedKey, allow: Allow, body: bytes | None, policy: Policy) -> Allow | Deny:
    """The verdict on the GraphQL request of `need` with this body, None for one that is too large.

    `allow` is the verdict on `any_query`; with it the request has been counted already.
    """
    assert allow.principal is not None
    fields = None if body is None else graphql.query_fields(body)
    operation = operations.graphql(need.operation, fields)
    verdict = settle(replace(need, operation=operation), allow.principal, time.time(), policy)
    if isinstance(verdict, Allow):
        return replace(allow, operation=operation)
    return replace(verdict, principal=allow.principal, operation=operation)


@lru_cache(maxsize=1024)
def _alone(peer: str) -> str:
    return client_address(peer, (), ())

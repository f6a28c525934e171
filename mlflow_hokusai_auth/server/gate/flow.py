"""The flow of a request, written once for both adapters.

`flow` does no I/O. It yields the steps that need I/O (read a body, wait for a verdict); the adapter
takes each step in its own way and sends back the result, as with httpx's `Auth.auth_flow`. `flow`
returns the gate's own answer, or how the adapter forwards the request to MLflow. An adapter decides
nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from concurrent import futures
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

from mlflow_hokusai_auth.core import browser
from mlflow_hokusai_auth.core.credentials import quoted, without_query_key
from mlflow_hokusai_auth.core.denials import redirect, render
from mlflow_hokusai_auth.core.forwarding import dropped, identity_headers
from mlflow_hokusai_auth.core.headers import MAX_BYTES, MAX_HEADERS, too_many
from mlflow_hokusai_auth.core.prefixes import slash_location
from mlflow_hokusai_auth.core.refusal_page import Places, render_page
from mlflow_hokusai_auth.core.types import Allow, Deny, NeedKey, Request
from mlflow_hokusai_auth.server.caller import Caller
from mlflow_hokusai_auth.server.exchange import Exchange, request_id

from . import graphql
from .bodies import body_limit, incomplete, too_large
from .gate import MISMOUNTED, Gate

#: The method of a websocket's handshake. MLflow has no websocket, so the handshake needs the scope of
#: an unknown route.
WEBSOCKET = "WEBSOCKET"

Headers = Sequence[tuple[bytes, bytes]]


class Arrival(NamedTuple):
    """A request as the adapter got it. Nothing is checked yet."""

    method: str
    #: The path with the prefix, percent-decoded once.
    path: str
    query: bytes
    #: The headers in their order, with names in lower case.
    headers: tuple[tuple[bytes, bytes], ...]
    #: The address of the socket's other end.
    peer: str
    #: The reading of `time.perf_counter` on arrival, in seconds.
    began: float
    #: True if the server has a root path, with which the gate and MLflow may read a path differently.
    mounted: bool = False


# The steps that an adapter takes


@dataclass(frozen=True, slots=True)
class ShowQuery:
    """Replace the request's query by `query` wherever the server keeps it for its access log."""

    query: bytes


class Unread(Enum):
    """The reason why the adapter could not read a body."""

    TOO_LARGE = "too large"
    #: The body took too long, or the client disconnected.
    INCOMPLETE = "incomplete"


@dataclass(frozen=True, slots=True)
class ReadBody:
    """Read at most `limit` bytes of body in at most `seconds`; MLflow reads the same bytes again.

    The result is the bytes, or an `Unread`.
    """

    limit: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for `future`. The result is its verdict, or None if it takes longer than `seconds`."""

    future: futures.Future[Allow | Deny]
    seconds: float

    def block(self) -> Allow | Deny | None:
        """Return the result. Blocks."""
        with contextlib.suppress(futures.TimeoutError):
            return self.future.result(self.seconds)
        return None


Step = ShowQuery | ReadBody | Wait


# The results of a flow


@dataclass(frozen=True, slots=True)
class Answer:
    """The gate's own answer."""

    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes = b""


@dataclass(slots=True)
class Forward:
    """A request for MLflow. The adapter reports here how MLflow answers it."""

    gate: Gate
    exchange: Exchange
    allow: Allow
    #: The path without the prefix.
    path: str
    #: Lower-case names of headers that MLflow doesn't get.
    removed: frozenset[bytes]
    #: Headers that MLflow gets in addition.
    added: Headers

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """All headers that MLflow gets."""
        sent = self.exchange.request.headers
        kept = [item for item in sent if item[0] not in self.removed] if self.removed else sent
        return [*kept, *self.added]

    @property
    def caller(self) -> Caller:
        """The caller, for code behind the gate."""
        exchange = self.exchange
        return Caller(
            self.allow.principal,
            exchange.request.address,
            exchange.request_id,
            exchange.answer,
            exchange.named,
            exchange.spared,
        )

    def started(self, status: int, content_type: str) -> Sequence[tuple[str, str]]:
        """Note that MLflow starts to answer. Return the headers to add to the answer."""
        exchange, gate = self.exchange, self.gate
        exchange.started(status, content_type)
        added = (*self.allow.headers, *gate.answer_headers(exchange), *exchange.answer)
        if self.allow.principal is not None:
            added = (_VARY, *added)
        if not gate.interceptors.installed:
            return added
        return (*added, *gate.interceptors.on_response(exchange.view(), status))

    def end(self, *, broke_off: bool = False) -> None:
        """Count and log the request, which MLflow has answered or (`broke_off`) failed to answer."""
        self.exchange.broke_off = broke_off
        self.gate.observer.report(self.exchange)


#: The header of every answer to a key. It keeps caches from giving the answer to another client.
_VARY = ("Vary", "Authorization, Cookie, X-API-Key")
#: Codes of refusals that a browser user resolves by signing in.
_SIGN_IN = frozenset({"KEY_MISSING", "SESSION_ENDED"})
HEADERS_TOO_LARGE = Deny(
    "HEADERS_TOO_LARGE",
    f"Send at most {MAX_HEADERS} headers, of {MAX_BYTES} bytes in all. In a browser, delete the "
    "cookies of this site.",
)


def flow(gate: Gate, arrival: Arrival) -> Generator[Step, Any, Forward | Answer]:
    """Decide on a request. Return what to forward to MLflow, or the gate's own answer."""
    # 1 prepare
    query = quoted(without_query_key(arrival.query))
    if query != arrival.query:
        # This comes first because the server logs the query whatever happens next.
        yield ShowQuery(query)
    prefix, path = gate.prefixes.split(arrival.path)
    large = too_many(arrival.headers)
    address = gate.address(arrival.peer, () if large else arrival.headers)
    request = Request(arrival.method, path or "/", arrival.query, arrival.headers, address)
    exchange = Exchange(request, prefix, request_id(request), arrival.began)
    if not gate.trusted:
        gate.proxy_warning.check(request)

    # 2 plan
    verdict: Allow | Deny
    if arrival.mounted:
        planned: Allow | Deny | NeedKey = MISMOUNTED
    elif large and gate.mode.now != "off":
        planned = HEADERS_TOO_LARGE
    else:
        planned = gate.plan(request)
    # 3 look up, and 4 settle
    if isinstance(planned, NeedKey):
        need = graphql.any_query(planned) or planned
        verdict = gate.peek(need) or (yield from _look_up(gate, need))
        if need is not planned and isinstance(verdict, Allow):
            verdict = yield from _read_query(gate, planned, verdict)
    elif isinstance(planned, Allow) and (limit := body_limit(planned.operation)):
        verdict = yield from _read_form(gate, planned, limit)
    else:
        verdict = planned

    # 5 conclude
    verdict = gate.conclude(exchange, verdict)
    # 6 refuse
    if isinstance(verdict, Deny):
        return _refusal(gate, exchange, verdict, query, path)
    # 7 forward
    if prefix and not path:
        return _to_slash(gate, exchange, query)
    exchange.passed = True
    forward = Forward(
        gate,
        exchange,
        verdict,
        path,
        dropped(request.names, verdict, gate.header_policy),
        (*identity_headers(verdict), *exchange.added),
    )
    if gate.observer.debug_headers:
        gate.observer.show_headers(exchange, forward.headers)
    return forward


def decide(gate: Gate, need: NeedKey) -> Allow | Deny:
    """Return the verdict on a key from a form. Blocks for at most `gate.lookups.timeout` seconds."""
    if (known := gate.peek(need)) is not None:
        return known
    steps = _look_up(gate, need)
    result: Allow | Deny | None = None
    while True:
        try:
            result = steps.send(result).block()
        except StopIteration as done:
            verdict: Allow | Deny = done.value
            return verdict


def _look_up(gate: Gate, need: NeedKey) -> Generator[Wait, Allow | Deny | None, Allow | Deny]:
    """Get the verdict on a key that needs a lookup, which runs in another thread."""
    if (refusal := gate.refuse(need)) is not None:
        return refusal
    verdict = yield Wait(gate.begin_lookup(need), gate.lookups.timeout)
    return verdict if verdict is not None else gate.lookup_timed_out(need)


def _read_query(gate: Gate, need: NeedKey, allow: Allow) -> Generator[Step, Any, Allow | Deny]:
    """Read a GraphQL request's body, which alone tells a query from a mutation, and decide on it."""
    body: bytes | Unread = yield ReadBody(graphql.MAX_BODY, gate.body_seconds)
    if body is Unread.INCOMPLETE:
        return incomplete(need.operation, gate.body_seconds)
    content = body if isinstance(body, bytes) else None
    return graphql.read_graphql(need, allow, content, gate.policy_now)


def _read_form(gate: Gate, public: Allow, limit: int) -> Generator[Step, Any, Allow | Deny]:
    """Read the body of a request without a key, so that no thread of MLflow's waits for it."""
    body: bytes | Unread = yield ReadBody(limit, gate.body_seconds)
    if body is Unread.TOO_LARGE:
        return too_large(public.operation)
    if body is Unread.INCOMPLETE:
        return incomplete(public.operation, gate.body_seconds)
    return public


def _refusal(gate: Gate, exchange: Exchange, deny: Deny, query: bytes, path: str) -> Answer:
    """Return the answer for `deny`.

    A browser that asks for a page goes to the sign-in page, or gets a page that says why not.
    """
    request = exchange.request
    if browser.wants_page(request):
        asked = replace(request, query=query)
        # A relative link from a bare prefix would lead out of it.
        at = slash_location(exchange.prefix) if exchange.prefix and not path else ""
        sign_in = at + browser.login_location(asked)
        if deny.code in _SIGN_IN:
            refusal = redirect(sign_in)
        else:
            root = at + browser.root_location(request)
            places = Places(root, sign_in, at + browser.page_location(asked))
            refusal = render_page(deny, gate.contact, places)
        headers = refusal.headers
    else:
        refusal = render(deny, gate.contact)
        headers = refusal.headers + gate.cors.headers(request.text(b"origin"))
    return _answer(gate, exchange, Answer(refusal.status, headers, refusal.body))


def _to_slash(gate: Gate, exchange: Exchange, query: bytes) -> Answer:
    """Redirect from a bare prefix to the prefix with a slash, where MLflow's page finds its files."""
    location = slash_location(exchange.prefix) + (f"?{query.decode('latin-1')}" if query else "")
    return _answer(gate, exchange, Answer(308, (("Location", location), ("Content-Length", "0"))))


def _answer(gate: Gate, exchange: Exchange, answer: Answer) -> Answer:
    """Count and log the request. Return `answer` with the headers that every answer has."""
    exchange.status, exchange.sent = answer.status, len(answer.body)
    gate.observer.report(exchange)
    body = b"" if exchange.request.method == "HEAD" else answer.body
    return Answer(answer.status, (*answer.headers, *gate.answer_headers(exchange)), body)

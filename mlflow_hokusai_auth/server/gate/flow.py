"""The way of a request, once for both adapters.

`flow` does no I/O: it yields what it needs (a body, a verdict from another thread), the adapter gets
it in its own way and sends it back, as httpx's `Auth.auth_flow` does. What `flow` returns is either
the answer, or how the request goes on to MLflow. An adapter decides nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

from mlflow_hokusai_auth.core import browser
from mlflow_hokusai_auth.core.credentials import without_query_key
from mlflow_hokusai_auth.core.denials import redirect, render
from mlflow_hokusai_auth.core.forwarding import dropped, identity_headers
from mlflow_hokusai_auth.core.headers import MAX_BYTES, MAX_HEADERS, quoted, too_many
from mlflow_hokusai_auth.core.prefixes import slash_location
from mlflow_hokusai_auth.core.types import Allow, Deny, NeedKey, Request
from mlflow_hokusai_auth.server.caller import Caller
from mlflow_hokusai_auth.server.exchange import Exchange, request_id

from . import graphql
from .gate import (
    MISMOUNTED,
    Gate,
    any_query,
    body_limit,
    incomplete,
    read_graphql,
    too_large,
)

#: The method of a websocket's handshake. No route of MLflow's is a websocket, so the gate asks for
#: what an unknown route takes.
WEBSOCKET = "WEBSOCKET"

Headers = Sequence[tuple[bytes, bytes]]


class Arrival(NamedTuple):
    """A request as it came from the server; nothing of it is checked."""

    method: str
    #: Decoded once, with the prefix.
    path: str
    query: bytes
    #: In their order, names in lower case.
    headers: tuple[tuple[bytes, bytes], ...]
    #: The address of the socket's other end.
    peer: str
    #: The reading of `time.perf_counter` when it came, in seconds.
    began: float
    #: The server was given a root path, which would let two readings of one path differ.
    mounted: bool = False


# What a flow asks of its adapter


@dataclass(frozen=True, slots=True)
class ShowQuery:
    """Put `query` in the place of the request's query, wherever the server keeps it for its log."""

    query: bytes


class Unread(Enum):
    """Why there is no body to decide on."""

    TOO_LARGE = "too large"
    #: It took too long, or the client left.
    INCOMPLETE = "incomplete"


@dataclass(frozen=True, slots=True)
class ReadBody:
    """Read the body, of at most `limit` bytes and in at most `seconds`, so that it can be read again.

    Send the bytes, or why there are none.
    """

    limit: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for `future`. Send its result, or None if it takes longer than `seconds`."""

    future: Future[Allow | Deny]
    seconds: float


Step = ShowQuery | ReadBody | Wait


# What a flow returns


@dataclass(frozen=True, slots=True)
class Answer:
    """The gate's own answer."""

    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes = b""


@dataclass(slots=True)
class Forward:
    """How the request goes on to MLflow, and what the adapter reports of the answer."""

    gate: Gate
    exchange: Exchange
    allow: Allow
    #: The path without the prefix.
    path: str
    #: Names of headers (lower case) that MLflow doesn't get.
    removed: frozenset[bytes]
    #: Headers that MLflow gets besides.
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
        )

    def started(self, status: int, content_type: str) -> Sequence[tuple[str, str]]:
        """Note that MLflow begins to answer; return the headers to add to the answer."""
        exchange, gate = self.exchange, self.gate
        exchange.started(status, content_type)
        added = (*self.allow.headers, *gate.marks(exchange), *exchange.answer)
        if self.allow.principal is not None:
            added = (_VARY, *added)
        if not gate.interceptors:
            return added
        return (*added, *gate.interceptors.on_response(exchange.view(), status))

    def over(self, *, broke_off: bool = False) -> None:
        """Count and log the request: MLflow is done with it, or broke off."""
        self.exchange.broke_off = broke_off
        self.gate.observer.over(self.exchange)


#: On every answer to a key, so that no cache on the way gives it to somebody else.
_VARY = ("Vary", "Authorization, Cookie, X-API-Key")
#: Refusals that signing in would answer.
_SIGN_IN = frozenset({"KEY_MISSING", "SESSION_ENDED"})
HEADERS_TOO_LARGE = Deny(
    "HEADERS_TOO_LARGE",
    f"Send at most {MAX_HEADERS} headers, of {MAX_BYTES} bytes in all. In a browser, delete the "
    "cookies of this site.",
)


def flow(gate: Gate, arrival: Arrival) -> Generator[Step, Any, Forward | Answer]:
    """Decide on a request: return how it goes on to MLflow, or the gate's own answer."""
    query = quoted(without_query_key(arrival.query))
    if query != arrival.query:
        # First of all, because the server logs the query whatever happens next.
        yield ShowQuery(query)
    prefix, path = gate.prefixes.split(arrival.path)
    large = too_many(arrival.headers)
    address = gate.address(arrival.peer, () if large else arrival.headers)
    request = Request(arrival.method, path or "/", arrival.query, arrival.headers, address)
    exchange = Exchange(request, prefix, request_id(request), arrival.began)
    if not gate.trusted:
        gate.forwarded.notice(request)

    verdict: Allow | Deny
    if arrival.mounted:
        step: Allow | Deny | NeedKey = MISMOUNTED
    elif large and gate.mode.now != "off":
        step = HEADERS_TOO_LARGE
    else:
        step = gate.plan(request)
    if isinstance(step, NeedKey):
        query_step = any_query(step)
        verdict = gate.peek(query_step or step) or (yield from _ask(gate, query_step or step))
        if query_step and isinstance(verdict, Allow):
            verdict = yield from _read_query(gate, step, verdict)
    elif isinstance(step, Allow) and (limit := body_limit(step.operation)):
        verdict = yield from _read_form(gate, step, limit)
    else:
        verdict = step

    verdict = gate.conclude(exchange, verdict)
    if isinstance(verdict, Deny):
        return _refusal(gate, exchange, verdict, query, path)
    if prefix and not path:
        return _to_slash(gate, exchange, query)
    exchange.passed = True
    forward = Forward(
        gate,
        exchange,
        verdict,
        path,
        dropped(request.names, verdict, gate.headers),
        (*identity_headers(verdict), *exchange.added),
    )
    if gate.observer.debug_headers:
        gate.observer.show_headers(exchange, forward.headers)
    return forward


def _ask(gate: Gate, need: NeedKey) -> Generator[Step, Any, Allow | Deny]:
    """Get the verdict on a key that is not known here from another thread."""
    if (refused := gate.refuse(need)) is not None:
        return refused
    found: Allow | Deny | None = yield Wait(gate.begin(need), gate.lookups.patience)
    return found if found is not None else gate.late(need)


def _read_query(gate: Gate, need: NeedKey, allow: Allow) -> Generator[Step, Any, Allow | Deny]:
    """Read a GraphQL request: only its body tells what it reads, and a query from a mutation."""
    body: bytes | Unread = yield ReadBody(graphql.MAX_BODY, gate.body_seconds)
    if body is Unread.INCOMPLETE:
        return incomplete(need.operation)
    return read_graphql(need, allow, body if isinstance(body, bytes) else None, gate.policy)


def _read_form(gate: Gate, public: Allow, limit: int) -> Generator[Step, Any, Allow | Deny]:
    """Read the body of somebody without a key, so that MLflow's threads wait for none."""
    body: bytes | Unread = yield ReadBody(limit, gate.body_seconds)
    if body is Unread.TOO_LARGE:
        return too_large(public.operation)
    return incomplete(public.operation) if body is Unread.INCOMPLETE else public


def _refusal(gate: Gate, exchange: Exchange, deny: Deny, query: bytes, path: str) -> Answer:
    """The answer for `deny`, which sends a browser that asks for a page to the sign-in page."""
    request = exchange.request
    if deny.code in _SIGN_IN and browser.wants_page(request):
        location = browser.login_location(replace(request, query=query))
        # A relative link from a bare prefix would lead out of it.
        at = slash_location(exchange.prefix) if exchange.prefix and not path else ""
        refusal = redirect(at + location)
        headers = refusal.headers
    else:
        refusal = render(deny)
        headers = refusal.headers + gate.cors.headers(request.text(b"origin"))
    return _answer(gate, exchange, Answer(refusal.status, headers, refusal.body))


def _to_slash(gate: Gate, exchange: Exchange, query: bytes) -> Answer:
    """The way from a bare prefix to its slash, below which MLflow's page finds its files."""
    location = slash_location(exchange.prefix) + (f"?{query.decode('latin-1')}" if query else "")
    return _answer(gate, exchange, Answer(308, (("Location", location), ("Content-Length", "0"))))


def _answer(gate: Gate, exchange: Exchange, answer: Answer) -> Answer:
    """`answer` as it is sent, with the headers that every answer has. Counts and logs the request."""
    exchange.status, exchange.sent = answer.status, len(answer.body)
    gate.observer.over(exchange)
    body = b"" if exchange.request.method == "HEAD" else answer.body
    return Answer(answer.status, (*answer.headers, *gate.marks(exchange)), body)

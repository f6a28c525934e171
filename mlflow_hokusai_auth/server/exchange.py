"""One request and its outcome: the gate writes it, and observers read it."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mlflow_hokusai_auth.core.credentials import QUERY_PLACE
from mlflow_hokusai_auth.core.keys import redact
from mlflow_hokusai_auth.core.types import Allow, Deny, Operation, Request

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class RequestView:
    """The part of a request that interceptors see: no header, no query and no key."""

    method: str
    #: The path without the prefix.
    path: str
    prefix: str
    request_id: str
    #: The row of the table of routes, "" for an unknown path.
    rule: str
    key_id: str
    owner: str
    address: str


@dataclass(slots=True)
class Exchange:
    """One request and its outcome. Times are readings of `time.perf_counter`, in seconds."""

    request: Request
    prefix: str
    request_id: str
    began: float
    operation: Operation | None = None
    #: The gate's own verdict; with mode observe, MLflow is called even after a Deny.
    verdict: Allow | Deny | None = None
    #: Time of the verdict.
    decided: float = 0.0
    #: Time of the first byte of MLflow's response, 0 if there was none.
    answered: float = 0.0
    #: Time of the request's end.
    ended: float = 0.0
    status: int = 0
    #: True if MLflow refused Host or Origin: its only 403 in text/plain, not JSON or HTML.
    host_refusal: bool = False
    #: Bytes of the response's body.
    sent: int = 0
    #: True if MLflow was called.
    passed: bool = False
    broke_off: bool = False
    #: Headers that interceptors add to the request for MLflow.
    added: Sequence[tuple[bytes, bytes]] = ()
    #: Headers that code behind the gate adds to the response.
    answer: list[tuple[str, str]] = field(default_factory=list)
    #: Fields that code behind the gate adds to the decision log, such as a registered model's name.
    named: dict[str, str] = field(default_factory=dict)
    #: The refusals that code behind the gate has only counted, by code and kind.
    spared: set[tuple[str, str]] = field(default_factory=set)

    def view(self) -> RequestView:
        """Return the part that interceptors see."""
        principal = self.verdict.principal if self.verdict is not None else None
        return RequestView(
            self.request.method,
            self.request.path,
            self.prefix,
            self.request_id,
            self.operation.rule if self.operation is not None else "",
            principal.key_id if principal else "",
            principal.owner if principal else "",
            self.request.address,
        )

    @property
    def query_key(self) -> bool:
        """True if the request's key was in its query."""
        credential = self.verdict.credential if isinstance(self.verdict, Allow) else None
        return credential is not None and QUERY_PLACE in credential.places

    def started(self, status: int, content_type: str) -> None:
        """Record the beginning of MLflow's response."""
        self.answered = time.perf_counter()
        self.status = status
        self.host_refusal = status == 403 and content_type.startswith("text/plain")


class Observer(Protocol):
    """The receiver of the gate's reports about requests. Its methods never raise."""

    #: True if the gate should call `show_headers` for each request that it forwards.
    debug_headers: bool

    def show_headers(self, exchange: Exchange, after: Iterable[tuple[bytes, bytes]]) -> None:
        """Report the request's headers, and those that MLflow gets (`after`)."""
        ...

    def report(self, exchange: Exchange) -> None:
        """Report a request that is over."""
        ...


def request_id(request: Request) -> str:
    """Return the client's X-Request-Id if it is well-formed and contains no key, or a new id."""
    if b"x-request-id" in request.names:
        for name, value in request.headers:
            if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
                text = value.decode("ascii")
                if redact(text) == text:
                    return text
    return "%016x" % random.getrandbits(64)  # noqa: UP031 - faster than an f-string

"""One request and its outcome: the gate fills it in, its observers read it."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from mlflow_hokusai_auth.core.credentials import QUERY_PLACE
from mlflow_hokusai_auth.core.keys import redact
from mlflow_hokusai_auth.core.types import Allow, Deny, Operation, Request

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class RequestView:
    """What an interceptor sees of a request; no header, no query and no key."""

    method: str
    #: Without the prefix.
    path: str
    prefix: str
    request_id: str
    #: The rule of the table of routes, "" for a path that MLflow is not known to have.
    rule: str
    key_id: str
    owner: str
    address: str


@dataclass(slots=True)
class Exchange:
    """One request and what became of it. Times are readings of `time.perf_counter`, in seconds."""

    request: Request
    prefix: str
    request_id: str
    began: float
    operation: Operation | None = None
    #: The gate's own verdict; with mode observe the request was let pass whatever it was.
    verdict: Allow | Deny | None = None
    decided: float = 0.0
    #: Of the first byte of MLflow's answer, 0 if there was none.
    answered: float = 0.0
    #: When it was over.
    ended: float = 0.0
    status: int = 0
    #: MLflow's own refusal of Host or Origin, told by its form: text where all else is JSON or HTML.
    host_refusal: bool = False
    #: Bytes of the response's body.
    sent: int = 0
    #: Whether MLflow was called.
    passed: bool = False
    broke_off: bool = False
    #: Headers that interceptors add to the request for MLflow.
    added: list[tuple[bytes, bytes]] = field(default_factory=list)
    #: Headers that code behind the gate adds to the answer.
    answer: list[tuple[str, str]] = field(default_factory=list)
    #: What code behind the gate says that the request is about: a registered model, by its name.
    named: dict[str, str] = field(default_factory=dict)

    def view(self) -> RequestView:
        """What interceptors see of it."""
        who = self.verdict.principal if self.verdict is not None else None
        return RequestView(
            self.request.method,
            self.request.path,
            self.prefix,
            self.request_id,
            self.operation.rule if self.operation is not None else "",
            who.key_id if who else "",
            who.owner if who else "",
            self.request.address,
        )

    @property
    def query_key(self) -> bool:
        """Whether the request's key was in its query."""
        credential = self.verdict.credential if isinstance(self.verdict, Allow) else None
        return credential is not None and QUERY_PLACE in credential.places

    def started(self, status: int, content_type: str) -> None:
        """MLflow begins to answer."""
        self.answered = time.perf_counter()
        self.status = status
        self.host_refusal = status == 403 and content_type.startswith("text/plain")


class Observer(Protocol):
    """Everything that reports requests. Its methods never raise."""

    #: The gate calls `show_headers` for each request that it passes on.
    debug_headers: bool

    def show_headers(self, exchange: Exchange, after: Iterable[tuple[bytes, bytes]]) -> None:
        """Report the headers that came, and those that MLflow gets (`after`)."""
        ...

    def over(self, exchange: Exchange) -> None:
        """Report a request that is over."""
        ...


def request_id(request: Request) -> str:
    """The client's X-Request-Id, if it is a plain one and no key, or a new one."""
    sent = request.headers if request.header(b"x-request-id") is not None else ()
    for name, value in sent:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            text = value.decode("ascii")
            if redact(text) == text:
                return text
    return f"{random.getrandbits(64):016x}"

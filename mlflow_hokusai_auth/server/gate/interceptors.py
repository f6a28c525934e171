"""Interceptors: the operator's own code that sees requests and responses, for debugging or site rules.

An interceptor is an object that an entry point of the group `mlflow_hokusai_auth.interceptor` names. It
imports its types from `server.interceptors`, and has one or both of these methods:

    def on_request(self, request: RequestView) -> Mapping[str, str] | Refusal | None
        Called after the gate has allowed the request. Returns headers to add for MLflow, or a refusal.
    def on_response(self, request: RequestView, status: int) -> Mapping[str, str] | None
        Called when MLflow starts to answer. Returns headers to add for the client.

An exception in an interceptor is logged and counted. `HOKUSAI_AUTH_INTERCEPTOR_ERRORS` says whether it
is ignored then, or refuses the request with 503. Interceptors run on the server's event loop, so they
must not block.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from mlflow_hokusai_auth.core.types import Deny
from mlflow_hokusai_auth.server import metrics
from mlflow_hokusai_auth.server.exchange import RequestView

GROUP = "mlflow_hokusai_auth.interceptor"

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)
_VALUE = re.compile(r"[ -~]*", re.ASCII)
#: Headers that frame a message, or that only the gate sets.
_RESERVED = re.compile(
    r"content-length|transfer-encoding|connection|host|set-cookie|x-hokusai-.*", re.IGNORECASE
)
_FAILED = Deny(
    "INTERCEPTOR_FAILED", "A rule of this server failed. Its operator finds why in the log."
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An interceptor's refusal. The client gets 403 with `message`."""

    message: str


@dataclass(frozen=True, slots=True)
class Interceptors:
    """The installed interceptors, each with the name of its entry point."""

    installed: Sequence[tuple[str, Any]] = ()
    refuse_on_error: bool = False

    def __bool__(self) -> bool:
        return bool(self.installed)

    def on_request(self, view: RequestView) -> Deny | list[tuple[str, str]]:
        """Return the headers to add to the request for MLflow, or a refusal. Never raises."""
        added: list[tuple[str, str]] = []
        for name, interceptor in self.installed:
            answer, failed = self._call(name, getattr(interceptor, "on_request", None), view)
            if failed and self.refuse_on_error:
                return _FAILED
            if isinstance(answer, Refusal):
                return Deny("INTERCEPTED", answer.message)
            added += answer or []
        return added

    def on_response(self, view: RequestView, status: int) -> list[tuple[str, str]]:
        """Return the headers to add to the response. Never raises."""
        added: list[tuple[str, str]] = []
        for name, interceptor in self.installed:
            answer, _ = self._call(name, getattr(interceptor, "on_response", None), view, status)
            added += answer if isinstance(answer, list) else []
        return added

    def _call(
        self, name: str, method: Callable[..., Any] | None, *arguments: Any
    ) -> tuple[list[tuple[str, str]] | Refusal | None, bool]:
        """Call `method`. Return its answer, and whether it failed."""
        if method is None:
            return None, False
        try:
            answer = method(*arguments)
            return answer if isinstance(answer, Refusal) else _headers(answer), False
        except Exception as error:
            # The log gets the exception's class only, because its text may quote the request.
            _log.error("Interceptor %s failed: %s", name, type(error).__name__)
            _log.debug("Interceptor %s failed", name, exc_info=True)
            metrics.INTERCEPTOR_ERRORS.labels(name).inc()
            return None, True


def load(*, refuse_on_error: bool) -> Interceptors:
    """Load the interceptors of the installed distributions, in the order of their names.

    Raises ValueError if one can't be loaded, because the server must not run without a site's rule.
    """
    interceptors = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            loaded = point.load()
            interceptors.append((point.name, loaded() if isinstance(loaded, type) else loaded))
            metrics.INTERCEPTOR_ERRORS.labels(point.name)  # from 0, for Prometheus
        except Exception as error:
            raise ValueError(
                f"interceptor {point.name} ({point.value}) can't be loaded: {type(error).__name__}"
            ) from None
    return Interceptors(tuple(interceptors), refuse_on_error)


def _headers(answer: Mapping[str, str] | None) -> list[tuple[str, str]]:
    added = []
    for name, value in (answer or {}).items():
        # WSGI makes the same variable of "_" and "-".
        reserved = _RESERVED.fullmatch(name.replace("_", "-"))
        if reserved or not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ValueError("a header that can't be added")
        added.append((name, value))
    return added

"""Code of the operator's that looks at requests and responses, for debugging or for rules of a site.

An interceptor is an object named by an entry point of the group `mlflow_hokusai_auth.interceptor`, with
either or both of these methods:

    def on_request(self, request: RequestView) -> Mapping[str, str] | Refusal | None
        after the gate allowed it; headers to add for MLflow, or a refusal
    def on_response(self, request: RequestView, status: int) -> Mapping[str, str] | None
        when MLflow begins to answer; headers to add for the client

An exception in one breaks no request: it is logged, counted, and then ignored, or answered with 503,
as `HOKUSAI_AUTH_INTERCEPTOR_ERRORS` says. They run on the server's event loop, so they must not block.
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
#: What frames a message, or is the gate's own to say.
_RESERVED = re.compile(
    r"content-length|transfer-encoding|connection|host|set-cookie|x-hokusai-.*", re.IGNORECASE
)
_FAILED = Deny(
    "INTERCEPTOR_FAILED", "A rule of this server failed. Its operator finds why in the log."
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An interceptor's refusal: 403, with `message` for whoever sent the request."""

    message: str


@dataclass(frozen=True, slots=True)
class Interceptors:
    """Those that are installed, by the name of their entry point."""

    installed: Sequence[tuple[str, Any]] = ()
    refuse_on_error: bool = False

    def __bool__(self) -> bool:
        return bool(self.installed)

    def on_request(self, view: RequestView) -> Deny | list[tuple[str, str]]:
        """Headers to add to the request for MLflow, or the refusal. Never raises."""
        added: list[tuple[str, str]] = []
        for name, one in self.installed:
            answer, failed = self._ask(name, getattr(one, "on_request", None), view)
            if failed and self.refuse_on_error:
                return _FAILED
            if isinstance(answer, Refusal):
                return Deny("INTERCEPTED", answer.message)
            added += answer or []
        return added

    def on_response(self, view: RequestView, status: int) -> list[tuple[str, str]]:
        """Headers to add to the response. Never raises."""
        added: list[tuple[str, str]] = []
        for name, one in self.installed:
            answer, _ = self._ask(name, getattr(one, "on_response", None), view, status)
            added += answer if isinstance(answer, list) else []
        return added

    def _ask(
        self, name: str, method: Callable[..., Any] | None, *arguments: Any
    ) -> tuple[list[tuple[str, str]] | Refusal | None, bool]:
        """The answer, and whether the interceptor failed."""
        if method is None:
            return None, False
        try:
            answer = method(*arguments)
            return answer if isinstance(answer, Refusal) else _headers(answer), False
        except Exception as error:
            # Only its kind: the text may quote what the interceptor was shown.
            _log.error("Interceptor %s failed: %s", name, type(error).__name__)
            _log.debug("Interceptor %s failed", name, exc_info=True)
            metrics.INTERCEPTOR_ERRORS.labels(name).inc()
            return None, True


def load(*, refuse_on_error: bool) -> Interceptors:
    """Those of the installed distributions, in the order of their names.

    Raises ValueError for one that can't be loaded: a rule that is missing must not go unseen.
    """
    found = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            loaded = point.load()
            found.append((point.name, loaded() if isinstance(loaded, type) else loaded))
            metrics.INTERCEPTOR_ERRORS.labels(point.name)  # from 0, for Prometheus
        except Exception as error:
            raise ValueError(
                f"interceptor {point.name} ({point.value}) can't be loaded: {type(error).__name__}"
            ) from None
    return Interceptors(tuple(found), refuse_on_error)


def _headers(answer: Mapping[str, str] | None) -> list[tuple[str, str]]:
    added = []
    for name, value in (answer or {}).items():
        # WSGI makes one header of both spellings.
        reserved = _RESERVED.fullmatch(name.replace("_", "-"))
        if reserved or not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ValueError("a header that can't be added")
        added.append((name, value))
    return added

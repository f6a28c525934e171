"""The `mlflow.request_header_provider` entry point: adds the key to MLflow's own requests.

MLflow asks providers for headers without passing the URL, so the provider takes it from the call stack.
Among the locals of the nearest `http_request` of mlflow/utils/rest_utils.py are the URL (2.9: its
parts) and the `kwargs` dictionary that it later passes to `requests.Session.request`. The provider adds
a response hook to that dictionary. If either is missing, no key is sent.
"""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any

from mlflow.tracking.request_header.abstract_request_header_provider import RequestHeaderProvider

from . import origin_guard, profile

_CALLER = ("mlflow.utils.rest_utils", "http_request")
_MAX_DEPTH = 16


class HokusaiHeaderProvider(RequestHeaderProvider):  # type: ignore[misc,unused-ignore]
    """Sets `X-API-Key` on requests to the origins that the key belongs to, and on no others."""

    def in_context(self) -> bool:
        """Return True: each request decides anew if there is a key to send."""
        return True

    def request_headers(self) -> dict[str, str]:
        """Return `{"X-API-Key": key}` or `{}`. Never raises: MLflow would log the error's text."""
        try:
            return _headers(sys._getframe(1))
        except Exception as error:
            profile.warn_once(f"{origin_guard.HEADER} was not sent ({type(error).__name__}).")
            return {}


def _headers(frame: FrameType | None) -> dict[str, str]:
    key = profile.api_key()
    if key is None:
        return {}
    call = _find_call(frame)
    url = _url(call)
    kwargs = call.get("kwargs")
    if url is None or not isinstance(kwargs, dict):
        return _send_nothing("this version of MLflow does not reveal the URL of a request")
    # MLflow raises TypeError when a provider and the caller set the same header.
    if _has_header(call.get("extra_headers")) or not origin_guard.may_send(url, key):
        return {}
    if getattr(call.get("host_creds"), "use_databricks_sdk", False):
        return _send_nothing("the Databricks SDK sends this request, so redirects can't be checked")
    if not _add_hook(kwargs):
        return {}
    return {origin_guard.HEADER: key}


def _find_call(frame: FrameType | None) -> dict[str, Any]:
    """Return the locals of the `http_request` that prepares a request, or {} if the stack has none."""
    for _ in range(_MAX_DEPTH):
        if frame is None:
            break
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == _CALLER:
            return frame.f_locals
        frame = frame.f_back
    return {}


def _url(call: dict[str, Any]) -> str | None:
    url = call.get("url")
    if url is None:
        # MLflow 2.9 joins the parts only after it has the headers.
        host, endpoint = getattr(call.get("host_creds"), "host", None), call.get("endpoint")
        if isinstance(host, str) and isinstance(endpoint, str):
            url = host.removesuffix("/") + endpoint
    return url if isinstance(url, str) else None


def _has_header(headers: dict[str, str] | None) -> bool:
    return any(name.lower() == origin_guard.HEADER.lower() for name in headers or ())


def _add_hook(kwargs: dict[str, Any]) -> bool:
    """Add the response hook to the request; return False if it already has one.

    It has one if this provider is registered twice (by two distributions, for example). MLflow would
    then join the two keys with a space.
    """
    hooks = kwargs.get("hooks") or {}
    present = hooks.get("response") or []
    present = [present] if callable(present) else list(present)
    if origin_guard.check_response in present:
        return False
    # The hooks are copied, as the caller may use its dictionary for the next request.
    kwargs["hooks"] = {**hooks, "response": [*present, origin_guard.check_response]}
    return True


def _send_nothing(reason: str) -> dict[str, str]:
    if os.environ.get("MLFLOW_TRACKING_AUTH") != "hokusai":
        profile.warn_once(
            f"{origin_guard.HEADER} was not sent: {reason}. Set MLFLOW_TRACKING_AUTH=hokusai instead."
        )
    return {}

"""The `mlflow.request_header_provider` entry point: adds the key to MLflow's own requests.

MLflow asks providers for headers without saying for which URL. The call stack knows: the nearest
`http_request` of mlflow/utils/rest_utils.py has the URL among its locals (2.9: its parts), and a
`kwargs` dictionary that it later hands to `requests.Session.request`, where a response hook can be
put. Where either is missing, no key is sent.
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
    """Gives `X-API-Key` to requests for the origins that the key belongs to, and to no others."""

    def in_context(self) -> bool:
        """Always True; whether there is a key to send is decided per request."""
        return True

    def request_headers(self) -> dict[str, str]:
        """`{"X-API-Key": key}` or `{}`. Never raises: MLflow would log the exception's text."""
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
        return _keep_back("this version of MLflow does not tell where a request goes")
    # MLflow raises TypeError when a provider and the caller set the same header.
    if _has_header(call.get("extra_headers")) or not origin_guard.may_send(url):
        return {}
    if getattr(call.get("host_creds"), "use_databricks_sdk", False):
        return _keep_back("the Databricks SDK sends this request and takes no redirect check")
    if not _add_hook(kwargs):
        return {}
    return {origin_guard.HEADER: key}


def _find_call(frame: FrameType | None) -> dict[str, Any]:
    """The locals of the `http_request` that is being prepared, or {} if it isn't on the stack."""
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
        # MLflow 2.9 joins them after it has asked for the headers.
        host, endpoint = getattr(call.get("host_creds"), "host", None), call.get("endpoint")
        if isinstance(host, str) and isinstance(endpoint, str):
            url = host.removesuffix("/") + endpoint
    return url if isinstance(url, str) else None


def _has_header(headers: dict[str, str] | None) -> bool:
    return any(name.lower() == origin_guard.HEADER.lower() for name in headers or ())


def _add_hook(kwargs: dict[str, Any]) -> bool:
    """Put the look at the answer among the request's hooks; False if it is there already.

    It is there when this provider is registered a second time (by two distributions, for example),
    and MLflow would then join the two values with a space.
    """
    hooks = kwargs.get("hooks") or {}
    present = hooks.get("response") or []
    present = [present] if callable(present) else list(present)
    if origin_guard.look_at_answer in present:
        return False
    # A copy: the caller may use its own dictionary for the next request.
    kwargs["hooks"] = {**hooks, "response": [*present, origin_guard.look_at_answer]}
    return True


def _keep_back(reason: str) -> dict[str, str]:
    if os.environ.get("MLFLOW_TRACKING_AUTH") != "hokusai":
        profile.warn_once(
            f"{origin_guard.HEADER} was not sent: {reason}. Set MLFLOW_TRACKING_AUTH=hokusai instead."
        )
    return {}

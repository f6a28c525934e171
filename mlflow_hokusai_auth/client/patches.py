"""Adds the key to the requests that MLflow sends without its `http_request`, and speaks of waits.

MLflow asks no provider for the headers of these requests, so the modules that send them are patched
right after their import. `tests/vectors/mlflow_http.txt` lists every module of MLflow that sends
requests, and how each gets a key.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import requests
from urllib3.util import Retry

from . import origin_guard, profile, waiting

_MARK = "_hokusai_auth"


def install() -> None:
    """Patch the modules when they are imported, or now if they already are.

    Imports nothing of MLflow, as it runs during MLflow's own import.
    """
    for name, patch in _PATCHES.items():
        if name in sys.modules:
            patch(sys.modules[name])
    if _Finder not in sys.meta_path:
        # MLflow's own import hooks (mlflow.utils.import_hooks) use a protocol that Python removes.
        sys.meta_path.insert(0, _Finder)


class _Finder:
    """Finds the modules as Python does, and patches each one after its code has run."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        patch = _PATCHES.get(name)
        spec = PathFinder.find_spec(name, path, target) if patch is not None else None
        if patch is None or spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


def is_patched(module: ModuleType) -> bool:
    """Return True if requests of `module` carry the key."""
    return hasattr(module, _MARK)


def patch_otel(module: ModuleType) -> None:
    """Send the spans of `mlflow.otel.autolog()` with the key, which is read for each request.

    Never raises, as the import of `module` would fail.
    """
    exporter = getattr(module, "OTLPSpanExporter", None)
    if is_patched(module) or not isinstance(exporter, type):
        return
    try:
        parameters = inspect.signature(exporter).parameters
    except (TypeError, ValueError):
        return
    if "session" not in parameters:
        return

    class Exporter(exporter):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if "session" not in kwargs:
                from mlflow_hokusai_auth.client.auth_provider import HokusaiAuth

                kwargs["session"] = requests.Session()
                kwargs["session"].auth = HokusaiAuth()
            super().__init__(*args, **kwargs)

    Exporter.__name__ = Exporter.__qualname__ = exporter.__name__
    module.OTLPSpanExporter = Exporter  # type: ignore[attr-defined]
    setattr(module, _MARK, True)


def patch_gateway(module: ModuleType) -> None:
    """Send the key as a bearer token with calls of `gateway:/…` from here, such as a judge's.

    X-API-Key would be unsafe: the HTTP clients in use (requests, aiohttp, LiteLLM) drop only
    Authorization when they follow a redirect to another host. Never raises.
    """
    before = getattr(module, "_build_auth_headers", None)
    resolve = getattr(module, "_resolve_gateway_uri", None)
    if is_patched(module) or before is None or resolve is None:
        return

    def build_auth_headers() -> dict[str, str] | None:
        headers: dict[str, str] | None = before()
        if headers:
            return headers  # MLflow found a user and password, which take precedence
        try:
            key = profile.api_key()
            if key is not None and origin_guard.may_send(resolve(), key):
                return {"Authorization": f"Bearer {key}"}
        except Exception as error:
            profile.warn_once(f"No key was sent to the gateway ({type(error).__name__}).")
        return headers

    module._build_auth_headers = build_auth_headers  # type: ignore[attr-defined]
    setattr(module, _MARK, True)


def patch_retries(module: ModuleType) -> None:
    """Say at once that the server tells MLflow to wait. Never raises."""
    if is_patched(module):
        return
    for name in ("Retry", "JitteredRetry"):
        retry = getattr(module, name, None)
        if isinstance(retry, type) and issubclass(retry, Retry):
            setattr(module, name, waiting.saying(retry))
    setattr(module, _MARK, True)


_PATCHES = {
    "mlflow.utils.request_utils": patch_retries,
    "mlflow.otel": patch_otel,
    "mlflow.genai.utils.gateway_utils": patch_gateway,
}

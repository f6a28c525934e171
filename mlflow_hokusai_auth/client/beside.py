"""MLflow's requests to its server that don't go through its `http_request`: they carry the key, too.

MLflow asks no provider for their headers. So what makes them is changed, right after MLflow has
imported it, which it does when it is first used. `tests/vectors/mlflow_http.txt` lists every module of
MLflow's that sends requests, and how each gets a key.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import requests

from . import origin_guard, profile

_MARK = "_hokusai_auth"


def install() -> None:
    """Have the modules changed when they are imported, or now if they are.

    Called while MLflow is imported, so nothing of MLflow's is imported here.
    """
    for name, change in _CHANGES.items():
        if name in sys.modules:
            change(sys.modules[name])
    if _Finder not in sys.meta_path:
        # MLflow's own hooks (mlflow.utils.import_hooks) use a way to load that Python gives up.
        sys.meta_path.insert(0, _Finder)


class _Finder:
    """Finds the modules as Python does, and has them changed after they have run."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        change = _CHANGES.get(name)
        spec = PathFinder.find_spec(name, path, target) if change is not None else None
        if change is None or spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def works_in(module: ModuleType) -> bool:
    """Whether what `module` sends carries the key."""
    return hasattr(module, _MARK)


def change_otel(module: ModuleType) -> None:
    """Have the spans of `mlflow.otel.autolog()` sent with the key, read anew for each request.

    Never raises: the import would fail.
    """
    exporter = getattr(module, "OTLPSpanExporter", None)
    if works_in(module) or not isinstance(exporter, type):
        return
    try:
        takes = inspect.signature(exporter).parameters
    except (TypeError, ValueError):
        return
    if "session" not in takes:
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


def change_gateway(module: ModuleType) -> None:
    """Have judges and others that call `gateway:/…` from here send the key as a bearer token.

    Not as X-API-Key: what sends these requests (requests, aiohttp, LiteLLM) knows nothing of us, and
    takes only Authorization away when it is redirected to another host. Never raises.
    """
    before = getattr(module, "_build_auth_headers", None)
    resolve = getattr(module, "_resolve_gateway_uri", None)
    if works_in(module) or before is None or resolve is None:
        return

    def build_auth_headers() -> dict[str, str] | None:
        headers: dict[str, str] | None = before()
        if headers:
            return headers  # user and password, which count more for MLflow than anything else
        try:
            key = profile.api_key()
            if key is not None and origin_guard.may_send(resolve()):
                return {"Authorization": f"Bearer {key}"}
        except Exception as error:
            profile.warn_once(f"The gateway was sent no key ({type(error).__name__}).")
        return headers

    module._build_auth_headers = build_auth_headers  # type: ignore[attr-defined]
    setattr(module, _MARK, True)


_CHANGES = {
    "mlflow.otel": change_otel,
    "mlflow.genai.utils.gateway_utils": change_gateway,
}

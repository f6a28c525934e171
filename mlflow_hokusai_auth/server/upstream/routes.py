"""Every route that an MLflow server answers, to check that `core.routes` has a row for each.

`python -m mlflow_hokusai_auth.server.upstream.routes` prints those of the installed MLflow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from . import apps

#: (method, rule, origin): origin is "flask", or "native" for FastAPI's own routes.
Route = tuple[str, str, str]

_FLASK_PATH = re.compile(r"<path:(\w+)>")
_FLASK_SEGMENT = re.compile(r"<(\w+)>")


def mlflow_routes(flask_app: Any, fastapi_app: Any | None = None) -> list[Route]:
    """The routes of an MLflow server, sorted, once each, as the app that has them spells them.

    `fastapi_app` is None under gunicorn and waitress, which serve the Flask app alone. HEAD and
    OPTIONS are left out where the framework adds them by itself, next to another method.
    """
    routes = set(_flask_routes(flask_app))
    if fastapi_app is not None:
        routes.update(native_routes(fastapi_app))
    return sorted(routes)


def installed_routes() -> list[Route]:
    """The routes of the installed MLflow, as its server under uvicorn has them."""
    app = apps.flask_app()
    return mlflow_routes(app, apps.fastapi_app(app))


def native_routes(fastapi_app: Any) -> Iterator[Route]:
    """FastAPI's own routes, in the order in which it tries them."""
    return _native_routes(fastapi_app.router.routes)


def template(rule: str) -> str:
    """`rule` as `core.routes` spells it: Flask's `<x>` and `<path:x>` become `{x}`, `{x:path}`."""
    return _FLASK_SEGMENT.sub(r"{\1}", _FLASK_PATH.sub(r"{\1:path}", rule))


def _flask_routes(app: Any) -> Iterator[Route]:
    for rule in app.url_map.iter_rules():
        methods = set(rule.methods or ())
        for method in methods - {"HEAD", "OPTIONS"} or methods:
            yield method, rule.rule, "flask"


def _native_routes(routes: Iterable[Any]) -> Iterator[Route]:
    for route in routes:
        if hasattr(route, "effective_route_contexts"):
            # FastAPI 0.165 keeps an included router as one entry, which makes its routes, with
            # their prefixes, on demand.
            yield from _native_routes(route.effective_route_contexts())
            continue
        route = getattr(route, "starlette_route", None) or route
        methods = set(getattr(route, "methods", None) or ())
        for method in sorted(methods - {"HEAD", "OPTIONS"} or methods):
            yield method, route.path, "native"


if __name__ == "__main__":
    from mlflow import __version__

    for line in sorted({f"{method} {template(rule)}" for method, rule, _ in installed_routes()}):
        print(__version__, line)

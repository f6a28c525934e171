"""The routes that an MLflow server answers; `core.routes` must have a row for each.

`python -m mlflow_hokusai_auth.server.upstream.routes` prints the routes of the installed MLflow.
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
    """Return the routes of an MLflow server, sorted, without duplicates, in the framework's spelling.

    `fastapi_app` is None under gunicorn and waitress, which serve the Flask app alone. HEAD and
    OPTIONS are left out next to another method, because the framework adds them by itself.
    """
    routes = set(_flask_routes(flask_app))
    if fastapi_app is not None:
        routes.update(native_routes(fastapi_app))
    return sorted(routes)


def installed_routes() -> list[Route]:
    """Return the routes of the installed MLflow's server under uvicorn."""
    app = apps.flask_app()
    return mlflow_routes(app, apps.fastapi_app(app))


def native_routes(fastapi_app: Any) -> Iterator[Route]:
    """Yield FastAPI's own routes in the order in which FastAPI tries them."""
    return _native_routes(fastapi_app.router.routes)


def template(rule: str) -> str:
    """Return `rule` in the spelling of `core.routes`: `{x}` for `<x>`, `{x:path}` for `<path:x>`."""
    return _FLASK_SEGMENT.sub(r"{\1}", _FLASK_PATH.sub(r"{\1:path}", rule))


def _flask_routes(app: Any) -> Iterator[Route]:
    for rule in app.url_map.iter_rules():
        methods = set(rule.methods or ())
        for method in methods - {"HEAD", "OPTIONS"} or methods:
            yield method, rule.rule, "flask"


def _native_routes(routes: Iterable[Any]) -> Iterator[Route]:
    for route in routes:
        if hasattr(route, "effective_route_contexts"):
            # FastAPI 0.165 keeps an included router as one entry, which makes its routes with their
            # prefixes on demand.
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

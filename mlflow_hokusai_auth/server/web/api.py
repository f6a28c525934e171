"""Our REST APIs share this: their blueprints, how they answer errors, and how they read requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import flask

from mlflow_hokusai_auth.core.errors import (
    AuthorityUnavailable,
    Conflict,
    Forbidden,
    InvalidRequest,
    NotFound,
    NotGenuine,
    StoreError,
)

from . import schemas

BASE = "/api/2.0/hokusai"


def blueprint(name: str) -> flask.Blueprint:
    """Return a blueprint below `BASE` whose answers no cache keeps, and whose errors have JSON."""
    routes = flask.Blueprint(name, __name__, url_prefix=BASE)

    @routes.after_request
    def no_store(response: flask.Response) -> flask.Response:
        response.headers["Cache-Control"] = "no-store"
        return response

    for error, status, error_code in (
        (NotGenuine, 401, "UNAUTHENTICATED"),
        (Forbidden, 403, "PERMISSION_DENIED"),
        (NotFound, 404, "RESOURCE_DOES_NOT_EXIST"),
        (Conflict, 409, "RESOURCE_CONFLICT"),
        (InvalidRequest, 400, "INVALID_PARAMETER_VALUE"),
        (AuthorityUnavailable, 503, "TEMPORARILY_UNAVAILABLE"),
        (StoreError, 503, "TEMPORARILY_UNAVAILABLE"),
    ):
        routes.register_error_handler(error, _error(status, error_code))
    return routes


def body() -> object:
    """Return the request's body as JSON, with any Content-Type; None if it is malformed."""
    return schemas.read_json(flask.request.get_data())


def flag(name: str) -> bool:
    """Return the parameter `name` of the query. Raises InvalidRequest."""
    value = flask.request.args.get(name, "false")
    if value not in ("true", "false"):
        raise InvalidRequest(f"{name} must be true or false.")
    return value == "true"


def max_results(query: Mapping[str, str]) -> int:
    """Return the number of results on a page that `query` asks for. Raises InvalidRequest."""
    results = query.get("max_results") or "100"
    if not (results.isascii() and results.isdigit()) or len(results) > 9:
        raise InvalidRequest("max_results must be a whole number.")
    return int(results)


def _error(status: int, error_code: str) -> Callable[[Exception], tuple[flask.Response, int]]:
    def handle(error: Exception) -> tuple[flask.Response, int]:
        return flask.jsonify(error_code=error_code, message=str(error)), status

    return handle

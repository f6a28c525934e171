"""Our REST APIs share this: their blueprints, how they answer errors, and how they read requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import flask

from mlflow_hokusai_auth.core.counts import whole_number
from mlflow_hokusai_auth.core.errors import (
    AuthorityUnavailable,
    Conflict,
    Forbidden,
    InvalidRequest,
    Misconfigured,
    NotFound,
    NotGenuine,
    StoreError,
)
from mlflow_hokusai_auth.core.keys import redact
from mlflow_hokusai_auth.core.suggest import did_you_mean

from . import openapi, schemas

BASE = "/api/2.0/hokusai"


def blueprint(name: str) -> flask.Blueprint:
    """Return a blueprint below `BASE` whose answers no cache keeps, and whose errors have JSON."""
    routes = flask.Blueprint(name, __name__, url_prefix=BASE)
    routes.after_request(no_store)

    @routes.before_request
    def refuse_unknown_parameters() -> None:
        known = _parameters().get((flask.request.method, str(flask.request.url_rule)))
        unknown = sorted(flask.request.args.keys() - known) if known is not None else []
        if unknown:
            listed = ", ".join(sorted(known or ())) or "none"
            raise InvalidRequest(
                f"unknown parameter {redact(unknown[0])[:80]!r}; known: {listed}."
                + did_you_mean(unknown[0], known or ())
            )

    for error, status, error_code in (
        (NotGenuine, 401, "UNAUTHENTICATED"),
        (Forbidden, 403, "PERMISSION_DENIED"),
        (NotFound, 404, "RESOURCE_DOES_NOT_EXIST"),
        (Conflict, 409, "RESOURCE_CONFLICT"),
        (InvalidRequest, 400, "INVALID_PARAMETER_VALUE"),
        (AuthorityUnavailable, 503, "TEMPORARILY_UNAVAILABLE"),
        (StoreError, 503, "TEMPORARILY_UNAVAILABLE"),
        (Misconfigured, 503, "TEMPORARILY_UNAVAILABLE"),
    ):
        routes.register_error_handler(error, _error(status, error_code))
    return routes


def no_store(response: flask.Response) -> flask.Response:
    """Keep `response` out of every cache, and return it."""
    response.headers["Cache-Control"] = "no-store"
    return response


@lru_cache(maxsize=1)
def _parameters() -> dict[tuple[str, str], frozenset[str]]:
    """Return the names of the parameters in the query of each described operation.

    The operation is a method, and a path as Flask spells it.
    """
    found = {}
    for path, item in openapi.document()["paths"].items():
        rule = path.replace("{", "<").replace("}", ">")
        for method in item.keys() - {"parameters"}:
            parameters = item[method].get("parameters", [])
            names = frozenset(one["name"] for one in parameters if one["in"] == "query")
            found[method.upper(), rule] = names
            if method == "get":
                found["HEAD", rule] = names
    return found


def unknown_paths() -> flask.Blueprint:
    """Return a blueprint that answers every path below `BASE` without a route of its own with JSON.

    Flask prefers any other route. MLflow would answer HTML.
    """
    routes = blueprint("hokusai_unknown")
    methods = ("GET", "POST", "PUT", "PATCH", "DELETE")

    @routes.route("/", defaults={"path": ""}, methods=methods)
    @routes.route("/<path:path>", methods=methods)
    def unknown(path: str) -> flask.Response:
        known = sorted(method for method, rule in _parameters() if rule == f"{BASE}/{path}")
        if known:
            raise NotFound(f"{BASE}/{redact(path)[:80]} takes {', '.join(known)} only.")
        raise NotFound(f"There is no {BASE}/{redact(path)[:80]}; see {BASE}/openapi.json.")

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
    if (results := whole_number(query.get("max_results") or "100")) is None:
        raise InvalidRequest("max_results must be a whole number.")
    return results


def _error(status: int, error_code: str) -> Callable[[Exception], tuple[flask.Response, int]]:
    def handle(error: Exception) -> tuple[flask.Response, int]:
        content: dict[str, object] = {"error_code": error_code, "message": str(error)}
        if fields := getattr(error, "fields", None):
            content["fields"] = dict(fields)
        return flask.jsonify(content), status

    return handle

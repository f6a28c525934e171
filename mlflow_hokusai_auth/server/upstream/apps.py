"""MLflow's web applications, which the server puts behind the gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import flask
    from fastapi import FastAPI

# MLflow is imported in the functions, because each import sets up a whole server.


def flask_app() -> flask.Flask:
    """Return MLflow's Flask application, which is one for the process."""
    from mlflow.server import app

    result: flask.Flask = app
    return result


def fastapi_app(inner: flask.Flask) -> FastAPI:
    """Return a new FastAPI application with MLflow's native routes, around `inner`."""
    from mlflow.server.fastapi_app import create_fastapi_app

    result: FastAPI = create_fastapi_app(inner)
    return result

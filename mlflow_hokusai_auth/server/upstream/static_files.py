"""MLflow's static files: the server serves those that the installed wheel of MLflow lists.

Under `/static-files/` they are public, as all who have that version of MLflow have the same ones. The
server serves no other file from their folder, because browsers show them on this server's own origin: a
file that somebody has put there would run with the rights of whoever is signed in.
"""

from __future__ import annotations

import logging
import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import flask

_FOLDER = ("mlflow", "server", "js", "build")
#: Flask's endpoints for static files, with what they call the path: MLflow's own, and Flask's.
_ENDPOINTS = {"serve_static_file": "path", "static": "filename"}

_log = logging.getLogger(__name__)


def listed() -> frozenset[str]:
    """Paths, below the folder of static files, of those that the installed MLflow came with."""
    try:
        files = distribution("mlflow").files or ()
    except PackageNotFoundError:
        files = ()
    depth = len(_FOLDER)
    return frozenset("/".join(f.parts[depth:]) for f in files if f.parts[:depth] == _FOLDER)


def public_paths() -> frozenset[str]:
    """The paths of those files on the server, for `Policy.static_files`."""
    return frozenset(f"/static-files/{name}" for name in listed())


def install(app: flask.Flask) -> None:
    """Let `app`, which is MLflow's, answer 404 for any other static file."""
    known = listed()
    if not known:
        _log.warning(
            "MLflow is not installed from a wheel, so its pages are not served: nothing tells which of "
            "the files in %s are its own. Install mlflow with pip.",
            app.static_folder,
        )

    @app.before_request
    def refuse_unlisted() -> None:
        request = flask.request
        name = _ENDPOINTS.get(request.endpoint or "")
        if name is not None and (request.view_args or {}).get(name) not in known:
            flask.abort(404)


def may_be_written() -> str | None:
    """What to warn an operator of, if the user that this process runs as may write those files."""
    import mlflow

    folder = Path(str(mlflow.__file__)).parent / "server" / "js" / "build"
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return None
    who = (
        "the server runs as root, who may write every file"
        if hasattr(os, "geteuid") and os.geteuid() == 0
        else "the server's user may write the files"
    )
    return (
        f"{who}, MLflow's pages in {folder} among them. What is written there runs in the browsers of "
        "those who are signed in. Run the server as a user who may only read its programs."
    )

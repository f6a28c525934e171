"""MLflow's static files: the server serves those that the installed wheel of MLflow lists.

Under `/static-files/` they are public, because everybody who installs that version of MLflow has them.
The server serves no other file from their folder: browsers load the files on this server's own origin,
where a file that somebody has added would run with the rights of the signed-in user.
"""

from __future__ import annotations

import logging
import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import flask

_FOLDER = ("mlflow", "server", "js", "build")
#: Flask endpoint for static files -> the name of its path argument. MLflow has one, and Flask one.
_ENDPOINTS = {"serve_static_file": "path", "static": "filename"}

_log = logging.getLogger(__name__)


def packaged() -> frozenset[str]:
    """Return the static files in the installed wheel of MLflow, by their path below their folder."""
    try:
        files = distribution("mlflow").files or ()
    except PackageNotFoundError:
        files = ()
    depth = len(_FOLDER)
    return frozenset("/".join(f.parts[depth:]) for f in files if f.parts[:depth] == _FOLDER)


def public_paths() -> frozenset[str]:
    """Return the URL paths of the packaged files, for `Policy.static_files`."""
    return frozenset(f"/static-files/{name}" for name in packaged())


def install(app: flask.Flask) -> None:
    """Let MLflow's Flask application `app` answer 404 for a static file that isn't packaged."""
    files = packaged()
    if not files:
        _log.warning(
            "MLflow is not installed from a wheel, so its pages are not served: no list says which "
            "files in %s are MLflow's own. Install mlflow with pip.",
            app.static_folder,
        )

    @app.before_request
    def refuse_unlisted() -> None:
        request = flask.request
        name = _ENDPOINTS.get(request.endpoint or "")
        if name is not None and (request.view_args or {}).get(name) not in files:
            flask.abort(404)


def may_be_written() -> str | None:
    """Return a warning for the operator if this process's user may write the static files, or None."""
    import mlflow

    folder = Path(str(mlflow.__file__)).parent / "server" / "js" / "build"
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return None
    reason = (
        "the server runs as root, who may write every file"
        if hasattr(os, "geteuid") and os.geteuid() == 0
        else "the server's user may write the files"
    )
    return (
        f"{reason}, MLflow's pages in {folder} among them. A file written there runs in the browsers "
        "of signed-in users. Run the server as a user who may only read its programs."
    )

"""`mlflow server --app-name hokusai-auth-wsgi`: the same app as an object, for waitress.

MLflow passes waitress both `--call` and `module:function()`, which waitress refuses on Linux, so a
factory can't be used there. In the `mlflow server` command itself, where MLflow only looks at what
kind of object this is, nothing is built.
"""

from __future__ import annotations

import os

from .app import create_app

app = create_app() if os.environ.get("_MLFLOW_SGI_NAME") else None

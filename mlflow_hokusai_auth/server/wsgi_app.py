"""`mlflow server --app-name hokusai-auth-wsgi`: the same app as an object, for waitress.

MLflow passes waitress both `--call` and `module:function()`, which waitress refuses on Linux, so this
can't be a factory. In the `mlflow server` command itself, MLflow only looks at the type of `app`, and
it is None there.
"""

from __future__ import annotations

import os

from .app import create_app

app = create_app() if os.environ.get("_MLFLOW_SGI_NAME") else None

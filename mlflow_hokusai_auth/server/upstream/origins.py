"""The origins whose pages may read MLflow's answers, by MLflow's own settings."""

from __future__ import annotations


def allowed() -> tuple[tuple[str, ...], str] | None:
    """Return the configured origins, and a pattern of those that MLflow allows always.

    Return None if MLflow has no security middleware (before 3.5), or if it is switched off.
    """
    try:
        from mlflow.server import security_utils
    except ImportError:
        return None
    from mlflow.environment_variables import MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE

    if MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE.get() == "true":
        return None
    return (
        tuple(security_utils.get_allowed_origins_from_env() or ()),
        "|".join(security_utils.LOCALHOST_ORIGIN_PATTERNS),
    )

"""The `mlflow.artifact_repository` entry point for `mlflow-artifacts`: keeps the server's prefix.

MLflow resolves `mlflow-artifacts:/` and `mlflow-artifacts:/api/2.0/mlflow-artifacts/artifacts` to
the root of the host, whatever path the tracking URI has (`MlflowArtifactsRepository.resolve_uri`,
2.9 to 3.17), and a load balancer that routes only /api/mlflow/* never gets those requests. All
artifact calls (list, download, upload, multipart upload, presigned download, delete) use the URL
resolved here.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import urlparse, urlunparse

from mlflow_hokusai_auth.client import profile
from mlflow_hokusai_auth.core.job_rules import is_job

SERVICE = "/api/2.0/mlflow-artifacts/artifacts"


class _KeepPrefix:
    """A mixin for MLflow's repository class that changes only the URL a URI resolves to."""

    @classmethod
    def resolve_uri(cls, artifact_uri: str, tracking_uri: str) -> str:
        """Return the http(s) URL of `artifact_uri`, with the path of `tracking_uri` in front.

        The URL stays as MLflow resolves it if the artifact URI names a host, or if the key does not
        belong to the tracking server. Raises MlflowException where MLflow does.
        """
        resolved: str = super().resolve_uri(artifact_uri, tracking_uri)  # type: ignore[misc]
        if urlparse(artifact_uri).netloc or not _is_ours(tracking_uri):
            return resolved
        prefix = re.sub("/+", "/", urlparse(tracking_uri).path).rstrip("/")
        parts = urlparse(resolved)
        # The prefix alone is not enough: MLflow's own path begins with the prefix /api, too.
        if parts.path.startswith(prefix + SERVICE):
            return resolved
        return urlunparse(parts._replace(path=prefix + parts.path))


def _is_ours(tracking_uri: str) -> bool:
    try:
        return profile.api_key() is not None and profile.origin_allowed(tracking_uri)
    except Exception as error:
        profile.warn_once(f"The artifact URL is left as MLflow made it ({type(error).__name__}).")
        return False


def __getattr__(name: str) -> Any:
    """Create `HokusaiArtifactRepository` on first use.

    MLflow loads this entry point during `import mlflow`. If this module imported MLflow at its top and
    were imported first, MLflow would look for the class before it exists, and do without it.
    """
    if name != "HokusaiArtifactRepository":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

    from mlflow_hokusai_auth.client import patches

    # This is the one entry point that MLflow loads before it sends anything.
    patches.install()
    if is_job(os.environ):
        from mlflow_hokusai_auth.server.upstream import job_roots

        job_roots.install()
    repository = type(name, (_KeepPrefix, MlflowArtifactsRepository), {"__module__": __name__})
    return globals().setdefault(name, repository)

"""The `mlflow.request_auth_provider` entry point: `MLFLOW_TRACKING_AUTH=hokusai`.

This alternative to the header provider does not depend on MLflow's internals, because `requests` passes
the URL to an authentication object. Both may be active at once.
"""

from __future__ import annotations

from mlflow.tracking.request_auth.abstract_request_auth_provider import RequestAuthProvider
from requests import PreparedRequest
from requests.auth import AuthBase

from . import origin_guard, profile


class HokusaiAuth(AuthBase):
    """Sets `X-API-Key` on requests for the origins that the key belongs to. Holds no key itself."""

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Add the key to a prepared request, and return that. `requests` calls this. Never raises."""
        try:
            key = profile.api_key()
            if key is not None and origin_guard.may_send(request.url or "", key):
                request.hooks["response"].append(origin_guard.check_response)
                # A header that is already set comes from the header provider or from the caller.
                request.headers.setdefault(origin_guard.HEADER, key)
        except Exception as error:
            profile.warn_once(f"{origin_guard.HEADER} was not sent ({type(error).__name__}).")
        return request


class HokusaiAuthProvider(RequestAuthProvider):  # type: ignore[misc,unused-ignore]
    """The provider that MLflow selects with `MLFLOW_TRACKING_AUTH=hokusai`."""

    def get_name(self) -> str:
        """Return the value of `MLFLOW_TRACKING_AUTH` that selects this provider."""
        return "hokusai"

    def get_auth(self) -> HokusaiAuth:
        """Return an authentication object for `requests` that reads the key anew for each request."""
        return HokusaiAuth()

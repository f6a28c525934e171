"""`mlflow.server.get_app_client("hokusai-auth", tracking_uri=…)`: key management from Python.

Requests go the way MLflow's own do, so the key is found, and sent, as for any MLflow call.
"""

from __future__ import annotations

from typing import Any

from mlflow.tracking._tracking_service.utils import _get_store
from mlflow.utils.rest_utils import http_request, verify_rest_response


class HokusaiAuthClient:
    """The server's key management. Every method raises MlflowException when the server refuses."""

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri

    def whoami(self) -> dict[str, Any]:
        """What the server knows of the key in use: key_id, owner, scopes, expires_at."""
        return self._call("GET", "whoami")

    def create_key(
        self,
        owner: str,
        scopes: list[str],
        *,
        name: str = "",
        environment: str = "live",
        expires_in: float | None = None,
    ) -> dict[str, Any]:
        """A new key, living `expires_in` seconds or for good; its `key` is in the answer only now."""
        body: dict[str, Any] = {
            "owner": owner,
            "scopes": scopes,
            "name": name,
            "environment": environment,
        }
        if expires_in is not None:
            body["expires_in"] = expires_in
        return self._call("POST", "keys", json=body)

    def list_keys(self) -> list[dict[str, Any]]:
        """Every key, oldest first, without the keys themselves."""
        keys: list[dict[str, Any]] = self._call("GET", "keys")["keys"]
        return keys

    def get_key(self, key_id: str) -> dict[str, Any]:
        """One key, without the key itself."""
        return self._call("GET", f"keys/{key_id}")

    def revoke_key(self, key_id: str) -> dict[str, Any]:
        """End a key for good; every server process refuses it within a second."""
        return self._call("DELETE", f"keys/{key_id}")

    def _call(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        endpoint = f"/api/2.0/hokusai/{path}"
        credentials = _get_store(self.tracking_uri).get_host_creds()
        response = http_request(credentials, endpoint, method, **kwargs)
        if response.status_code == 201:
            answer: dict[str, Any] = response.json()
            return answer
        answer = verify_rest_response(response, endpoint).json()
        return answer

"""`mlflow.server.get_app_client("hokusai-auth", tracking_uri=…)`: key management from Python.

Requests are sent as MLflow's own are, so they carry the key that any MLflow call would.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

from mlflow.exceptions import MlflowException
from mlflow.store.entities import PagedList
from mlflow.tracking._tracking_service.utils import _get_store
from mlflow.utils.rest_utils import http_request, verify_rest_response
from requests import RequestException, Response

_BASE = "/api/2.0/hokusai/"
#: The default of `edit_key`'s arguments: leave the field as it is. None has a meaning there.
_LEAVE: Any = object()


class HokusaiAuthClient:
    """The server's key management. Every method raises MlflowException if the server refuses.

    Keys are dictionaries, as in the REST API: `key_id`, `owner`, `scopes`, `state` and so on, with
    times in seconds since the epoch. Only `create_key` and `rotate_key` return the key itself.
    """

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri

    def whoami(self, **options: Any) -> dict[str, Any]:
        """Return the record of the key in use: `key_id`, `owner`, `scopes`, what it `can` do, ….

        `default_experiment` is the name of the experiment for runs that name none, or None if these
        go to MLflow's Default.
        `options` are those of MLflow's `http_request` (`timeout` in seconds, `max_retries`).
        """
        return self._call("GET", "whoami", **options)

    def create_key(
        self,
        owner: str,
        scopes: Sequence[str],
        *,
        name: str = "",
        environment: str = "live",
        expires_in: float | None = None,
        networks: Sequence[str] = (),
        rate_limit_per_hour: int | None = None,
        note: str = "",
    ) -> dict[str, Any]:
        """Make a key that lives `expires_in` seconds (None: for ever). `key` is returned only now.

        `networks` are the addresses and CIDR networks that it may be used from; empty means all.
        """
        fields = _fields(name, expires_in, networks, rate_limit_per_hour, note)
        body = {"owner": owner, "scopes": scopes, "environment": environment, **fields}
        return self._call("POST", "keys", json=body)

    def import_key(
        self,
        key: str,
        owner: str,
        scopes: Sequence[str],
        *,
        name: str = "",
        expires_in: float | None = None,
        networks: Sequence[str] = (),
        rate_limit_per_hour: int | None = None,
        note: str = "",
    ) -> dict[str, Any]:
        """Import the existing `key`. The other arguments are those of `create_key`."""
        fields = _fields(name, expires_in, networks, rate_limit_per_hour, note)
        body = {"key": key, "owner": owner, "scopes": scopes, **fields}
        return self._call("POST", "keys/import", json=body)

    def list_keys(
        self,
        *,
        owner: str | None = None,
        environment: str | None = None,
        state: str | None = None,
        query: str | None = None,
        max_results: int = 100,
        page_token: str | None = None,
    ) -> PagedList[dict[str, Any]]:
        """Return a page of keys, whose `token` is the next page's `page_token` (last page: None).

        `state` is "active", "deprecated", "expired" or "revoked"; `query` is a part of the owner, name
        or id.
        """
        params = {
            "owner": owner,
            "environment": environment,
            "state": state,
            "query": query,
            "max_results": max_results,
            "page_token": page_token,
        }
        answer = self._call("GET", "keys", params=_given(params))
        return PagedList(answer["keys"], answer.get("next_page_token"))

    def get_key(self, key_id: str) -> dict[str, Any]:
        """Return the record of one key."""
        return self._call("GET", _key_path(key_id))

    def edit_key(
        self,
        key_id: str,
        *,
        owner: str = _LEAVE,
        name: str = _LEAVE,
        scopes: Sequence[str] = _LEAVE,
        expires_in: float | None = _LEAVE,
        networks: Sequence[str] = _LEAVE,
        rate_limit_per_hour: int | None = _LEAVE,
        note: str = _LEAVE,
    ) -> dict[str, Any]:
        """Change the given fields, and leave the others.

        `expires_in` is in seconds from now. None for `expires_in` or `rate_limit_per_hour`, and an
        empty list for `networks`, remove the limit.
        """
        changes = {
            "owner": owner,
            "name": name,
            "scopes": scopes,
            "expires_in": expires_in,
            "networks": networks,
            "rate_limit_per_hour": rate_limit_per_hour,
            "note": note,
        }
        body = {field: value for field, value in changes.items() if value is not _LEAVE}
        return self._call("PATCH", _key_path(key_id), json=body)

    def rotate_key(self, key_id: str, *, overlap: float | None = None) -> dict[str, Any]:
        """Replace the key; `replaces` in the answer is the old one.

        The old key stays valid for `overlap` seconds (None: the server's default, a day).
        """
        body = _given({"overlap": overlap})
        return self._call("POST", f"{_key_path(key_id)}/rotate", json=body)

    def revoke_key(self, key_id: str, *, wait: bool = False, force: bool = False) -> dict[str, Any]:
        """Revoke a key for good. Every server process refuses it within a second.

        With `wait`, return only then. The last key that may manage keys needs `force`.
        """
        params = {name: "true" for name, on in (("wait", wait), ("force", force)) if on}
        return self._call("DELETE", _key_path(key_id), params=params)

    def export_keys(self) -> Iterator[dict[str, Any]]:
        """Iterate over all keys, and read them from the server as they are consumed.

        Raises MlflowException during the iteration, too, if the connection breaks: the keys so far are
        then not all.
        """
        path = "keys/export"
        with self._send("GET", path, stream=True) as response:
            if response.status_code != 200:
                verify_rest_response(response, _BASE + path)
            try:
                for line in response.iter_lines():
                    if line:
                        yield json.loads(line)
            # ValueError: only a part of a line has arrived, which is no JSON.
            except (RequestException, ValueError) as error:
                raise MlflowException(f"The export of keys broke off: {error}") from error

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        if method == "POST":
            # If an answer were lost, MLflow would repeat the request and make a second key.
            options.setdefault("max_retries", 0)
        response = self._send(method, path, **options)
        if response.status_code == 201:
            response.status_code = 200  # the only good status for MLflow 2.9
        answer: dict[str, Any] = verify_rest_response(response, _BASE + path).json()
        return answer

    def _send(self, method: str, path: str, **options: Any) -> Response:
        # For any other URI, MLflow would create a local store with its files.
        if not self.tracking_uri.lower().startswith(("http://", "https://")):
            raise MlflowException.invalid_parameter_value(
                "The tracking URI is not the http(s) URL of a server. Set MLFLOW_TRACKING_URI."
            )
        credentials = _get_store(self.tracking_uri).get_host_creds()
        # Without this, the server's message would be lost after the last retry.
        options.setdefault("raise_on_status", False)
        response: Response = http_request(credentials, _BASE + path, method, **options)
        return response


def _fields(
    name: str,
    expires_in: float | None,
    networks: Sequence[str],
    rate_limit_per_hour: int | None,
    note: str,
) -> dict[str, Any]:
    """The optional fields of a new key that are set."""
    texts = {"name": name, "note": note, "networks": networks}
    numbers = {"expires_in": expires_in, "rate_limit_per_hour": rate_limit_per_hour}
    return {**{field: value for field, value in texts.items() if value}, **_given(numbers)}


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _key_path(key_id: str) -> str:
    # quote keeps dots, and HTTP clients resolve "keys/.." before they send it.
    if key_id in ("", ".", ".."):
        raise MlflowException.invalid_parameter_value(f"{key_id!r} is not the id of a key.")
    return f"keys/{quote(key_id, safe='')}"

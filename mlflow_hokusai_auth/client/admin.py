"""`mlflow.server.get_app_client("hokusai-auth", tracking_uri=…)`: key management from Python.

Requests go the way MLflow's own do, so the key is found, and sent, as for any MLflow call.
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
#: What `edit_key` is not told to change; None means something there.
_LEAVE: Any = object()


class HokusaiAuthClient:
    """The server's key management. Every method raises MlflowException when the server refuses.

    Keys are dictionaries, as the REST API gives them: `key_id`, `owner`, `scopes`, `state` and so
    on, times in seconds since the epoch. The key itself is only in what `create_key` and
    `rotate_key` give.
    """

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri

    def whoami(self, **options: Any) -> dict[str, Any]:
        """What the server knows of the key in use: `key_id`, `owner`, `scopes`, what it `can` do.

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
        """A new key, living `expires_in` seconds or for good; its `key` is in the answer only now.

        `networks` are addresses and CIDR networks that it may be used from, everywhere if there
        are none.
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
        """Take in `key`, which was handed out before. The rest is as for `create_key`."""
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
        """A page of keys; its `token` is the next page's `page_token`, or None on the last one.

        `state` is "active", "deprecated", "expired" or "revoked"; `query` is looked for in owner,
        name and id.
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
        """One key."""
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
        """Change what is given, and leave the rest.

        `expires_in` counts in seconds from now; None takes the end away. None for
        `rate_limit_per_hour` takes the limit away, as an empty list does for `networks`.
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
        """A new key in place of `key_id`; `replaces` in the answer is the old one.

        The old one goes on for `overlap` seconds, or as long as the server thinks fit.
        """
        body = _given({"overlap": overlap})
        return self._call("POST", f"{_key_path(key_id)}/rotate", json=body)

    def revoke_key(self, key_id: str, *, wait: bool = False, force: bool = False) -> dict[str, Any]:
        """End a key for good; every server process refuses it within a second.

        With `wait`, return only then. `force` is needed for the last key that may manage keys.
        """
        params = {name: "true" for name, on in (("wait", wait), ("force", force)) if on}
        return self._call("DELETE", _key_path(key_id), params=params)

    def export_keys(self) -> Iterator[dict[str, Any]]:
        """Every key, read from the server as they are taken from here.

        Raises MlflowException also in the middle, when the connection breaks: what came before is
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
            # ValueError: a line that is not JSON, as when half of one has arrived.
            except (RequestException, ValueError) as error:
                raise MlflowException(f"The export of keys broke off: {error}") from error

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        if method == "POST":
            # MLflow would repeat it when an answer was lost: two keys, one of which nobody knows.
            options.setdefault("max_retries", 0)
        response = self._send(method, path, **options)
        if response.status_code == 201:
            response.status_code = 200  # the only one that MLflow 2.9 verifies
        answer: dict[str, Any] = verify_rest_response(response, _BASE + path).json()
        return answer

    def _send(self, method: str, path: str, **options: Any) -> Response:
        # MLflow makes a local store, and its files, for any other URI.
        if not self.tracking_uri.lower().startswith(("http://", "https://")):
            raise MlflowException.invalid_parameter_value(
                "The tracking URI is not the http(s) URL of a server. Set MLFLOW_TRACKING_URI."
            )
        credentials = _get_store(self.tracking_uri).get_host_creds()
        # So that, with retries used up, there is a message of the server's to tell.
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
    """Those fields of a new key that are set."""
    texts = {"name": name, "note": note, "networks": networks}
    numbers = {"expires_in": expires_in, "rate_limit_per_hour": rate_limit_per_hour}
    return {**{field: value for field, value in texts.items() if value}, **_given(numbers)}


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _key_path(key_id: str) -> str:
    # quote leaves dots alone, and HTTP clients resolve "keys/.." before they send it.
    if key_id in ("", ".", ".."):
        raise MlflowException.invalid_parameter_value(f"{key_id!r} is not the id of a key.")
    return f"keys/{quote(key_id, safe='')}"

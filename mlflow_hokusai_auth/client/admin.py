"""`mlflow.server.get_app_client("hokusai-auth", tracking_uri=…)`: key management from Python.

Requests are sent as MLflow's own are, so they carry the key that any MLflow call would.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from mlflow.exceptions import MlflowException
from mlflow.store.entities import PagedList
from mlflow.tracking._tracking_service.utils import _get_store
from mlflow.utils.rest_utils import http_request, verify_rest_response
from requests import RequestException, Response

_BASE = "/api/2.0/hokusai/"
#: The default of arguments for which None has a meaning: the field isn't sent.
_LEAVE: Any = object()


class HokusaiAuthClient:
    """The server's management of keys and owners. Each method raises MlflowException if it refuses.

    Keys are dictionaries, as in the REST API: `key_id`, `owner`, `scopes`, `state` and so on, with
    times in seconds since the epoch. Only `create_key` and `rotate_key` return the key itself. Owned
    names, grants and prefixes are dictionaries, too.
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
        expires_in: float | None = _LEAVE,
        networks: Sequence[str] = (),
        rate_limit_per_hour: int | None = None,
        note: str = "",
        models: Sequence[str] = (),
        no_delete: bool = False,
    ) -> dict[str, Any]:
        """Make a key that lives `expires_in` seconds. `key` is returned only now.

        Without `expires_in` it lives as long as the server's default, which is a year unless its
        operator changes it. With None it lives for ever, which the server refuses if it has a maximum.
        `networks` are the addresses and CIDR networks that it may be used from. `models` are the names
        of registered models that it may change, or beginnings and `*`. Empty means all. With
        `no_delete` it may not delete anything.
        """
        fields = _fields(
            name=name,
            note=note,
            networks=networks,
            models=models,
            no_delete=no_delete,
            expires_in=None,
            rate_limit_per_hour=rate_limit_per_hour,
        )
        body = {"owner": owner, "scopes": scopes, "environment": environment, **fields}
        if expires_in is not _LEAVE:
            body["expires_in"] = expires_in
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
        models: Sequence[str] = (),
        no_delete: bool = False,
    ) -> dict[str, Any]:
        """Import the existing `key`, which never ends without `expires_in` in seconds.

        The other arguments are those of `create_key`.
        """
        fields = _fields(
            name=name,
            note=note,
            networks=networks,
            models=models,
            no_delete=no_delete,
            expires_in=expires_in,
            rate_limit_per_hour=rate_limit_per_hour,
        )
        body = {"key": key, "owner": owner, "scopes": scopes, **fields}
        return self._call("POST", "keys/import", json=body)

    def create_link(
        self,
        *,
        key: Mapping[str, Any] | None = None,
        replaces: str | None = None,
        overlap: float | None = None,
        expires_in: float | None = None,
    ) -> dict[str, Any]:
        """Make a one-time link; `url` in the answer is the link, which can't be read again.

        Whoever opens it first gets a key that is made at that moment: `key` has the arguments of
        `create_key`, such as {"owner": "ACME", "scopes": ["model:write"]}. Or give `replaces`, the id
        of the key that the new one replaces, with `overlap` as in `rotate_key`. The link can be opened
        for `expires_in` seconds (None: the server's default, a day).
        """
        optional = {
            "key": None if key is None else dict(key),
            "replaces": replaces,
            "overlap": overlap,
            "expires_in": expires_in,
        }
        return self._call("POST", "links", json=_given(optional))

    def list_links(self) -> list[dict[str, Any]]:
        """Return all one-time links, newest first; each stays for 30 days after it has expired."""
        links: list[dict[str, Any]] = self._call("GET", "links")["links"]
        return links

    def revoke_link(self, link_id: str) -> dict[str, Any]:
        """Revoke a one-time link, so that nobody can open it. The key of an opened one goes on."""
        return self._call("DELETE", _path("links", link_id))

    def list_keys(
        self,
        *,
        owner: str | None = None,
        environment: str | None = None,
        state: str | None = None,
        query: str | None = None,
        scope: str | None = None,
        expires_within: int | None = None,
        unused_for: int | None = None,
        order_by: str | None = None,
        max_results: int = 100,
        page_token: str | None = None,
    ) -> PagedList[dict[str, Any]]:
        """Return a page of keys, newest first.

        The page's `token` is the next page's `page_token` (last page: None), and its `total` is the
        number of keys on all pages.

        `state` is "active", "deprecated", "expired" or "revoked", or "valid" for the first two, or
        "ended" for the others. `query` is a part of the owner, name or id. `expires_within` and
        `unused_for` are in seconds, and leave only valid keys. `order_by` is "created_at",
        "expires_at", "last_used_at", "name", "owner", "scopes" or "state", perhaps with " DESC".
        """
        params = {
            "owner": owner,
            "environment": environment,
            "state": state,
            "query": query,
            "scope": scope,
            "expires_within": expires_within,
            "unused_for": unused_for,
            "order_by": order_by,
            "max_results": max_results,
            "page_token": page_token,
        }
        answer = self._call("GET", "keys", params=_given(params))
        page = PagedList(answer["keys"], answer.get("next_page_token"))
        page.total = answer.get("total")
        return page

    def find_keys(self, key: str) -> list[dict[str, Any]]:
        """Return the record of `key`, or those of the keys that end in these four characters.

        The list is empty if the server has none. The key is sent in the body of the request.
        """
        found: list[dict[str, Any]] = self._call("POST", "keys/find", json={"key": key})["keys"]
        return found

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
        models: Sequence[str] = _LEAVE,
        no_delete: bool = _LEAVE,
    ) -> dict[str, Any]:
        """Change the given fields, and leave the others.

        `expires_in` is in seconds from now. None for `expires_in` or `rate_limit_per_hour`, and an
        empty list for `networks` or `models`, remove the limit.
        """
        changes = {
            "owner": owner,
            "name": name,
            "scopes": scopes,
            "expires_in": expires_in,
            "networks": networks,
            "rate_limit_per_hour": rate_limit_per_hour,
            "note": note,
            "models": models,
            "no_delete": no_delete,
        }
        body = {field: value for field, value in changes.items() if value is not _LEAVE}
        return self._call("PATCH", _key_path(key_id), json=body)

    def rotate_key(self, key_id: str, *, overlap: float | None = None) -> dict[str, Any]:
        """Replace the key; `replaces` in the answer is the old one.

        An administrator's new key lives as long, from now on, as the old one was to live. A key that
        replaces itself keeps its end.
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

    def revoke_keys(
        self, owner: str, *, apply: bool = False, wait: bool = False, force: bool = False
    ) -> dict[str, Any]:
        """Revoke all valid keys of `owner`; unless `apply`, only return which: `keys`.

        One-time links of this owner that wait are revoked as well, and its trusts are removed, because
        both would make new keys: `links` and `trusts` are their ids. `kept` says why other keys stay.
        `wait` and `force` are those of `revoke_key`.
        """
        body = {"owner": owner, "apply": apply, "wait": wait, "force": force}
        return self._call("POST", "keys/revoke", json=body)

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

    def list_owners(
        self,
        *,
        kind: str = "model",
        owner: str | None = None,
        unowned: bool = False,
        max_results: int = 100,
        page_token: str | None = None,
    ) -> PagedList[dict[str, Any]]:
        """Return a page of registered models (or experiments: `kind`), each with its `owner` or None.

        `token` of the page is the next page's `page_token` (last page: None).
        """
        params = {
            "kind": kind,
            "owner": owner,
            "unowned": "true" if unowned else None,
            "max_results": max_results,
            "page_token": page_token,
        }
        answer = self._call("GET", "owners", params=_given(params))
        return PagedList(answer["owners"], answer.get("next_page_token"))

    def owners_of(self, name: str) -> list[dict[str, Any]]:
        """Return whose the registered model and the experiment with this name are."""
        owners: list[dict[str, Any]] = self._call("GET", "owners/of", params={"name": name})[
            "owners"
        ]
        return owners

    def assign_owner(
        self,
        *,
        owner: str | None = None,
        models: str | None = None,
        experiments: str | None = None,
        names: Sequence[Mapping[str, str]] = (),
        from_owner: str | None = None,
        apply: bool = False,
        keep_grants: bool = False,
    ) -> dict[str, Any]:
        """Give models or experiments to `owner`; unless `apply`, only return what would change.

        Give one pattern, or `names` with `kind` and `name` each, and perhaps `owner`; or `from_owner`,
        for all that this one owns, prefixes included. The grants of former owners end, or become the
        new owner's with `keep_grants`.
        """
        what = {
            "owner": owner,
            "models": models,
            "experiments": experiments,
            "from_owner": from_owner,
        }
        body = {**_given(what), "apply": apply, "keep_grants": keep_grants}
        if names:
            body["names"] = [dict(row) for row in names]
        return self._call("POST", "owners/assign", json=body)

    def release_name(self, name: str) -> dict[str, Any]:
        """Release the name of a registered model, so that it has no owner, and return whose it was."""
        return self._call("POST", "owners/release", json={"name": name})

    def check_owners(self) -> list[dict[str, Any]]:
        """Return what is wrong with the tables of ownership, with advice."""
        problems: list[dict[str, Any]] = self._call("GET", "owners/check")["problems"]
        return problems

    def add_grant(
        self,
        *,
        grantee: str,
        pattern: str,
        level: str = "read",
        expires_in: float | None = None,
    ) -> dict[str, Any]:
        """Let `grantee` "read" or "contribute" to the models that `pattern` names, now and later.

        An owner's grant covers that owner's models, an operator's any. It ends after `expires_in`
        seconds (None: never).
        """
        body = {"grantee": grantee, "pattern": pattern, "level": level, "expires_in": expires_in}
        return self._call("POST", "grants", json=_given(body))

    def list_grants(
        self, *, max_results: int = 100, page_token: str | None = None
    ) -> PagedList[dict[str, Any]]:
        """Return a page of the grants that the key's owner gave or has; administrators get all."""
        params = {"max_results": max_results, "page_token": page_token}
        answer = self._call("GET", "grants", params=_given(params))
        return PagedList(answer["grants"], answer.get("next_page_token"))

    def remove_grant(self, grant_id: str) -> dict[str, Any]:
        """End a grant, and return it."""
        return self._call("DELETE", _path("grants", grant_id))

    def add_prefix(self, *, prefix: str, owner: str, kind: str = "model") -> dict[str, Any]:
        """Reserve new names of models (or experiments: `kind`) that begin so for `owner`."""
        body = {"prefix": prefix, "owner": owner, "kind": kind}
        return self._call("POST", "prefixes", json=body)

    def list_prefixes(self) -> list[dict[str, Any]]:
        """Return all prefixes."""
        prefixes: list[dict[str, Any]] = self._call("GET", "prefixes")["prefixes"]
        return prefixes

    def remove_prefix(self, *, prefix: str, kind: str = "model") -> dict[str, Any]:
        """End the reservation of a prefix, and return it."""
        return self._call("DELETE", "prefixes", params={"prefix": prefix, "kind": kind})

    def add_trust(
        self,
        owner: str | None,
        scopes: Sequence[str],
        *,
        github: str | None = None,
        gitlab: str | None = None,
        issuer: str | None = None,
        workflow: str | None = None,
        environment: str | None = None,
        claims: Mapping[str, str] | None = None,
        single_use: bool | None = None,
        ttl: float | None = None,
        models: Sequence[str] = (),
        no_delete: bool = False,
        jwks: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Trust a workload: its identity tokens are exchanged for keys that live `ttl` seconds.

        Where the server allows it, suppliers trust repositories as well; they leave `owner` None.
        Give `github` ("org/repo") with `workflow` ("release.yml"), `gitlab` ("group/project"), or
        `issuer` (a URL) with `claims`: name -> exact value, or a beginning and `*`. The other
        arguments are those of `create_key`; `jwks` is the issuer's key set, to ask the issuer never.
        """
        optional = {
            "owner": owner,
            "github": github,
            "gitlab": gitlab,
            "issuer": issuer,
            "workflow": workflow,
            "environment": environment,
            "claims": None if claims is None else dict(claims),
            "single_use": single_use,
            "ttl": ttl,
            "models": list(models) or None,
            "no_delete": no_delete or None,
            "jwks": None if jwks is None else dict(jwks),
        }
        return self._call("POST", "trust", json={"scopes": scopes, **_given(optional)})

    def list_trusts(self) -> list[dict[str, Any]]:
        """Return all trusts, oldest first; to a supplier, those of its own owner."""
        trusts: list[dict[str, Any]] = self._call("GET", "trust")["trusts"]
        return trusts

    def edit_trust(
        self,
        trust_id: str,
        *,
        scopes: Sequence[str] = _LEAVE,
        models: Sequence[str] = _LEAVE,
        no_delete: bool = _LEAVE,
        ttl: float = _LEAVE,
        jwks: Mapping[str, Any] | None = _LEAVE,
        forget_ids: bool = False,
    ) -> dict[str, Any]:
        """Change the given fields of a trust, and leave the others.

        The trust's keys end within a second, unless only `ttl` (in seconds) changes.
        With `forget_ids`, the numbers of the repository are pinned anew at the next exchange.
        """
        fields = {
            "scopes": scopes,
            "models": models,
            "no_delete": no_delete,
            "ttl": ttl,
            "jwks": jwks,
            "forget_ids": forget_ids or _LEAVE,
        }
        body = {field: value for field, value in fields.items() if value is not _LEAVE}
        return self._call("PATCH", _path("trust", trust_id), json=body)

    def remove_trust(self, trust_id: str) -> dict[str, Any]:
        """Remove a trust, and return it. Its keys end within a second."""
        return self._call("DELETE", _path("trust", trust_id))

    def isolation(self) -> dict[str, Any]:
        """Return whether this server keeps suppliers apart: `isolation`, `in_effect`, `mode`, …."""
        return self._call("GET", "isolation")

    def set_isolation(self, isolation: str) -> dict[str, Any]:
        """Set the isolation of all servers: "off", "observe", "writes", "full" or "default"; return it.

        The server refuses "writes" and "full" if it can't know whose things are.
        """
        return self._call("POST", "isolation", json={"isolation": isolation})

    def status(self, **options: Any) -> dict[str, Any]:
        """Return what is in force on this server: `mode`, `isolation`, `keys`, `health`, ….

        `options` are those of MLflow's `http_request` (`timeout` in seconds, `max_retries`).
        """
        return self._call("GET", "status", **options)

    def list_audit(
        self,
        *,
        since: float | None = None,
        event: str | None = None,
        key_id: str | None = None,
        actor: str | None = None,
        after: int | None = None,
        max_results: int = 100,
        page_token: str | None = None,
    ) -> PagedList[dict[str, Any]]:
        """Return the last audited events, oldest first; `token` leads to the page of older ones.

        `since` is in seconds since the epoch; `event` may be a beginning, such as "key."; `key_id`
        matches the changed key and the actor's key. With the id of an event as `after`, they are the
        first ones after it.
        """
        params = {
            "since": since,
            "event": event,
            "key_id": key_id,
            "actor": actor,
            "after": after,
            "max_results": max_results,
            "page_token": page_token,
        }
        answer = self._call("GET", "audit", params=_given(params))
        return PagedList(answer["events"], answer.get("next_page_token"))

    def follow_audit(
        self,
        *,
        event: str | None = None,
        key_id: str | None = None,
        actor: str | None = None,
        interval: float = 2.0,
    ) -> Iterator[dict[str, Any]]:
        """Iterate over the events that happen from now on, without an end.

        Asks every `interval` seconds. The other arguments are those of `list_audit`.
        """
        which: dict[str, Any] = {"event": event, "key_id": key_id, "actor": actor}
        last = next((newest["id"] for newest in self.list_audit(max_results=1)), 0)
        while True:
            events = self.list_audit(after=last, **which)
            yield from events
            if events:
                last = events[-1]["id"]
            else:
                time.sleep(interval)

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
    *, expires_in: float | None, rate_limit_per_hour: int | None, **others: Any
) -> dict[str, Any]:
    """Return the optional fields of a new key that are set."""
    numbers = {"expires_in": expires_in, "rate_limit_per_hour": rate_limit_per_hour}
    return {**{field: value for field, value in others.items() if value}, **_given(numbers)}


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _key_path(key_id: str) -> str:
    return _path("keys", key_id)


def _path(kind: str, id: str) -> str:
    # quote keeps dots, and HTTP clients resolve "keys/.." before they send it.
    if id in ("", ".", ".."):
        raise MlflowException.invalid_parameter_value(
            f"{id!r} is not the id of a {kind.removesuffix('s')}."
        )
    return f"{kind}/{quote(id, safe='')}"

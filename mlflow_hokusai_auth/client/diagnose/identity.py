"""The report of `hokusai-auth whoami`: the key in use, where it came from, and all other keys here.

Requests are sent as MLflow sends its own. No text of a report holds a key.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from mlflow_hokusai_auth.client import ci_key, origin_guard, profile
from mlflow_hokusai_auth.client.admin import HokusaiAuthClient

from . import doctor, mistakes
from .environment import environment

#: Names, and grants, that are read of what an owner has, at most.
MAX_ROWS = 1000

_HOKUSAI = (profile.KEY, profile.KEY_FILE, profile.PROFILE)
_LOGINS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_BOUNDS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": f"{doctor.TIMEOUT:g}",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}


def examine(chosen: str | None = None, url: str | None = None, *, ask: bool = False) -> Any:
    """Return the report on the key in use: `ok`, `server`, `key_from`, and `error` or its record.

    A good key's report has `ends_in` (seconds, or None), and `owned` and `grants` if the server tells.
    `profiles` are the keys of ~/.hokusai, with `name` and `in_use` each, and `ok`, `owner`, `key_id`
    and `expires_at` of those that the server was asked about: only if `ask`, as it gets them then.
    With `chosen`, the key is that of this section of ~/.hokusai/profiles. `url` becomes the tracking
    URI of this process.
    """
    if url is not None:
        mlflow.set_tracking_uri(url)
    uri = profile.tracking_uri()
    with environment(_BOUNDS):
        with environment(_only(chosen) if chosen is not None else {}):
            report, key = _look(uri)
            if report["ok"]:
                report.update(_things(uri, report.get("owner")))
        report["profiles"] = list(_stored(uri, key, ask)) if chosen is None else []
    return report


def _look(uri: str) -> tuple[dict[str, Any], str]:
    """Return the report on the key that the environment chooses, and the key."""
    report: dict[str, Any] = {"ok": False, "server": doctor.one_line(uri), "key_from": None}
    try:
        source, text = profile.find_key()
    except profile.Unusable as reason:
        return {**report, "error": doctor.one_line(f"{reason}.")}, ""
    key = text.strip()
    if not key and ci_key.is_wanted():
        try:
            source, key = f"{ci_key.TRUST}=auto", ci_key.obtain()
        except ci_key.Unavailable as reason:
            return {**report, "error": doctor.one_line(str(reason))}, ""
    login = next((name for name in _LOGINS if os.environ.get(name)), None)
    report["key_from"] = _named(source) if key else login
    if key and profile.origin(uri) is not None and not origin_guard.is_allowed(uri, key):
        refusal = " ".join(origin_guard.explain_refusal(profile.origin(uri), key))
        return {**report, "error": doctor.one_line(refusal, key)}, key
    try:
        answer = HokusaiAuthClient(uri).whoami()
    except MlflowException as error:
        return {**report, "error": doctor.one_line(str(error), key)}, key
    if not isinstance(answer.get("key_id"), str):
        return {**report, "error": doctor.NOT_OURS}, key
    ends = answer.get("expires_at")
    left = ends - time.time() if isinstance(ends, (int, float)) else None
    # The server's fields don't replace ours.
    return {**report, **answer, **report, "ok": True, "ends_in": left}, key


def _named(source: str) -> str:
    """Return `source`, one of `profile.find_key`, with the name of the profile."""
    if profile.PROFILE not in source:
        return source
    name = os.environ.get(profile.PROFILE, "").strip()
    return doctor.one_line(f"[{name}] of {profile.PROFILES_FILE}")


def _things(uri: str, owner: object) -> dict[str, Any]:
    """Return what `owner` has, and the grants that it gave or has, if the server tells."""
    client = HokusaiAuthClient(uri)
    try:
        owned = {
            kind: [
                row["name"]
                for row in client.list_owners(kind=kind, owner=str(owner), max_results=MAX_ROWS)
            ]
            for kind in ("model", "experiment")
        }
        # Administrators get the grants of everybody.
        grants = [
            grant
            for grant in client.list_grants(max_results=MAX_ROWS)
            if owner in (grant["granted_by"], grant["grantee"])
        ]
    except (MlflowException, KeyError, TypeError):
        return {}
    return {"owned": owned, "grants": grants}


def _stored(uri: str, used: str, ask: bool) -> Iterator[dict[str, Any]]:
    """Yield a report on each key of ~/.hokusai. The server is asked about them only if `ask`."""
    try:
        names: list[str | None] = [*profile.profiles()]
    except profile.Unusable as reason:
        yield {"name": profile.PROFILES_FILE, "in_use": False, "ok": False, "error": str(reason)}
        names = []
    for name in (*names, None):
        with environment(_only(name)):
            found: dict[str, Any] = {"name": name or profile.CONFIG_FILE, "in_use": False}
            try:
                _, text = profile.find_key()
            except profile.Unusable as reason:
                yield {**found, "ok": False, "error": doctor.one_line(str(reason))}
                continue
            key = text.strip()
            if name is None and not key:
                continue
            if key == used:
                yield {**found, "in_use": True, "ok": None}
            elif mistake := mistakes.in_key(key):
                yield {**found, "ok": False, "error": ". ".join(mistake)}
            elif not ask:
                yield {**found, "ok": None}
            else:
                report, _ = _look(uri)
                shown = ("ok", "error", "key_id", "owner", "expires_at", "ends_in")
                yield {**found, **{field: report[field] for field in shown if field in report}}


def _only(name: str | None) -> Mapping[str, str | None]:
    """Return variables that choose the profile `name`, or ~/.hokusai/config if it is None."""
    return {**dict.fromkeys(_HOKUSAI), profile.PROFILE: name}

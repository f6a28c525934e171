"""What both providers do with the key: decide for one URL, and take it back on a redirect."""

from __future__ import annotations

import os
import re
from typing import Any

from mlflow_hokusai_auth.client import profile

HEADER = "X-API-Key"

# requests joins Location to the URL with rules of its own ("////host" leads to host), so what isn't
# one of the two plain forms counts as another origin.
_PLAIN = re.compile(r"[!-~]+")
_PATH = re.compile(r"/(?![/\\])")


def may_send(url: str) -> bool:
    """Whether the key may be sent to `url`; if not, warns once per origin and says what to change.

    May raise what MLflow raises while it looks up its tracking URI; the callers catch it.
    """
    if profile.origin_allowed(url):
        return True
    profile.warn_once(_why_not(profile.origin(url)))
    return False


def drop_key_on_redirect(response: Any, **_: Any) -> None:
    """A requests response hook: remove the key when `response` redirects to another origin.

    requests builds the next request as a copy of the one that was answered, after the hooks have
    run (`Session.send`, then `SessionRedirectMixin.resolve_redirects`), and itself drops only
    `Authorization`. The copy keeps the hook, so every hop of a chain is checked.
    """
    if not response.is_redirect:
        return
    here, there = profile.origin(response.url), _target(response)
    if here is not None and here == there:
        return
    # A hook before this one (digest authentication) may have answered with a second response, while
    # requests still copies the first request.
    for answered in (response, *response.history):
        if answered.request.headers.pop(HEADER, None) is not None:
            profile.warn_once(
                f"{HEADER} was not forwarded from {here} to {there or 'an odd URL'}: a redirect "
                "led to another origin. If the server has moved there, set MLFLOW_TRACKING_URI "
                "to its new address."
            )


def _target(response: Any) -> profile.Origin | None:
    """The origin that `response` redirects to, or None if that isn't certain."""
    location = response.headers["location"]
    if not _PLAIN.fullmatch(location):
        return None
    return profile.origin(response.url if _PATH.match(location) else location)


def _why_not(target: profile.Origin | None) -> str:
    if target is None:
        return (
            f"{HEADER} was not sent to a URL whose host cannot be told for certain. Write the URL "
            "with a plain ASCII host (xn--… for other scripts): https://registry.example.com/path."
        )
    if os.environ.get(profile.ALLOWED_ORIGINS, "").strip():
        return (
            f"{HEADER} was not sent to {target}: it is not in {profile.ALLOWED_ORIGINS}. "
            f"If the key belongs there, add {target} to the list."
        )
    if not target.confidential:
        return (
            f"{HEADER} was not sent to {target}: plain http would show the key to the network. Use "
            f"https, or set {profile.ALLOWED_ORIGINS}={target} if that network is trusted."
        )
    return (
        f"{HEADER} was not sent to {target}: it is not the origin of MLflow's tracking URI. If the "
        f"key belongs there, set MLFLOW_TRACKING_URI to it or {profile.ALLOWED_ORIGINS}={target}."
    )

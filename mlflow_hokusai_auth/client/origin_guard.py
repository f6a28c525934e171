"""The rules that both providers share: may a URL have the key, and what its response means.

A response may redirect, so that the key must be removed, announce that the key ends soon, or refuse an
exchanged key that ended early.
"""

from __future__ import annotations

import os
import re
from email.utils import parsedate_to_datetime
from typing import Any

from mlflow_hokusai_auth.client import ci_key, profile
from mlflow_hokusai_auth.core import times

HEADER = "X-API-Key"

# `requests` joins Location to the URL with rules of its own ("////host" leads to host), so any other
# form than these two plain ones counts as another origin.
_PLAIN = re.compile(r"[!-~]+")
_PATH = re.compile(r"/(?![/\\])")
# RFC 9745: a date as a structured field (RFC 9651), in seconds since the epoch.
_DEPRECATION = re.compile(r"@-?[0-9]{1,15}")


def may_send(url: str, key: str) -> bool:
    """Return True if `key` may be sent to `url`; if not, warn once per origin, with advice.

    May raise any error of MLflow's lookup of its tracking URI; callers catch it.
    """
    if is_allowed(url, key):
        return True
    profile.warn_once(" ".join(explain_refusal(profile.origin(url), key)))
    return False


def is_allowed(url: str, key: str) -> bool:
    """Return True if `key` may be sent to `url`: an exchanged key only to its own origin."""
    if isinstance(key, ci_key.ExchangedKey) and profile.origin(url) != key.origin:
        return False
    return profile.origin_allowed(url)


def check_response(response: Any, **sending: Any) -> Any:
    """Return the response that counts. Both providers add this hook to a request.

    With both providers active it runs twice, as `requests` adds a caller's hooks after those of an
    authentication object, which can't see them. The second run has no effect.
    """
    # The order matters: the warning needs the key, which the redirect check removes.
    response = send_again(response, **sending)
    warn_of_sunset(response)
    drop_key_on_redirect(response)
    return response


def send_again(response: Any, **sending: Any) -> Any:
    """Return the response to the same request with another key, if an exchanged key was refused.

    A 401 is the gate's, so that MLflow has not done anything yet. If there is no other key, or the
    body can't be sent a second time, `response` is returned. Never raises.
    """
    sent = response.request.headers.get(HEADER)
    if response.status_code != 401 or sent is None:
        return response
    try:
        key = ci_key.replace(sent)
        again = response.request.copy()
        whole = isinstance(again.body, (str, bytes, type(None)))
        if key is None or not whole or not may_send(response.url, key):
            return response
        # The connection is free again once the answer has been read.
        _ = response.content
        response.close()
        again.headers[HEADER] = key
        answer = response.connection.send(again, **sending)
    except Exception as error:
        profile.warn_once(f"A request was not sent once more ({type(error).__name__}).")
        return response
    answer.history.append(response)
    answer.request = again
    return answer


def warn_of_sunset(response: Any, **_: Any) -> None:
    """Warn, once for each date, if the server says that our key was replaced and when it ends.

    The server says so with `Deprecation` (RFC 9745) and `Sunset` (RFC 8594). Malformed headers are
    ignored. Never raises.
    """
    try:
        deprecation, sunset = (response.headers.get(name) for name in ("Deprecation", "Sunset"))
        if deprecation is None or sunset is None or not _DEPRECATION.fullmatch(deprecation):
            return
        # The caller of MLflow may have set another key than ours.
        sent = response.request.headers.get(HEADER)
        ends = parsedate_to_datetime(sunset)
        if sent is None or sent != profile.api_key() or ends.tzinfo is None:
            return
        date = times.date(ends.timestamp())
    except Exception:
        return
    profile.warn_once(
        f"This Hokusai API key was replaced and ends on {date}. "
        f"Set {profile.KEY} to the new key before then; if you do not have it, ask the server's "
        "operator."
    )


def drop_key_on_redirect(response: Any, **_: Any) -> None:
    """Remove the key if `response` redirects to another origin.

    `requests` copies the answered request for the redirect after the hooks have run (`Session.send`,
    then `SessionRedirectMixin.resolve_redirects`), and drops only `Authorization` itself. The copy
    keeps the hook, so every redirect of a chain is checked.
    """
    if not response.is_redirect:
        return
    here, there = profile.origin(response.url), _target(response)
    if here is not None and here == there:
        return
    # An earlier hook (digest authentication) may have sent a second request, while `requests` still
    # copies the first one.
    for answered in (response, *response.history):
        if answered.request.headers.pop(HEADER, None) is not None:
            profile.warn_once(
                f"{HEADER} was not forwarded from {here} to {there or 'an ambiguous URL'}: a redirect "
                "led to another origin. If the server has moved there, set MLFLOW_TRACKING_URI "
                "to its new address."
            )


def _target(response: Any) -> profile.Origin | None:
    """Return the origin that `response` redirects to, or None if that is ambiguous."""
    location = response.headers["location"]
    if not _PLAIN.fullmatch(location):
        return None
    return profile.origin(response.url if _PATH.match(location) else location)


def explain_refusal(target: profile.Origin | None, key: str) -> tuple[str, str]:
    """Return the reason why `target` (None: an ambiguous URL) does not get `key`, and the fix."""
    if target is None:
        return (
            f"{HEADER} is not sent to a URL with an ambiguous host.",
            "Write the URL with a plain ASCII host (xn--… for other scripts): "
            "https://registry.example.com/path.",
        )
    if isinstance(key, ci_key.ExchangedKey) and target != key.origin:
        return (
            f"{HEADER} is not sent to {target}: this job's key was exchanged with {key.origin}.",
            f"If {target} needs a key, set {profile.KEY} to one for both.",
        )
    if os.environ.get(profile.ALLOWED_ORIGINS, "").strip():
        return (
            f"{HEADER} is not sent to {target}: it is not in {profile.ALLOWED_ORIGINS}.",
            f"If the key belongs there, add {target} to the list.",
        )
    if not target.confidential and target.loopback:
        return (
            f"{HEADER} is not sent to {target}: it would go through the proxy of HTTP_PROXY, which "
            "can read plain http.",
            "Add localhost,127.0.0.1,::1 to NO_PROXY.",
        )
    if not target.confidential:
        return (
            f"{HEADER} is not sent to {target}: plain http would show the key to the network.",
            f"Use https, or set {profile.ALLOWED_ORIGINS}={target} if that network is trusted.",
        )
    return (
        f"{HEADER} is not sent to {target}: it is not the origin of MLflow's tracking URI.",
        f"If the key belongs there, set MLFLOW_TRACKING_URI to it or "
        f"{profile.ALLOWED_ORIGINS}={target}.",
    )

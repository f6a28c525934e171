"""`HOKUSAI_TRUST=auto`: a CI job without a key exchanges its identity token for one that lives minutes.

PyPA's `id` gets the token from GitHub, GitLab, Buildkite, CircleCI or Google Cloud. It goes to the
tracking server's origin only, which is also its audience. The key goes nowhere else either, stays in
this process's memory, and is renewed before it ends.
"""

from __future__ import annotations

import math
import os
import threading
import time
from typing import NamedTuple

import requests

from mlflow_hokusai_auth.core import keys

from . import profile

TRUST = "HOKUSAI_TRUST"
PATH = "/api/2.0/hokusai/token"
#: Seconds for one request, and between an exchange that failed and the next one.
TIMEOUT, PAUSE = 30.0, 30.0
#: Tries of one exchange while the server asks to wait, and seconds of one such wait, at most.
TRIES, MAX_WAIT = 3, 10.0
#: The share of a key's life after which it is renewed.
RENEW_AFTER = 2 / 3

_GRANT = {
    "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
    "subject_token_type": "urn:ietf:params:oauth:token-type:id_token",
}


class Unavailable(Exception):
    """Raised if no key was exchanged. The text says why and what to do, and holds no token."""


class ExchangedKey(str):
    """A key, and the only origin that it may be sent to."""

    __slots__ = ("origin",)
    origin: profile.Origin

    def __new__(cls, key: str, origin: profile.Origin) -> ExchangedKey:
        made = super().__new__(cls, key)
        made.origin = origin
        return made

    def __getnewargs__(self) -> tuple[str, profile.Origin]:  # type: ignore[override]
        # A copy of a request's headers copies the key, too.
        return str(self), self.origin


class _Held(NamedTuple):
    """A key for the server at `uri`; times are readings of the monotonic clock."""

    uri: str
    key: ExchangedKey
    renew_at: float
    ends_at: float


_lock = threading.Lock()
_held: _Held | None = None
#: The server that the last exchange failed with, and the time from which on another may be tried.
_failed: tuple[str, float, str] = ("", 0.0, "")
#: The last key that was replaced because the server refused it, and the time from which on the next is.
_refused: tuple[str, float] = ("", float("-inf"))


def is_wanted() -> bool:
    """Return True if the environment asks for exchanged keys."""
    value = os.environ.get(TRUST, "").strip()
    if value not in ("", "auto"):
        profile.warn_once(f"{TRUST} is ignored: it must be auto.")
    return value == "auto"


def current() -> ExchangedKey | None:
    """Return the key of this job, exchanged or renewed if need be; None, with a warning, if not."""
    try:
        return obtain()
    except Unavailable as reason:
        profile.warn_once(f"No Hokusai API key is sent ({TRUST}=auto): {reason}")
        return None


def obtain() -> ExchangedKey:
    """Return the key of this job, exchanged or renewed if need be. Raises Unavailable."""
    global _held, _failed
    uri = profile.tracking_uri()
    with _lock:
        now = time.monotonic()
        good = _held is not None and _held.uri == uri and now < _held.ends_at
        held = _held if good else None
        if held is not None and now < held.renew_at:
            return held.key
        if _failed[0] == uri and now < _failed[1]:
            if held is None:
                raise Unavailable(_failed[2])
            return held.key
        try:
            _held = held = _exchange(uri)
        except Unavailable as reason:
            _failed = (uri, time.monotonic() + PAUSE, str(reason))
            if held is None:
                raise
        return held.key


def replace(key: str) -> ExchangedKey | None:
    """Return a key in place of `key`, which the server refused with 401; None if there is none.

    The server may have ended it early, because the trust was changed. There is at most one exchange for
    it in `PAUSE` seconds, so that a server that refuses every key causes no loop.
    """
    global _held, _refused
    with _lock:
        if _held is not None and _held.key == key:
            now = time.monotonic()
            if now < _refused[1]:
                return None
            _held, _refused = None, (key, now + PAUSE)
            profile.warn_once(
                "The server refuses this job's Hokusai API key (401), so the job's identity is "
                "exchanged once more."
            )
        elif key != _refused[0]:
            return None
    # Another thread may have exchanged the identity by now, or be about to.
    return current()


def forget() -> None:
    """Forget the keys, and that an exchange failed."""
    global _held, _failed, _refused, _lock
    _held, _failed, _refused = None, ("", 0.0, ""), ("", float("-inf"))
    _lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    # Another thread of the parent may have held it.
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # Windows has no fork.
    os.register_at_fork(after_in_child=_after_fork)


def _exchange(uri: str) -> _Held:
    origin = profile.origin(uri)
    if origin is None or not profile.origin_allowed(uri):
        raise Unavailable(
            "the tracking URI must be the https URL of the server that exchanges identity tokens, "
            f"and in {profile.ALLOWED_ORIGINS} if that is set."
        )
    answer = _post(uri, _identity_token(str(origin)))
    for _ in range(TRIES - 1):
        if answer.status_code not in (429, 503):
            break
        time.sleep(min(_seconds(answer.headers.get("Retry-After")), MAX_WAIT))
        # Each try has a token of its own, because the server may have used up the one before.
        answer = _post(uri, _identity_token(str(origin)))
    began = time.monotonic()
    try:
        given = answer.json()
    except ValueError:
        given = None
    if answer.status_code != 200 or not isinstance(given, dict):
        said = _line(given.get("message")) if isinstance(given, dict) else ""
        raise Unavailable(
            said or f"{origin} answers {answer.status_code}, not as a server of this package."
        )
    key, lifetime = given.get("access_token"), given.get("expires_in")
    if (
        not isinstance(key, str)
        or keys.unsendable(key) is not None
        or not isinstance(lifetime, (int, float))
        or not 0 < lifetime < math.inf
    ):
        raise Unavailable(f"{origin} answers without a key, or without its lifetime.")
    profile.warn_once(
        f"This job's identity was exchanged for a Hokusai API key of {_line(given.get('owner'))} "
        f"({_line(given.get('scope'))}) at {origin}. It ends in {lifetime / 60:.0f} minutes, and is "
        "renewed before."
    )
    held = ExchangedKey(key, origin)
    return _Held(uri, held, began + RENEW_AFTER * lifetime, began + lifetime)


def _identity_token(audience: str) -> str:
    try:
        import id as ambient
    except ImportError:
        raise Unavailable("install the extra: pip install 'mlflow-hokusai-auth[ci]'.") from None
    try:
        token = ambient.detect_credential(audience)
    except ambient.IdentityError as error:
        # The library quotes the whole answer, which may repeat the CI's own credential.
        said = str(error).partition(", body=")[0]
        raise Unavailable(
            f"the CI gives no identity token: {_line(said)}. On GitHub, the job needs "
            "`permissions: id-token: write`."
        ) from None
    except Exception as error:
        # The text of other errors may hold the CI's own credential.
        raise Unavailable(f"the CI gives no identity token ({type(error).__name__}).") from None
    if token is None:
        raise Unavailable(
            "this is no job of GitHub, GitLab, Buildkite, CircleCI or Google Cloud that may have an "
            f"identity token. GitLab needs `id_tokens` with the audience {audience}."
        )
    return token


def _post(uri: str, token: str) -> requests.Response:
    try:
        return requests.post(
            uri.rstrip("/") + PATH,
            data={**_GRANT, "subject_token": token},
            timeout=TIMEOUT,
            # A redirect would take the token to another server.
            allow_redirects=False,
            verify=_verify(),
            # Without it, `requests` would send a password of ~/.netrc.
            auth=lambda request: request,
        )
    except requests.RequestException as error:
        # The text of the error may quote the request.
        raise Unavailable(
            f"{profile.origin(uri)} can't be reached ({type(error).__name__})."
        ) from None


def _verify() -> bool | str:
    """Return what MLflow's own requests do about the server's certificate."""
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() == "true":
        return False
    return os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True


def _seconds(text: str | None) -> float:
    return float(text) if text is not None and text.isascii() and text.isdigit() else 1.0


def _line(text: object) -> str:
    """Return `text` from outside as one printable line of at most 400 characters, without a key."""
    return keys.one_line(text)[:400] if isinstance(text, str) else ""

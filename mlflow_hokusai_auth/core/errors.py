"""The exceptions that cross the borders between packages, with one root.

A message is for the person who has to act on it, and contains no secret.
"""

from __future__ import annotations


class HokusaiAuthError(Exception):
    """The root of this package's exceptions on the server and at its command line."""


class SettingsError(HokusaiAuthError):
    """Raised at start for a setting that can't be used. The message names the setting."""


class StoreError(HokusaiAuthError):
    """Raised at start for a key store that can't be used: a wrong URI, no driver, another version."""


class InvalidRequest(HokusaiAuthError):
    """Raised for input that can't be used, with what to send instead. HTTP answers 400."""


class Forbidden(InvalidRequest):
    """Raised if the caller may not do this to this key. HTTP answers 403."""


class KeyNotFound(InvalidRequest):
    """Raised if no key has the given id. HTTP answers 404."""


class KeyConflict(InvalidRequest):
    """Raised if the key's state does not allow the change. HTTP answers 409."""


class NotGenuine(InvalidRequest):
    """Raised for a report of leaked keys without a trusted signature. HTTP answers 401."""


class AuthorityUnavailable(HokusaiAuthError):
    """Raised if an authority or the key store can't be asked now. HTTP answers 503; nobody is let in.

    `retry_after` is the number of seconds after which to try again, where the authority gave one.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Throttled(AuthorityUnavailable):
    """Raised if the authority answers that it is asked too often (429). HTTP answers 429, too."""


class NoVerdict(AuthorityUnavailable):
    """Raised if the authority answers, but does not say whether the key is good.

    The request gets 503. The reason may lie in this key alone, so the authority is not left alone.
    """

"""The exceptions that one package raises and another one handles, with a common root.

A message addresses the person who can act on it, and contains no secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


class HokusaiAuthError(Exception):
    """The root of this package's exceptions on the server and at its command line."""


class SettingsError(HokusaiAuthError):
    """Raised at start for a setting that can't be used. The message names the setting."""


class StoreError(HokusaiAuthError):
    """Raised at start for a key store that can't be used: a wrong URI, no driver, another version."""


class Misconfigured(HokusaiAuthError):
    """Raised for a request that needs a setting which is not set. HTTP answers 503."""


class InvalidRequest(HokusaiAuthError):
    """Raised for input that can't be used, with what to send instead. HTTP answers 400.

    `fields` are the wrong fields of a body, each with what is wrong with it.
    """

    def __init__(self, message: str, fields: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(message)
        self.fields = fields


class StaffNarrowed(InvalidRequest):
    """Raised if a key of the server's staff would be narrowed. The command line exits with 2."""


class Forbidden(InvalidRequest):
    """Raised if the caller may not do this to this key. HTTP answers 403."""


class NotFound(InvalidRequest):
    """Raised if nothing that the caller may see has the given name or id. HTTP answers 404."""


class KeyNotFound(NotFound):
    """Raised if no key has the given id."""


class Conflict(InvalidRequest):
    """Raised if what exists does not allow the change. HTTP answers 409."""


class KeyConflict(Conflict):
    """Raised if the key's state does not allow the change."""


class NotGenuine(InvalidRequest):
    """Raised for a report of leaked keys without a trusted signature. HTTP answers 401."""


class AuthorityUnavailable(HokusaiAuthError):
    """Raised if a lookup fails, or the key store can't be reached. HTTP answers 503, without MLflow.

    `retry_after` is the authority's own number of seconds to wait, or None if it gave none.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Throttled(AuthorityUnavailable):
    """Raised if the authority answers 429 (too many lookups). HTTP answers 429 as well."""


class UnusableReply(AuthorityUnavailable):
    """Raised if the authority answers, but does not say whether the key is good.

    HTTP answers 503. The cause may be this key alone, so the authority's breaker stays closed.
    """

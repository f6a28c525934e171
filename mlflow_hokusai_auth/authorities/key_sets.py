"""The public keys of trusted issuers: fetched by OpenID Connect Discovery, cached, and bounded.

Only the exact URLs of trusted issuers are asked, and only over TLS (or on this machine). A set is used
for `FRESH` seconds, and for `STALE` while its issuer can't be reached. An unknown key id makes the set
be read again, at most once in `INTERVAL`, so that a flood of made-up tokens makes no requests. Nobody
waits for an issuer that was slow or failed the last time, so that strangers can't hold the threads of
other requests.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import jwt
import requests
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.core.trust import shown

from .timed_http import cause, read_body, session, until

#: Seconds for which a set is used without a look at its issuer, and while the issuer is unreachable.
FRESH, STALE = 3600.0, 86400.0
#: Seconds between two readings of a set, and after a failure if there is no set yet.
INTERVAL, FIRST_INTERVAL = 60.0, 10.0
#: Bytes of a document, and keys of a set, at most.
MAX_DOCUMENT, MAX_KEYS = 256 * 1024, 100
#: Bits of an RSA key, at least (NIST SP 800-131A).
MIN_RSA = 2048
#: Callers that wait at the same time, at most, for all issuers together; and the seconds of a wait.
MAX_WAITING, PATIENCE = 2, 2.0
_log = logging.getLogger("mlflow_hokusai_auth.trust")
_DISCOVERY = "/.well-known/openid-configuration"
_LOOPBACK = re.compile(
    r"http://(?:localhost|127\.0\.0\.1|\[::1\])(?::[0-9]{1,5})?(?:/[!-~]*)?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """A public key of an issuer, and the only algorithm that it verifies."""

    algorithm: str
    key: RSAPublicKey | EllipticCurvePublicKey


KeySet = Mapping[str, VerifyingKey]


@dataclass(slots=True)
class _State:
    """The knowledge of this process about an issuer. Times are readings of the clock, in seconds."""

    keys: KeySet | None = None
    read_at: float = 0.0
    next_reading: float = float("-inf")
    #: The reason why the last reading failed, or "".
    problem: str = ""
    #: False if the last reading failed or took longer than anybody waits, so that nobody waits now.
    prompt: bool = True
    #: The reading that goes on, in a thread of its own, and the time at which it began.
    reading: threading.Event | None = None
    began: float = 0.0


class KeySets:
    """The key sets of issuers. `timer` is monotonic.

    A reading takes `timeout` seconds at most, unless a name takes longer to resolve. An issuer has one
    reading at a time, in a thread of its own. `MAX_WAITING` callers at most wait for readings, of all
    issuers together, for `patience` seconds; the others are answered at once.
    """

    def __init__(
        self,
        *,
        timeout: float = 5.0,
        patience: float = PATIENCE,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout = timeout
        self._patience = patience
        self._timer = timer
        self._lock = threading.Lock()
        self._states: dict[str, _State] = {}
        self._waiting = threading.BoundedSemaphore(MAX_WAITING)

    def find(self, issuer: str, key_id: str) -> VerifyingKey | None:
        """Return the key `key_id` ("" for the only key) of `issuer`, or None if the set has none.

        The issuer must be a trusted one. Raises AuthorityUnavailable if there is no set.
        """
        now = self._timer()
        with self._lock:
            state = self._states.setdefault(issuer, _State())
            known = _of(state.keys, key_id) if now - state.read_at <= STALE else None
            if known is not None and now - state.read_at <= FRESH:
                return known
            first = state.reading is None and now >= state.next_reading
            if first:
                self._begin_reading(issuer, state, now)
            reading = state.reading if state.prompt and (first or known is None) else None
            rest = self._patience - (now - state.began)
        if reading is not None and rest > 0 and self._waiting.acquire(blocking=False):
            try:
                reading.wait(rest)
            finally:
                self._waiting.release()
        with self._lock:
            now = self._timer()
            if state.keys is None or now - state.read_at > STALE:
                raise _unavailable(state, now)
            found = _of(state.keys, key_id)
            if found is None and (state.problem or state.reading is not None):
                # The issuer may have the key by now.
                raise _unavailable(state, now)
            return found

    def _begin_reading(self, issuer: str, state: _State, now: float) -> None:
        # Only a thread of its own bounds the callers' time: nothing bounds the resolution of names.
        thread = threading.Thread(
            target=self._read, args=(issuer, state), name="hokusai-auth issuer", daemon=True
        )
        state.reading, state.began = threading.Event(), now
        try:
            thread.start()
        except RuntimeError:
            # The system has no thread to spare.
            self._end_reading(state, None, "this server has no thread to ask the issuer with")

    def _read(self, issuer: str, state: _State) -> None:
        keys, problem = None, ""
        try:
            keys = _fetch(issuer, time.monotonic() + self._timeout)
        except AuthorityUnavailable as error:
            problem = str(error)
        except Exception as error:
            problem = f"the issuer {issuer} can't be reached: {cause(error)}"
        if problem:
            # The text names addresses, some of which the issuer chose: it is for the operator alone.
            _log.warning("The keys of %s can't be read: %s", issuer, shown(problem))
        with self._lock:
            self._end_reading(state, keys, problem)

    def _end_reading(self, state: _State, keys: KeySet | None, problem: str) -> None:
        """Note the outcome of the reading of `state`, and wake those who wait for it."""
        now, reading = self._timer(), state.reading
        assert reading is not None
        if keys is not None:
            state.keys, state.read_at = keys, now
        state.problem, state.reading = problem, None
        state.prompt = not problem and now - state.began <= self._patience
        state.next_reading = now + (INTERVAL if state.keys else FIRST_INTERVAL)
        reading.set()


def _unavailable(state: _State, now: float) -> AuthorityUnavailable:
    wait = max(state.next_reading - now, 1.0)
    return AuthorityUnavailable("the issuer's keys can't be read", retry_after=wait)


def parse(document: bytes | str) -> KeySet:
    """Return the usable keys of a JSON Web Key Set (RFC 7517). Raises ValueError, with advice.

    Keys for other purposes and of other kinds are left out: only RSA of 2048 bits or more, and P-256.
    """
    entries = _object(document).get("keys")
    if not isinstance(entries, list) or len(entries) > MAX_KEYS:
        raise ValueError(f"this is no JSON Web Key Set of at most {MAX_KEYS} keys")
    found: dict[str, VerifyingKey] = {}
    for entry in entries:
        if (key := _verifying(entry)) is not None:
            found.setdefault(str(entry.get("kid", "")), key)
    if not found:
        raise ValueError(
            "this key set has no public key for signatures: RSA of 2048 bits, or P-256"
        )
    return found


@lru_cache(maxsize=64)
def parse_file(document: str) -> KeySet:
    """Return what `parse` does, and remember it."""
    return parse(document)


def find_in_file(document: str, key_id: str) -> VerifyingKey | None:
    """Return the key `key_id` ("" for the only key) of the key set `document`, or None."""
    return _of(parse_file(document), key_id)


def _of(keys: KeySet | None, key_id: str) -> VerifyingKey | None:
    if not keys:
        return None
    if not key_id:
        return next(iter(keys.values())) if len(keys) == 1 else None
    return keys.get(key_id)


def _object(document: bytes | str) -> dict[str, object]:
    """Return the JSON object in `document`; an empty one if there is none."""
    try:
        content = json.loads(document)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _verifying(entry: object) -> VerifyingKey | None:
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
        return None
    algorithm = {"RSA": "RS256", "EC": "ES256"}.get(str(entry.get("kty")))
    if algorithm is None or entry.get("alg", algorithm) != algorithm or "d" in entry:
        return None
    try:
        key = jwt.PyJWK(entry, algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    if isinstance(key, RSAPublicKey) and key.key_size >= MIN_RSA:
        return VerifyingKey(algorithm, key)
    if isinstance(key, EllipticCurvePublicKey) and key.curve.name == "secp256r1":
        return VerifyingKey(algorithm, key)
    return None


def _fetch(issuer: str, deadline: float) -> KeySet:
    local = _LOOPBACK.fullmatch(issuer) is not None
    verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
    # A proxy would read plain http, and takes 127.0.0.1 for itself.
    with session(verify, proxied=None if local else issuer) as client:
        described = _object(_get(client, issuer.rstrip("/") + _DISCOVERY, deadline))
        if described.get("issuer") != issuer:
            raise AuthorityUnavailable(
                f"{issuer}{_DISCOVERY} describes no issuer of exactly this name"
            )
        url = described.get("jwks_uri")
        if not isinstance(url, str) or not (
            url.startswith("https://") or (local and _LOOPBACK.fullmatch(url))
        ):
            raise AuthorityUnavailable(f"the issuer {issuer} names no https address of its keys")
        try:
            return parse(_get(client, url, deadline))
        except ValueError as error:
            raise AuthorityUnavailable(f"the issuer {issuer}: {error}") from None


def _get(client: requests.Session, url: str, deadline: float) -> bytes:
    with client.get(url, timeout=until(deadline), allow_redirects=False, stream=True) as response:
        if response.status_code != 200:
            raise AuthorityUnavailable(f"{url} answers {response.status_code}")
        content = read_body(response, MAX_DOCUMENT)
    if content is None:
        raise AuthorityUnavailable(f"{url} answers with more than {MAX_DOCUMENT} bytes")
    return content

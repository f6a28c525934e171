"""Reports of GitHub's secret-scanning partner programme: verifying and parsing them.

GitHub searches public places for `PATTERN` and posts the matches to the address we gave it, signed with
one of its keys. Formats and names are those of its documentation:
https://docs.github.com/en/code-security/secret-scanning/secret-scanning-partnership-program/secret-scanning-partner-program

GitHub's public keys come from a file that the operator saves, so that no request from outside makes the
server send one. A report carries no time, so anyone who saw it can send it again; revoking a key twice
does no harm.
"""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP256R1,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from mlflow_hokusai_auth.core import keys as key_format

#: GitHub publishes its signing keys here; `load` reads a saved copy.
KEYS_URL = "https://api.github.com/meta/public_keys/secret_scanning"
#: Request headers: the identifier of the signing key, and the signature of the raw body.
IDENTIFIER_HEADER = "Github-Public-Key-Identifier"
SIGNATURE_HEADER = "Github-Public-Key-Signature"
#: The rule of the route that takes reports, and its message on a server without GitHub's keys.
RULE = "POST /api/2.0/hokusai/keys/leaked"
ABSENT = "This server takes no leak reports: HOKUSAI_AUTH_LEAK_PUBLIC_KEYS is not set."
#: The most matches that one report may have.
MAX_LEAKS = 1000
#: The maximum length of `kind`, `url` and `source`, in characters; the rest is cut off.
MAX_TEXT = 500

# GitHub scans with Hyperscan, which has no lookaround and reports every possible match. So the end
# needs a boundary: without one, the first 32 and 40 characters of a key would be reported as well.
# The start has none, since a key may follow a letter: "\nhk_live_…" in quoted code, "%3Dhk_live_…".
#: The pattern that GitHub scans for: keys made here (46 characters after the prefix) and older ones.
PATTERN = (
    r"hk_(?:(?:live|test|dev)_(?:[0-9A-Za-z]{46}|[0-9A-Za-z]{40}|[0-9A-Za-z]{32})"
    r"|ci_[0-9A-Za-z]{46})\b"
)


@dataclass(frozen=True, slots=True)
class Leak:
    """One match: a `token` found in public, GitHub's name for its pattern, and the place.

    Every field but `token` is safe to log: printable, at most `MAX_TEXT` characters, without keys.
    `url` and `source` ("commit", "gist_content", "npm", …) may be empty.
    """

    token: str = field(repr=False)
    kind: str
    url: str
    source: str


def load(path: str) -> Mapping[str, EllipticCurvePublicKey]:
    """Return GitHub's public keys by identifier, from the file at `path`, a saved answer of `KEYS_URL`.

    Keys with `is_current` false are included: GitHub's documentation selects the key by the identifier
    that came with the report, and none of its samples reads `is_current`.
    Raises ValueError, with advice, if the file can't be read, is malformed, has no keys, or has one
    that is not on P-256.
    """
    advice = f"save it again: curl -fsS -o {shlex.quote(path)} {KEYS_URL}"
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror}); {advice}") from None
    answer = _json(content)
    entries = answer.get("public_keys") if isinstance(answer, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} has no public_keys; {advice}")
    keys: dict[str, EllipticCurvePublicKey] = {}
    for number, entry in enumerate(entries, 1):
        identifier, pem = _strings(entry, "key_identifier", "key")
        key = _public_key(pem)
        if not identifier or key is None:
            raise ValueError(f"public key {number} in {path} is not a P-256 key; {advice}")
        if keys.setdefault(identifier, key) != key:
            raise ValueError(f"{path} has two keys with one identifier ({number}); {advice}")
    return keys


def is_genuine(
    body: bytes, identifier: str, signature: str, keys: Mapping[str, EllipticCurvePublicKey]
) -> bool:
    """Return True if GitHub signed `body`, the raw bytes of the request. Never raises.

    `identifier` and `signature` are the two headers. The signature is ECDSA on P-256 with SHA-256, in
    DER, in base64.
    """
    key = keys.get(identifier)
    if key is None:
        return False
    try:
        key.verify(base64.b64decode(signature, validate=True), body, ECDSA(SHA256()))
    except (InvalidSignature, ValueError):
        return False
    return True


def parse(body: bytes) -> list[Leak]:
    """Parse a report: `[{"token": …, "type": …, "url": …, "source": …}, …]`.

    Raises ValueError, whose message quotes nothing of `body`, for anything else and for more than
    `MAX_LEAKS` matches.
    """
    entries = _json(body)
    if not isinstance(entries, list) or len(entries) > MAX_LEAKS:
        raise ValueError(f"A report is a JSON list of at most {MAX_LEAKS} matches, in UTF-8.")
    leaks = []
    for number, entry in enumerate(entries, 1):
        token, kind, url, source = _strings(entry, "token", "type", "url", "source")
        # A key is just as public if the report does not say where, so only these two are required.
        if not token or not kind:
            raise ValueError(f"Match {number} of the report has no token or no type.")
        leaks.append(Leak(token, _loggable(kind), _loggable(url), _loggable(source)))
    return leaks


def feedback(leak: Leak, known: bool) -> dict[str, str]:
    """Return the reply's entry for `leak`. `known` says that the token is, or once was, a key of ours.

    GitHub takes the token or its SHA-256; we send the SHA-256, so that no key is sent. Its
    documentation does not say how to encode it; this is hexadecimal, as another partner does it
    (Sentry, `src/sentry/api/endpoints/secret_scanning/`).
    """
    return {
        "token_hash": key_format.digest(leak.token),
        "token_type": leak.kind,
        "label": "true_positive" if known else "false_positive",
    }


def _json(content: bytes) -> object:
    """Parse JSON; None if it is malformed. A JSONDecodeError holds the whole text, so none escapes."""
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _strings(entry: object, *names: str) -> list[str]:
    """Return the values of `names` in `entry`; "" for one that is missing or not a string."""
    values = [entry.get(name) if isinstance(entry, dict) else None for name in names]
    return [value if isinstance(value, str) else "" for value in values]


def _public_key(pem: str) -> EllipticCurvePublicKey | None:
    """Return the P-256 key in `pem`, or None."""
    try:
        key = load_pem_public_key(pem.encode("utf-8"))
    except (ValueError, UnsupportedAlgorithm):
        return None
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return key
    return None


def _loggable(text: str) -> str:
    # The order matters: an unprintable character may split a key, and `redact` misses a truncated key.
    printable = "".join(character for character in text if character.isprintable())
    return key_format.redact(printable)[:MAX_TEXT]

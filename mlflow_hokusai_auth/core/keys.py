"""The format of a key, and the only things done with its text: check, digest, redact.

A key made here is `hk_<live|test|dev>_` + 40 random base62 characters + a CRC-32 of those 40 in six
base62 characters, as GitHub builds its tokens
(https://github.blog/engineering/behind-githubs-new-authentication-token-formats/). 40 characters hold
238 bits, so that a plain SHA-256 is enough to store: nothing to guess, nothing to stretch.
Keys handed out before have 32 or 40 characters and no checksum; they stay valid.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import zlib

ENVIRONMENTS = ("live", "test", "dev")
#: The longest text that is looked at as a key, in characters.
MAX_LENGTH = 256

_SESSION = "hk_session_"
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
#: The digits of a number to the base 62 × 62.
_PAIRS = [high + low for high in _ALPHABET for low in _ALPHABET]
_RANDOM = 40
_CHECKSUM = 6
_SHAPE = re.compile(r"[A-Za-z0-9_-]{1,256}", re.ASCII)
_CHECKSUMMED = re.compile(
    rf"hk_(?:live|test|dev)_([0-9A-Za-z]{{{_RANDOM}}})([0-9A-Za-z]{{{_CHECKSUM}}})", re.ASCII
)
_IMPORTABLE = re.compile(r"hk_(?:live|test|dev)_(?:[0-9A-Za-z]{32}|[0-9A-Za-z]{40})", re.ASCII)


def _spelt(text: str) -> str:
    """A pattern for `text`, each character of it as it is or percent-encoded."""
    return "".join(f"(?:{character}|%{ord(character):02x})" for character in text)


# Web servers log a target as it came, so any part of it may be encoded: %5F for the underscore.
_IN_TEXT = re.compile(
    _spelt("hk_")
    + f"({'|'.join(_spelt(name) for name in (*ENVIRONMENTS, 'jobs', 'session'))})"
    + _spelt("_")
    + "[A-Za-z0-9_%-]{4,}",
    re.ASCII | re.IGNORECASE,
)


def checksum(text: str) -> str:
    """CRC-32 of `text` (zlib's), in six base62 characters, `0-9A-Za-z`, padded with `0`."""
    high, low = divmod(zlib.crc32(text.encode("ascii")), len(_PAIRS))
    high, middle = divmod(high, len(_PAIRS))
    return _PAIRS[high] + _PAIRS[middle] + _PAIRS[low]


def generate(environment: str = "live") -> str:
    """A new key for `environment`, one of `ENVIRONMENTS`; raises ValueError for any other."""
    if environment not in ENVIRONMENTS:
        raise ValueError(f"environment must be one of {', '.join(ENVIRONMENTS)}")
    body = "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM))
    return f"hk_{environment}_{body}{checksum(body)}"


def session_token() -> str:
    """A new token for a browser's session: 256 random bits, and a beginning that no key has."""
    return _SESSION + secrets.token_urlsafe(32)


def is_session_token(text: str) -> bool:
    """Whether `text` is shaped as `session_token` makes it."""
    return text.startswith(_SESSION)


def unsendable(key: str) -> str | None:
    """Why `key` must not be put into a header, in words for its owner, or None if it may."""
    if len(key) > MAX_LENGTH:
        return f"it is longer than {MAX_LENGTH} characters"
    if not _SHAPE.fullmatch(key):
        return "it has characters that no key has (a space, a quote or a line break, perhaps)"
    return None


def problem(key: str) -> str | None:
    """Why `key` can't be a key, in words for its owner, or None if it can.

    Loose on purpose: an authority other than ours may have keys of other lengths, so only bytes that
    no key has, and a checksum that does not add up, are refused without asking.
    """
    made_here = _CHECKSUMMED.fullmatch(key)
    if made_here is None:
        return unsendable(key)
    if checksum(made_here[1]) != made_here[2]:
        return "its checksum does not add up, so a character was lost or changed on the way"
    return None


def importable(key: str) -> bool:
    """Whether the store takes `key`: made here, or of the older 32 or 40 character shape."""
    return problem(key) is None and bool(_CHECKSUMMED.fullmatch(key) or _IMPORTABLE.fullmatch(key))


def environment(key: str) -> str:
    """The environment that an importable key was made for: "live", "test" or "dev"."""
    return key.split("_", 2)[1]


def digest(key: str) -> str:
    """SHA-256 of `key`, as 64 hex digits: what is stored, and what is looked up."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def redact(text: str) -> str:
    """`text` with every key in it cut down to its environment, for logs and messages."""
    return _IN_TEXT.sub(r"hk_\1_***", text)

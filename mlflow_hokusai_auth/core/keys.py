"""The format of a key, and functions to check, digest and redact it.

A new key is `hk_<live|test|dev|ci>_` + 40 random base62 characters + their CRC-32 in six base62
characters, as GitHub builds its tokens
(https://github.blog/engineering/behind-githubs-new-authentication-token-formats/). 40 characters hold
238 bits, so nobody can guess a key, and a plain SHA-256 is enough to store.
Older keys have 32 or 40 characters and no checksum; they stay valid.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import zlib

ENVIRONMENTS = ("live", "test", "dev")
#: The environment of keys that are exchanged for an identity token. They live an hour at most.
EPHEMERAL = "ci"
#: Characters of a key, at most, of any authority.
MAX_LENGTH = 256

_SESSION = "hk_session_"
_LINK = "hk_link_"
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
#: The digits of base 62 × 62.
_PAIRS = [high + low for high in _ALPHABET for low in _ALPHABET]
_RANDOM = 40
_CHECKSUM = 6
_SHAPE = re.compile(r"[A-Za-z0-9_-]{1,256}", re.ASCII)
_CHECKSUMMED = re.compile(
    rf"hk_(?:live|test|dev|ci)_([0-9A-Za-z]{{{_RANDOM}}})([0-9A-Za-z]{{{_CHECKSUM}}})", re.ASCII
)
_LINK_CODE = re.compile(rf"{_LINK}[A-Za-z0-9_-]{{43}}", re.ASCII)
_IMPORTABLE = re.compile(r"hk_(?:live|test|dev)_(?:[0-9A-Za-z]{32}|[0-9A-Za-z]{40})", re.ASCII)


def _spelt(text: str) -> str:
    """Return a pattern for `text`, each character plain or percent-encoded."""
    return "".join(f"(?:{character}|%{ord(character):02x})" for character in text)


# Web servers log a target as it was sent, so any character may be encoded, such as %5F for "_".
_IN_TEXT = re.compile(
    _spelt("hk_")
    + f"({'|'.join(_spelt(name) for name in (*ENVIRONMENTS, EPHEMERAL, 'jobs', 'link', 'session'))})"
    + _spelt("_")
    + "[A-Za-z0-9_%-]{4,}",
    re.ASCII | re.IGNORECASE,
)
#: A JSON Web Token: its first two parts are JSON objects, which begin with `{"` in base64url.
_TOKEN_IN_TEXT = re.compile(
    r"eyJ[A-Za-z0-9_-]+(?:\.|%2[Ee])eyJ[A-Za-z0-9_-]+(?:(?:\.|%2[Ee])[A-Za-z0-9_-]*)?"
)


def checksum(text: str) -> str:
    """Return zlib's CRC-32 of `text` in six base62 characters (`0-9A-Za-z`), padded with `0`."""
    number = zlib.crc32(text.encode("ascii"))
    return _PAIRS[number // 62**4] + _PAIRS[number // 62**2 % 62**2] + _PAIRS[number % 62**2]


def generate(environment: str = "live") -> str:
    """Return a new key for `environment`, one of `ENVIRONMENTS` or `EPHEMERAL`.

    Raises ValueError for any other.
    """
    if environment not in (*ENVIRONMENTS, EPHEMERAL):
        raise ValueError(f"environment must be one of {', '.join(ENVIRONMENTS)}")
    body = "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM))
    return f"hk_{environment}_{body}{checksum(body)}"


def session_token() -> str:
    """Return a new token for a browser's session: `hk_session_`, which no key has, and 256 bits."""
    return _SESSION + secrets.token_urlsafe(32)


def is_session_token(text: str) -> bool:
    """Return whether `text` begins as the tokens of `session_token` do."""
    return text.startswith(_SESSION)


def link_code() -> str:
    """Return a new code of a one-time link: `hk_link_`, with which no key begins, and 256 bits."""
    return _LINK + secrets.token_urlsafe(32)


def link_code_in(text: str) -> str | None:
    """Return the code in `text`, which is a one-time link or its code alone; None without one."""
    found = _LINK_CODE.fullmatch(text.strip().rpartition("#")[2])
    return found[0] if found else None


def unsendable(key: str) -> str | None:
    """Return why `key` must not be put into a header, for its owner, or None if it may."""
    if len(key) > MAX_LENGTH:
        return f"it is longer than {MAX_LENGTH} characters"
    if not _SHAPE.fullmatch(key):
        return "it has characters that no key has (perhaps a space, a quote or a line break)"
    return None


def problem(key: str) -> str | None:
    """Return why `key` can't be a key, for its owner, or None if it can.

    Other authorities may have keys of other forms. So this refuses only characters and lengths that no
    key has, and a key in our form whose checksum is wrong.
    """
    made_here = _CHECKSUMMED.fullmatch(key)
    if made_here is None:
        if key.startswith(_LINK):
            return "it is the code of a one-time link: open the link in a browser to get the key"
        return unsendable(key)
    if checksum(made_here[1]) != made_here[2]:
        return "its checksum is wrong, so a character was lost or changed on the way"
    return None


def importable(key: str) -> bool:
    """Return whether the store can import `key`: it has our form, or that of an older key."""
    known = _CHECKSUMMED.fullmatch(key) or _IMPORTABLE.fullmatch(key)
    return problem(key) is None and known is not None and environment(key) in ENVIRONMENTS


def environment(key: str) -> str:
    """Return the environment of a key in our form: "live", "test", "dev" or "ci"."""
    return key.split("_", 2)[1]


def digest(key: str) -> str:
    """Return the SHA-256 of `key` in 64 hex digits. Only this is stored, and lookups go by it."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def redact(text: str) -> str:
    """Return `text` for logs and messages: keys cut down to their environment, no identity token."""
    if "eyJ" in text:
        text = _TOKEN_IN_TEXT.sub("eyJ***", text)
    return _IN_TEXT.sub(r"hk_\1_***", text)


def one_line(text: str) -> str:
    """Return `text`, which came from outside, redacted and as one line of printable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in redact(text)).split())

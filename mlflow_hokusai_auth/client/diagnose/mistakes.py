"""Recognises the usual mistakes in a key and in a tracking URI, so that the doctor can name them."""

from __future__ import annotations

import re

from mlflow_hokusai_auth.client import profile
from mlflow_hokusai_auth.core import keys

_EXAMPLE = "https://registry.hokus.ai/api/mlflow"

#: The mistake, and its fix.
Mistake = tuple[str, str]

COPY = "Copy the whole key again."
_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=", re.ASCII)
_QUOTED = re.compile(r"(['\"`]).*\1|[“”‘’<].*", re.DOTALL)
# The documentation writes hk_live_YOUR_KEY, and other texts hk_live_xxxx or hk_test_....
_PLACEHOLDER = re.compile(
    r"(?:hk_(?:live|test|dev)_)?(?:YOUR|MY|THE|NEW|OLD)[_-].*|hk_[a-z]+_(?:[xX*.…_-]+|\.\.\.)|.*\.\.\.",
    re.ASCII,
)
_BEGINNING = re.compile(r"hk_(?:live|test|dev)_([0-9A-Za-z]*)", re.ASCII)
#: Characters after the second _ of a key, and of older ones, which have no checksum.
_LENGTH = 46
_OLD_LENGTHS = (40, 32)
_HOST = re.compile(
    r"(localhost|[0-9]{1,3}(?:\.[0-9]{1,3}){3}|\[[0-9a-f:.]+\]|[a-z0-9-]+(?:\.[a-z0-9-]+)+)"
    r"(:[0-9]{1,5})?(/.*)?",
    re.ASCII | re.IGNORECASE,
)


def in_key(text: str) -> Mistake | None:
    """Return what is wrong with `text`, which should be a key, or None. Never quotes it."""
    text = text.strip()
    if name := _ASSIGNMENT.match(text):
        about = f"{name[1]}=" if len(name[1]) <= 40 and keys.redact(name[1]) == name[1] else "NAME="
        return (
            f"what is there begins with {about}, as in a .env file",
            "Leave only the key itself, without its name and without quotes.",
        )
    if _PLACEHOLDER.fullmatch(text):
        return (
            "it is the placeholder of the documentation",
            "Put the key that you were given in its place. If you have none, ask the server's "
            "operator.",
        )
    if _QUOTED.fullmatch(text):
        return "it is in quotes or brackets", "Leave only the key itself."
    beginning = _BEGINNING.fullmatch(text)
    if beginning and (left := len(beginning[1])) < _LENGTH and left not in _OLD_LENGTHS:
        return (
            f"it is cut short: it has {left} characters after the second _, and a whole key has "
            f"{_LENGTH}",
            COPY,
        )
    if problem := keys.problem(text):
        return problem, COPY
    return None


def in_uri(uri: str) -> Mistake | None:
    """Return what is wrong with `uri`, which should be the URL of a server, or None."""
    if uri.lower().startswith(("http://", "https://")):
        return None
    fix = "Set MLFLOW_TRACKING_URI to the URL of the server, such as {}."
    if bare := _HOST.fullmatch(uri):
        origin = profile.origin(f"http://{bare[1]}")
        scheme = "http" if origin is not None and origin.loopback else "https"
        found = f"{uri} has no scheme, so MLflow takes it for a folder on this machine"
        return found, fix.format(f"{scheme}://{uri}")
    return f"{uri} is not the URL of a server", fix.format(_EXAMPLE)

"""The whole server once more under `/mlflow` and `/api/mlflow`.

The prefix is taken off once, from `path` and `raw_path`, and `root_path` is left alone: Starlette
routes on the path without `root_path` while MLflow's middlewares look at the whole path, and a gate
between two readings of one path can be walked around (measured on MLflow 3.12 and 3.17).
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote


class Prefixes:
    """The configured prefixes; matches as werkzeug's DispatcherMiddleware does."""

    def __init__(self, prefixes: Sequence[str]) -> None:
        # The longest first: with /a and /a/b, /a/b/c belongs to /a/b.
        self._prefixes = tuple(sorted(prefixes, key=len, reverse=True))

    def split(self, path: str) -> tuple[str, str]:
        """`path` as (prefix, rest): ("/mlflow", "/health"), or ("", path) without a prefix."""
        for prefix in self._prefixes:
            if path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in ("", "/"):
                return prefix, path[len(prefix) :]
        return "", path


def raw_without(prefix: str, rest: str, raw_path: bytes | None) -> bytes:
    """`raw_path` without `prefix`, whose decoded remainder is `rest`."""
    encoded = prefix.encode("ascii")
    if raw_path is not None and raw_path.startswith(encoded):
        return raw_path[len(encoded) :]
    # The prefix itself came percent-encoded; what follows it is spelt anew.
    return quote(rest).encode("ascii")


def slash_location(prefix: str) -> str:
    """Where a request for the bare prefix is sent, relative so that an outer prefix survives.

    MLflow's page loads its files by relative links, which from /api/mlflow would lead to /api/.
    """
    return prefix.rsplit("/", 1)[1] + "/"

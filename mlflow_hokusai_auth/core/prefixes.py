"""Prefixes: the paths, such as `/mlflow` and `/api/mlflow`, under which the server answers as well.

The prefix is removed once, from `path` and `raw_path`, and `root_path` does not change: Starlette
routes by the path without `root_path`, while MLflow's middlewares read the whole path. If the two
disagree on the path, a request passes the gate as one route and reaches another (measured on MLflow
3.12 and 3.17).
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote


class Prefixes:
    """The configured prefixes, matched as by werkzeug's DispatcherMiddleware."""

    def __init__(self, prefixes: Sequence[str]) -> None:
        # The longest comes first: with /a and /a/b, /a/b/c belongs to /a/b.
        self._prefixes = tuple(sorted(prefixes, key=len, reverse=True))

    def split(self, path: str) -> tuple[str, str]:
        """Split `path` into (prefix, rest): ("/mlflow", "/health"), or ("", path) without a prefix."""
        for prefix in self._prefixes:
            if path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in ("", "/"):
                return prefix, path[len(prefix) :]
        return "", path


def raw_without(prefix: str, rest: str, raw_path: bytes | None) -> bytes:
    """Return `raw_path` without `prefix`; `rest` is the decoded path behind the prefix."""
    encoded = prefix.encode("ascii")
    if raw_path is not None and raw_path.startswith(encoded):
        return raw_path[len(encoded) :]
    # The prefix came percent-encoded, so the bytes behind it can't be cut out: encode `rest` again.
    return quote(rest).encode("ascii")


def slash_location(prefix: str) -> str:
    """Return the relative location to which a request for the bare prefix is redirected.

    MLflow's page loads its files by relative links, which from /api/mlflow would lead to /api/. The
    location is relative as well, because a proxy may add a prefix of its own.
    """
    return prefix.rsplit("/", 1)[1] + "/"

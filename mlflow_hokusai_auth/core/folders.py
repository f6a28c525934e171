"""The folders in which experiments keep their files.

Users choose the place and the name of such a folder. So `artifact_paths` compares a path with the
folders of existing experiments, and does not trust the words in the path.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlparse, urlunparse

from .locations import Location, Roots, read

#: Characters because of which MLflow may read a path otherwise than it is written.
_ODD = re.compile(r"[%?#;:\\\x00-\x20\x7f]")
#: A path with such a character is read only up to this length (characters), since reading it is slow.
MAX_ODD = 2048
_HERE = Location("file", "", ())

#: A place as (scheme, URI authority, segment, segment, …).
_Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Folders:
    """The folders of experiments that this process has read from MLflow's database.

    The folders that MLflow makes itself need no query: each is named by its experiment's number.
    """

    #: The place that MLflow's artifact proxy serves; None if it serves none.
    served: Location | None = _HERE
    #: The place below which MLflow makes numbered folders; None if it makes none.
    base: Location | None = _HERE
    #: The folders that are not numbered, as MLflow reads their locations.
    exact: frozenset[_Key] = frozenset()
    #: The same folders after `fold`, because some file systems ignore case and Unicode forms.
    alike: frozenset[_Key] = frozenset()
    #: Every place above one of `alike`.
    above: frozenset[_Key] = frozenset()

    def adding(self, uris: Iterable[str], roots: Roots) -> Folders:
        """Return these folders and those at `uris`, the artifact locations of experiments."""
        exact: set[_Key] = set()
        alike: set[_Key] = set()
        for uri in uris:
            place = roots.place(read(uri))
            # A request's path is compared both as MLflow reads it and as it is written.
            parts = read_path("/".join(place.parts))
            alike.add(_alike(_key(place, place.parts)))
            if parts is not None:
                exact.add(_key(place, parts))
                if parts != place.parts:
                    alike.add(_alike(_key(place, parts)))
        above = {folder[:end] for folder in alike for end in range(2, len(folder))}
        return Folders(
            self.served, self.base, self.exact | exact, self.alike | alike, self.above | above
        )

    def overlaps(self, place: Location) -> bool:
        """Return whether `place` is at, above or below a folder that isn't a numbered one."""
        return self.holds(place) or bool(_beginnings(_alike(_key(place, place.parts)), self.alike))

    def holds(self, place: Location) -> bool:
        """Return whether a folder that isn't a numbered one is at or below `place`."""
        key = _alike(_key(place, place.parts))
        return key in self.alike or key in self.above

    def below(self, parts: Sequence[str], *, alike: bool = False) -> Iterator[_Key]:
        """Yield the rest of the proxy's path `parts` below each folder that contains it.

        With `alike`, paths and folders are compared after `fold`.
        """
        if self.served is None:
            return
        key = _key(self.served, (*self.served.parts, *parts))
        key = _alike(key) if alike else key
        for end in _beginnings(key, self.alike if alike else self.exact):
            yield key[end:]
        if self.base is not None:
            base = _key(self.base, self.base.parts)
            if end := _numbered(key, _alike(base) if alike else base):
                yield key[end:]

    def has_one_in(self, parts: Sequence[str]) -> bool:
        """Return whether a folder that isn't a numbered one is at or below the proxy's path `parts`."""
        served = self.served
        return served is not None and self.holds(
            Location(served.scheme, served.authority, (*served.parts, *parts))
        )


#: The folders of a server with MLflow's default locations, before any query.
BY_NUMBER = Folders()


def read_path(path: str) -> _Key | None:
    """Return the segments of `path` as `mlflow.utils.uri.validate_path_is_safe` reads it.

    Return None for a path that MLflow refuses, and for an odd one that is longer than `MAX_ODD`.
    """
    if _ODD.search(path):
        read_as = _as_mlflow_reads(path)
        if read_as is None:
            return None
        path = read_as
    parts = tuple(part for part in path.split("/") if part not in ("", "."))
    return None if ".." in parts else parts


def _as_mlflow_reads(path: str) -> str | None:
    if len(path) > MAX_ODD:
        return None
    try:
        for _ in range(10):
            decoded = urlunparse(urlparse(unquote(path)))
            if decoded == path:
                return path.removeprefix("file:")
            path = decoded
    except ValueError:  # urlparse raises it for a netloc in brackets
        pass
    return None


def _key(place: Location, parts: Sequence[str]) -> _Key:
    return (place.scheme, place.authority, *parts)


def _alike(key: _Key) -> _Key:
    return tuple([fold(part) for part in key])


def fold(text: str) -> str:
    """Return `text` without differences of case and of Unicode form (NFKC)."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def _beginnings(key: _Key, folders: frozenset[_Key]) -> list[int]:
    """Return the lengths of the beginnings of `key` that are in `folders`."""
    if not folders:
        return []
    # Clients choose the number of segments, but no folder has more: MLflow's columns are too short.
    return [end for end in range(2, min(len(key), 500) + 1) if key[:end] in folders]


def _numbered(key: _Key, base: _Key) -> int:
    """Return the length of the beginning of `key` that is a numbered folder below `base`, or 0."""
    if key[: len(base)] != base:
        return 0
    # With workspaces, an experiment's folder is workspaces/NAME/NUMBER.
    end = len(base) + (2 if key[len(base) : len(base) + 1] == ("workspaces",) else 0)
    return end + 1 if len(key) > end and key[end].isdecimal() else 0

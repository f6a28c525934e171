"""The folders that experiments have their files in.

Users choose where such a folder is and what it is called. So a path is judged by the folders that there
are (`artifact_paths`), and not by the words in it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlparse, urlunparse

from .locations import Location, Roots, read

#: A character that may make MLflow read a path in another way than it is written.
_ODD = re.compile(r"[%?#;:\\\x00-\x20\x7f]")
#: Characters of a path with one of those, up to which it is read as MLflow reads it, which takes time.
MAX_ODD = 2048
_HERE = Location("file", "", ())

#: The segments of a place, after its scheme and authority.
_Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Folders:
    """The folders of experiments, as far as they are known.

    Known without a look-up are those that MLflow makes by itself, each named by a number.
    """

    #: The place that MLflow's proxy serves; None if it serves none.
    served: Location | None = _HERE
    #: The place below which MLflow makes folders by itself; None if it makes none.
    base: Location | None = _HERE
    #: The other folders, as MLflow reads their locations.
    exact: frozenset[_Key] = frozenset()
    #: The same, where upper and lower case, and ways to write a character, are one: on some file
    #: systems they are.
    alike: frozenset[_Key] = frozenset()
    #: All that is above one of `alike`.
    above: frozenset[_Key] = frozenset()

    def adding(self, uris: Iterable[str], roots: Roots) -> Folders:
        """These folders and those at `uris`, the locations of experiments."""
        exact: set[_Key] = set()
        alike: set[_Key] = set()
        for uri in uris:
            place = roots.place(read(uri))
            # As MLflow reads the path of a request for what is there; and as it is written.
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
        """Whether `place` is at, above or below a folder that is not made by number."""
        return self.holds(place) or bool(_beginnings(_alike(_key(place, place.parts)), self.alike))

    def holds(self, place: Location) -> bool:
        """Whether a folder that is not made by number is at `place` or below it."""
        key = _alike(_key(place, place.parts))
        return key in self.alike or key in self.above

    def below(self, parts: Sequence[str], *, alike: bool = False) -> Iterator[_Key]:
        """What of the path `parts`, which the proxy serves, is below each folder that it is in.

        With `alike` the path and the folders count in lower case.
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
        """Whether a folder that is not made by number is at the path `parts`, or below it."""
        served = self.served
        return served is not None and self.holds(
            Location(served.scheme, served.authority, (*served.parts, *parts))
        )


#: The folders that are known without a look-up, where all is as MLflow has it by default.
BY_NUMBER = Folders()


def read_path(path: str) -> _Key | None:
    """The segments of `path` as `mlflow.utils.uri.validate_path_is_safe` reads it.

    None for what MLflow refuses, or can't be told.
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
    except ValueError:  # a netloc in brackets
        pass
    return None


def _key(place: Location, parts: Sequence[str]) -> _Key:
    return (place.scheme, place.authority, *parts)


def _alike(key: _Key) -> _Key:
    return tuple([fold(part) for part in key])


def fold(text: str) -> str:
    """`text` in lower case, and each character in one way to write it."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def _beginnings(key: _Key, folders: frozenset[_Key]) -> list[int]:
    """The lengths of the beginnings of `key` that are in `folders`."""
    if not folders:
        return []
    # Clients choose how many segments there are; MLflow's columns hold 200 characters or so.
    return [end for end in range(2, min(len(key), 500) + 1) if key[:end] in folders]


def _numbered(key: _Key, base: _Key) -> int:
    """How many segments of `key` are a folder that MLflow makes below `base`; 0 if it is in none."""
    if key[: len(base)] != base:
        return 0
    # With workspaces, an experiment's folder is workspaces/NAME/NUMBER.
    end = len(base) + (2 if key[len(base) : len(base) + 1] == ("workspaces",) else 0)
    return end + 1 if len(key) > end and key[end].isdecimal() else 0

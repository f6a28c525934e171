"""Locations of files, and the check of those that clients send.

MLflow reads and writes files at URIs that clients send: an experiment's `artifact_location`, a
version's `source`. MLflow's parts read a URI in several ways (decoded or not, `..` resolved or not).
So a client's URI that could be read in more than one way is refused.

The words of this module and of `folders`:

location  a URI of files, split in its parts, as a client or MLflow wrote it
place     the location where the files really are, behind links and MLflow's artifact proxy
root      a place below which the server may read and write artifacts
served    the place below which MLflow's artifact proxy reads and writes, if it is on
base      the place below which MLflow makes a folder for each experiment, named by its number
folder    the place of one experiment's files, which no other experiment may share
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol
from urllib.parse import unquote

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
#: The path before an artifact's path in a URL of MLflow's artifact proxy.
_PROXY = ("api", "2.0", "mlflow-artifacts", "artifacts")
#: Sources that MLflow's clients send for prompts, which have no files.
PROMPT_SOURCES = frozenset({"dummy-source", "prompt-template"})
#: This makes a client's URI odd, but not an operator's.
_HOST = "its scheme takes no host"
#: Characters of a URI, at most. MLflow's columns are shorter.
_MAX_LENGTH = 1000
#: A path that needs more rounds of decoding than this counts as odd.
MAX_DECODING = 10


@dataclass(frozen=True, slots=True)
class Location:
    """A place for files. `odd` says why its URI can be read in more than one way, or is ""."""

    #: In lower case; "file" for a local path, with or without a scheme.
    scheme: str
    #: Bucket, host or container, as written.
    authority: str
    #: The segments of the path, as written.
    parts: tuple[str, ...]
    odd: str = ""

    def __str__(self) -> str:
        """Return the location as a URI, without a password."""
        path = "".join(f"/{part}" for part in self.parts)
        if self.scheme == "file":
            return path or "/"
        user, at, host = self.authority.rpartition("@")
        shown = f"{user.partition(':')[0]}:***@{host}" if ":" in user else f"{user}{at}{host}"
        return f"{self.scheme}:{f'//{shown}' if shown else ''}{path or '/'}"


def read(uri: str) -> Location:
    """Return the location of `uri`. Never raises: an unreadable one is `odd`."""
    match = _SCHEME.match(uri)
    scheme, rest = (match[1].lower(), uri[match.end() :]) if match else ("file", uri)
    authority = ""
    if match and rest.startswith("//"):
        authority, slash, path = rest[2:].partition("/")
        rest = slash + path
    parts = tuple(rest.removeprefix("/").rstrip("/").split("/")) if rest.strip("/") else ()
    odd = _oddity(uri, match[1] if match else "", authority, rest, parts)
    return Location(scheme, authority, parts, odd)


def _oddity(uri: str, written_scheme: str, authority: str, rest: str, parts: Sequence[str]) -> str:
    if len(uri) > _MAX_LENGTH:
        return f"it has more than {_MAX_LENGTH} characters"
    # A slash at the end is no part of the location.
    if not uri.isprintable() or uri.rstrip("/") != uri.strip().rstrip("/").rstrip():
        return "it has characters that can't be printed, or spaces around it"
    if found := set(uri) & set("%?#;\\"):
        return f"it has {' '.join(sorted(found))} in it"
    if written_scheme != written_scheme.lower() or len(written_scheme) == 1:
        return "its scheme is not in lower case, or a drive"
    if {".", ".."} & set(parts):
        return "it has the segment . or .. in it"
    if "" in parts or rest.endswith("//"):
        return "it has an empty segment in it"
    if not rest.startswith("/") and (rest or not authority):
        return "it is relative"
    if authority and written_scheme in ("file", "mlflow-artifacts", "runs", "models"):
        return _HOST
    return ""


def read_root(uri: str) -> Location:
    """Return the artifact root at an operator's `uri`, which is no local path.

    Raises ValueError, with the reason, if locations can't be compared with it.
    """
    root = read(uri)
    if root.odd not in ("", _HOST) or root.scheme in ("file", "runs", "models"):
        raise ValueError(f"can't be compared with other locations: {root.odd or 'it is no folder'}")
    return replace(root, odd="")


def opening_problem(uri: str, roots: Iterable[Location]) -> str | None:
    """Return why the server must not open `uri`, which is no local path; None if it may.

    The check of stored URIs is less strict than that of URIs from clients: roots contain no `%` or `#`,
    so one below a root can't lead out of it.
    """
    location = read(uri)
    if not uri.isprintable() or uri != uri.strip() or "\\" in uri:
        return "it has a backslash, or characters that can't be printed"
    if "." in location.parts or any(leads_out(part) for part in location.parts):
        return "it has the segment . or .. in it"
    if not any(inside(location, root) for root in roots):
        return "it is outside the server's artifact roots"
    return None


def inside(location: Location, root: Location) -> bool:
    """Return whether `location` is `root` or below it, as they are written; neither may be odd."""
    return (
        location.scheme == root.scheme
        and location.authority == root.authority
        and location.parts[: len(root.parts)] == root.parts
    )


def overlap(one: Location, other: Location) -> bool:
    """Return whether one of two locations is at, above or below the other.

    Case and Unicode forms don't matter, because some file systems ignore them.
    """
    if one.scheme != other.scheme or one.authority.casefold() != other.authority.casefold():
        return False
    length = min(len(one.parts), len(other.parts))
    return _folded(one.parts[:length]) == _folded(other.parts[:length])


def _folded(parts: tuple[str, ...]) -> str:
    return unicodedata.normalize("NFKC", "/".join(parts)).casefold()


def leads_out(path: str) -> bool:
    """Return whether `path`, below a root, is absolute or has a `..` or a NUL, decoded or not."""
    for _ in range(MAX_DECODING):
        if path.startswith("/") or ".." in re.split(r"[/\\]", path) or "\0" in path:
            return True
        if (decoded := unquote(path)) == path:
            return False
        path = decoded
    return True


@dataclass(frozen=True, slots=True)
class Roots:
    """The server's artifact roots, which it may read and write.

    `aliases` are pairs of a location and its place, where the files really are: links may lead to a
    folder, and MLflow's proxy has a URL.
    """

    #: Places of files; none of them is an alias.
    places: tuple[Location, ...]
    aliases: tuple[tuple[Location, Location], ...] = ()
    #: The place below which MLflow makes a folder for each experiment, named by its number.
    base: Location | None = None
    #: The place that MLflow's artifact proxy serves; None if it serves none.
    served: Location | None = None

    def place(self, location: Location) -> Location:
        """Return the place where the files of `location` really are."""
        if self.served is not None and (below := _proxied(location)) is not None:
            return _below(self.served, below, location.odd)
        for alias, target in self.aliases:
            if inside(location, alias):
                return _below(target, location.parts[len(alias.parts) :], location.odd)
        return location

    @property
    def written(self) -> tuple[Location, ...]:
        """The roots under all of their names."""
        return (*self.places, *(alias for alias, _ in self.aliases))

    def root_of(self, place: Location) -> Location | None:
        """Return the root that contains `place`, a result of `place()`, or None."""
        return next((root for root in self.places if inside(place, root)), None)


def _proxied(location: Location) -> tuple[str, ...] | None:
    """Return the path below the place that the proxy serves, as MLflow reads it, or None."""
    if location.scheme == "mlflow-artifacts":
        return location.parts
    if location.scheme in ("http", "https"):
        for i in range(len(location.parts) - len(_PROXY) + 1):
            if location.parts[i : i + len(_PROXY)] == _PROXY:
                below = location.parts[i + len(_PROXY) :]
                # If the proxy's path comes twice, MLflow reads the part between the two.
                ends = (j for j in range(len(below)) if below[j : j + len(_PROXY)] == _PROXY)
                return below[: next(ends, len(below))]
    return None


def _below(root: Location, parts: tuple[str, ...], odd: str) -> Location:
    return Location(root.scheme, root.authority, (*root.parts, *parts), odd or root.odd)


class Experiments(Protocol):
    """The folders of all experiments, except numbered ones, which MLflow makes itself."""

    def overlaps(self, place: Location) -> bool:
        """Return whether `place`, of `Roots.place`, is at, above or below one of them."""

    def holds(self, place: Location) -> bool:
        """Return whether one of them is at or below `place`."""


def location_problem(uri: str, roots: Roots, others: Experiments) -> str | None:
    """Return why a client may not create an experiment at `uri`; None if it may."""
    if problem := outside_problem(uri, roots):
        return problem
    return _folder_problem(roots.place(read(uri)), roots, others)


def outside_problem(uri: str, roots: Roots) -> str | None:
    """Return why a client may not name `uri`, wherever its files belong; None if it may."""
    location = read(uri)
    place = roots.place(location)
    if location.odd:
        return location.odd
    # Clients would send their keys to another host, however the server reads its name.
    http = location.scheme in ("http", "https")
    elsewhere = http and not any(inside(location, root) for root in roots.written)
    if elsewhere or roots.root_of(place) is None:
        return "it is outside the server's artifact roots"
    return None


def _folder_problem(place: Location, roots: Roots, others: Experiments) -> str | None:
    """Return why `place`, which is in a root, can't be an experiment's own folder; None if it can."""
    if any(len(place.parts) <= len(root.parts) for root in roots.places if overlap(place, root)):
        return "it contains a whole artifact root, which experiments share"
    if roots.base is not None and _is_made_by_number(place, roots.base):
        return "MLflow makes the folders of experiments there itself"
    if others.overlaps(place):
        return "it is at, above or below the files of another experiment"
    return None


def _is_made_by_number(place: Location, base: Location) -> bool:
    """Return whether a numbered folder, present or future, is at, above or below `place`."""
    rest = _below_base(place, base)
    return rest is not None and (not rest or rest[0].isdecimal())


def _holds_numbered(place: Location, base: Location) -> bool:
    """Return whether a numbered folder, present or future, is at or below `place`."""
    rest = _below_base(place, base)
    return rest is not None and (not rest or (len(rest) == 1 and rest[0].isdecimal()))


def _below_base(place: Location, base: Location) -> tuple[str, ...] | None:
    """Return the rest of `place` below `base`, or below a workspace in it; None if it is elsewhere."""
    if not overlap(place, base):
        return None
    rest = place.parts[len(base.parts) :]
    # With workspaces, an experiment's folder is workspaces/NAME/NUMBER.
    return rest[2:] if rest and rest[0].casefold() == "workspaces" else rest


@dataclass(frozen=True, slots=True)
class Reference:
    """The run, logged model ("model") or version that a `runs:/…` or `models:/…` names."""

    kind: str
    name: str
    version: str = ""

    @property
    def model(self) -> str:
        """The model of a version: models:/NAME@ALIAS, or models:/NAME/VERSION with any NAME."""
        return self.name if self.version else self.name.rpartition("@")[0] or self.name


def reference(location: Location) -> Reference | None:
    """Return the run, model or version that `location` names; None for files, or if it is odd."""
    if location.odd or not location.parts:
        return None
    first = location.parts[0]
    if location.scheme == "runs":
        return Reference("run", first)
    if location.scheme != "models":
        return None
    if len(location.parts) == 1 and "@" not in first:
        return Reference("model", first)
    return Reference("version", first, location.parts[1] if len(location.parts) > 1 else "")


def owners_named(location: Location) -> list[str]:
    """Return the segments of `location` that may be the id of the run or logged model that owns it."""
    return [part for part in dict.fromkeys(location.parts) if len(part) <= 50][-64:]


def source_problem(
    uri: str,
    roots: Roots,
    owners: Iterable[str],
    versions: Iterable[str],
    experiments: Experiments,
) -> str | None:
    """Return why a client may not register the files at `uri`, which is no reference; None if it may.

    `owners` are the locations of the runs and logged models of `owners_named`. `versions` are those of
    registered versions at or above `uri`; they are read only if the decision depends on them.
    """
    if problem := outside_problem(uri, roots):
        return problem
    place = roots.place(read(uri))
    if any(inside(place, roots.place(read(owner))) for owner in owners):
        return None
    problem = _folder_problem(place, roots, experiments)
    if problem is None:
        return None
    for version in versions:
        files = roots.place(read(version))
        if is_part(files, roots, experiments) and inside(place, files):
            return None
    return problem


def is_part(files: Location, roots: Roots, experiments: Experiments) -> bool:
    """Return whether a version's `files` are less than a whole experiment's.

    A version of more does not allow others to register them.
    """
    numbered = roots.base is not None and _holds_numbered(files, roots.base)
    below_a_root = roots.root_of(files) not in (None, files)
    return not numbered and not experiments.holds(files) and not files.odd and below_a_root


def outside(
    uris: Iterable[tuple[str, str]], roots: Roots, limit: int
) -> tuple[list[tuple[str, int]], int]:
    """Return the folders outside `roots` with the count of `uris` in each, and how many were left out.

    `uris` are locations of experiments, each with its number, and of versions, each with "". There are
    at most `limit` folders, in falling order of their counts.
    """
    counts: dict[str, int] = {}
    for uri, number in uris:
        location = read(uri)
        reference_or_prompt = location.scheme in ("runs", "models") or uri in PROMPT_SOURCES
        if not reference_or_prompt and roots.root_of(roots.place(location)) is None:
            folder = str(_folder_above(location, number))
            counts[folder] = counts.get(folder, 0) + 1
    folders = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return folders[:limit], len(folders[limit:])


def _folder_above(location: Location, number: str) -> Location:
    """Return the folder above the one that MLflow made for experiment `number`, a run or a model."""
    parts = location.parts
    for i, part in enumerate(parts):
        following = "".join(parts[i + 1 : i + 2])
        run = re.fullmatch(r"[0-9a-f]{32}", part) and following == "artifacts"
        if run or (part == "models" and re.fullmatch(r"m-[0-9a-f]{32}", following)):
            parts = parts[:i]
            number = number or parts[-1] if parts and parts[-1].isdecimal() else number
            break
    if number and parts[-1:] == (number,):
        parts = parts[:-1]
    return replace(location, parts=parts)

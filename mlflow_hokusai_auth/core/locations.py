"""Where a URI points to, and what a client may have stored as the place of its files.

MLflow reads and writes where URIs say that clients have sent: an experiment's `artifact_location`, a
version's `source`. MLflow's parts read a URI in several ways (decoded or not, `..` resolved or not), so
a URI from a client that could be read in more than one way is refused.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol
from urllib.parse import unquote

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
#: The path that stands before an artifact's in the address of MLflow's proxy.
_PROXY = ("api", "2.0", "mlflow-artifacts", "artifacts")
#: Sources of prompts, which have no files; MLflow's clients send them.
PROMPT_SOURCES = frozenset({"dummy-source", "prompt-template"})
#: Odd in what a client sends; an operator may mean it.
_HOST = "its scheme takes no host"
#: Characters of a URI; MLflow's columns are shorter.
_MAX_LENGTH = 1000
#: Times that a path is decoded before it counts as odd.
_MAX_DECODING = 10


@dataclass(frozen=True, slots=True)
class Location:
    """A place for files. `odd` says why its URI may be read in more than one way; "" if it can't."""

    #: In lower case; "file" for a local path, with or without a scheme.
    scheme: str
    #: Bucket, host or container, as written.
    authority: str
    #: The segments of the path, as written.
    parts: tuple[str, ...]
    odd: str = ""

    def __str__(self) -> str:
        """The location as a URI, without a password."""
        path = "".join(f"/{part}" for part in self.parts)
        if self.scheme == "file":
            return path or "/"
        user, at, host = self.authority.rpartition("@")
        shown = f"{user.partition(':')[0]}:***@{host}" if ":" in user else f"{user}{at}{host}"
        return f"{self.scheme}:{f'//{shown}' if shown else ''}{path or '/'}"


def read(uri: str) -> Location:
    """The location that `uri` names. Never raises."""
    found = _SCHEME.match(uri)
    scheme, rest = (found[1].lower(), uri[found.end() :]) if found else ("file", uri)
    authority = ""
    if found and rest.startswith("//"):
        authority, slash, path = rest[2:].partition("/")
        rest = slash + path
    parts = tuple(rest.removeprefix("/").rstrip("/").split("/")) if rest.strip("/") else ()
    odd = _oddity(uri, found[1] if found else "", authority, rest, parts)
    return Location(scheme, authority, parts, odd)


def _oddity(uri: str, written_scheme: str, authority: str, rest: str, parts: Sequence[str]) -> str:
    if len(uri) > _MAX_LENGTH:
        return f"it has more than {_MAX_LENGTH} characters"
    if not uri.isprintable() or uri != uri.strip():
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
    """The root that an operator names by `uri`, which is no local path.

    Raises ValueError, which says what is wrong, for one that locations can't be compared with.
    """
    root = read(uri)
    if root.odd not in ("", _HOST) or root.scheme in ("file", "runs", "models"):
        raise ValueError(f"can't be compared with other locations: {root.odd or 'it is no folder'}")
    return replace(root, odd="")


def opening_problem(uri: str, roots: Iterable[Location]) -> str | None:
    """Why the server must not open `uri`, which is no local path; None if it is in one of `roots`.

    It is an answer about stored URIs, which are judged less strictly than what a client sends: a `%` or
    `#` below a root, which has none, leads nowhere else.
    """
    location = read(uri)
    if not uri.isprintable() or uri != uri.strip() or "\\" in uri:
        return "it has characters that can't be told apart"
    if "." in location.parts or any(leads_out(part) for part in location.parts):
        return "it has the segment . or .. in it"
    if not any(inside(location, root) for root in roots):
        return "it is outside the server's artifact roots"
    return None


def inside(location: Location, root: Location) -> bool:
    """Whether `location` is `root` or below it, as they are written; neither may be odd."""
    return (
        location.scheme == root.scheme
        and location.authority == root.authority
        and location.parts[: len(root.parts)] == root.parts
    )


def overlap(one: Location, other: Location) -> bool:
    """Whether one of two locations is at, above or below the other.

    Upper and lower case, and ways to write a character, count as the same: on some file systems
    they are.
    """
    if one.scheme != other.scheme or one.authority.casefold() != other.authority.casefold():
        return False
    length = min(len(one.parts), len(other.parts))
    return _folded(one.parts[:length]) == _folded(other.parts[:length])


def _folded(parts: tuple[str, ...]) -> str:
    return unicodedata.normalize("NFKC", "/".join(parts)).casefold()


def leads_out(path: str) -> bool:
    """Whether `path`, below a root, is absolute or has a `..` or a NUL, also once it is decoded."""
    for _ in range(_MAX_DECODING):
        if path.startswith("/") or ".." in re.split(r"[/\\]", path) or "\0" in path:
            return True
        if (decoded := unquote(path)) == path:
            return False
        path = decoded
    return True


@dataclass(frozen=True, slots=True)
class Roots:
    """The server's artifact roots: what it may read and write.

    `aliases` are pairs of a location and the place where its files really are: a folder may be reached
    through a link, and MLflow's proxy by its address.
    """

    #: Where files are; no location that is an alias.
    places: tuple[Location, ...]
    aliases: tuple[tuple[Location, Location], ...] = ()
    #: Below which MLflow makes a folder for each experiment, named by its number.
    base: Location | None = None
    #: The place that MLflow's proxy serves, if it does.
    served: Location | None = None

    def place(self, location: Location) -> Location:
        """Where the files of `location` really are."""
        if self.served is not None and (below := _proxied(location)) is not None:
            return _below(self.served, below, location.odd)
        for alias, target in self.aliases:
            if inside(location, alias):
                return _below(target, location.parts[len(alias.parts) :], location.odd)
        return location

    @property
    def written(self) -> tuple[Location, ...]:
        """The roots by all names that they have."""
        return (*self.places, *(alias for alias, _ in self.aliases))

    def root_of(self, place: Location) -> Location | None:
        """The root that `place`, of `place()`, is in."""
        return next((root for root in self.places if inside(place, root)), None)


def _proxied(location: Location) -> tuple[str, ...] | None:
    """The path below what the proxy serves, as MLflow makes it of a location of that kind."""
    if location.scheme == "mlflow-artifacts":
        return location.parts
    if location.scheme in ("http", "https"):
        for i in range(len(location.parts) - len(_PROXY) + 1):
            if location.parts[i : i + len(_PROXY)] == _PROXY:
                below = location.parts[i + len(_PROXY) :]
                # MLflow takes what is between two of them.
                ends = (j for j in range(len(below)) if below[j : j + len(_PROXY)] == _PROXY)
                return below[: next(ends, len(below))]
    return None


def _below(root: Location, parts: tuple[str, ...], odd: str) -> Location:
    return Location(root.scheme, root.authority, (*root.parts, *parts), odd or root.odd)


class Experiments(Protocol):
    """The folders of the experiments that there are, but for those that MLflow makes by number."""

    def overlaps(self, place: Location) -> bool:
        """Whether `place`, of `Roots.place`, is at, above or below one of them."""

    def holds(self, place: Location) -> bool:
        """Whether one of them is at `place` or below it."""


def location_problem(uri: str, roots: Roots, others: Experiments) -> str | None:
    """Why a client may not make an experiment at `uri`; None if it may."""
    location = read(uri)
    place = roots.place(location)
    if problem := _outside(location, place, roots):
        return problem
    return _folder_problem(place, roots, others)


def _outside(location: Location, place: Location, roots: Roots) -> str | None:
    if location.odd:
        return location.odd
    # Clients would send their keys to another host, whatever the server makes of its name.
    http = location.scheme in ("http", "https")
    elsewhere = http and not any(inside(location, root) for root in roots.written)
    if elsewhere or roots.root_of(place) is None:
        return "it is outside the server's artifact roots"
    return None


def _folder_problem(place: Location, roots: Roots, others: Experiments) -> str | None:
    """Why `place`, which is in a root, is no folder of its own; None if it is one."""
    if any(len(place.parts) <= len(root.parts) for root in roots.places if overlap(place, root)):
        return "it is the root of what others have their files in"
    if roots.base is not None and _is_made_by_number(place, roots.base):
        return "MLflow makes the folders of experiments there itself"
    if others.overlaps(place):
        return "it is at, above or below the files of another experiment"
    return None


def _is_made_by_number(place: Location, base: Location) -> bool:
    """Whether MLflow makes, or will make, the folder of an experiment at, above or below `place`."""
    rest = _below_base(place, base)
    return rest is not None and (not rest or rest[0].isdecimal())


def _holds_numbered(place: Location, base: Location) -> bool:
    """Whether MLflow makes, or will make, the folder of an experiment at or below `place`."""
    rest = _below_base(place, base)
    return rest is not None and (not rest or (len(rest) == 1 and rest[0].isdecimal()))


def _below_base(place: Location, base: Location) -> tuple[str, ...] | None:
    """What of `place` is below where MLflow makes folders by number; None if it is elsewhere."""
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


def reference(location: Location) -> Reference | None:
    """What `location` refers to by name; None if it is a place of files, or odd."""
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
    """The segments of a location that may be the id of the run or logged model that it is of."""
    return [part for part in dict.fromkeys(location.parts) if len(part) <= 50][-64:]


def source_problem(
    uri: str,
    roots: Roots,
    owners: Iterable[str],
    versions: Iterable[str],
    experiments: Experiments,
) -> str | None:
    """Why a client may not register the files at `uri`, which is no reference; None if it may.

    `owners` are the locations of the runs and logged models that `owners_named` finds, `versions` those
    of registered versions at or above `uri`, which are gone through only where it matters.
    """
    location = read(uri)
    place = roots.place(location)
    if problem := _outside(location, place, roots):
        return problem
    if any(inside(place, roots.place(read(owner))) for owner in owners):
        return None
    problem = _folder_problem(place, roots, experiments)
    if problem is None:
        return None
    for version in versions:
        files = roots.place(read(version))
        # A version of all that an experiment holds, or of more, makes nobody the owner of it.
        numbered = roots.base is not None and _holds_numbered(files, roots.base)
        whole = numbered or experiments.holds(files)
        below_a_root = roots.root_of(files) not in (None, files)
        if not whole and not files.odd and below_a_root and inside(place, files):
            return None
    return problem


def outside(
    uris: Iterable[tuple[str, str]], roots: Roots, limit: int
) -> tuple[list[tuple[str, int]], int]:
    """Where the files are that lie outside `roots`: folders, with how many of `uris` are in each.

    `uris` are locations of experiments, each with its number, and of versions, each with "". Gives at
    most `limit` folders, those with most first, and the number of further ones.
    """
    counts: dict[str, int] = {}
    for uri, number in uris:
        location = read(uri)
        reference_or_prompt = location.scheme in ("runs", "models") or uri in PROMPT_SOURCES
        if not reference_or_prompt and roots.root_of(roots.place(location)) is None:
            folder = str(_folder_above(location, number))
            counts[folder] = counts.get(folder, 0) + 1
    found = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return found[:limit], len(found[limit:])


def _folder_above(location: Location, number: str) -> Location:
    """The folder above those that MLflow makes: of the experiment `number`, a run or a logged model."""
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

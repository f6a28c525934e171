"""A place of artifacts names runs, logged models and an experiment's folder, and has several URIs.

An experiment's folder holds `RUN/artifacts/…`, `models/MODEL/artifacts/…` and `traces/TRACE/…`. A place
may name several runs, because another experiment's folder may be among a run's artifacts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import quote

from .locations import Location, Roots, inside

#: A place that names more runs and logged models than this belongs to nobody.
MAX_NAMED = 32

_RUN = re.compile(r"[0-9a-f]{32}")
_MODEL = re.compile(r"m-[0-9a-f]{32}")
#: A folder that MLflow has named by an experiment's number. The length keeps to a database's integers.
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)
#: Characters of a location in a row, at most.
_MAX_LENGTH = 1000

#: A run or a logged model: its kind, "run" or "logged model", and its id.
Named = tuple[str, str]


def named_in(place: Location) -> list[Named]:
    """Return all runs and logged models that the segments of `place` may be the ids of."""
    found = dict.fromkeys(_named(part) for part in place.parts)
    return [named for named in found if named is not None]


def holder(rest: tuple[str, ...]) -> Named | None:
    """Return the run or logged model whose folder holds `rest`, a path below an experiment's folder."""
    named = _named("".join(rest[1:2] if rest[:1] == ("models",) else rest[:1]))
    kind = "logged model" if rest[:1] == ("models",) else "run"
    return named if named is not None and named[0] == kind else None


def _named(part: str) -> Named | None:
    if _RUN.fullmatch(part):
        return "run", part
    return ("logged model", part) if _MODEL.fullmatch(part) else None


def numbered(place: Location, base: Location | None) -> tuple[int, tuple[str, ...]] | None:
    """Return the experiment whose numbered folder is at or above `place`, and the path below it.

    `base` is the place below which MLflow makes such folders.
    """
    if base is None or not inside(place, base):
        return None
    number, *rest = place.parts[len(base.parts) :] or ("",)
    return (int(number), tuple(rest)) if _NUMBER.fullmatch(number) else None


def references(place: Location) -> Iterator[Location]:
    """Yield `runs:/RUN/path` for each run of which `place` may be the artifacts or in them."""
    for i, part in enumerate(place.parts):
        if _RUN.fullmatch(part) and place.parts[i + 1 : i + 2] in ((), ("artifacts",)):
            yield Location("runs", "", (part, *place.parts[i + 2 :]))


def in_model(place: Location, model: str) -> tuple[str, ...] | None:
    """Return the path of `place` below the artifacts of a logged model; None if it is elsewhere."""
    for i in range(len(place.parts) - 1):
        if place.parts[i : i + 2] == ("models", model):
            return place.parts[i + 3 :]
    return None


def at_or_above(place: Location, least: int) -> Iterator[Location]:
    """Yield `place` and the places above it with at least `least` segments, from the top.

    None is longer than a row's location.
    """
    length = 0
    for end, part in enumerate(place.parts, 1):
        length += len(part) + 1
        if length > _MAX_LENGTH:
            return
        if end >= least:
            yield Location(place.scheme, place.authority, place.parts[:end])


def spellings(place: Location, roots: Roots) -> Iterator[str]:
    """Yield the URIs, without a `/` at the end, by which rows may name `place`."""
    yield from _written(place)
    for alias, target in roots.aliases:
        if inside(place, target):
            parts = (*alias.parts, *place.parts[len(target.parts) :])
            yield from _written(Location(alias.scheme, alias.authority, parts))


def _written(location: Location) -> Iterator[str]:
    path = "".join(f"/{part}" for part in location.parts)
    if location.scheme == "file":
        yield path
        for written in dict.fromkeys((path, quote(path))):
            yield from (f"file:{written}", f"file://{written}")
    elif location.authority:
        yield f"{location.scheme}://{location.authority}{path}"
    else:
        yield from (f"{location.scheme}:{path}", f"{location.scheme}://{path}")

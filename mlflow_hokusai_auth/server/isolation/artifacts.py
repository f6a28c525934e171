"""The check that no confined key changes artifacts of other owners, or registered artifacts.

MLflow's artifact repositories ask `Artifacts` when they store or delete files, by whichever route. The
owner of a place follows from the ids in it and from the experiments whose folder it is in.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

from cachetools import TTLCache
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from mlflow_hokusai_auth.core import artifact_places, isolation
from mlflow_hokusai_auth.core.isolation import Problem
from mlflow_hokusai_auth.core.locations import Location, Roots, is_part, read, reference
from mlflow_hokusai_auth.core.policy import Policy
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.upstream import stores, tables
from mlflow_hokusai_auth.server.upstream.artifact_roots import Watch, shown
from mlflow_hokusai_auth.server.upstream.experiment_folders import ExperimentFolders
from mlflow_hokusai_auth.server.upstream.repositories import Change
from mlflow_hokusai_auth.store import ownership

from . import hidden
from .confinement import confined, refuse
from .facts import FRESH, Facts

_SIZE = 10_000
#: Segments of a place, at most: the queries grow with their number.
_DEPTH = 100
#: The codes of refusals that tell the owner of a place.
_WHOSE = ("NOT_OWNER", "EXPERIMENT_REFUSED")
#: The number of a version has fewer digits.
_DIGITS = 10
_NO_ANSWER = "Who owns these artifacts can't be looked up at the moment. Try again."
_ODD = Problem(
    "LOCATION_REFUSED",
    "The path of these artifacts leads out of its folder, or has too many folders.",
)


class Frozen:
    """The results of the last looks at places, kept for `FRESH` seconds, by owner.

    A refusal of a frozen place holds for this change. If a file may be stored, so may others in its
    folder, but only at the first look at an upload: the last look judges everything again.
    """

    def __init__(self, timer: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._refused: TTLCache[tuple[str, Change], bool] = TTLCache(_SIZE, FRESH, timer)
        self._free: TTLCache[tuple[object, ...], bool] = TTLCache(_SIZE, FRESH, timer)

    def is_free(self, owner: str, change: Change) -> bool:
        """Return whether this owner could store a file in the same folder a moment ago."""
        with self._lock:
            return change.file and _folder(owner, change) in self._free

    def is_refused(self, owner: str, change: Change) -> bool:
        """Return whether the change was refused to this owner a moment ago."""
        with self._lock:
            return (owner, change) in self._refused

    def found(self, owner: str, change: Change, *, frozen: bool) -> None:
        """Remember the answer of the database."""
        with self._lock:
            if frozen:
                self._refused[owner, change] = True
                self._free.pop(_folder(owner, change), None)
            elif change.file:
                self._free[_folder(owner, change)] = True


def _folder(owner: str, change: Change) -> tuple[object, ...]:
    place = change.place
    return owner, place.scheme, place.authority, place.parts[:-1]


class _Late:
    """A connection that is made for the first statement, because remembered answers need none."""

    def __init__(self, engine: Engine, stack: ExitStack) -> None:
        self._engine, self._stack = engine, stack
        self._connection: Connection | None = None

    def execute(self, *given: Any) -> Any:
        if self._connection is None:
            self._connection = self._stack.enter_context(self._engine.connect())
        return self._connection.execute(*given)


@dataclass(frozen=True, slots=True)
class Artifacts:
    """Refuses changes of artifacts that confined keys may not make."""

    roots: Roots
    policy: Policy
    folders: ExperimentFolders
    watch: Watch
    facts: Facts
    frozen: Frozen = field(default_factory=Frozen)

    @property
    def looks(self) -> bool:
        """True if the caller is kept to what is theirs."""
        return self.confined() is not None

    @property
    def hides(self) -> bool:
        """True if the caller sees only what is theirs and what was shared with them."""
        return self.watch.hides and self.confined() is not None

    @callers.seeing_all("who owns artifacts")
    def sees(self, place: Location) -> bool:
        """Return whether the caller, from whom others' artifacts are hidden, sees `place`. Blocks.

        Raises MlflowException if the database does not answer.
        """
        principal = self.confined()
        engine = stores.tracking_engine()
        if principal is None or engine is None or not self.facts.usable:
            return False
        if len(place.parts) > _DEPTH or ".." in place.parts:
            return False
        try:
            with engine.connect() as connection:
                me = principal.owner_id
                seen = self._owns_place(me, place, connection) or self._reads(me, place, connection)
                if not seen and self.facts.experiments_of(
                    connection, artifact_places.named_in(place)
                ):
                    hidden.tell(f"artifacts at {shown(str(place))}")
                return seen
        except SQLAlchemyError as error:
            raise stores.unavailable(_NO_ANSWER) from error

    def _owns_place(self, me: str, place: Location, connection: Connection) -> bool:
        named = artifact_places.named_in(place)
        if len(named) > artifact_places.MAX_NAMED or self.folders.known.holds(place):
            return False
        known = self.facts.experiments_of(connection, named)
        numbers = {*self._rests(place, connection), *known.values()}
        return bool(numbers) and all(self._owns(me, number, connection) for number in numbers)

    def _reads(self, me: str, place: Location, connection: Connection) -> bool:
        """Return whether `place` is among the files of a version that `me` sees.

        The files must be those of the version's maker or of the model's owner: a version that was made
        without isolation may name anybody's.
        """
        for name, version, uri in tables.versions_at(self._uris(place, 1), connection):
            files = self.roots.place(read(uri))
            if not is_part(files, self.roots, self.folders.known):
                continue
            owner = ownership.model_owner(connection, name)
            if me and (owner == me or self.facts.level(connection, me, name)):
                makers = {owner, ownership.version_owner(connection, name, version)} - {None}
                numbers = self._rests(files, connection)
                whose = {self.facts.experiment_owner(connection, number) for number in numbers}
                if whose and whose <= makers:
                    return True
        return False

    @callers.seeing_all("who owns artifacts")
    def check(self, change: Change, *, last: bool = True) -> bool:
        """Return whether the caller may make this change, or raise MlflowException. Blocks.

        The answer that a place is frozen may be `FRESH` seconds old. The `last` look asks the database
        whether a place is not frozen.
        """
        principal = self.confined()
        if principal is None:
            return True
        if not self.facts.usable:
            self._refuse(change.place, isolation.UNKNOWN)
            return False
        try:
            problem = self._problem(principal, change, last=last)
        except SQLAlchemyError as error:
            raise stores.unavailable(_NO_ANSWER) from error
        if self.watch.hides and problem is not None and problem.code in _WHOSE:
            problem = isolation.HIDDEN_ARTIFACTS
        self._refuse(change.place, problem)
        return problem is None

    @callers.seeing_all("who owns artifacts")
    def owns(self, uri: str, connection: Connection) -> bool:
        """Return whether the files at `uri` belong to the caller, who is kept to what is theirs."""
        principal, location = self.confined(), read(uri)
        if principal is None or location.odd:
            return False
        place = self.roots.place(location)
        rests = self._rests(place, connection)
        return self._owner_problem(principal.owner_id, place, rests, connection, file=False) is None

    @callers.seeing_all("who owns artifacts")
    def check_source(self, uri: str, model: str, connection: Connection) -> None:
        """Raise MlflowException if the caller may not register `uri` as a version of `model`.

        Other checks refuse a run, a logged model or a version that does not exist.
        """
        principal = self.confined()
        if principal is None:
            return
        me, location = principal.owner_id, read(uri)
        named = reference(location)
        if named is None:
            place = self.roots.place(location)
            allowed = self.owns(uri, connection) or (
                self._is_shared(me, place, connection)
                and self._may_add(me, place, model, connection)
            )
        elif named.kind == "version":
            allowed = self._has_version(me, named.model, named.version, connection)
        elif named.kind == "run":
            # MLflow resolves runs:/RUN/NAME at each download, to the newest logged model of the name.
            allowed = not tables.has_run(named.name, connection)
        else:
            number = self.facts.experiment_of(connection, "logged model", named.name)
            allowed = number is None or self._owns(me, number, connection)
        if not allowed:
            self._refuse(location, isolation.SOURCE)

    @callers.seeing_all("who owns artifacts")
    def check_copy(self, uri: str, model: str, connection: Connection) -> None:
        """Raise MlflowException if the caller may not add a copy of the files at `uri` to `model`.

        The caller may copy the files of a version, or of a logged model, that they may register.
        """
        principal, location = self.confined(), read(uri)
        if principal is None:
            return
        if not self._may_add(principal.owner_id, self.roots.place(location), model, connection):
            self._refuse(location, isolation.SOURCE)

    @callers.seeing_all("who owns artifacts")
    def check_run(self, run: str, uris: Iterable[str], connection: Connection) -> None:
        """Raise MlflowException if the caller's new version, with files at `uris`, may not name `run`.

        It may name a run of the caller's. A copy of a version or of a logged model, whose files the
        caller may register, may also name the run of the first one.
        """
        principal = self.confined()
        if principal is None:
            return
        missing = isolation.missing_problem("run", run)
        number = self.facts.experiment_of(connection, "run", run)
        problem: Problem | None = missing
        if number is not None:
            owner = self.facts.experiment_owner(connection, number)
            problem = isolation.experiment_problem(principal.owner_id, number, owner)
        if problem is None or run in self._runs_of(uris, connection):
            return
        refuse(self.watch, missing if self.watch.hides else problem)

    def confined(self) -> Principal | None:
        """Return the caller if they are kept to what is theirs."""
        return confined(self.watch, self.policy)

    def _problem(self, principal: Principal, change: Change, *, last: bool) -> Problem | None:
        me, place, file = principal.owner_id, change.place, change.file
        if principal.no_delete and change.deletes:
            return isolation.DELETING
        if not last and self.frozen.is_free(me, change):
            return None
        if self.frozen.is_refused(me, change):
            return isolation.FROZEN
        engine = stores.tracking_engine()
        assert engine is not None, "there are tables of ownership, so the store is a database"
        if len(place.parts) > _DEPTH or ".." in place.parts:
            return _ODD
        with ExitStack() as stack:
            connection = cast("Connection", _Late(engine, stack))
            rests = self._rests(place, connection)
            problem = self._owner_problem(me, place, rests, connection, file=file)
            if problem is not None:
                return problem
            frozen = self._is_frozen(place, rests, connection, file=file)
            self.frozen.found(me, change, frozen=frozen)
            return isolation.FROZEN if frozen else None

    def _owner_problem(
        self,
        me: str,
        place: Location,
        rests: Mapping[int, tuple[str, ...]],
        connection: Connection,
        *,
        file: bool,
    ) -> Problem | None:
        named = artifact_places.named_in(place)
        if len(named) > artifact_places.MAX_NAMED:
            return _ODD
        if not file and self.folders.known.holds(place):
            return Problem("NOT_OWNER", "This folder contains the folder of an experiment.")
        known = self.facts.experiments_of(connection, named)
        owners = {
            number: self.facts.experiment_owner(connection, number)
            for number in {*rests, *known.values()}
        }
        return isolation.artifact_problem(me, owners, rests.values(), known, file=file)

    def _rests(self, place: Location, connection: Connection) -> dict[int, tuple[str, ...]]:
        """Return the path of `place` below the folder of each experiment that it is in."""
        found = {}
        in_number = artifact_places.numbered(place, self.roots.base)
        if in_number is not None:
            found[in_number[0]] = in_number[1]
        if in_number is None or self.folders.known.overlaps(place):
            for number, uri in tables.experiments_at(self._uris(place, 1), connection):
                folder = self.roots.place(read(uri))
                found[number] = place.parts[len(folder.parts) :]
        return found

    def _is_frozen(
        self,
        place: Location,
        rests: Mapping[int, tuple[str, ...]],
        connection: Connection,
        *,
        file: bool,
    ) -> bool:
        models = [name for kind, name in artifact_places.named_in(place) if kind == "logged model"]
        references = list(artifact_places.references(place))
        for model, ready, run, name in tables.logged_models(models, connection) if models else ():
            rest = artifact_places.in_model(place, model)
            if rest is None:
                continue
            if ready:
                return True
            if run:
                references.append(Location("runs", "", (run, name, *rest)))
        # A version of several experiments' files would freeze those of all of them.
        least = len(place.parts) - max(map(len, rests.values()))
        uris = [*self._uris(place, least)]
        for one in references:
            uris += self._uris(one, 1)
        above = [] if file else [uri for one in (place, *references) for uri in self._spelled(one)]
        return ownership.is_registered(connection, uris, above)

    def _runs_of(self, uris: Iterable[str], connection: Connection) -> set[str | None]:
        """Return the runs of the versions and of the logged models that have their files at `uris`."""
        found: set[str | None] = set()
        for uri in uris:
            place = self.roots.place(read(uri))
            named = [
                name for kind, name in artifact_places.named_in(place) if kind == "logged model"
            ]
            if named:
                found.update(run for _, _, run, _ in tables.logged_models(named, connection))
            found.update(tables.runs_of_versions_at(self._uris(place, 1), connection))
        return found

    def _is_shared(self, me: str, place: Location, connection: Connection) -> bool:
        """Return whether `place` is among the files of a version that `me` has."""
        for name, version, uri in tables.versions_at(self._uris(place, 1), connection):
            files = self.roots.place(read(uri))
            if is_part(files, self.roots, self.folders.known) and self._has_version(
                me, name, str(version), connection
            ):
                return True
        return False

    def _may_add(self, me: str, place: Location, model: str, connection: Connection) -> bool:
        """Return whether `me` may add a version at `place`, where `me` has one already, to `model`.

        The version that `me` has may be older than isolation, and name anybody's files. If a version
        in a model of the files' owner named them, that model's readers, such as `me`, would read them.
        """
        if ownership.model_owner(connection, model) == me:
            return True
        known = self.facts.experiments_of(connection, artifact_places.named_in(place))
        return (
            not (known or self._rests(place, connection))
            or self._owns_place(me, place, connection)
            or self._reads(me, place, connection)
        )

    def _has_version(self, me: str, name: str, version: str, connection: Connection) -> bool:
        """Return whether a model version is `me`'s own, or shared with `me`."""
        if not me:
            return False
        if ownership.model_owner(connection, name) == me or self.facts.level(connection, me, name):
            return True
        made = version.isdecimal() and len(version) < _DIGITS
        return made and ownership.version_owner(connection, name, int(version)) == me

    def _owns(self, me: str, number: int, connection: Connection) -> bool:
        owner = self.facts.experiment_owner(connection, number)
        return isolation.experiment_problem(me, number, owner) is None

    def _uris(self, place: Location, least: int) -> Iterable[str]:
        for one in artifact_places.at_or_above(place, least):
            yield from self._spelled(one)

    def _spelled(self, place: Location) -> Iterable[str]:
        return artifact_places.spellings(place, self.roots)

    def _refuse(self, place: Location, problem: Problem | None) -> None:
        refuse(self.watch, problem, place)

"""The reason why isolation shows something of MLflow's to a key or hides it, for operators.

The server itself decides in SQL (`server/isolation/shadows.py`), on the same facts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from .isolation import DEFAULT_EXPERIMENT
from .policy import Policy, is_confined
from .times import date
from .types import MODES, MOST_ISOLATION, Principal

#: Kinds of things that `judge` knows.
KINDS = ("model", "run", "experiment")


class Shared(NamedTuple):
    """A grant that covers a model; `granted_by` is "" for an operator's."""

    id: str
    granted_by: str
    level: str
    expires_at: float | None


@dataclass(frozen=True, slots=True)
class Thing:
    """A registered model, a run or an experiment, with its facts from the tables of ownership."""

    #: One of `KINDS`.
    kind: str
    #: The name of a model, or the id.
    name: str
    #: True if MLflow has it.
    exists: bool
    #: The owner of the model's name or of the experiment; None if nobody owns it.
    owner: str | None = None
    #: True if the owner's model of this name was deleted or renamed.
    gone: bool = False
    #: The number of the experiment, or of the experiment that the run is in.
    experiment: int | None = None
    #: The grants that give the key's owner the model, also those that have ended.
    shared: tuple[Shared, ...] = ()


class Sight(NamedTuple):
    """The decision, and the rule that it follows from."""

    allowed: bool
    verdict: str


def judge(
    thing: Thing, principal: Principal, policy: Policy, *, mode: str, level: str, now: float
) -> Sight:
    """Return whether the key of `principal` sees `thing` at `now`, and why.

    `mode` is one of `MODES`, and `level`, one of `ISOLATION`, is what counts while it is enforce. The
    key's scopes don't matter here, except that they make it a supplier's or staff's.
    """
    if not thing.exists:
        return Sight(False, f"missing: {_missing(thing)}")
    if mode != MODES[0]:
        return Sight(True, f"shown: the mode is {mode}, so isolation is off")
    if principal.revoked_at is not None:
        return Sight(False, "refused: the key is revoked")
    if principal.expires_at is not None and principal.expires_at <= now:
        return Sight(False, f"refused: the key ended at {date(principal.expires_at)}")
    if level != MOST_ISOLATION:
        return Sight(True, f"shown: isolation is {level}, which hides nothing")
    if not is_confined(principal, policy):
        return Sight(True, "shown: the key is staff's, and staff sees everything")
    if thing.kind == "model":
        return _model(thing, principal.owner_id, now)
    return _in_experiment(thing, principal.owner_id)


def _model(thing: Thing, me: str, now: float) -> Sight:
    if me and thing.owner == me and not thing.gone:
        return Sight(True, f"shown: {me} owns the model")
    for grant in _current(thing.shared, now):
        by = grant.granted_by or "an operator"
        until = "without end" if grant.expires_at is None else f"until {date(grant.expires_at)}"
        return Sight(True, f"shown: grant {grant.id} of {by} ({grant.level}, {until})")
    if not me:
        return Sight(False, f"hidden: {_NOBODY}")
    if thing.gone:
        why = f"the earlier model of {thing.owner} is gone, and this one was made without the gate"
    elif thing.owner is None:
        why = "nobody owns the model"
    else:
        why = f"the model's owner is {thing.owner}"
    ended = "".join(
        f"; grant {one.id} ended at {date(one.expires_at or 0)}" for one in thing.shared
    )
    return Sight(False, f"hidden: {why}, and no grant shares it with {me}{ended}")


def _in_experiment(thing: Thing, me: str) -> Sight:
    run = thing.kind == "run"
    if thing.experiment == DEFAULT_EXPERIMENT and not run:
        return Sight(True, "shown: every key sees MLflow's experiment Default, and not its runs")
    what = f"the run's experiment {thing.experiment}" if run else "the experiment"
    if me and thing.owner == me:
        return Sight(True, f"shown: {me} owns {what}")
    if not me:
        return Sight(False, f"hidden: {_NOBODY}")
    if thing.owner is None:
        return Sight(False, f"hidden: nobody owns {what}")
    kinds = "runs" if run else "experiments"
    return Sight(False, f"hidden: {thing.owner} owns {what}, and {kinds} can't be shared")


def _current(shared: Collection[Shared], now: float) -> list[Shared]:
    """Return the grants that have not ended, those that end last first."""
    current = [one for one in shared if one.expires_at is None or one.expires_at > now]
    return sorted(current, key=lambda one: (one.expires_at is not None, -(one.expires_at or 0)))


def _missing(thing: Thing) -> str:
    kept = f"; its name stays {thing.owner}'s" if thing.owner and thing.kind == "model" else ""
    return f"MLflow has no such {thing.kind}{kept}"


_NOBODY = "the key's authority names no owner, so nothing is the key's"

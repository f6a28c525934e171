"""Decisions on changes of MLflow's data, from facts that are read elsewhere.

Each function returns why its caller, whose owner is `me`, may not make a change, or None. An owner of
None means that nobody owns the thing: everybody may read it, and no confined key changes it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from .artifact_places import Named, holder
from .folders import fold
from .ownership import matches
from .types import MOST_ISOLATION

#: The codes with which isolation refuses a change.
CODES = frozenset(
    {
        "NOT_OWNER",
        "NAME_TAKEN",
        "NAME_RESERVED",
        "NAME_REFUSED",
        "DELETE_REFUSED",
        "EXPERIMENT_REFUSED",
        "ALIAS_PROTECTED",
        "ARTIFACT_FROZEN",
        "ISOLATED",
        "LOCATION_REFUSED",
        "SOURCE_REFUSED",
    }
)
#: The name by which the report of `observe` lists a read from which `full` would hide something.
HIDDEN = "HIDDEN"
#: The experiment that MLflow uses if a client names none. In it all teams' runs would meet.
DEFAULT_EXPERIMENT = 0
#: Names of experiments that begin so belong to the owner whose name follows.
DEFAULT_PREFIX = "default:"
#: Characters of a value in a search with LIKE, at most. SQLite fails at a pattern of 50,000 bytes.
LONGEST_PATTERN = 10_000


class Problem(NamedTuple):
    """The reason why a change is refused."""

    #: One of `denials.CODES`.
    code: str
    message: str


def experiment_problem(me: str, number: int, owner: str | None) -> Problem | None:
    """Judge a change of an experiment, or of a run, a logged model or a dataset in it."""
    if me and owner == me:
        return None
    if number == DEFAULT_EXPERIMENT:
        return Problem(
            "EXPERIMENT_REFUSED",
            "Your key can't add to the Default experiment or change it, because runs of several teams "
            "would meet there. Set MLFLOW_EXPERIMENT_NAME, or call mlflow.set_experiment, with a name "
            "of your own.",
        )
    return Problem(
        "NOT_OWNER",
        f"Experiment {number} belongs to {_owned(owner)}, so your key can't add to it or change it. "
        "Use an experiment of your own.",
    )


def missing_problem(kind: str, name: object) -> Problem:
    """Return the refusal of a change of a thing, or of a link to it, that does not exist.

    In isolation `full` another owner's thing is refused in the same words.
    """
    return Problem("NOT_OWNER", f"There is no {kind} {name} that your key may change.")


def name_problem(
    me: str, kind: str, name: str, owner: str | None, taken: bool, reserved: str | None
) -> Problem | None:
    """Judge a new name of a "model" or an "experiment".

    `owner` has or had the name, and `taken` says whether something has it now. Names that begin like
    this one are reserved for `reserved`.
    """
    if not me:
        return Problem("NOT_OWNER", _NOBODY)
    if owner == me:
        return None
    # This refusal comes first, so that nobody else learns whether a reserved name is taken.
    default = kind == "experiment" and name.startswith(DEFAULT_PREFIX)
    if (reserved is not None and reserved != me) or (default and name != DEFAULT_PREFIX + me):
        return Problem(
            "NAME_RESERVED",
            f"Names that begin like {name} are reserved for another owner. Choose another name.",
        )
    if owner is not None or taken:
        return Problem(
            "NAME_TAKEN",
            f"The name {name} is taken by another owner. Choose another name: a name stays its first "
            f"owner's, also after the {kind} is deleted.",
        )
    return None


def staff_name_problem(name: str) -> Problem:
    """Return why staff can't use a name that another owner has or had."""
    return Problem(
        "NAME_TAKEN",
        f"The name {name} belongs to another owner. Choose another one, or free it first: "
        "hokusai-auth owners release, or owners assign.",
    )


def model_problem(
    me: str, name: str, owner: str | None, level: str | None, *, touched: bool = False
) -> Problem | None:
    """Judge a change of a registered model, its tags or its aliases.

    With `touched`, only the time of its last change is set, as when it gets a version. `level` is what
    grants give `me` on the model.
    """
    if (me and owner == me) or (touched and level == "contribute"):
        return None
    return Problem(
        "NOT_OWNER",
        f"The registered model {name} belongs to {_owned(owner)}, so your key can't change it. "
        f"{_advice(owner, level)}",
    )


def version_problem(
    me: str,
    name: str,
    owner: str | None,
    level: str | None,
    *,
    new: bool,
    maker: str | None,
    held: Collection[str],
) -> Problem | None:
    """Judge a new version of a registered model, or a change of one that `maker` made.

    `held` are the aliases and stages by which consumers find it.
    """
    if me and owner == me:
        return None
    if level != "contribute":
        return model_problem(me, name, owner, level)
    if new:
        return None
    if maker != me:
        return Problem(
            "NOT_OWNER",
            f"You may add versions to the registered model {name}, and change those that you made. "
            "Another owner made this one.",
        )
    if held:
        return Problem(
            "NOT_OWNER",
            f"The {next(iter(held))} is, or would be, this version of {name}, so only the model's "
            "owner can change it. Register a new version, or ask the owner.",
        )
    return None


def artifact_problem(
    me: str,
    owners: Mapping[int, str | None],
    rests: Collection[tuple[str, ...]],
    known: Collection[Named],
    *,
    file: bool,
) -> Problem | None:
    """Judge a change of a file of artifacts, or with all that is in it, of a folder.

    `rests` are the paths of the file or folder below the folders of the experiments that it is in.
    `owners` are those of these experiments, and of those with a run or a logged model that the place
    names: by the number of the experiment. `known` are the runs and logged models that exist.
    """
    if not rests:
        return Problem("NOT_OWNER", f"These artifacts are in no experiment's folder. {_ARTIFACTS}")
    for number in sorted(owners):
        if problem := experiment_problem(me, number, owners[number]):
            return problem
    for rest in rests:
        folder = rest[:-1] if file else rest
        if folder in ((), ("models",)):
            return Problem(
                "NOT_OWNER", f"The folder of an experiment itself is nobody's. {_ARTIFACTS}"
            )
        if fold(rest[0]) == "traces":
            return Problem("ISOLATED", "Your key can't change the artifacts of traces.")
        named = holder(rest)
        if named is not None and named not in known:
            return Problem("NOT_OWNER", f"There is no {' '.join(named)}. {_ARTIFACTS}")
    return None


def narrowing_problem(patterns: Collection[str], name: str) -> Problem | None:
    """Judge the name of a model by the patterns of the key itself; none means any name."""
    if not patterns or any(matches(pattern, name) for pattern in patterns):
        return None
    return Problem(
        "NAME_REFUSED",
        f"This key may create and change only models named {' or '.join(sorted(patterns))}, and not "
        f"{name}.",
    )


def pattern_problem(values: Iterable[object], *, escapes: bool) -> str | None:
    """Return why a search with LIKE, which has these values, may fail on some rows; None if it can't.

    With `escapes`, a backslash in a pattern escapes the character after it. The database looks at rows
    that the caller does not see, too. If it failed at those that begin like the pattern, its error
    would spell them out.
    """
    for value in values:
        if not isinstance(value, str):
            continue
        if len(value) > LONGEST_PATTERN:
            return f"A search with LIKE takes texts of at most {LONGEST_PATTERN} characters."
        if escapes and (len(value) - len(value.rstrip("\\"))) % 2:
            return (
                "In a search with LIKE, no text may end with a single backslash, because it escapes "
                "the character after it. Write two for a backslash."
            )
    return None


def alias_problem(protected: Collection[str], name: str, aliases: Iterable[str]) -> Problem | None:
    """Judge a change of what `aliases` of the model `name` point to, or of what they are called."""
    held = next((alias for alias in aliases if alias in protected), None)
    if held is None:
        return None
    return Problem(
        "ALIAS_PROTECTED",
        f"The alias {held} is protected on this server: only its operator sets, moves or removes it, "
        f"and renames or deletes what it points to. Ask the operator to do this for {name}.",
    )


def advice(models: int, experiments: int) -> str:
    """Return what an operator does about a default that is less than the most.

    `models` and `experiments` are the numbers of those that nobody owns.
    """
    switch = f"hokusai-auth isolation {MOST_ISOLATION}"
    if not models and not experiments:
        return (
            "Every supplier changes everybody's models. Everything has an owner, so switch it on: "
            + switch
        )
    return (
        "Every supplier changes everybody's models, because some have no owner: "
        f"{models} registered models and {experiments} experiments. Say whose they are, "
        f"hokusai-auth owners assign, and then: {switch}"
    )


#: Registered versions and finished logged models stay what they were when somebody began to use them.
FROZEN = Problem(
    "ARTIFACT_FROZEN",
    "These artifacts belong to a registered model version, or to a logged model that is finished, so "
    "they can't be changed or deleted any more. Log the model again, and register a new version.",
)
SOURCE = Problem(
    "SOURCE_REFUSED",
    "A model version of yours can't have this source, because the files are not yours. Register the "
    "files of a run or of a logged model in your own experiments, by their artifact URI or "
    "models:/m-…, or a version that is yours or that was shared with you (models:/NAME/VERSION). "
    "runs:/… won't do, because its files may change later.",
)
DELETING = Problem("DELETE_REFUSED", "This key may not delete or archive anything.")

_ARTIFACTS = (
    "Your key changes only the artifacts of runs and logged models in your own experiments."
)
#: The refusal of a change in `full`, in the same words for others' artifacts and for none.
HIDDEN_ARTIFACTS = Problem(
    "NOT_OWNER", f"There is no such run, logged model or experiment of yours. {_ARTIFACTS}"
)
#: The refusal of everything while the tables of ownership can't be used.
UNKNOWN = Problem(
    "ISOLATED",
    "This server does not know whose its models are, so your key can't do this here. Tell its "
    "operator: the server's log says why.",
)
#: The refusal of a statement of MLflow's that this version does not know, and can't confine.
CLOSED_STATEMENT = Problem(
    "ISOLATED",
    "This server can't tell which of its data your key may see here. Tell its operator: the server's "
    "log has the code ISOLATED with the request's id.",
)
#: The refusal of a change, or of a look, by code that has lost its caller, such as a thread of a pool.
NO_CALLER = Problem(
    "ISOLATED",
    "Nothing on this server says for whose key it does this, so it doesn't. Tell its operator.",
)
_NOBODY = (
    "The authority of your key does not say who you are, so the key owns nothing and can't change "
    "anything. Ask the server's operator."
)


def _owned(owner: str | None) -> str:
    return "nobody" if owner is None else "another owner"


def _advice(owner: str | None, level: str | None) -> str:
    if owner is None:
        return "Ask the server's operator to assign it to you: hokusai-auth owners assign."
    if level is not None:
        return "What was shared with you doesn't include this."
    return "Use a name of your own, or ask its owner to share it with you."

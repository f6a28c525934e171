"""The lists that say to which experiment, registered model or version a row of MLflow's belongs.

`make test` compares both lists with the mapped classes of the installed MLflow. A table in neither list
is closed for confined keys, so that a new version of MLflow opens nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class Thing(NamedTuple):
    """The thing that a row belongs to, by its kind and the names of the columns that identify it."""

    #: "experiment", "run", "logged model", "model" or "version".
    kind: str
    columns: tuple[str, ...]


_EXPERIMENT = Thing("experiment", ("experiment_id",))
_RUN = Thing("run", ("run_uuid",))
_LOGGED = Thing("logged model", ("model_id",))
_MODEL = Thing("model", ("name",))
_VERSION = Thing("version", ("name", "version"))

#: Table -> the things that its rows belong to. The owner of each of them must be the caller.
BINDINGS: dict[str, tuple[Thing, ...]] = {
    "experiments": (_EXPERIMENT,),
    "experiment_tags": (_EXPERIMENT,),
    "datasets": (_EXPERIMENT,),
    "runs": (_EXPERIMENT,),
    "tags": (_RUN,),
    "params": (_RUN,),
    "metrics": (_RUN,),
    "latest_metrics": (_RUN,),
    "logged_models": (_EXPERIMENT, Thing("run", ("source_run_id",))),
    "logged_model_tags": (_LOGGED,),
    "logged_model_params": (_LOGGED,),
    "logged_model_metrics": (_LOGGED, Thing("run", ("run_id",))),
    "registered_models": (_MODEL,),
    "registered_model_tags": (_MODEL,),
    "registered_model_aliases": (_MODEL,),
    "model_versions": (_VERSION,),
    "model_version_tags": (_VERSION,),
}
#: Metrics of logged models. MLflow does not check that the logged model exists.
LOGGED_METRICS = "logged_model_metrics"
#: The names by which consumers find a version of a model.
ALIASES = "registered_model_aliases"
#: Rows that join a run with a dataset or a logged model: their columns name the kinds of both ends.
INPUTS = "inputs"
#: Tags of such rows, which MLflow writes together with them.
INPUT_TAGS = "input_tags"
#: The kinds that `inputs` uses for its ends -> the kinds of things.
ENDS = {
    "RUN": "run",
    "RUN_INPUT": "run",
    "RUN_OUTPUT": "run",
    "MODEL_INPUT": "logged model",
    "MODEL_OUTPUT": "logged model",
    "DATASET": "dataset",
}
#: The text by which an assessment's metadata name a run: MLflow deletes these with the run.
NAMING_A_RUN = {
    "assessments": re.compile(r'"mlflow\.assessment\.sourceRunId": "([^"]*)"'),
}
#: Tables of MLflow's own bookkeeping, which hold nothing that a client chooses.
OPEN = frozenset({"sql_trace_rollup_rebuild_queue"})
#: Tables that confined keys don't change, by the beginnings of their names.
CLOSED = (
    "assessment",
    "endpoint",
    "entity_associations",
    "evaluation_dataset",
    "gateway",
    "guardrail",
    "issue",
    "job",
    "label_schema",
    "mcp_",
    "model_definitions",
    "online_scoring_configs",
    "budget_policies",
    "review_queue",
    "scheduler_lease",
    "scorer",
    "secrets",
    "span",
    "sql_",
    "trace",
    "webhook",
    "workspaces",
)


def is_bound(table: str) -> bool:
    """Return whether rows of `table` belong to an experiment, a registered model or a version."""
    return table in BINDINGS or table in (INPUTS, INPUT_TAGS)


def is_known(table: str) -> bool:
    """Return whether `table` is in a list here."""
    return is_bound(table) or table.startswith(CLOSED)


def ends(source: tuple[str, str], destination: tuple[str, str]) -> Iterator[tuple[str, str]] | None:
    """Return kind and id of both ends of a row of `inputs`; None if a kind is not known."""
    found = [(ENDS.get(kind), name) for kind, name in (source, destination)]
    if any(kind is None for kind, _ in found):
        return None
    return ((str(kind), name) for kind, name in found)

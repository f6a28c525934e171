"""The kind of resource that an artifact's path belongs to, by the folders of experiments.

An experiment's folder holds `RUN/artifacts/…`, `models/MODEL/artifacts/…` and `traces/TRACE/…`.
"""

from __future__ import annotations

from dataclasses import replace
from urllib.parse import parse_qs

from .artifact_places import holder
from .folders import MAX_ODD, Folders, fold, read_path
from .types import Operation

PARAMETER = "{artifact_path:path}"

_LISTS = frozenset(f"GET /{api}/2.0/mlflow-artifacts/artifacts" for api in ("api", "ajax-api"))
_UPLOAD = "POST /ajax-api/2.0/mlflow/upload-artifact"


def refine_artifact_path(operation: Operation, path: str, folders: Folders) -> Operation:
    """Return `operation`, whose rule has an artifact's path, with the kind that this path belongs to.

    `path` is the request's. The operation is `unsure` if newer `folders` may lead to another kind.
    """
    kind, unsure = _kind(operation.rule.startswith("DELETE "), _path(operation, path), folders)
    return _with_kind(operation, kind, unsure)


def refine_artifact_listing(
    operation: Operation, query: bytes, has_body: bool, folders: Folders
) -> Operation:
    """Return `operation` with the kind of the artifacts that it lists, if it lists any."""
    if operation.rule not in _LISTS:
        return operation
    # A body, or a long query, is not read here, so it may name a trace's artifacts.
    if has_body or len(query) > MAX_ODD:
        return replace(operation, kind="traces")
    paths = parse_qs(query.decode("utf-8", "replace")).get("path", [])
    kinds = [_kind(False, path, folders) for path in paths]
    traces = [unsure for kind, unsure in kinds if kind == "traces"]
    return _with_kind(operation, "traces", all(traces)) if traces else operation


def explain_kind(operation: Operation) -> str:
    """Return a sentence, after a space, on why an artifact's path belongs to `operation`'s kind."""
    if operation.rule not in _LISTS and not operation.rule.endswith(PARAMETER):
        return ""
    if operation.kind == "traces":
        return (
            " The path belongs to a trace (traces/… right below an experiment's folder), or to no run "
            "or logged model of an existing experiment."
        )
    if operation.kind == "experiments":
        return (
            " This scope deletes only the folder of one run or logged model of an existing "
            "experiment, or files in it."
        )
    return ""


def _with_kind(operation: Operation, kind: str, unsure: bool) -> Operation:
    if (kind, unsure) == (operation.kind, operation.unsure):
        return operation
    return replace(operation, kind=kind, unsure=unsure)


def _path(operation: Operation, path: str) -> str:
    """Return the artifact's path in `path`, the request's."""
    return path[len(operation.rule.partition(" ")[2]) - len(PARAMETER) :]


def _kind(deletes: bool, path: str, folders: Folders) -> tuple[str, bool]:
    """Return the kind of resource that an artifact at `path` belongs to, and whether that is unsure.

    Files of a run or a logged model are of kind "artifacts". A path that may be a trace's is of kind
    "traces". Deleting more than one run's or logged model's files is a change of kind "experiments".
    """
    parts = read_path(path)
    if parts is None:
        return "traces", False
    # This decides most paths, at a tenth of the cost.
    if not deletes and "traces" not in fold("/".join(parts)):
        return "artifacts", False
    if any(rest[:1] == ("traces",) for rest in folders.below(parts, alike=True)):
        return "traces", False
    if any(_owner(rest) for rest in folders.below(parts)):
        contains_others = deletes and folders.has_one_in(parts)
        return ("experiments", False) if contains_others else ("artifacts", False)
    # The path may be in a new experiment's folder, which `folders` doesn't contain yet.
    if "traces" in map(fold, parts):
        return "traces", True
    return ("experiments", True) if deletes else ("artifacts", False)


def _owner(rest: tuple[str, ...]) -> tuple[str, str] | None:
    """Return the (field, id) of the run or logged model that `rest`, below a folder, belongs to."""
    named = holder(rest)
    below = rest[2:] if rest[:1] == ("models",) else rest[1:]
    if named is None or below[:1] not in ((), ("artifacts",)):
        return None
    kind, name = named
    return kind.replace(" ", "_"), name


def named(operation: Operation, path: str, query: bytes, folders: Folders) -> dict[str, str]:
    """Return the fields of the decision log about an artifact: `path`, and `run` or `logged_model`.

    `path` and `query` are the request's. If they name no artifact, there are no fields.
    """
    if operation.rule == _UPLOAD:
        fields = parse_qs(query[:MAX_ODD].decode("utf-8", "replace"))
        owner = _owner(tuple(fields.get("run_uuid", [])[:1]))
        return {**dict([owner] if owner else []), "path": "".join(fields.get("path", [])[:1])}
    if not operation.rule.endswith(PARAMETER):
        return {}
    path = _path(operation, path)
    parts = read_path(path) or ()
    rests = list(folders.below(parts))
    if operation.kind != "traces" or operation.unsure:
        # Outside known folders, a segment that looks like an id is good enough for a log.
        ids = [i for i in range(min(len(parts), 100)) if parts[max(i - 1, 0)] != "traces"]
        rests += [parts[i:] for i in ids]
    owner = next((owner for rest in rests if (owner := _owner(rest))), None)
    return {**dict([owner] if owner else []), "path": path}

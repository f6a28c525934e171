"""The kind of resource that a path of artifacts is about, by the folders of experiments.

An experiment's folder holds `RUN/artifacts/…`, `models/MODEL/artifacts/…` and `traces/TRACE/…`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from urllib.parse import parse_qs

from .folders import MAX_ODD, Folders, fold, read_path
from .types import Operation

PARAMETER = "{artifact_path:path}"

_RUN = re.compile(r"[0-9a-f]{32}")
_MODEL = re.compile(r"m-[0-9a-f]{32}")
_LISTS = frozenset(f"GET /{api}/2.0/mlflow-artifacts/artifacts" for api in ("api", "ajax-api"))
_UPLOAD = "POST /ajax-api/2.0/mlflow/upload-artifact"


def judged(operation: Operation, path: str, folders: Folders) -> Operation:
    """`operation`, whose rule has a path of artifacts, with the kind that `path` is of.

    `path` is that of the request. `unsure` says that another kind may come out once `folders` are known
    better.
    """
    kind, unsure = _kind(operation.rule.startswith("DELETE "), _path(operation, path), folders)
    return _of(operation, kind, unsure)


def listed(operation: Operation, query: bytes, has_body: bool, folders: Folders) -> Operation:
    """`operation` with the kind of the artifacts that it lists, which its `query` names, or a body."""
    if operation.rule not in _LISTS:
        return operation
    # What is not read here is taken to name what it may.
    if has_body or len(query) > MAX_ODD:
        return replace(operation, kind="traces")
    named = parse_qs(query.decode("utf-8", "replace")).get("path", [])
    kinds = [_kind(False, path, folders) for path in named]
    found = [(kind, unsure) for kind, unsure in kinds if kind == "traces"]
    return _of(operation, "traces", all(unsure for _, unsure in found)) if found else operation


def explained(operation: Operation) -> str:
    """A sentence, after a space, on why a path of artifacts is of the kind that `operation` has."""
    if operation.rule not in _LISTS and not operation.rule.endswith(PARAMETER):
        return ""
    if operation.kind == "traces":
        return (
            " The path is of a trace (traces/… right below an experiment's folder), or of no run or "
            "logged model of an experiment that there is."
        )
    if operation.kind == "experiments":
        return (
            " This scope deletes only what is in the folder of one run or logged model of an "
            "experiment that there is, and such a folder."
        )
    return ""


def _of(operation: Operation, kind: str, unsure: bool) -> Operation:
    if (kind, unsure) == (operation.kind, operation.unsure):
        return operation
    return replace(operation, kind=kind, unsure=unsure)


def _path(operation: Operation, path: str) -> str:
    """The path of an artifact in `path`, that of a request."""
    return path[len(operation.rule.partition(" ")[2]) - len(PARAMETER) :]


def _kind(deletes: bool, path: str, folders: Folders) -> tuple[str, bool]:
    """The kind of resource that an artifact at `path` is of; and whether nobody can be sure yet.

    What is known to be a run's or a model's is of the registry. To delete more than one of these is
    to delete a part of what the experiment is.
    """
    parts = read_path(path)
    if parts is None:
        return "traces", False
    # Most paths are told by this, at a tenth of the cost.
    if not deletes and "traces" not in fold("/".join(parts)):
        return "artifacts", False
    if any(rest[:1] == ("traces",) for rest in folders.below(parts, alike=True)):
        return "traces", False
    if any(_owner(rest) for rest in folders.below(parts)):
        contains_others = deletes and folders.has_one_in(parts)
        return ("experiments", False) if contains_others else ("artifacts", False)
    # It may be in the folder of an experiment that is not known here yet.
    if "traces" in map(fold, parts):
        return "traces", True
    return ("experiments", True) if deletes else ("artifacts", False)


def _owner(rest: tuple[str, ...]) -> tuple[str, str] | None:
    """The run or logged model that `rest`, a path below an experiment's folder, is of."""
    if rest[:1] == ("models",):
        field, name, rest = "logged_model", "".join(rest[1:2]), rest[2:]
        found = _MODEL.fullmatch(name)
    else:
        field, name, rest = "run", "".join(rest[:1]), rest[1:]
        found = _RUN.fullmatch(name)
    return (field, name) if found and rest[:1] in ((), ("artifacts",)) else None


def named(operation: Operation, path: str, query: bytes, folders: Folders) -> dict[str, str]:
    """What a request says of the artifact that it is about: `path`, and `run` or `logged_model`.

    `path` and `query` are those of the request. {} for a request about no artifact that they name.
    """
    if operation.rule == _UPLOAD:
        fields = parse_qs(query[:MAX_ODD].decode("utf-8", "replace"))
        run = "".join(fields.get("run_uuid", [])[:1])
        found = {"run": run} if _RUN.fullmatch(run) else {}
        return {**found, "path": "".join(fields.get("path", [])[:1])}
    if not operation.rule.endswith(PARAMETER):
        return {}
    path = _path(operation, path)
    parts = read_path(path) or ()
    rests = list(folders.below(parts))
    if operation.kind != "traces" or operation.unsure:
        # In no folder that is known, looks are enough for a log.
        ids = [i for i in range(min(len(parts), 100)) if parts[max(i - 1, 0)] != "traces"]
        rests += [parts[i:] for i in ids]
    owner = next((owner for rest in rests if (owner := _owner(rest))), None)
    return {**(dict([owner]) if owner else {}), "path": path}

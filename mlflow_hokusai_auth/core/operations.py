"""The operation of a request: (method, path), matched against `routes.TABLE` as MLflow will match it.

A path that the table does not list, in exactly this spelling, needs ADMIN. So a path that MLflow
would redirect, or a route of a future version, is never open by accident.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product

from mlflow_hokusai_auth.core.artifact_paths import PARAMETER, refine_artifact_path
from mlflow_hokusai_auth.core.folders import BY_NUMBER, Folders
from mlflow_hokusai_auth.core.routes import QUERY_FIELDS, TABLE
from mlflow_hokusai_auth.core.types import Access, Operation

UNKNOWN = Operation(Access.ADMIN, "unknown", "")
#: Kinds that every mode protects, in any spelling that MLflow might accept: a key that is created in
#: one mode outlives the mode, and the assistant runs programs on the host.
CLOSED = ("assistant", "hokusai")
_UNKNOWN_OF = {f"/{kind}": Operation(Access.ADMIN, kind, "") for kind in CLOSED}

_PARAMETER = re.compile(r"\{\w+(:path)?\}")
_CHOICE = re.compile(r"\{([^}]*)\}")


def classify(method: str, path: str, folders: Folders = BY_NUMBER) -> Operation:
    """Return the operation of `method` on `path`. Its rule is "" if no row of the table matches.

    `path` is decoded and has no prefix; `folders` decide the kind of an artifact's path. HEAD counts as
    GET. OPTIONS only asks for the methods of a path. It is public if one of them is, since load
    balancers send it, and needs READ if none is.
    """
    method = method.upper()
    if method == "OPTIONS":
        return _options(path)
    operation = _find("GET" if method == "HEAD" else method, path)
    if operation is None:
        return _unknown(path)
    if operation.rule.endswith(PARAMETER):
        return refine_artifact_path(operation, path, folders)
    return operation


def graphql(operation: Operation, fields: Iterable[str] | None) -> Operation:
    """Return GraphQL's `operation` for a query with these root `fields`; None means a mutation.

    A query reads the kinds of its fields. An unknown field may contain anything, so it needs a scope
    for everything.
    """
    if fields is None:
        return operation
    kinds: set[str] = set()
    for field in fields:
        kinds.update(QUERY_FIELDS.get(field, (operation.kind,)))
    return replace(operation, access=Access.READ, reads=frozenset(kinds))


def _unknown(path: str) -> Operation:
    return next((closed for part, closed in _UNKNOWN_OF.items() if part in path), UNKNOWN)


def rules() -> Iterator[Operation]:
    """Yield an operation for every row of the table, method and spelling."""
    for kind, base, row in _rows():
        access, methods, *paths = row.split()
        for method, path in product(methods.split(","), paths):
            yield Operation(
                Access[access.rstrip(">")], kind, f"{method} {base}{path}", access.endswith(">")
            )


def _rows() -> Iterator[tuple[str, str, str]]:
    kind, bases = "", [""]
    for line in TABLE.splitlines():
        if line.startswith("["):
            kind, _, base = line.strip("[]").partition(" ")
            bases = _spellings(base)
        elif line and not line.startswith("#"):
            for base in bases:
                yield kind, base, line


def _spellings(base: str) -> list[str]:
    """Return `base` with every choice of each `{a,b}` in it."""
    pieces = _CHOICE.split(base)
    return ["".join(choice) for choice in product(*(piece.split(",") for piece in pieces))]


def _regex(template: str, group: str) -> str:
    """Return a pattern for `template`, as a group of this name, that runs in linear time.

    If a rule has several `{x:path}`, Starlette's patterns try every way to divide the path, and a
    caller without a key must not cost so much time. The first way is enough to know that the rule
    matches. So each `{x:path}` but the last matches up to the first place that fits, without
    backtracking: a look-ahead and a back reference to it, since `(?>…)` needs Python 3.11.
    """
    parameters = list(_PARAMETER.finditer(template))
    last_path = max((i for i, parameter in enumerate(parameters) if parameter[1]), default=-1)
    pattern = ""
    for i, parameter in enumerate(parameters):
        end = parameters[i + 1].start() if i + 1 < len(parameters) else len(template)
        literal = re.escape(template[parameter.end() : end])
        if not parameter[1]:
            pattern += f"[^/]+{literal}"
        elif i < last_path:
            pattern += f"(?=(?P<{group}_{i}>[^/].*?{literal}))(?P={group}_{i})"
        else:
            pattern += f"[^/].*{literal}"
    return f"(?P<{group}>{pattern})"


#: Path without parameters -> method -> operation.
_static: dict[str, dict[str, Operation]] = {}
#: Path up to its first parameter -> method -> pattern for the rest of the path.
_patterns: dict[str, dict[str, re.Pattern[str]]] = {}
#: Name of a group in these patterns -> operation.
_groups: dict[str | None, Operation] = {}


def _build() -> None:
    beginnings: dict[tuple[str, str], list[str]] = {}
    for number, operation in enumerate(rules()):
        method, _, path = operation.rule.partition(" ")
        if "{" not in path:
            _static.setdefault(path, {})[method] = operation
            continue
        group = f"r{number}"
        _groups[group] = operation
        start = path.index("{")
        beginnings.setdefault((path[:start], method), []).append(_regex(path[start:], group))
    for (beginning, method), patterns in beginnings.items():
        _patterns.setdefault(beginning, {})[method] = re.compile("|".join(patterns))


_build()
_longest = max(map(len, _patterns))


def _find(method: str, path: str) -> Operation | None:
    operation = _static.get(path, {}).get(method)
    if operation is not None:
        return operation
    # Starlette ignores a line break at the end of a path, so it may match another row.
    if "\n" in path:
        return None
    # The longest beginning comes first, because werkzeug prefers literal text to a parameter. All
    # beginnings are short, so thousands of slashes in a path take no more rounds than a few.
    end = path.rfind("/", 0, _longest)
    while end >= 0:
        methods = _patterns.get(path[: end + 1])
        if methods is not None:
            pattern = methods.get(method)
            match = pattern.fullmatch(path, end + 1) if pattern is not None else None
            if match is not None:
                return _groups[match.lastgroup]
        end = path.rfind("/", 0, end)
    return None


def _options(path: str) -> Operation:
    methods = ("GET", "POST", "PUT", "PATCH", "DELETE")
    operations = [operation for method in methods if (operation := _find(method, path))]
    if not operations:
        return _unknown(path)
    public = [operation for operation in operations if operation.access is Access.PUBLIC]
    operation = (public or operations)[0]
    access = Access.PUBLIC if public else Access.READ
    return Operation(access, operation.kind, f"OPTIONS {operation.rule.partition(' ')[2]}")

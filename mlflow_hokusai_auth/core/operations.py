"""What a request does: its (method, path), matched as MLflow will match it, against `routes.TABLE`.

Whatever the table does not list, in exactly its spelling, takes the most privilege. So a path that
MLflow would redirect, or a route of a version to come, is never open by accident.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product

from mlflow_hokusai_auth.core.artifact_paths import PARAMETER, judged
from mlflow_hokusai_auth.core.folders import BY_NUMBER, Folders
from mlflow_hokusai_auth.core.routes import QUERY_FIELDS, TABLE
from mlflow_hokusai_auth.core.types import Access, Operation

UNKNOWN = Operation(Access.ADMIN, "unknown", "")
#: Kinds that are closed beyond their class, in any mode, and so in any spelling that MLflow might
#: understand after all: keys that are made in one mode outlive it, and the assistant runs programs on
#: the host.
CLOSED = ("assistant", "hokusai")
_UNKNOWN_OF = {f"/{kind}": Operation(Access.ADMIN, kind, "") for kind in CLOSED}

_PARAMETER = re.compile(r"\{\w+(:path)?\}")
_CHOICE = re.compile(r"\{([^}]*)\}")


def classify(method: str, path: str, folders: Folders = BY_NUMBER) -> Operation:
    """The operation that `method` on `path` is; one without a rule if MLflow may have no such route.

    `path` is decoded, and without the alias; `folders` are those of experiments, by which a path of
    artifacts is judged. HEAD counts as GET. OPTIONS only asks which methods
    a path has: it is public where one of them is, as load balancers ask so, and else takes READ.
    """
    method = method.upper()
    if method == "OPTIONS":
        return _options(path)
    operation = _find("GET" if method == "HEAD" else method, path)
    if operation is None:
        return _unknown(path)
    if operation.rule.endswith(PARAMETER):
        return judged(operation, path, folders)
    return operation


def graphql(operation: Operation, fields: Iterable[str] | None) -> Operation:
    """`operation`, a GraphQL route's, for a query with these root fields, or for a mutation (None).

    A query reads the kinds of resource that its fields hold. One with a field that is not listed may
    hold anything, so it takes a scope for everything.
    """
    if fields is None:
        return operation
    kinds: set[str] = set()
    for field in fields:
        kinds.update(QUERY_FIELDS.get(field, (operation.kind,)))
    return replace(operation, access=Access.READ, reads=frozenset(kinds))


def _unknown(path: str) -> Operation:
    return next((one for part, one in _UNKNOWN_OF.items() if part in path), UNKNOWN)


def rules() -> Iterator[Operation]:
    """Every row of the table, once for each spelling, as the operation that it stands for."""
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
    """Each way to read the `{a,b}` in `base`."""
    pieces = _CHOICE.split(base)
    return ["".join(choice) for choice in product(*(piece.split(",") for piece in pieces))]


def _regex(template: str, group: str) -> str:
    """A pattern for `template`, with parameters, in a group of that name; it runs in linear time.

    Starlette's own patterns for several `{x:path}` in one rule try every way to divide a path,
    which a caller without a key must not have us do. The first way is enough to know that there is
    one, so all but the last `{x:path}` are matched up to the first place that fits, for good: a
    look-ahead and a back reference to it, as `(?>…)` needs Python 3.11.
    """
    found = list(_PARAMETER.finditer(template))
    last_path = max((i for i, one in enumerate(found) if one[1]), default=-1)
    pattern = ""
    for i, one in enumerate(found):
        end = found[i + 1].start() if i + 1 < len(found) else len(template)
        literal = re.escape(template[one.end() : end])
        if not one[1]:
            pattern += f"[^/]+{literal}"
        elif i < last_path:
            pattern += f"(?=(?P<{group}_{i}>[^/].*?{literal}))(?P={group}_{i})"
        else:
            pattern += f"[^/].*{literal}"
    return f"(?P<{group}>{pattern})"


#: Path without parameters -> method -> operation.
_static: dict[str, dict[str, Operation]] = {}
#: The beginning of a path with parameters, up to the first -> method -> pattern of what follows.
_patterns: dict[str, dict[str, re.Pattern[str]]] = {}
#: Name of a group in those patterns -> operation.
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
    # Starlette overlooks a line break at the end of a path, so it may find another row than we do.
    if "\n" in path:
        return None
    # The longest beginning first, as to werkzeug what is spelled out beats a parameter. All of them
    # are short, so a path of thousands of slashes takes no more rounds than another.
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
    found = [operation for method in methods if (operation := _find(method, path))]
    if not found:
        return _unknown(path)
    public = [operation for operation in found if operation.access is Access.PUBLIC]
    operation = (public or found)[0]
    access = Access.PUBLIC if public else Access.READ
    return Operation(access, operation.kind, f"OPTIONS {operation.rule.partition(' ')[2]}")

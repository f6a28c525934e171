"""Write the pages that are made from the code: `python docs/generate.py [FOLDER]`, by default docs/.

The pages are settings, scopes and routes, the command line, and the REST API.
tests/docs/test_generated.py fails if one of them is not current.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import click
from generate_rest import kind_of, rest, table
from pydantic import AliasChoices, SecretStr

from mlflow_hokusai_auth.cli import main as command_line
from mlflow_hokusai_auth.core import operations, policy, routes, scopes
from mlflow_hokusai_auth.core.types import Access, Operation, Principal
from mlflow_hokusai_auth.server.gate import graphql
from mlflow_hokusai_auth.server.settings import PREFIX, Settings

_CLASSES = (Access.READ, Access.WRITE, Access.ADMIN)


def settings() -> Iterator[str]:
    """Yield the page of settings: a section for each field of the model."""
    yield """# Every setting

Settings are environment variables of `mlflow server`, and of `hokusai-auth` on the server's host.
The server reads them once, at its start. Wrong values and misspelt names stop the start, with a
message that names all of them. Commas separate the items of a list. A variable that is not in the
environment is read from a file in `/run/secrets` with its name in lower case, such as
`/run/secrets/hokusai_auth_database_uri`. `hokusai-auth` reads `MLFLOW_BACKEND_STORE_URI` from there as
well, and so does the image's server.
"""
    schema = Settings.model_json_schema(by_alias=False)["properties"]
    for name, field in Settings.model_fields.items():
        default = field.default
        if isinstance(default, SecretStr):
            default = default.get_secret_value()
        if isinstance(default, tuple):
            default = ",".join(default)
        text = f"{default:g}" if isinstance(default, float) else str(default)
        text = text.lower() if isinstance(default, bool) else text
        about = str(field.description)
        if isinstance(field.validation_alias, AliasChoices):
            others = [f"`{other}`" for other in field.validation_alias.choices[1:]]
            about += f" Also read: {', '.join(sorted(others))}."
        kind = kind_of(schema[name]).replace("list of string", "list")
        kind = f"One of {kind}" if kind.startswith("`") else kind.capitalize()
        yield f"\n## {PREFIX}{name.upper()}\n\n{about}\n\n"
        yield f"{kind}. Default: {f'`{text}`' if text else 'none'}.\n"


def scopes_page() -> Iterator[str]:
    """Yield the page of scopes and routes: what each scope grants, and what each route needs."""
    rules = [rule for rule in operations.rules() if rule.access in _CLASSES]
    alike: dict[tuple[str, ...], list[str]] = {}
    admin = sorted(scopes.ADMIN, key=lambda name: (not name.startswith("mlflow:"), name))
    for scope in (*scopes.REGISTRY, *scopes.GENERAL, *admin, scopes.METRICS):
        opened = tuple(rule.rule for rule in rules if _may(scope, rule))
        alike.setdefault(opened, []).append(scope)
    # A scope that opens a single route gets a sentence below the table instead of a column.
    heads = [names[0] for opened, names in alike.items() if len(opened) > 1]
    yield """# Scopes and routes

This page says what a key may do under the policy `scopes`, the default ([policies](policies.md)).
`hokusai-auth explain` answers the same for one request, `hokusai-auth routes` for all routes of
the installed MLflow.

## What each scope grants

- **read**: look at and download.
- **write**: create, change and delete; spend money; call a provider.
- **admin**: manage keys, webhooks, credentials, other users, the host.

The table leaves out routes that are public or open to any key.

"""
    kinds = sorted({rule.kind for rule in rules})
    by_kind = {kind: [rule for rule in rules if rule.kind == kind] for kind in kinds}
    cells = [
        [
            kind,
            *(
                _granted_graphql(scope, found[0]) if kind == "graphql" else _granted(scope, found)
                for scope in heads
            ),
        ]
        for kind, found in by_kind.items()
    ]
    yield table(["routes of", *(f"`{scope}`" for scope in heads)], cells)
    yield "\n"
    for opened, (first, *others) in alike.items():
        if others:
            yield f"`{first}` has other names: {', '.join(f'`{name}`' for name in others)}.\n"
        if len(opened) == 1:
            yield f"`{first}` opens `{opened[0]}`, and nothing else.\n"
    yield f"""
All other scopes belong to other services and grant nothing. MLflow's assistant refuses every key
unless `HOKUSAI_AUTH_ASSISTANT` is true.

## GraphQL

`/graphql` is one route for queries and mutations. If a key may send queries at all, the gate
reads the body and decides by its fields. A query needs read on the kinds of resource that its
fields return, as in this table. A query with any other field needs read on everything
(`mlflow:read`). A mutation needs write on everything (`mlflow:write`). So does a body that the
gate can't read as a query: one that is not JSON, has more than {graphql.MAX_BODY // 1024} KiB,
has a query of more than {graphql.MAX_QUERY} characters or {graphql.MAX_TOKENS} tokens, or arrives
in chunks at gunicorn or waitress.

"""
    yield table(
        ("field", "needs read on"),
        [(f"`{name}`", ", ".join(kinds)) for name, kinds in routes.QUERY_FIELDS.items()],
    )
    yield """
## Artifacts

The server restricts where artifacts lie. Unless the key is an administrator's, an experiment's
`artifact_location` and a version's `source` must be inside the server's artifact roots, and not
among the files of another experiment. For every key, the server opens nothing outside its
artifact roots, unless `HOKUSAI_AUTH_ARTIFACT_ROOTS` names the place.

The kind of an artifact follows from the locations of the experiments, not from words in its path:

| path | kind |
| --- | --- |
| `traces/<trace id>/…` right below an experiment's location | traces |
| `<run id>/artifacts/…` or `models/<model id>/artifacts/…` below it | artifacts |
| any path outside these | traces, if `traces` is a segment of it, and artifacts otherwise |

A key with `model:write` may delete the folder of one run or logged model, and files in it. It may
not delete a folder above these, nor a path below no experiment's location. Before the server
refuses a request because it does not know the experiment, it reads the locations again, so a new
experiment counts in all processes and replicas at once. (With MLflow's file store instead of a
database, the server knows only experiments without a location of their own.)

## What each route needs

Every route answers under each prefix as well. `[ajax-]api` stands for both spellings, `{x}` for
one segment of a path, `{x:path}` for the rest. `HEAD` needs the same as `GET`. `OPTIONS` needs
read, or no key if another method of the path is public. For queries to `/graphql` see
[above](#graphql). public: no key; key: any good key. **A route that is not listed needs admin.**
On routes marked ↗ MLflow calls a provider, and does not get the caller's key.

With `HOKUSAI_AUTH_SUPPLIER_TRUST=true`, the routes of trusts need read or write instead of admin.
They show suppliers only the [trusts of their own owner](trust.md#let-suppliers-trust-their-own-jobs).

Under `/static-files/`, the files of the installed MLflow's own wheel are public. The server
serves no others from that folder.
"""
    every = list(operations.rules())
    for kind in sorted({rule.kind for rule in every}):
        rows = _routes(rule for rule in every if rule.kind == kind)
        yield f"\n### {kind}\n\n{table(('needs', 'method', 'path'), rows)}"


def _may(scope: str, rule: Operation) -> bool:
    holder = Principal("", "", frozenset({scope}))
    return policy.access(holder, rule, policy.Policy()) >= rule.access


def _granted(scope: str, rules: Sequence[Operation]) -> str:
    """Return the classes of `rules` that `scope` opens, and single rules of its other classes."""
    found = []
    for access in _CLASSES:
        of_class = [rule for rule in rules if rule.access is access]
        opened = [rule for rule in of_class if _may(scope, rule)]
        if opened == of_class and opened:
            found.append(access.name.lower())
        else:
            found += sorted({f"`{rule.rule.rpartition('mlflow/')[2]}`" for rule in opened})
    return ", ".join(found) or "–"


def _granted_graphql(scope: str, route: Operation) -> str:
    """Return what `scope` opens of GraphQL, where the body decides."""
    known, other, mutation = (
        _may(scope, operations.graphql(route, fields))
        for fields in (routes.QUERY_FIELDS, ("another",), None)
    )
    reads = "read" if other else "[queries of the registry](#graphql)" if known else ""
    return ", ".join(filter(None, (reads, "write" if mutation else ""))) or "–"


def _routes(rules: Iterable[Operation]) -> list[tuple[str, str, str]]:
    spelt: dict[tuple[str, str, str], set[str]] = {}
    for rule in rules:
        method, _, path = rule.rule.partition(" ")
        takes = rule.access.name.lower() + (" ↗" if rule.outbound else "")
        spelt.setdefault((path.replace("/ajax-api/", "/api/"), method, takes), set()).add(path)
    methods: dict[tuple[str, str], list[str]] = {}
    for (path, method, takes), paths in spelt.items():
        shown = path.replace("/api/", "/[ajax-]api/", 1) if len(paths) > 1 else paths.pop()
        methods.setdefault((takes, shown), []).append(method)
    return [(takes, ", ".join(found), f"`{path}`") for (takes, path), found in methods.items()]


def cli() -> Iterator[str]:
    """Yield the page of the command line: a section for each command."""
    yield """# Command line

`whoami`, `doctor` and `smoke` send requests to a server, with your key. `keys`, `links`, `audit`,
`mode` and `log-level` open the key store itself: run them on the server's host, with its environment.
`status` and `trust` do either: with `--url` they ask a server. All exit with status 0, with 1 and a
line on standard error, or with 2 for a wrong option or value.
`doctor` exits with 3 if it only warns. `--json` of `doctor`, `smoke` and `whoami` has `ok`.

Times are in UTC, to the minute (`2026-11-30 14:00Z`), and to the second where the order counts.
A key that another one replaced, and that is still valid for a while, is called `replaced`; REST,
Python and `--json` call that state `deprecated`.

## Completion

Bash completes commands, options and their values (scopes, states, environments, modes, columns)
after:

```bash
eval "$(_HOKUSAI_AUTH_COMPLETE=bash_source hokusai-auth)"
```

Put that line into `~/.bashrc` to have it in each shell. For zsh it is the same with `zsh_source`
in `~/.zshrc`, and for fish `_HOKUSAI_AUTH_COMPLETE=fish_source hokusai-auth | source` in
`~/.config/fish/config.fish`.
"""
    yield from _commands(command_line, "hokusai-auth")


def _commands(command: click.Command, name: str) -> Iterator[str]:
    if isinstance(command, click.Group):
        for sub, found in sorted(command.commands.items()):
            yield from _commands(found, f"{name} {sub}")
        return
    context = click.Context(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    about, _, more = inspect.cleandoc(command.help or "").partition("\n\n")
    yield f"\n## {name}\n\n{' '.join(about.split())}\n\n```text\n{usage}\n```\n"
    for part in more.split("\n\n") if more else ():
        # click keeps the line breaks of a paragraph that begins with \b.
        kept = part.startswith("\b\n")
        yield f"\n```text\n{part[2:]}\n```\n" if kept else f"\n{' '.join(part.split())}\n"
    rows = [_option(one) for one in command.params if isinstance(one, click.Option)]
    if rows:
        yield "\n" + table(("option", "meaning"), rows)


def _option(option: click.Option) -> tuple[str, str]:
    value = "" if option.is_flag else f" {option.metavar or option.type.name.upper()}"
    about = [option.help or ""]
    if option.required:
        about.append("Required.")
    if option.show_default:
        about.append(f"Default: `{option.default}`.")
    if option.envvar:
        about.append(f"Variable: `{option.envvar}`.")
    return f"`{', '.join(option.opts)}{value}`", " ".join(about)


PAGES = {
    "operator/settings.md": (settings, "mlflow_hokusai_auth/server/settings.py"),
    "operator/scopes.md": (scopes_page, "mlflow_hokusai_auth/core/scopes.py and routes.py"),
    "api/rest.md": (rest, "mlflow_hokusai_auth/server/web/openapi.py"),
    "api/cli.md": (cli, "mlflow_hokusai_auth/cli"),
}


def write(folder: Path) -> None:
    """Write the pages to `folder`."""
    for name, (make, source) in PAGES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        head = f"<!-- Generated by docs/generate.py from {source}. Do not edit. -->\n\n"
        path.write_text(head + "".join(make()), "utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

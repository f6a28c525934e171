"""`hokusai-auth`: keys, the table of routes, and a demo of the whole."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from mlflow_hokusai_auth import __version__

if TYPE_CHECKING:
    from mlflow_hokusai_auth.backends.local import LocalStore

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@click.group()
@click.version_option(__version__)
def main() -> None:
    """Hokusai API keys for MLflow."""


@main.group()
def keys() -> None:
    """Keys in the embedded store (HOKUSAI_AUTH_DATABASE_URI, sqlite:///hokusai_auth.db)."""


def _json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def _new_key_options(command: F) -> F:
    for option in (
        click.option("--expires-in", metavar="TIME", help="How long it lives: 30d, 12h, 45m, 90s."),
        click.option("--name", default="", help="What it is for."),
        click.option("--scope", "scopes", multiple=True, required=True, help="May be repeated."),
        click.option("--owner", required=True, help="Whom it is for."),
    ):
        command = option(command)
    return command


@keys.command()
@_new_key_options
@click.option("--environment", default="live", help="live, test or dev; the key begins with it.")
@_json_option
def create(
    owner: str,
    scopes: Sequence[str],
    name: str,
    expires_in: str | None,
    environment: str,
    as_json: bool,
) -> None:
    """Make a key and print it, this once."""
    store = _store()
    with _friendly():
        record, key = store.create(
            **_arguments(owner, scopes, name, expires_in, environment=environment)
        )
    if as_json:
        _print_json({**_described(record), "key": key})
        return
    click.echo(f"{key}\n")
    click.echo(
        f"This is {record.key_id}, for {record.owner}. Keep the key now: it is not stored.",
        err=True,
    )


@keys.command("import")
@_new_key_options
@click.option(
    "--key-file",
    type=click.File(),
    default="-",
    help="Where the key is read from; standard input if left out.",
)
@_json_option
def import_key(
    owner: str,
    scopes: Sequence[str],
    name: str,
    expires_in: str | None,
    key_file: Any,
    as_json: bool,
) -> None:
    """Take in a key that was handed out before, read from a file or standard input."""
    store = _store()
    with _friendly():
        arguments = _arguments(owner, scopes, name, expires_in)
        del arguments["environment"]
        _show([store.add(key_file.read().strip(), **arguments)], as_json, one=True)


@keys.command("list")
@_json_option
def list_keys(as_json: bool) -> None:
    """All keys, oldest first."""
    store = _store()
    with _friendly():
        _show(store.list(), as_json)


@keys.command()
@click.argument("key_id")
@_json_option
def show(key_id: str, as_json: bool) -> None:
    """One key, by its id."""
    store = _store()
    with _friendly():
        _show([store.get(key_id)], as_json, one=True)


@keys.command()
@click.argument("key_id")
@_json_option
def revoke(key_id: str, as_json: bool) -> None:
    """End a key for good; running servers refuse it within a second."""
    store = _store()
    with _friendly():
        _show([store.revoke(key_id)], as_json, one=True)


@main.command()
@_json_option
def routes(as_json: bool) -> None:
    """Every route of the installed MLflow server, and what it takes to call it."""
    _require_server()
    from mlflow_hokusai_auth.core.operations import classify
    from mlflow_hokusai_auth.server.mlflow_routes import installed_routes, template

    rows = []
    for method, rule, origin in installed_routes():
        operation = classify(method, template(rule))
        rows.append(
            {
                "access": operation.access.name.lower(),
                "method": method,
                "route": rule,
                "kind": operation.kind,
                "served_by": origin,
            }
        )
    if as_json:
        _print_json(rows)
    else:
        _print_table(rows)


@main.command()
@click.argument("method")
@click.argument("path")
@click.option("--scope", "scopes", multiple=True, help="A scope of the key; may be repeated.")
@_json_option
def explain(method: str, path: str, scopes: Sequence[str], as_json: bool) -> None:
    """Which rule decides on a request, what it takes, and whether a key with --scope may."""
    _require_server()
    from mlflow_hokusai_auth.server import explain as explained
    from mlflow_hokusai_auth.server import settings

    try:
        answer = explained.explain(method, path, scopes, settings.load())
    except settings.SettingsError as error:
        _fail(str(error))
    if as_json:
        _print_json(answer)
        return
    for name, value in answer.items():
        click.echo(f"{name + ':':10} {', '.join(value) if isinstance(value, list) else value}")


@main.command()
@click.option("--keep", is_flag=True, envvar="KEEP", help="Leave the server running at the end.")
def demo(keep: bool) -> None:
    """Start a server, make a key, register a model with it, load it again."""
    _require_server()
    from mlflow_hokusai_auth.demo import run

    sys.exit(run(keep=keep))


def _require_server() -> None:
    try:
        import flask  # noqa: F401
        import pydantic_settings  # noqa: F401
        import sqlalchemy  # noqa: F401
    except ImportError as error:
        _fail(
            f"this command needs {error.name}. Install the server's extra: "
            "pip install 'mlflow-hokusai-auth[server]'"
        )


def _store() -> LocalStore:
    _require_server()
    from mlflow_hokusai_auth.backends.local import LocalStore
    from mlflow_hokusai_auth.server import settings

    with _friendly():
        try:
            config = settings.load()
        except settings.SettingsError as error:
            _fail(str(error))
        store = LocalStore(config.database_uri.get_secret_value())
        store.migrate()
        return store


class _friendly:
    """Turns what the store raises into one line and exit status 1."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from mlflow_hokusai_auth.backends import BackendUnavailable
        from mlflow_hokusai_auth.backends.local import StoreError

        if isinstance(error, (StoreError, BackendUnavailable)):
            _fail(str(error))


def _arguments(
    owner: str,
    scopes: Sequence[str],
    name: str,
    expires_in: str | None,
    environment: str = "live",
) -> dict[str, Any]:
    from mlflow_hokusai_auth.server.api import new_key_arguments

    body: dict[str, Any] = {
        "owner": owner,
        "scopes": list(scopes),
        "name": name,
        "environment": environment,
    }
    if expires_in is not None:
        body["expires_in"] = _seconds(expires_in)
    return new_key_arguments(body)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)([smhd])", text)
    if not match:
        _fail("--expires-in takes a number and s, m, h or d, such as 30d")
    return int(match[1]) * _UNITS[match[2]]


def _described(record: Any) -> dict[str, object]:
    from mlflow_hokusai_auth.server.api import describe

    return describe(record)


def _show(records: Sequence[Any], as_json: bool, *, one: bool = False) -> None:
    described = [_described(record) for record in records]
    if as_json:
        _print_json(described[0] if one else described)
        return
    _print_table(
        [
            {
                "key_id": row["key_id"],
                "state": row["state"],
                "owner": row["owner"],
                "name": row["name"] or "-",
                "scopes": ",".join(row["scopes"]),  # type: ignore[arg-type]
                "created": _date(row["created_at"]),
                "expires": _date(row["expires_at"]),
            }
            for row in described
        ]
    )


def _date(seconds: Any) -> str:
    if seconds is None:
        return "-"
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%MZ")


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        click.echo("none")
        return
    names = list(rows[0])
    widths = [max(len(name), *(len(str(row[name])) for row in rows)) for name in names]
    for row in [dict(zip(names, names, strict=True)), *rows]:
        line = "  ".join(str(row[n]).ljust(w) for n, w in zip(names, widths, strict=True))
        click.echo(line.rstrip())


def _fail(message: str) -> NoReturn:
    raise SystemExit(f"hokusai-auth: {message}")


if __name__ == "__main__":
    main()

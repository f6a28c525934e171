"""`hokusai-auth owners`, `grants` and `prefixes`: whose everything is, and what owners share.

With a database (--backend-store-uri) the commands work in it, as an operator. Without one they ask the
server of MLFLOW_TRACKING_URI, with the client's key.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import click

from mlflow_hokusai_auth.core.ownership import KINDS, LEVELS

from .output import (
    F,
    Word,
    WrongValue,
    date,
    json_option,
    print_json,
    print_table,
    printable,
    seconds,
)
from .store import actor, database, database_option, opened, require_server, server

if TYPE_CHECKING:
    from mlflow_hokusai_auth.client.admin import HokusaiAuthClient
    from mlflow_hokusai_auth.store.owners import Ownership

#: Rows of a file for `owners assign`, at most, as in one request.
_MAX_ROWS = 10_000


_place_option = database_option(
    "Work in MLflow's database, as an operator (default: MLFLOW_BACKEND_STORE_URI). Without it, ask "
    "the server of MLFLOW_TRACKING_URI with your key."
)


def _page_options(command: F) -> F:
    number = click.option("--max-results", type=int, default=100, show_default=True, metavar="N")
    token = click.option("--page-token", help="The next page, as printed by the previous one.")
    return number(token(command))


_kind_option = click.option(
    "--kind",
    type=Word(KINDS),
    default=KINDS[0],
    show_default=True,
    help="Registered models, or experiments.",
)


@click.group()
def owners() -> None:
    """Show and change the owners of registered models and experiments."""


@owners.command("list")
@_kind_option
@click.option("--owner", help="Only those of this owner.")
@click.option("--unowned", is_flag=True, help="Only those that nobody owns.")
@_page_options
@_place_option
@json_option
def list_owners(uri: str | None, as_json: bool, **which: Any) -> None:
    """List registered models or experiments with their owners, one page at a time.

    With --unowned an operator also sees who may own them: names that MLflow keeps with them. Clients
    may have set these.
    """
    with _place(uri) as place:
        page = place.list_owners(**which)
    _show_page("owners", [*page], page.token, as_json, _suggested if which["unowned"] else _owned)


@owners.command("of")
@click.argument("name")
@_place_option
@json_option
def owners_of(name: str, uri: str | None, as_json: bool) -> None:
    """Show whose the registered model and the experiment NAME are."""
    with _place(uri) as place:
        rows = place.owners_of(name)
    _show_all("owners", rows, as_json, _owned)


@owners.command()
@click.option("--models", metavar="PATTERN", help="Registered models: a name, or acme-*.")
@click.option("--experiments", metavar="PATTERN", help="Experiments: a name, or /acme/*.")
@click.option(
    "--csv",
    "file",
    type=click.File(encoding="utf-8-sig"),
    help="A file with the columns kind (model or experiment) and name, and perhaps owner.",
)
@click.option(
    "--from", "from_owner", metavar="OWNER", help="Give away all that this owner has, reserved too."
)
@click.option(
    "--owner", "--to", "owner", help="The new owner; of rows without one, if there is a file."
)
@click.option("--apply", is_flag=True, help="Change it; otherwise only show what would change.")
@click.option(
    "--keep-grants", is_flag=True, help="What former owners shared stays shared, by the new owner."
)
@_place_option
@json_option
def assign(uri: str | None, as_json: bool, file: IO[str] | None, **given: Any) -> None:
    """Give models or experiments to an owner.

    Nothing changes without --apply. The answer also lists versions of these models whose files belong
    to others: their owners can change such files.
    """
    names = [] if file is None else _rows(file)
    if [given["models"], given["experiments"], given["from_owner"], file].count(None) != 3:
        raise WrongValue("give --models, --experiments, --from or --csv: one of them")
    with _place(uri) as place:
        answer = place.assign_owner(**given, names=names)
    if as_json:
        print_json(answer)
        return
    columns = ("kind", "name", "before", "owner")
    print_table([{name: row[name] for name in columns} for row in answer["changes"]])
    done = "changed" if answer["applied"] else "would change; nothing did, without --apply"
    click.echo(f"{answer['changed']} {done}. {answer['unchanged']} have this owner already.")
    for name in answer["missing"]:
        click.echo(f"hokusai-auth: there is no {printable(name)}", err=True)
    if answer["foreign_sources"]:
        click.echo("Versions whose files are not the owner's, as far as is known:")
        print_table(answer["foreign_sources"])


@owners.command()
@click.argument("name")
@_place_option
@json_option
def release(name: str, uri: str | None, as_json: bool) -> None:
    """Release the name of a registered model, so that it has no owner.

    If the model is gone, anybody may make one of this name then.
    """
    with _place(uri) as place:
        row = place.release_name(name)
    if as_json:
        print_json(row)
    else:
        click.echo(f"{printable(name)} was {printable(row['owner'])}'s, and has no owner now.")


@owners.command()
@_place_option
@json_option
def check(uri: str | None, as_json: bool) -> None:
    """Look for what plain MLflow left in the tables, and for owners that differ in case only.

    The exit status is 1 if there is anything.
    """
    with _place(uri) as place:
        problems = place.check_owners()
    _show_all("problems", problems, as_json, dict)
    if problems:
        sys.exit(1)


@owners.command()
@_place_option
@json_option
def sql(uri: str | None, as_json: bool) -> None:
    """Print the SQL that makes the tables, for database administrators.

    It is for the kind of --backend-store-uri, or else for PostgreSQL. It is needed only if MLflow's
    user may not create tables.
    """
    require_server()
    from mlflow_hokusai_auth.store.ownership import ddl

    statements = ddl("sqlite" if (uri or "").startswith("sqlite") else "postgresql")
    if as_json:
        print_json({"sql": statements})
    else:
        click.echo(statements, nl=False)


@click.group()
def grants() -> None:
    """Share registered models with other owners."""


@grants.command("add")
@click.option("--owner", "grantee", required=True, help="Whom to share with: the owner of a key.")
@click.option("--model", "pattern", required=True, help="A model, or a beginning and *: acme-*.")
@click.option("--level", type=Word(LEVELS), default=LEVELS[0], show_default=True)
@click.option("--expires-in", metavar="TIME", help="Time until it ends: 30d, 12h, 45m, 90s.")
@_place_option
@json_option
def add_grant(uri: str | None, as_json: bool, expires_in: str | None, **given: Any) -> None:
    """Share models: your own, now and later, or any if you are an operator."""
    lifetime = None if expires_in is None else seconds(expires_in, "--expires-in")
    with _place(uri) as place:
        row = place.add_grant(**given, expires_in=lifetime)
    _show_all(None, [row], as_json, _grant)
    if not row["models"]:
        click.echo(
            "hokusai-auth: the grant covers no model yet. If one should be there, its name is spelt "
            f"otherwise: `hokusai-auth grants remove {row['id']}` ends the grant",
            err=True,
        )


@grants.command("list")
@_page_options
@_place_option
@json_option
def list_grants(uri: str | None, as_json: bool, max_results: int, page_token: str | None) -> None:
    """List the grants that you gave or have; operators see all."""
    with _place(uri) as place:
        page = place.list_grants(max_results=max_results, page_token=page_token)
    _show_page("grants", [*page], page.token, as_json, _grant)


@grants.command("remove")
@click.argument("grant_id")
@_place_option
@json_option
def remove_grant(grant_id: str, uri: str | None, as_json: bool) -> None:
    """End a grant, by its id."""
    with _place(uri) as place:
        row = place.remove_grant(grant_id)
    _show_all(None, [row], as_json, _grant)


@click.group()
def prefixes() -> None:
    """Reserve beginnings of names for owners."""


@prefixes.command("add")
@click.argument("prefix")
@click.option("--owner", required=True, help="The owner that new names with it are reserved for.")
@_kind_option
@_place_option
@json_option
def add_prefix(uri: str | None, as_json: bool, **given: Any) -> None:
    """Reserve new names that begin with PREFIX. Names that exist stay whose they are."""
    with _place(uri) as place:
        row = place.add_prefix(**given)
    _show_all(None, [row], as_json, dict)


@prefixes.command("list")
@_place_option
@json_option
def list_prefixes(uri: str | None, as_json: bool) -> None:
    """List all prefixes."""
    with _place(uri) as place:
        rows = place.list_prefixes()
    _show_all("prefixes", rows, as_json, dict)


@prefixes.command("remove")
@click.argument("prefix")
@_kind_option
@_place_option
@json_option
def remove_prefix(uri: str | None, as_json: bool, **given: Any) -> None:
    """End the reservation of PREFIX."""
    with _place(uri) as place:
        row = place.remove_prefix(**given)
    _show_all(None, [row], as_json, dict)


def grants_to(uri: str, owner: str) -> list[dict[str, Any]]:
    """Return the grants of which `owner` is the grantee, in MLflow's database. Raises Mistake."""
    found: list[dict[str, Any]] = []
    token: str | None = None
    with _place(uri) as place:
        while True:
            page = place.list_grants(max_results=1000, page_token=token)
            found += [row for row in page if row["grantee"] == owner]
            if (token := page.token) is None:
                return found


@contextmanager
def _place(uri: str | None) -> Iterator[Ownership | HokusaiAuthClient]:
    """Yield MLflow's database at `uri`, or the server. Their errors in the block become Mistakes."""
    if uri is None:
        with server() as client:
            yield client
        return
    with opened() as store, database(uri) as engine:
        from mlflow_hokusai_auth.store.owners import Ownership

        by = actor()
        yield Ownership(
            engine,
            lambda event, detail: store.database.note(event, by, detail),
            key_owners=store.owners,
        )


def _rows(file: IO[str]) -> list[dict[str, str]]:
    """Return the rows of a file for `assign`. Raises WrongValue."""
    try:
        reader = csv.DictReader(io.StringIO(file.read()), strict=True)
        columns = set(reader.fieldnames or ())
        if not {"kind", "name"} <= columns <= {"kind", "name", "owner"}:
            raise WrongValue("--csv: the first line must be kind,name or kind,name,owner")
        rows = [
            {name: value for name, value in row.items() if isinstance(name, str) and value}
            for row in reader
        ]
    except (csv.Error, UnicodeDecodeError) as error:
        raise WrongValue(f"--csv: {error}") from None
    for number, row in enumerate(rows, 1):
        if not {"kind", "name"} <= row.keys():
            raise WrongValue(f"--csv: row {number} has no kind or no name")
    if not 0 < len(rows) <= _MAX_ROWS:
        raise WrongValue(f"--csv: the file must have from 1 to {_MAX_ROWS} rows, not {len(rows)}")
    return rows


def _owned(row: Mapping[str, Any]) -> dict[str, object]:
    columns = ("kind", "name", "experiment_id", "owner", "key_id")
    return {**{name: row[name] for name in columns}, "gone": date(row["gone_at"])}


def _suggested(row: Mapping[str, Any]) -> dict[str, object]:
    columns = ("kind", "name", "experiment_id")
    return {
        **{name: row[name] for name in columns},
        # Servers before suggestions have none.
        "suggested": ", ".join(row.get("suggested") or ()),
    }


def _grant(row: Mapping[str, Any]) -> dict[str, object]:
    columns = ("id", "granted_by", "grantee", "pattern", "level", "models")
    shown = {name: row[name] for name in columns}
    return {
        **shown,
        "granted_by": row["granted_by"] or "operators",
        "ends": date(row["expires_at"]),
    }


def _show_all(
    name: str | None, rows: Sequence[Mapping[str, Any]], as_json: bool, columns: Any
) -> None:
    """Print `rows`; as JSON, below `name`, or the only one as it is."""
    if as_json:
        print_json(rows[0] if name is None else {name: rows})
    else:
        print_table([columns(row) for row in rows])


def _show_page(
    name: str, rows: list[Mapping[str, Any]], token: str | None, as_json: bool, columns: Any
) -> None:
    if as_json:
        print_json({name: rows, "next_page_token": token})
        return
    print_table([columns(row) for row in rows])
    if token is not None:
        again = f"hokusai-auth: there are more: repeat the command with --page-token {token!r}"
        click.echo(printable(again), err=True)

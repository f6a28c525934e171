"""`hokusai-auth keys` manages the keys in the embedded store by the rules of the REST API."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

import click

from mlflow_hokusai_auth.core.counts import counted, whole_number
from mlflow_hokusai_auth.core.keys import ENVIRONMENTS, redact
from mlflow_hokusai_auth.core.scopes import KNOWN

from .links import lasting as lasting_link
from .links import link_options
from .links import make as make_link
from .output import (
    WORDS,
    F,
    Mistake,
    WrongValue,
    body_of,
    completes,
    date,
    json_option,
    one_of,
    print_fields,
    print_json,
    print_table,
    printable,
    seconds,
    undo,
)
from .ownership import grants_to
from .store import actor, lifetimes, opened

if TYPE_CHECKING:
    from mlflow_hokusai_auth.store.records import KeyRecord


#: The columns of a table of keys, unless others are chosen.
_COLUMNS = ("key_id", "state", "owner", "name", "scopes", "expires_at")
#: The widths to which columns are cut on a terminal, at most. With these, _COLUMNS fit 80 columns.
_NARROWEST = {
    "owner": 7,
    "name": 7,
    "scopes": len("model:write"),
    "note": 7,
    "models": 7,
    "networks": 7,
}
_COLOURS = {
    "state": {"active": "green", "replaced": "yellow", "expired": "bright_black", "revoked": "red"}
}
#: Names of the REST API for words of people.
_REST = {word: name for name, word in WORDS.items()}
#: The values of --sort: what a list can be ordered by.
_ORDERS = ("created_at", "expires_at", "last_used_at", "name", "owner", "scopes", "state")
#: The values of --state, which are the REST API's but for one.
_STATES = ("active", "replaced", "expired", "revoked", "valid", "ended")


@click.group()
def keys() -> None:
    """Manage keys in the embedded store (HOKUSAI_AUTH_DATABASE_URI, sqlite:///hokusai_auth.db)."""


def _field_options(*, required: bool) -> Callable[[F], F]:
    """Return the options for the fields of a key, named as the REST API names them."""

    def add(command: F) -> F:
        for option in (
            click.option(
                "--no-delete",
                is_flag=True,
                default=None,
                help="The key may not delete anything.",
            ),
            click.option(
                "--models",
                multiple=True,
                metavar="PATTERN",
                help="A registered model that the key may change, or a beginning and `*`, such as "
                "`acme-*`; may be repeated.",
            ),
            click.option(
                "--rate-limit",
                "rate_limit_per_hour",
                metavar="N|none",
                help="Requests that the key may send in any hour.",
            ),
            click.option(
                "--network",
                "networks",
                multiple=True,
                metavar="CIDR",
                help="An address or network that the key may be used from; may be repeated.",
            ),
            click.option(
                "--expires-in",
                metavar="TIME|never",
                help="Lifetime from now on: 30d, 12h, 45m, 90s, or never. Without it, a new key lives "
                "for HOKUSAI_AUTH_KEY_LIFETIME (365 days), and an imported key never ends.",
            ),
            click.option("--note", help="A note for operators."),
            click.option("--name", help="The purpose of the key."),
            click.option(
                "--scope",
                "scopes",
                multiple=True,
                required=required,
                shell_complete=completes(*sorted(KNOWN)),
                help="A scope of the key: model:write, model:read, mlflow:admin, …; may be repeated.",
            ),
            click.option("--owner", required=required, help="The owner of the key."),
        ):
            command = option(command)
        return command

    return add


@keys.command()
@_field_options(required=True)
@click.option(
    "--environment",
    shell_complete=completes(*ENVIRONMENTS),
    help="live (the default), test or dev; it is a part of the key.",
)
@link_options
@json_option
def create(as_json: bool, link: bool, link_expires: str | None, **given: Any) -> None:
    """Make a key and print it; it is shown only once."""
    lasting = lasting_link(link, link_expires)
    # A link of a new store would be for a server that does not exist.
    with opened(make=not link) as store:
        from mlflow_hokusai_auth.server.web import schemas

        if link:
            make_link(store, {"key": _body(given), **lasting}, as_json=as_json)
            return

        body = schemas.parse(schemas.NewKey, _body(given))
        record, key = store.create(**schemas.new_fields(body, lifetimes()), by=actor())
        described = schemas.describe(record)
    if as_json:
        print_json({**described, "key": key})
        return
    click.echo(key)
    click.echo(
        f"This is {record.key_id}, for {record.owner}. {_ends(record)} Save the key now: it is not "
        "stored.",
        err=True,
    )


@keys.command("import")
@_field_options(required=True)
@click.option(
    "--key-file",
    type=click.File(errors="replace"),
    default="-",
    help="The file with the key; standard input by default.",
)
@json_option
def import_key(as_json: bool, key_file: IO[str], **given: Any) -> None:
    """Import an existing key from a file or standard input."""
    # This is longer than any key, and bounds the reading of a wrong file.
    key = key_file.read(10_000).strip()
    if not key:
        raise WrongValue("there is no key to import: the file, or standard input, is empty")
    with opened(make=True) as store:
        from mlflow_hokusai_auth.server.web import schemas

        body = schemas.parse(schemas.ExistingKey, {**_body(given), "key": key})
        described = schemas.describe(store.add(body.key, **schemas.fields(body), by=actor()))
    _show(described, as_json)


@keys.command("list")
@click.option("--owner", help="Only keys of this owner.")
@click.option(
    "--environment",
    shell_complete=completes(*ENVIRONMENTS),
    help="Only keys of this environment: live, test or dev.",
)
@click.option(
    "--state",
    shell_complete=completes(*_STATES),
    help="Only keys in this state: active, replaced, expired or revoked; or valid (the first two), or "
    "ended (the others).",
)
@click.option("--query", help="Only keys with this text in their owner, name or id.")
@click.option("--max-results", type=int, default=100, show_default=True, metavar="N")
@click.option("--page-token", help="The next page, as printed by the previous one.")
@click.option(
    "--sort",
    metavar="COLUMN",
    shell_complete=completes(*_ORDERS),
    help="Order by created_at, expires_at, last_used_at, name, owner, scopes or state; a minus before "
    "the name (-expires_at) reverses the order.",
)
@click.option(
    "--columns",
    metavar="NAMES",
    shell_complete=lambda context, parameter, incomplete: _complete_columns(incomplete),
    help="Columns, separated by commas; `keys show` prints the names of all (default: "
    + ",".join(_COLUMNS)
    + ").",
)
@json_option
def list_keys(
    as_json: bool,
    max_results: int,
    state: str | None,
    sort: str | None,
    columns: str | None,
    **which: str | None,
) -> None:
    """List keys, newest first, one page at a time.

    On a terminal, long owners, names and scopes are cut so that a line fits.
    """
    with opened() as store:
        chosen = _chosen_columns(columns)
        from mlflow_hokusai_auth.server.web.keys_api import page
        from mlflow_hokusai_auth.server.web.schemas import describe

        query = {name: value for name, value in which.items() if value is not None}
        if state is not None:
            state = WORDS.get(state, state)
            query["state"] = _REST.get(one_of(state, "--state", _STATES), state)
        if sort is not None:
            query["order_by"] = _order(sort)
        found = page(store, {**query, "max_results": str(max_results)})
        described = [describe(record) for record in found.records]
    token = found.next_page_token
    if as_json:
        print_json({"keys": described, "next_page_token": token})
        return
    rows = [_facts(record) for record in described]
    _print_keys([{name: row[name] for name in chosen} for row in rows])
    if token is not None:
        shown = f"{found.before + 1} to {found.before + len(rows)} of {found.total}"
        click.echo(
            f"These are keys {shown}: repeat the command with --page-token {token}", err=True
        )


@keys.command()
@click.argument("key_id")
@json_option
def show(key_id: str, as_json: bool) -> None:
    """Show the record of a key, by its id."""
    with opened() as store:
        from mlflow_hokusai_auth.server.web.keys_api import with_uses

        (described,) = with_uses(store, [store.get(key_id)])
    if as_json:
        print_json(described)
        return
    uses = described.pop("uses_by_hour")
    print_fields({**_facts(described), "uses in 24 hours": sum(uses)})


class _KeyFile(click.File):
    """A file that holds a key. The key itself in its place is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if redact(str(value)) != str(value):
            self.fail(
                "That is a key, not a file. The shell's history and the list of processes keep what "
                "stands here: run `hokusai-auth keys find -`, paste the key, press Enter and Ctrl-D.",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


@keys.command()
@click.argument("key_file", type=_KeyFile(errors="replace"), metavar="FILE")
@json_option
def find(key_file: IO[str], as_json: bool) -> None:
    """Find the key that FILE holds; `-` is standard input.

    FILE holds a whole key, or its last four characters. The exit status is 1 if no key is found.
    """
    text = key_file.read(10_000).strip()
    if not text:
        raise WrongValue("there is no key to find: the file, or standard input, is empty")
    with opened() as store:
        from mlflow_hokusai_auth.server.web import keys_api
        from mlflow_hokusai_auth.server.web.schemas import describe

        found = [describe(record) for record in keys_api.find(store, text)]
    if as_json:
        print_json({"keys": found})
    elif found:
        _print_keys([{name: _facts(one)[name] for name in _COLUMNS} for one in found])
    if not found:
        raise Mistake("this store has no such key: it may be from another server, or mistyped")


@keys.command()
@click.argument("key_id")
@_field_options(required=False)
@click.option("--any-network", is_flag=True, help="The key may be used from any address.")
@click.option("--any-model", is_flag=True, help="The key may change models of any name.")
@click.option("--may-delete", is_flag=True, help="The key may delete.")
@json_option
def edit(
    key_id: str,
    as_json: bool,
    any_network: bool,
    any_model: bool,
    may_delete: bool,
    **given: Any,
) -> None:
    """Change a key; fields that are left out stay as they are."""
    body = _body(given)
    undo(
        body,
        ("--network", "--any-network", "networks", any_network, []),
        ("--models", "--any-model", "models", any_model, []),
        ("--no-delete", "--may-delete", "no_delete", may_delete, False),
    )
    with opened() as store:
        from mlflow_hokusai_auth.server.web import schemas

        changes = schemas.changes(schemas.parse(schemas.KeyChanges, body), lifetimes())
        described = schemas.describe(store.edit(key_id, changes, actor()))
    _show(described, as_json)


@keys.command()
@click.argument("key_id")
@click.option(
    "--overlap",
    metavar="TIME",
    default="1d",
    show_default=True,
    help="Time for which the old key stays valid; 0s ends it now.",
)
@link_options
@json_option
def rotate(key_id: str, overlap: str, as_json: bool, link: bool, link_expires: str | None) -> None:
    """Make a key that replaces another one, and print it; it is shown only once.

    The new key lives, from now on, as long as the old one was to live.
    """
    lasting = lasting_link(link, link_expires)
    options = {"overlap": seconds(overlap, "--overlap")}
    with opened() as store:
        from mlflow_hokusai_auth.server.web import schemas

        if link:
            make_link(store, {"replaces": key_id, **options, **lasting}, as_json=as_json)
            return
        body = schemas.parse(schemas.Rotation, options)
        record, key, old = store.rotate(
            key_id, overlap=body.overlap, by=actor(), lifetimes=lifetimes(), renewed=True
        )
        new, replaced = schemas.describe(record), schemas.describe(old)
    if as_json:
        print_json({**new, "key": key, "replaces": replaced})
        return
    click.echo(key)
    ended = replaced["state"] == "expired"
    click.echo(
        f"This is {record.key_id}, for {record.owner}. {_ends(record)} Save the key now: it is not "
        f"stored. {key_id} "
        + ("has ended." if ended else f"stays valid until {date(old.expires_at)}."),
        err=True,
    )


@keys.command()
@click.argument("key_id", required=False)
@click.option(
    "--owner", help="Revoke all keys and links of this owner, who leaves, and remove its trusts."
)
@click.option(
    "--apply", is_flag=True, help="With --owner: do it; otherwise only show which keys would end."
)
@click.option("--wait", is_flag=True, help="Return only once no server accepts the key.")
@click.option("--force", is_flag=True, help="Revoke even the last key that may manage keys.")
@json_option
def revoke(
    key_id: str | None, owner: str | None, apply: bool, wait: bool, force: bool, as_json: bool
) -> None:
    """Revoke a key for good; running servers refuse it within a second.

    With --owner instead of KEY_ID, revoke all valid keys and waiting one-time links of an owner, and
    remove its trusts. Nothing changes then without --apply. The exit status is 1 if a key has to stay.
    """
    if (key_id is None) == (owner is None) or (apply and owner is None):
        raise click.UsageError("Give KEY_ID; or --owner, and --apply to do it.")
    with opened() as store:
        from mlflow_hokusai_auth.server.web import keys_api, schemas

        if key_id is None:
            body = {"owner": owner, "apply": apply, "wait": wait, "force": force}
            asked = schemas.parse(schemas.Revocation, body)
            return _show_leaver(asked.owner, keys_api.revoke_owner(store, asked, actor()), as_json)
        described = schemas.describe(store.revoke(key_id, actor(), force=force))
        if wait:
            # No server needs to confirm: each stops using a cached key within this time, unless it has
            # read the store since.
            time.sleep(keys_api.REVOKED_EVERYWHERE)
    _show(described, as_json)


def _show_leaver(owner: str, found: Mapping[str, Any], as_json: bool) -> None:
    """Print what of `owner` ended, or would, and what still stands. Exit with 1 if a key stays."""
    ended, kept = found["keys"], found["kept"]
    if as_json:
        print_json(found)
    else:
        _print_keys([{name: _facts(one)[name] for name in _COLUMNS} for one in ended])
        parts = [f"{counted(len(ended), 'key')} of {printable(owner)}"]
        if links := len(found["links"]):
            parts.append(counted(links, "one-time link"))
        if trusts := found["trusts"]:
            parts.append(counted(len(trusts), "trust"))
        number = " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
        done = "revoked." if found["applied"] else "would end; none did, without --apply."
        click.echo(f"{number} {done}")
        for trust_id in trusts:
            gone = "was removed" if found["applied"] else "would be removed"
            click.echo(f"{trust_id}, which gave CI jobs keys of this owner, {gone}.")
    _tell_what_stays(owner)
    if kept:
        raise Mistake(" ".join(kept))


def _tell_what_stays(owner: str) -> None:
    """Print what a leaver still has in MLflow, and the commands that end it."""
    here = shlex.quote(printable(owner))
    click.echo(
        "hokusai-auth: models and experiments stay this owner's: "
        f"`hokusai-auth owners list --owner {here}` shows them, and "
        f"`hokusai-auth owners assign --from {here} --to OWNER` gives them to another owner",
        err=True,
    )
    uri = os.environ.get("MLFLOW_BACKEND_STORE_URI")
    try:
        shared = None if not uri else grants_to(uri, owner)
    except Mistake as error:
        shared = None
        click.echo(f"hokusai-auth: grants can't be read: {error.message}", err=True)
    if shared is None:
        click.echo(
            "hokusai-auth: what is shared with this owner stays so: `hokusai-auth grants list` shows "
            "it, and `hokusai-auth grants remove ID` ends it",
            err=True,
        )
    for grant in shared or ():
        click.echo(
            f"hokusai-auth: {printable(grant['pattern'])} is shared with this owner, until "
            f"`hokusai-auth grants remove {grant['id']}`",
            err=True,
        )


@keys.command()
def export() -> None:
    """Print the records of all keys, newest first, one JSON object per line."""
    with opened() as store:
        from mlflow_hokusai_auth.server.web.schemas import describe

        for record in store.each():
            click.echo(json.dumps(describe(record)))


def _body(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given options as the body of a REST request."""
    body = body_of(given)
    if (lifetime := body.get("expires_in")) is not None:
        body["expires_in"] = None if lifetime == "never" else seconds(lifetime, "--expires-in")
    if (limit := body.get("rate_limit_per_hour")) is not None:
        body["rate_limit_per_hour"] = None if limit == "none" else _number(limit, "--rate-limit")
    return body


def _number(text: str, option: str) -> int:
    if (number := whole_number(text)) is None:
        raise WrongValue(f"{option} takes a whole number, or none")
    return number


def _ends(record: KeyRecord) -> str:
    return (
        "It never ends." if record.expires_at is None else f"It ends on {date(record.expires_at)}."
    )


def _facts(described: Mapping[str, Any]) -> dict[str, object]:
    """Return a key, as the REST API describes it, in words: its times, and that it was replaced."""
    facts = {
        WORDS.get(name, name): date(value) if name.endswith("_at") else value
        for name, value in described.items()
    }
    return {**facts, "state": WORDS.get(described["state"], described["state"])}


def _chosen_columns(text: str | None) -> Sequence[str]:
    """Return the names in `text`, of --columns. Raises WrongValue."""
    if text is None:
        return _COLUMNS
    known = _known_columns()
    chosen = [name.strip() for name in text.split(",")]
    return [one_of(name, "--columns", known) for name in chosen]


def _complete_columns(begun: str) -> list[str]:
    """Return the completions of `begun`, names with commas between them, by one more name."""
    before, comma, name = begun.rpartition(",")
    try:
        known_columns = _known_columns()
    except ImportError:  # the command needs the server's extra
        return []
    return [before + comma + known for known in known_columns if known.startswith(name)]


def _known_columns() -> list[str]:
    from mlflow_hokusai_auth.server.web.schemas import Key

    return [WORDS.get(name, name) for name in Key.model_fields]


def _order(text: str) -> str:
    """Return `text`, of --sort, as the REST API has it. Raises WrongValue."""
    field = one_of(text.removeprefix("-"), "--sort", _ORDERS)
    return f"{field} DESC" if text.startswith("-") else field


def _print_keys(rows: Sequence[Mapping[str, object]]) -> None:
    print_table(rows, _NARROWEST, _COLOURS)


def _show(described: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(described)
    else:
        facts = _facts(described)
        _print_keys([{name: facts[name] for name in _COLUMNS}])

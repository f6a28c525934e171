"""The audit log, the gate's routes and decisions, modes, and a demo. All need the server's extra."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

from mlflow_hokusai_auth.core.errors import SettingsError
from mlflow_hokusai_auth.core.types import MODES

from .output import (
    Mistake,
    date,
    json_option,
    moment,
    print_fields,
    print_json,
    print_table,
    seconds,
)
from .store import actor, opened, require_server

#: The maximum length of a value in the table of events, in characters.
_MAX_DETAIL = 60


@click.command()
@click.option("--since", metavar="TIME", help="Only events of the last 7d, 12h, 45m.")
@click.option("--event", help="Only events whose name begins so: key.revoked, or session.")
@click.option("--key", "key_id", metavar="ID", help="Only events by this key or about it.")
@click.option("--actor", help="Only events by this actor.")
@click.option(
    "--limit",
    type=click.IntRange(1, 1_000_000),
    default=100,
    show_default=True,
    metavar="N",
    help="The number of events; the last ones are shown.",
)
@json_option
def audit(
    since: str | None,
    event: str | None,
    key_id: str | None,
    actor: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """Show the audit log: the last events, oldest first."""
    for option, text in (("--event", event), ("--key", key_id), ("--actor", actor)):
        if text is not None and not text.isprintable():
            raise Mistake(f"{option} takes printable text")
    after = None if since is None else time.time() - seconds(since, "--since")
    with opened() as store:
        events = store.database.audited(
            since=after, event=event, key_id=key_id, actor=actor, limit=limit
        )
    if as_json:
        for entry in events:
            click.echo(json.dumps(entry))
        return
    print_table(
        [
            {
                "time": moment(entry["at"]),
                "event": entry["event"],
                "actor": entry["actor"],
                "key_id": entry["key_id"],
                "address": entry["address"],
                "detail": _short(entry["detail"]),
            }
            for entry in events
        ]
    )


@click.command()
@json_option
def routes(as_json: bool) -> None:
    """List every route of the installed MLflow server, and the access that it requires."""
    require_server()
    from mlflow_hokusai_auth.core.operations import classify
    from mlflow_hokusai_auth.server.upstream.routes import installed_routes, template

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
        print_json(rows)
    else:
        print_table(rows)


@click.command()
@click.argument("method")
@click.argument("path")
@click.option("--scope", "scopes", multiple=True, help="A scope of the key; may be repeated.")
@json_option
def explain(method: str, path: str, scopes: Sequence[str], as_json: bool) -> None:
    """Show the rule for a request, what it requires, and if a key with --scope may send it."""
    require_server()
    if not path.startswith("/"):
        raise Mistake("give the path alone, such as /api/2.0/mlflow/experiments/get")
    from mlflow_hokusai_auth.server import explain as explained
    from mlflow_hokusai_auth.server import settings

    try:
        answer = explained.explain(method, path, scopes, settings.load())
    except SettingsError as error:
        raise Mistake(str(error)) from None
    if as_json:
        print_json(answer)
    else:
        print_fields(answer)


@click.command()
@click.option("--keep", is_flag=True, envvar="KEEP", help="Leave the server running at the end.")
def demo(keep: bool) -> None:
    """Start a server, make a key, register a model with it, and load it."""
    require_server()
    from .demo import run

    sys.exit(run(keep=keep))


def _short(detail: Mapping[str, Any]) -> str:
    """Return `detail` in one line. Texts are quoted, so that none can look like another field."""
    shown = []
    for name, value in detail.items():
        if name.endswith("_at") and isinstance(value, (int, float)):
            text = str(date(value))
        else:
            text = json.dumps(value, ensure_ascii=False)
        shown.append(f"{name}={text if len(text) <= _MAX_DETAIL else text[:_MAX_DETAIL] + '…'}")
    return " ".join(shown)


@click.command("log-level")
@click.argument(
    "level", required=False, type=click.Choice(["debug", "info", "warning", "error", "default"])
)
@json_option
def log_level(level: str | None, as_json: bool) -> None:
    """Show or set the log level of running servers, within a second and without a restart."""
    with opened() as store:
        if level:
            number = 0 if level == "default" else getattr(logging, level.upper())
            store.database.set_state("log_level", number, "log_level.changed", actor(), level=level)
        number = store.database.states().get("log_level", 0)
    name = logging.getLevelName(number).lower() if number else "default"
    if as_json:
        print_json({"log_level": name})
    elif not level:
        click.echo(name)


@click.command()
@click.argument("mode", required=False, type=click.Choice([*MODES, "default"]))
@click.option(
    "--report", is_flag=True, help="Show requests that observe passed and enforce would refuse."
)
@click.option(
    "--since", metavar="TIME", default="7d", show_default=True, help="The period of --report."
)
@json_option
def mode(mode: str | None, report: bool, since: str, as_json: bool) -> None:
    """Show or set the mode of running servers, within a second or two and without a restart.

    \b
    enforce   refuse requests without a good key, or without the right scope
    observe   refuse nothing, but record what enforce would refuse: see --report
    off       check nothing; every answer has X-Hokusai-Auth-Mode: off
    default   use each server's HOKUSAI_AUTH_MODE

    Key management requires mlflow:admin in every mode. A server that was started with
    HOKUSAI_AUTH_FORCE_MODE keeps that mode.
    """
    if mode and report:
        raise Mistake("give a mode to set, or --report")
    after = time.time() - seconds(since, "--since")
    with opened() as store:
        from mlflow_hokusai_auth.store import dry_run

        if report:
            return _print_report(dry_run.report(store.database, after), as_json)
        if mode:
            number = MODES.index(mode) if mode in MODES else -1
            store.database.set_state("mode", number, "mode.changed", actor(), mode=mode)
        number = store.database.states().get("mode", -1)
        changes = store.database.audited(event="mode.changed", limit=1)
    name = MODES[number] if 0 <= number < len(MODES) else "default"
    change = changes[-1] if changes else None
    if as_json:
        last = change and {"since": change["at"], "by": change["actor"]}
        return print_json({"mode": name, **(last or {"since": None, "by": None})})
    click.echo(name if name != "default" else "default: HOKUSAI_AUTH_MODE of each server")
    if change:
        click.echo(f"since {moment(change['at'])}, by {change['actor']}")


def _print_report(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    if as_json:
        return print_json(rows)
    print_table(
        [
            {
                "requests": row["requests"],
                "reason": row["reason"],
                "route": row["rule"],
                "key_id": row["key_id"],
                "owner": row["owner"],
                "address": row["address"],
                "last": date(row["last_at"]),
            }
            for row in rows
        ]
    )

"""The audit log, the gate's routes and decisions, modes, and a demo. All need the server's extra."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from mlflow_hokusai_auth.core.errors import HokusaiAuthError, SettingsError
from mlflow_hokusai_auth.core.isolation import CODES as CODES_OF_ISOLATION
from mlflow_hokusai_auth.core.isolation import HIDDEN, advice
from mlflow_hokusai_auth.core.keys import redact
from mlflow_hokusai_auth.core.scopes import KNOWN
from mlflow_hokusai_auth.core.times import moment
from mlflow_hokusai_auth.core.types import ISOLATING, ISOLATION, MODES

from .output import (
    WORDS,
    F,
    Mistake,
    Word,
    WrongValue,
    cell,
    completes,
    date,
    json_option,
    print_fields,
    print_json,
    print_table,
    seconds,
)
from .store import actor, database, database_option, opened, require_server, server

if TYPE_CHECKING:
    from mlflow_hokusai_auth.server.live_settings import Mode
    from mlflow_hokusai_auth.server.settings import Settings
    from mlflow_hokusai_auth.store.keys import LocalStore

#: The maximum length of a value in the table of events, in characters.
_MAX_DETAIL = 60
#: The number of events without --limit and --since.
_EVENTS = 100
#: The advice on the value of MLFLOW_BACKEND_STORE_URI.
_AS_THE_SERVER = (
    "as the server has it (in the server's folder sqlite:///mlflow.db, if it was given no "
    "--backend-store-uri)"
)
#: Seconds that a server may take for its status.
_TIMEOUT = 30.0
#: Seconds between two looks for new events.
_FOLLOW = 1.0


@click.command()
@click.option("--since", metavar="TIME", help="Only events of the last 7d, 12h, 45m.")
@click.option("--event", help="Only events whose name begins so: key.revoked, or session.")
@click.option("--key", "key_id", metavar="ID", help="Only events by this key or about it.")
@click.option("--actor", help="Only events by this actor.")
@click.option(
    "--limit",
    type=click.IntRange(1, 1_000_000),
    metavar="N",
    help="The number of events; the last ones are shown. Without it, 100, or all since --since.",
)
@click.option("--follow", "-f", is_flag=True, help="Go on with new events until Ctrl-C.")
@json_option
def audit(
    since: str | None,
    limit: int | None,
    follow: bool,
    as_json: bool,
    **which: Any,
) -> None:
    """Show the audit log: the last events, oldest first."""
    for option, text in which.items():
        if text is not None and not text.isprintable():
            raise WrongValue(f"--{option.removesuffix('_id')} takes printable text")
    after = None if since is None else time.time() - seconds(since, "--since")
    if limit is None and since is None:
        limit = _EVENTS
    with opened() as store:
        audited = store.database.audited
        last = _last_event(store) if follow else 0
        # One more than asked for tells if there are more.
        events = audited(since=after, limit=limit and limit + 1, **which)
        if limit is not None and len(events) > limit:
            events = events[-limit:]
            click.echo("There are more events before these: see --limit and --since.", err=True)
        _print_events(events, as_json, with_head=True)
        while follow:
            # Events that came while the first ones were read are among them already.
            last = max(last, events[-1]["id"]) if events else last
            events = audited(after=last, **which)
            _print_events(events, as_json, with_head=False)
            if not events:
                time.sleep(_FOLLOW)


def _last_event(store: LocalStore) -> int:
    newest = store.database.audited(limit=1)
    return int(newest[0]["id"]) if newest else 0


def _print_events(events: Sequence[Mapping[str, Any]], as_json: bool, *, with_head: bool) -> None:
    if as_json:
        for entry in events:
            click.echo(json.dumps(entry))
        return
    rows = [
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
    if with_head:
        print_table(rows)
    for row in () if with_head else rows:
        click.echo("  ".join(cell(value) for value in row.values()))


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
@click.argument("method", required=False)
@click.argument("path", required=False)
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    shell_complete=completes(*sorted(KNOWN)),
    help="A scope of the key; may be repeated.",
)
@click.option("--as", "key_id", metavar="KEY_ID", help="A key of the key store.")
@click.option("--model", metavar="NAME", help="With --as: a registered model.")
@click.option("--run", metavar="ID", help="With --as: a run.")
@click.option("--experiment", metavar="ID", help="With --as: an experiment.")
@database_option("MLflow's database, for --as (default: MLFLOW_BACKEND_STORE_URI).")
@json_option
def explain(
    method: str | None,
    path: str | None,
    scopes: Sequence[str],
    key_id: str | None,
    uri: str | None,
    as_json: bool,
    **things: str | None,
) -> None:
    """Show the rule for a request, or the rule that shows something to a key or hides it.

    \b
    explain METHOD PATH               what a request requires, and if a key with --scope may send it
    explain --as KEY_ID --model NAME  if isolation shows the thing to the key, and why

    The exit status is 1 if the request is refused, or the thing is hidden. For GraphQL's one route it
    is 1 if queries or mutations are, and --json tells which.
    """
    require_server()
    named = [(kind, name) for kind, name in things.items() if name is not None]
    if key_id is not None and len(named) == 1 and method is None and not scopes:
        answer = _sight(*named[0], key_id, uri)
    elif key_id is not None or named or method is None or path is None:
        raise click.UsageError(
            "Give METHOD and PATH; or --as with one of --model, --run and --experiment.",
            click.get_current_context(),
        )
    else:
        answer = _request(method, path, scopes)
    if as_json:
        print_json(answer)
    else:
        print_fields(answer)
    if not answer["allowed"]:
        sys.exit(1)


def _request(method: str, path: str, scopes: Sequence[str]) -> dict[str, object]:
    if not path.startswith("/"):
        raise WrongValue("give the path alone, such as /api/2.0/mlflow/experiments/get")
    from mlflow_hokusai_auth.server import explain as explained
    from mlflow_hokusai_auth.server import settings

    try:
        return explained.explain(method, path, scopes, settings.load())
    except SettingsError as error:
        raise Mistake(str(error)) from None


def _sight(kind: str, name: str, key_id: str, uri: str | None) -> dict[str, object]:
    if uri is None:
        raise WrongValue(
            "--as needs MLflow's database: --backend-store-uri (MLFLOW_BACKEND_STORE_URI)"
        )
    from mlflow_hokusai_auth.server import explain as explained
    from mlflow_hokusai_auth.server import settings

    with opened() as store, database(uri) as engine:
        return explained.explain_sight(kind, name, key_id, store, engine, settings.load())


@click.command()
@click.option("--keep", is_flag=True, envvar="KEEP", help="Leave the server running at the end.")
def demo(keep: bool) -> None:
    """Start a server on which two suppliers register models, and see and change only what is theirs."""
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
    "level", required=False, type=Word(["debug", "info", "warning", "error", "default"])
)
@json_option
def log_level(level: str | None, as_json: bool) -> None:
    """Show or set the log level of running servers, within a second and without a restart."""
    with opened(make=level is not None) as store:
        if level:
            number = 0 if level == "default" else getattr(logging, level.upper())
            store.database.set_state("log_level", number, "log_level.changed", actor(), level=level)
        number = store.database.states().get("log_level", 0)
    name = logging.getLevelName(number).lower() if number else "default"
    if as_json:
        print_json({"log_level": name})
    elif not level:
        click.echo(name)


def _switch(names: Sequence[str], shown: str) -> Callable[[F], F]:
    """Add what `mode` and `isolation` take: one of `names`, or --report, which shows `shown`."""

    def add(command: F) -> F:
        for option in (
            json_option,
            click.option(
                "--since",
                metavar="TIME",
                default="7d",
                show_default=True,
                help="The period of --report.",
            ),
            click.option("--report", is_flag=True, help=f"Show {shown}."),
            click.argument("chosen", required=False, type=Word([*names, "default"])),
        ):
            command = option(command)
        return command

    return add


@click.command()
@_switch(MODES, "requests that observe passed and enforce would refuse")
def mode(chosen: str | None, report: bool, since: str, as_json: bool) -> None:
    """Show or set the mode of running servers, within a second or two and without a restart.

    \b
    enforce   refuse requests without a good key, or without the right scope
    observe   refuse nothing, but record what enforce would refuse: see --report
    off       check nothing; every answer has X-Hokusai-Auth-Mode: off
    default   use each server's HOKUSAI_AUTH_MODE

    Key management requires mlflow:admin in every mode. A server that was started with
    HOKUSAI_AUTH_FORCE_MODE keeps that mode.
    """
    _check_switch(chosen, report)
    with opened(make=chosen is not None) as store:
        if report:
            return _print_report(store, since, None, as_json)
        if chosen:
            store.database.choose("mode", MODES, chosen, actor())
        from mlflow_hokusai_auth.server import settings

        config = settings.load()
        now = _mode(store, config)
        if now.by == "force_mode" and not as_json:
            click.echo(
                f"{now.now}: HOKUSAI_AUTH_FORCE_MODE overrides what is set with this command:"
            )
        why = "by HOKUSAI_AUTH_MODE"
        if "mode" not in config.model_fields_set:
            why = "because HOKUSAI_AUTH_MODE is not set"
        default = f"{config.mode}, {why}"
        more = {"in_force": now.now, "because": now.by}
        _print_state(store, "mode", MODES, f"{default}; each server has its own", as_json, more)


def _mode(store: LocalStore, config: Settings) -> Mode:
    """Return the mode of a server with these settings."""
    from mlflow_hokusai_auth.server.live_settings import Mode

    mode = Mode(config.mode, config.force_mode)
    mode.follow(store.database.states())
    return mode


@click.command()
@click.option("--url", metavar="URL", help="Ask this server, with your key (mlflow:admin).")
@database_option(
    "MLflow's database, which may decide the isolation (default: MLFLOW_BACKEND_STORE_URI)."
)
@json_option
def status(url: str | None, uri: str | None, as_json: bool) -> None:
    """Show mode, isolation, keys, migrations and health.

    With --url, the command asks that server. Without it, the command reads the key store and the
    settings of its own environment: run it on the server's host, with the server's environment.

    The exit status is 1 if a check fails.
    """
    if url is not None:
        with server(url) as client:
            # MLflow would repeat a request to a server that is down for minutes.
            found = client.status(timeout=_TIMEOUT, max_retries=0)
    else:
        found = _status_here(uri)
    if as_json:
        print_json(found)
    else:
        _print_status(found, uri)
    if found["health"]["status"] != "ok":
        sys.exit(1)


def _status_here(uri: str | None) -> dict[str, Any]:
    with opened(migrate=False) as store:
        from mlflow_hokusai_auth.server import settings
        from mlflow_hokusai_auth.server.live_settings import Isolation, Mode
        from mlflow_hokusai_auth.server.web import health, status_api

        config = settings.load()
        mode = Mode(config.mode, config.force_mode)
        decided = _decided(uri)[0]
        isolation = Isolation(mode, config.isolation, decided or "off")
        checks = health.checks(store, lambda: "", isolation)
        # Only a server can check its other parts.
        checks = {name: checks[name] for name in ("key_store", "migrations")}
        with contextlib.suppress(HokusaiAuthError):
            states = store.database.states()
            mode.follow(states)
            isolation.follow(states)
        found = status_api.status_of(store, mode, isolation, health.Health(checks))
        if isolation.by == "decision" and decided is None:
            found["isolation"] = found["isolation_in_effect"] = "unknown"
        return found


#: The sources of the mode and of the isolation, in words.
_BY = {
    "force_mode": "HOKUSAI_AUTH_FORCE_MODE",
    "store": "set with `hokusai-auth {0}`",
    "setting": "HOKUSAI_AUTH_{1}",
    "decision": "decided for MLflow's database",
}


def _print_status(found: Mapping[str, Any], uri: str | None) -> None:
    """Print a status, as the REST API has it, on one screen. `uri` is that of MLflow's database."""
    keys, health = found["keys"], found["health"]
    total = 0 if keys is None else sum(keys.values())
    states = ", ".join(
        f"{number} {WORDS.get(state, state)}" for state, number in (keys or {}).items() if number
    )
    isolation = (
        f"{found['isolation']} ({_BY[found['isolation_by']].format('isolation', 'ISOLATION')})"
    )
    if found["isolation"] != found["isolation_in_effect"]:
        isolation += f"; off while the mode is {found['mode']}"
    if found["isolation"] == "unknown":
        isolation = "unknown: " + (
            f"set MLFLOW_BACKEND_STORE_URI {_AS_THE_SERVER}"
            if uri is None
            else "no decision can be read in the database of MLFLOW_BACKEND_STORE_URI"
        )
    print_fields(
        {
            "version": found["version"],
            "mode": f"{found['mode']} ({_BY[found['mode_by']].format('mode', 'MODE')})",
            "isolation": isolation,
            "keys": "unknown" if keys is None else f"{total}{': ' if states else ''}{states}",
            "ending in 14 days": found["keys_ending_soon"],
            "links": _links(found),
            "migrations": "current" if found["migrations_current"] else "not current",
            "health": health["status"],
            **{
                f"  {name}": f"{'ok' if part['ok'] else 'FAIL'}  {part['found']}"
                for name, part in health["checks"].items()
            },
        }
    )


def _links(found: Mapping[str, Any]) -> str:
    if found["links_waiting"] is None:
        return "unknown"
    text = f"{found['links_waiting']} waiting"
    if found["links_refused"]:
        text += f", {found['links_refused']} with refused attempts"
    if found["links_tried_again"]:
        text += (
            f" ({found['links_tried_again']} after it was opened: see `hokusai-auth links list`)"
        )
    return text


@click.command()
@_switch(ISOLATION, "what observe let pass, and writes would refuse or full hide")
@database_option(
    "MLflow's database, in which writes and full need tables (default: MLFLOW_BACKEND_STORE_URI)."
)
def isolation(chosen: str | None, report: bool, since: str, as_json: bool, uri: str | None) -> None:
    """Show or set the isolation of running servers, within a second or two and without a restart.

    \b
    off       every key with model:write changes everybody's models
    observe   refuse nothing, but record what writes would refuse and full hide: see --report
    writes    a key with model:* scopes changes what its owner made or may contribute to
    full      the same, and it sees only that and what was shared with it
    default   use each server's HOKUSAI_AUTH_ISOLATION, or else what was decided for the database

    It counts while the mode is enforce.
    """
    _check_switch(chosen, report)
    with opened(make=chosen is not None) as store:
        if report:
            return _print_report(store, since, CODES_OF_ISOLATION | {HIDDEN}, as_json)
        if chosen in ISOLATING:
            _require_kept(uri)
        decided, to_do = _decided(uri)
        if chosen:
            store.database.choose("isolation", ISOLATION, chosen, actor())
        default = "HOKUSAI_AUTH_ISOLATION of each server, or else as decided for MLflow's database"
        if decided:
            default += f": {decided}"
        states = store.database.states()
        number = states.get("mode", 0)
        now = MODES[number] if 0 <= number < len(MODES) else MODES[0]
        more = {"default": decided, "mode": now}
        _print_state(store, "isolation", ISOLATION, default, as_json, more)
        if to_do and states.get("isolation", -1) < 0 and not as_json:
            click.echo(to_do)
        if now != MODES[0] and not as_json:
            click.echo(f"Suppliers are not kept apart now, because the mode is {now}.")


def _require_kept(uri: str | None) -> None:
    """Raise Mistake if suppliers can't be kept apart in MLflow's database at `uri`."""
    if uri is None:
        raise Mistake(
            f"set MLFLOW_BACKEND_STORE_URI {_AS_THE_SERVER}: not every database can keep suppliers "
            "apart, so the command looks first"
        )
    from mlflow_hokusai_auth.server.isolation import preparation
    from mlflow_hokusai_auth.server.upstream.artifact_roots import REGISTRY, TRACKING

    with database(uri):
        registry = os.environ.get("MLFLOW_REGISTRY_STORE_URI", "")
        found = preparation.prepare({TRACKING: uri, REGISTRY: registry})
    if found.obstacle is not None:
        raise Mistake(f"suppliers can't be kept apart: {redact(found.obstacle)}")


def _decided(uri: str | None) -> tuple[str | None, str]:
    """Return the isolation that was decided for MLflow's database at `uri`, and advice on it.

    It is None if it is not known.
    """
    if uri is None:
        return None, ""
    from mlflow_hokusai_auth.store import ownership

    try:
        with database(uri) as engine:
            found = ownership.decided(engine)
            if found in (None, *ISOLATING):
                return found, ""
            with engine.connect() as connection:
                return found, advice(*ownership.unowned(connection))
    except (Mistake, HokusaiAuthError):
        return None, ""


def _check_switch(chosen: str | None, report: bool) -> None:
    if chosen and report:
        raise WrongValue("give one to set, or --report")


def _print_state(
    store: LocalStore,
    state: str,
    names: Sequence[str],
    default: str,
    as_json: bool,
    more: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Print a setting that the store keeps, and who changed it last; as JSON, with `more`."""
    number = store.database.states().get(state, -1)
    changes = store.database.audited(event=f"{state}.changed", limit=1)
    name = names[number] if 0 <= number < len(names) else "default"
    change = changes[-1] if changes else None
    if as_json:
        last = change and {"since": change["at"], "by": change["actor"]}
        return print_json({state: name, **(last or {"since": None, "by": None}), **more})
    click.echo(name if name != "default" else f"default: {default}")
    if change:
        click.echo(f"since {moment(change['at'])}, by {change['actor']}")


def _print_report(
    store: LocalStore, since: str, reasons: frozenset[str] | None, as_json: bool
) -> None:
    """Print what observe let pass, for these `reasons` or for all."""
    from mlflow_hokusai_auth.store import dry_run

    found = dry_run.report(store.database, time.time() - seconds(since, "--since"))
    rows = [row for row in found if reasons is None or row["reason"] in reasons]
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

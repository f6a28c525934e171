"""`hokusai-auth whoami`, `doctor` and `smoke`: diagnosis on a supplier's machine.

MLflow is imported only when one of them runs, so that other commands need not wait for it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from mlflow_hokusai_auth.core import times
from mlflow_hokusai_auth.core.counts import counted

from .output import json_option, print_json

if TYPE_CHECKING:
    from mlflow_hokusai_auth.client.diagnose.doctor import Check
    from mlflow_hokusai_auth.client.diagnose.smoke import Check as TimedCheck

#: The exit status of `doctor` if it only warns.
_WARNED = 3
#: Names, and grants, that `whoami` prints of what an owner has, at most.
_SHOWN = 3
_ADVICE = "\nRun `hokusai-auth doctor` to find out why."
_WORDS = {True: "ok", False: "FAIL", None: "skip"}


@click.command()
@click.option(
    "--profile", "chosen", metavar="NAME", help="Use this section of ~/.hokusai/profiles."
)
@click.option("--url", metavar="URL", help="Ask this server (default: MLFLOW_TRACKING_URI).")
@click.option(
    "--all",
    "ask",
    is_flag=True,
    help="Send the server the other keys of ~/.hokusai, too, and show whose they are.",
)
@json_option
def whoami(chosen: str | None, url: str | None, ask: bool, as_json: bool) -> None:
    """Show the server, your key, where the key came from, and what you own and share.

    The other keys of ~/.hokusai are listed, but may belong to other servers: only --all sends them to
    this one.

    The exit status is 1 if the key in use fails.
    """
    from mlflow_hokusai_auth.client.diagnose import doctor, identity

    report = identity.examine(chosen, url, ask=ask)
    if as_json:
        print_json(report)
    else:
        try:
            lines = _lines(report)
        except (TypeError, ValueError, KeyError, OverflowError, OSError):
            error = f"the answer has an unknown form. {doctor.NOT_OURS}"
            report.update(ok=False, error=error)
            lines = {"server": report["server"], "key from": str(report["key_from"])}
        for name, value in lines.items():
            click.echo(f"{name + ':':20}{doctor.one_line(value)}")
        if not report["ok"]:
            advice = "" if report["error"].endswith(doctor.NOT_OURS) else _ADVICE
            click.echo(f"hokusai-auth: {report['error']}{advice}", err=True)
        _print_profiles(report["profiles"])
    if not report["ok"]:
        sys.exit(1)


@click.command("doctor")
@click.option("--strict", is_flag=True, help="Fail for warnings, too.")
@json_option
def doctor(strict: bool, as_json: bool) -> None:
    """Check everything that a request with your key depends on, and name the fix of a failure.

    The exit status is 0 if all is well, 1 after a failure, and 3 if there are only warnings: the key
    works, but it ends soon, was replaced, or can't register models.
    """
    from mlflow_hokusai_auth.client.diagnose.doctor import examine

    checks = []
    for check in examine():
        checks.append(check)
        if not as_json:
            _print_check(check)
    warned = any(check.warns for check in checks)
    failed = any(check.ok is False for check in checks) or (strict and warned)
    if as_json:
        print_json({"ok": not failed, "checks": list(map(_as_json, checks))})
    if failed or warned:
        sys.exit(1 if failed else _WARNED)


@click.command("smoke")
@click.argument("url")
@json_option
def smoke(url: str, as_json: bool) -> None:
    """Register a tiny model at URL, load it again and delete it, in half a minute at most.

    Also checks that requests without a key are refused. It is safe in production, as it changes only
    what it makes. The key comes from the same source as for MLflow, such as HOKUSAI_API_KEY.
    """
    from mlflow_hokusai_auth.client.diagnose.smoke import smoke as run

    # SIGTERM, which `timeout` and CI send, works like Ctrl-C, so that smoke deletes what it made.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = run(url, (lambda check: None) if as_json else _print_check)
    finally:
        signal.signal(signal.SIGTERM, before)
    if as_json:
        checks = list(map(_as_json, report.checks))
        print_json(
            {"ok": report.ok, "url": report.url, "seconds": report.seconds, "checks": checks}
        )
    else:
        click.echo(f"{'all is well' if report.ok else 'FAILED'}, {report.seconds:.1f} s")
    if report.stuck:
        # At a normal exit, Python would wait for the threads of MLflow's downloads.
        os._exit(1)
    if not report.ok:
        sys.exit(1)


def _as_json(check: Check | TimedCheck) -> dict[str, Any]:
    return {**check._asdict(), "warns": check.warns}


def _print_check(check: Check | TimedCheck) -> None:
    took = getattr(check, "seconds", None)
    seconds = "" if took is None else f" ({took:.2f} s)"
    word = "WARN" if check.warns else _WORDS[check.ok]
    click.echo(f"{word:6}{check.check}: {check.found}{seconds}")
    if check.fix:
        click.echo(f"{'':6}fix: {check.fix}")


def _lines(report: dict[str, Any]) -> dict[str, str]:
    """Return the lines for `report`, of `identity.examine`. A missing field has no line."""
    lines = {
        "server": report["server"],
        "key from": report["key_from"] or "nowhere: none is configured",
    }
    for name in ("key_id", "owner", "name"):
        if name in report:
            lines[name] = str(report[name] or "-")
    if report.get("source"):
        lines["source"] = str(report["source"])
    for name, none in (
        ("scopes", "none"),
        ("can", "nothing"),
        ("networks", "everywhere"),
        ("models", "any"),
    ):
        if name in report:
            lines[name] = ", ".join(map(str, report[name] or ())) or none
    if "no_delete" in report:
        lines["no_delete"] = "yes" if report["no_delete"] else "no"
    if "expires_at" in report:
        lines["expires_at"] = _ends(report)
    if "deprecated_at" in report:
        replaced = report["deprecated_at"]
        lines["replaced"] = "no" if replaced is None else f"on {times.date(replaced)}"
    if "default_experiment" in report:
        lines["default_experiment"] = str(report["default_experiment"] or "-")
    if report.get("contact"):
        lines["contact"] = str(report["contact"])
    if "rate_limit" in report:
        limit = report["rate_limit"]
        lines["rate_limit"] = (
            f"{limit['remaining']} of {limit['limit']} requests left, more in {limit['reset']} s"
            if limit
            else "none"
        )
    if "owned" in report:
        lines["owns"] = "; ".join(
            counted(len(names), kind) + (f": {_some(names)}" if names else "")
            for kind, names in report["owned"].items()
        )
    if "grants" in report:
        given = [grant for grant in report["grants"] if grant["granted_by"] == report["owner"]]
        had = [grant for grant in report["grants"] if grant not in given]
        lines["shares"] = _some([_grant(grant, f"with {grant['grantee']}") for grant in given])
        lines["shared with it"] = _some(
            [_grant(grant, f"by {grant['granted_by'] or 'operators'}") for grant in had]
        )
    return lines


def _ends(report: Mapping[str, Any]) -> str:
    if report["expires_at"] is None:
        return "never"
    left = report["ends_in"]
    return f"{times.date(report['expires_at'])}, " + (
        f"in {times.span(left)}" if left > 0 else "in the past"
    )


def _some(texts: Sequence[str]) -> str:
    """Return the first of `texts`, and how many there are besides."""
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f", … and {more} more" if more > 0 else "") or "nothing"


def _grant(grant: Mapping[str, Any], who: str) -> str:
    ends = grant["expires_at"]
    until = "" if ends is None else f" until {times.date(ends)}"
    return f"{grant['pattern']} {who} ({grant['level']}{until})"


def _print_profiles(profiles: Sequence[Mapping[str, Any]]) -> None:
    """Print what is known of each key of ~/.hokusai."""
    from mlflow_hokusai_auth.client.diagnose import doctor

    if not profiles:
        return
    click.echo("\nKeys of ~/.hokusai:")
    names = [doctor.one_line(str(profile["name"])) for profile in profiles]
    width = max(map(len, names)) + 2
    for name, profile in zip(names, profiles, strict=True):
        if profile["in_use"]:
            about = "the key in use"
        elif profile["ok"] is None:
            about = "not checked"
        elif not profile["ok"]:
            about = f"FAIL: {profile['error']}"
        else:
            try:
                ends = _ends(profile)
            except (TypeError, ValueError, KeyError, OverflowError, OSError):
                ends = "unknown"
            about = f"{profile['key_id']} of {profile.get('owner')}, ends: {ends}"
        click.echo(f"  {name:{width}}{doctor.one_line(about)}")
    if any(profile["ok"] is None and not profile["in_use"] for profile in profiles):
        click.echo(
            "To check them, --all sends all of them to this server, and --profile NAME sends one."
        )

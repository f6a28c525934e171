"""`hokusai-auth whoami`, `doctor` and `smoke`: diagnosis on a supplier's machine.

MLflow is imported only when one of them runs, so that other commands need not wait for it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mlflow_hokusai_auth.client.diagnose.doctor import Check
    from mlflow_hokusai_auth.client.diagnose.smoke import Check as TimedCheck

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
#: The exit status of `doctor` if it only warns.
_WARNED = 3
_WORDS = {True: "ok", False: "FAIL", None: "skip"}


@click.command()
@_json_option
def whoami(as_json: bool) -> None:
    """Show your key's record on the server of MLFLOW_TRACKING_URI."""
    import mlflow
    from mlflow.exceptions import MlflowException

    from mlflow_hokusai_auth.client import profile
    from mlflow_hokusai_auth.client.admin import HokusaiAuthClient
    from mlflow_hokusai_auth.client.diagnose import doctor

    client = HokusaiAuthClient(str(mlflow.get_tracking_uri()))
    try:
        answer = client.whoami(timeout=doctor.TIMEOUT, max_retries=0)
    except MlflowException as error:
        message = doctor.one_line(str(error), profile.api_key() or "")
        click.echo(f"hokusai-auth: {message}\nRun `hokusai-auth doctor` to find out why.", err=True)
        sys.exit(1)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    try:
        lines = _lines(answer)
    except (TypeError, ValueError, KeyError, OverflowError):
        click.echo(f"hokusai-auth: the answer has an unknown form. {doctor.NOT_OURS}", err=True)
        sys.exit(1)
    for name, value in lines.items():
        click.echo(f"{name + ':':20}{doctor.one_line(value)}")


@click.command("doctor")
@click.option("--strict", is_flag=True, help="Fail for warnings, too.")
@_json_option
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
        click.echo(json.dumps({"ok": not failed, "checks": list(map(_as_json, checks))}, indent=2))
    if failed or warned:
        sys.exit(1 if failed else _WARNED)


@click.command("smoke")
@click.argument("url")
@_json_option
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
        result = {"url": report.url, "ok": report.ok, "seconds": report.seconds, "checks": checks}
        click.echo(json.dumps(result, indent=2))
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


def _lines(answer: dict[str, Any]) -> dict[str, str]:
    """Return the lines for `answer`, the body of `GET whoami`. A missing field has no line."""
    from mlflow_hokusai_auth.client.diagnose.doctor import date

    lines: dict[str, str] = {}
    for name in ("key_id", "owner", "name"):
        if name in answer:
            lines[name] = str(answer[name] or "-")
    for name, none in (
        ("scopes", "none"),
        ("can", "nothing"),
        ("networks", "everywhere"),
        ("models", "any"),
    ):
        if name in answer:
            lines[name] = ", ".join(map(str, answer[name] or ())) or none
    if "no_delete" in answer:
        lines["no_delete"] = "yes" if answer["no_delete"] else "no"
    for name, none in (("expires_at", "never"), ("deprecated_at", "-")):
        if name in answer:
            lines[name] = none if answer[name] is None else date(answer[name])
    if "default_experiment" in answer:
        lines["default_experiment"] = str(answer["default_experiment"] or "-")
    if "rate_limit" in answer:
        limit = answer["rate_limit"]
        lines["rate_limit"] = (
            f"{limit['remaining']} of {limit['limit']} requests left, more in {limit['reset']} s"
            if limit
            else "none"
        )
    return lines

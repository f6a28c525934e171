"""`hokusai-auth whoami` and `doctor`: what a supplier needs when something does not work.

MLflow is imported only when one of them runs, as the other commands need not wait for that.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import click

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_WORDS = {True: "ok", False: "FAIL", None: "skip"}


@click.command()
@_json_option
def whoami(as_json: bool) -> None:
    """What the server of MLFLOW_TRACKING_URI knows of your key."""
    import mlflow
    from mlflow.exceptions import MlflowException

    from . import doctor, profile
    from .admin import HokusaiAuthClient

    client = HokusaiAuthClient(str(mlflow.get_tracking_uri()))
    try:
        answer = client.whoami(timeout=doctor.TIMEOUT, max_retries=0)
    except MlflowException as error:
        message = doctor.one_line(str(error), profile.api_key() or "")
        click.echo(f"hokusai-auth: {message}", err=True)
        sys.exit(1)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    for name, value in _lines(answer).items():
        click.echo(f"{name + ':':15}{doctor.one_line(value)}")


@click.command("doctor")
@_json_option
def doctor(as_json: bool) -> None:
    """Check everything that a request with your key depends on; says what to do where it fails."""
    from .doctor import examine

    checks = []
    for check in examine():
        checks.append(check)
        if as_json:
            continue
        click.echo(f"{_WORDS[check.ok]:6}{check.check}: {check.found}")
        if check.fix:
            click.echo(f"{'':6}fix: {check.fix}")
    if as_json:
        click.echo(json.dumps([check._asdict() for check in checks], indent=2))
    if any(check.ok is False for check in checks):
        sys.exit(1)


def _lines(answer: dict[str, Any]) -> dict[str, str]:
    """`answer`, of `GET whoami`, as people read it. A field that is missing has no line."""
    from .doctor import date

    lines: dict[str, str] = {}
    for name in ("key_id", "owner", "name"):
        if name in answer:
            lines[name] = str(answer[name] or "-")
    for name, none in (("scopes", "none"), ("can", "nothing"), ("networks", "everywhere")):
        if name in answer:
            lines[name] = ", ".join(map(str, answer[name] or ())) or none
    for name, none in (("expires_at", "never"), ("deprecated_at", "-")):
        if name in answer:
            lines[name] = none if answer[name] is None else date(answer[name])
    if "rate_limit" in answer:
        limit = answer["rate_limit"]
        lines["rate_limit"] = (
            f"{limit['remaining']} of {limit['limit']} requests left, more in {limit['reset']} s"
            if limit
            else "none"
        )
    return lines

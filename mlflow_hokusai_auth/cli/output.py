"""Printing, and parsing of times, for all commands."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, TypeVar

import click

from mlflow_hokusai_auth.core import times

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Mistake(click.ClickException):
    """An error that the user can correct: one line on standard error, and exit status 1."""

    def __init__(self, message: str) -> None:
        # A database driver's message may have several lines.
        super().__init__(printable(" ".join(message.split())))

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"hokusai-auth: {self.message}", file=file or sys.stderr)


class WrongValue(Mistake):
    """A value that can't be used: one line on standard error, and exit status 2."""

    exit_code = 2


def json_option(command: F) -> F:
    """Add the option --json, as the argument `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def seconds(text: str, option: str) -> float:
    """Parse `text`, such as 30d, into seconds. Raises WrongValue, which names `option`."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if not match:
        raise WrongValue(f"{option} takes a number and s, m, h or d, such as 30d")
    return float(int(match[1]) * _UNITS[match[2]])


def printable(value: object) -> str:
    """Return `value` as text without line breaks and terminal control characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def cell(value: object) -> str:
    """Return `value` as text for a table."""
    if isinstance(value, (list, tuple)):
        value = ",".join(str(item) for item in value)
    if isinstance(value, bool):
        value = "yes" if value else "no"
    return "-" if value is None or value == "" else printable(value)


def date(at: float | None) -> str | None:
    """Return `at`, in seconds since the epoch, as text in UTC, to the minute."""
    return None if at is None else times.date(at)


def print_json(value: object) -> None:
    """Print `value` as indented JSON."""
    click.echo(json.dumps(value, indent=2))


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print `rows`, which all have the same names, below a line with those names."""
    if not rows:
        click.echo("none")
        return
    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def print_fields(fields: Mapping[str, object]) -> None:
    """Print `fields`, one per line. Further lines of a text are indented, unlike a field."""
    width = max(map(len, fields)) + 2
    for name, value in fields.items():
        first, *more = value.expandtabs().split("\n") if isinstance(value, str) else [value]
        click.echo(f"{name + ':':{width}}{cell(first)}")
        for line in more:
            click.echo(f"{'':{width}}{printable(line)}".rstrip())

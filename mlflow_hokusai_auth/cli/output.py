"""Printing, and reading of options, for all commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import IO, Any, TypeVar

import click

from mlflow_hokusai_auth.core import times
from mlflow_hokusai_auth.core.suggest import did_you_mean

F = TypeVar("F", bound=Callable[..., Any])

#: The words of people for names of the REST API.
WORDS = {"deprecated": "replaced", "deprecated_at": "replaced_at"}
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


class Word(click.Choice):  # type: ignore[type-arg,unused-ignore]
    """One of a few words. The error for a misspelt one names the word that is like it."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return `value` if it is one of the words. Raises BadParameter."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            hint = did_you_mean(str(value), map(str, self.choices))
            raise click.BadParameter(f"{error.message}{hint}", ctx, param) from None


def one_of(text: str, option: str, known: Collection[str]) -> str:
    """Return `text` if it is `known`. Raises WrongValue, which names `option` and what is like it."""
    if text not in known:
        raise WrongValue(f"{option} takes one of {', '.join(known)}.{did_you_mean(text, known)}")
    return text


def completes(*known: str) -> Callable[..., list[str]]:
    """Return the `shell_complete` of an option or argument that takes one of `known`."""
    return lambda context, parameter, incomplete: [
        word for word in known if word.startswith(incomplete)
    ]


def body_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given as the body of a REST request."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in given.items()
        if value is not None and value != ()
    }


def undo(body: dict[str, Any], *options: tuple[str, str, str, bool, object]) -> None:
    """Set the fields of `body` that flags undo. Raises UsageError for a field that is given as well.

    Each of `options` is an option, the flag that undoes it, the field, True if the flag is given, and
    the value that it gives the field.
    """
    for option, flag, field, is_given, value in options:
        if is_given and field in body:
            raise click.UsageError(f"Give {option} or {flag}, not both.")
        if is_given:
            body[field] = value


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


def width(text: str) -> int:
    """Return the number of columns that `text` takes on a terminal."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def cut(text: str, columns: int) -> str:
    """Return `text`, or as much of its beginning as fits into `columns`, and `…`."""
    if width(text) <= columns:
        return text
    while width(text) > columns - 1:
        text = text[:-1]
    return text + "…"


def is_terminal() -> bool:
    """Return True if standard output is a terminal."""
    return sys.stdout.isatty()


def print_table(
    rows: Sequence[Mapping[str, object]],
    narrowest: Mapping[str, int] = MappingProxyType({}),
    colours: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> None:
    """Print `rows`, which all have the same names, below a line with those names.

    On a terminal, the columns in `narrowest` are cut so that a line fits, to this width at most. Words
    of a column are coloured there as `colours` says, unless NO_COLOR is set.
    """
    if not rows:
        click.echo("none")
        return
    names = list(rows[0])
    lines = [names, *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(width, column)) for column in zip(*lines, strict=True)]
    if is_terminal():
        _fit(widths, [narrowest.get(name) for name in names], shutil.get_terminal_size().columns)
        if os.environ.get("NO_COLOR"):
            colours = {}
    else:
        colours = {}
    for line in lines:
        shown = []
        for name, text, columns in zip(names, line, widths, strict=True):
            text = cut(text, columns)
            colour = colours.get(name, {}).get(text)
            padding = " " * (columns - width(text))
            shown.append((click.style(text, fg=colour) if colour else text) + padding)
        click.echo("  ".join(shown).rstrip())


def _fit(widths: list[int], narrowest: Sequence[int | None], columns: int) -> None:
    """Narrow the widest of the `widths` that may be until a line has at most `columns`, if it can."""
    while sum(widths) + 2 * (len(widths) - 1) > columns:
        free = [
            number
            for number, least in enumerate(narrowest)
            if least is not None and widths[number] > least
        ]
        if not free:
            return
        widths[max(free, key=lambda number: widths[number])] -= 1


def print_fields(fields: Mapping[str, object]) -> None:
    """Print `fields`, one per line. Further lines of a text are indented, unlike a field."""
    indent = max(map(len, fields)) + 2
    for name, value in fields.items():
        first, *more = value.expandtabs().split("\n") if isinstance(value, str) else [value]
        click.echo(f"{name + ':':{indent}}{cell(first)}")
        for line in more:
            click.echo(f"{'':{indent}}{printable(line)}".rstrip())

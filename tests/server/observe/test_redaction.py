"""A process logs no key, and everything else unchanged."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.server.observe.redaction import cut_keys, show_own
from tests.server.forked import forked

KEY = keys.generate()
ENCODED = "".join(f"%{ord(character):02x}" for character in KEY)
#: What may be encoded of a key's beginning, and how.
ENCODINGS = (("h", "%68"), ("k", "%6b"), ("k", "%6B"), ("_", "%5f"), ("_", "%5F"))


class Atoms(dict[str, Any]):
    """A mapping like gunicorn's, which answers for missing names."""

    def __missing__(self, name: str) -> str:
        return "-"


class Broken:
    """An object that can't be converted to text."""

    def __str__(self) -> str:
        raise RuntimeError


@pytest.fixture(autouse=True)
def _cut() -> Iterator[None]:
    before = logging.getLogRecordFactory()
    cut_keys()
    yield
    logging.setLogRecordFactory(before)


def record(message: object, *args: Any, exc_info: Any = None) -> logging.LogRecord:
    return logging.getLogger("test").makeRecord(
        "test", logging.INFO, __file__, 1, message, args, exc_info
    )


def test_keys_are_removed() -> None:
    wrong = []
    for message, *args in (
        (f"key {KEY}",),
        (f"key {ENCODED}",),
        (ValueError(f"key {KEY}"),),
        ("%s %s", "key", KEY),
        ("%s %s", "key", ENCODED),
        *(("%s", KEY.replace(one, code, 1)) for one, code in ENCODINGS),
        ("%s", ValueError(KEY)),
        ("%(key)s %(other)s", Atoms(key=f"key {KEY}")),
    ):
        said = record(message, *args).getMessage()
        if KEY[8:] in said or ENCODED in said or "hk_" not in said or "***" not in said:
            wrong.append(f"{message} {args}: {said}")
    assert not wrong, "\n".join(wrong)


def test_record_without_a_key_is_unchanged() -> None:
    error, atoms = ValueError("100 %"), Atoms(given="x")
    made = record("%d %5.1f %s %s %s", 3, 2.5, None, error, quote("ä/"))
    assert made.args is not None and made.args[3] is error  # type: ignore[index]
    assert made.getMessage() == "3   2.5 None 100 % %C3%A4/"
    assert record("%(given)s %(lacks)s", atoms).getMessage() == "x -"
    assert record("%(given)s", atoms).args is atoms
    assert record("%r", Broken()).args[0].__class__ is Broken  # type: ignore[index]


def test_keys_are_removed_from_tracebacks_and_other_tracebacks_stay_whole() -> None:
    try:
        raise ValueError(f"key {KEY}")
    except ValueError:
        with_key = record("failed", exc_info=sys.exc_info())
    try:
        raise ValueError("no key")
    except ValueError:
        without = record("failed", exc_info=sys.exc_info())
    written = logging.Formatter().format(with_key)
    assert (
        KEY[8:] not in written and "Traceback" in written and "ValueError: key hk_live_" in written
    )
    # Some handlers read the exception itself.
    assert isinstance(without.exc_info, tuple) and without.exc_info[0] is ValueError
    assert record("failed", exc_info=(None, None, None)).getMessage() == "failed"


OPERATORS = "logging.basicConfig(stream=sys.stdout, format='OPS %(message)s', level=logging.INFO)"


def test_our_logs_are_shown_unless_the_operator_configures_them() -> None:
    def show(before: str) -> list[str]:
        """Return the output of a fork, as a process has only one configuration of logging."""
        out, error = io.StringIO(), io.StringIO()
        ours, other = (
            logging.getLogger(f"mlflow_hokusai_auth.{one}") for one in ("audit", "other")
        )
        for log in (logging.getLogger(), logging.getLogger("mlflow_hokusai_auth"), ours, other):
            log.handlers.clear()
            log.setLevel(logging.NOTSET)
        logging.getLogger().setLevel(logging.WARNING)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            if before == "configured":
                form = "OPS %(message)s"
                logging.basicConfig(stream=out, format=form, level=logging.INFO)
            elif before == "errors only":
                ours.setLevel(logging.ERROR)
            show_own()
            ours.info("audited")
            other.warning("warned")
        return [out.getvalue(), error.getvalue()]

    warned = "WARNING mlflow_hokusai_auth.other: warned\n"
    assert forked(lambda: show("")) == ["", f"audited\n{warned}"]
    assert forked(lambda: show("errors only")) == ["", warned]
    assert forked(lambda: show("configured")) == ["OPS audited\nOPS warned\n", ""]

"""Removes keys from everything that this process logs, and shows our own logs."""

from __future__ import annotations

import copy
import logging
import traceback
from typing import Any

from mlflow_hokusai_auth.core.keys import redact


def cut_keys() -> None:
    """Remove keys from all log records of this process, MLflow's and the web server's as well.

    It wraps the record factory, since a filter sees only the records of its own handler or logger.
    """
    make = logging.getLogRecordFactory()

    def made(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.msg = _clean(record.msg)
        if isinstance(record.args, tuple):
            record.args = tuple([_clean(item) for item in record.args])
        elif isinstance(record.args, dict):
            cleaned = {name: _clean(item) for name, item in record.args.items()}
            if cleaned != record.args:
                # The copy keeps the class: gunicorn's mapping of atoms answers for missing names, too.
                record.args = copy.copy(record.args)
                record.args.update(cleaned)
        if record.exc_info:
            text = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
            if (redacted := redact(text)) != text:
                record.exc_info, record.exc_text = None, redacted
        return record

    logging.setLogRecordFactory(made)


def _clean(item: Any) -> Any:
    """Return `item` if its text contains no key, otherwise the redacted text."""
    if type(item) is int:
        return item
    try:
        text = item if type(item) is str else str(item)
    except Exception:
        return item
    # A quick test comes first. A percent-encoded `hk_` contains %68, %6b or %5f.
    if not any(part in text for part in ("hk_", "%6", "%5", "eyJ")):
        return item
    redacted = redact(text)
    return item if redacted == text else redacted


def show_own() -> None:
    """Write our own logs to standard error, unless the operator has configured handlers for them."""
    for name in ("audit", "decisions", "headers"):
        log = logging.getLogger(f"mlflow_hokusai_auth.{name}")
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)
        _write(log, "%(message)s")
    # Without a handler, Python drops every record below WARNING, whatever the logger's level.
    _write(logging.getLogger("mlflow_hokusai_auth"), "%(levelname)s %(name)s: %(message)s")


def _write(log: logging.Logger, form: str) -> None:
    if log.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(form))
    log.addHandler(handler)
    log.propagate = False

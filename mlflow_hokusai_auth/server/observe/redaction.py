"""Keys are cut out of all that this process logs; and our own logs are shown."""

from __future__ import annotations

import copy
import logging
import traceback
from typing import Any

from mlflow_hokusai_auth.core.keys import redact


def cut_keys() -> None:
    """Cut keys out of all that this process logs: of MLflow's own and the web server's lines as well.

    Where records are made, since a handler's or a logger's filter sees those of its own only.
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
                # A copy of its class: gunicorn's mapping of atoms answers for names that it lacks.
                record.args = copy.copy(record.args)
                record.args.update(cleaned)
        if record.exc_info:
            text = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
            if (redacted := redact(text)) != text:
                record.exc_info, record.exc_text = None, redacted
        return record

    logging.setLogRecordFactory(made)


def _clean(item: Any) -> Any:
    """`item` if it has no key in it, else its text without."""
    if type(item) is int:
        return item
    try:
        text = item if type(item) is str else str(item)
    except Exception:
        return item
    # Looked at first, as that is quick: what is encoded of `hk_` is one of %68, %6b and %5f.
    if "hk_" not in text and "%6" not in text and "%5" not in text:
        return item
    redacted = redact(text)
    return item if redacted == text else redacted


def show_own() -> None:
    """Write our own logs to standard error, unless the operator's configuration has them."""
    for name in ("audit", "decisions", "headers"):
        log = logging.getLogger(f"mlflow_hokusai_auth.{name}")
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)
        _write(log, "%(message)s")
    # Without a handler of its own, Python would drop what is below a warning, whatever the level.
    _write(logging.getLogger("mlflow_hokusai_auth"), "%(levelname)s %(name)s: %(message)s")


def _write(log: logging.Logger, form: str) -> None:
    if log.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(form))
    log.addHandler(handler)
    log.propagate = False

"""Finds what somebody meant who misspelt one of a few known words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """Return " Did you mean `…`?" with the word of `known` that is most like `text`, or "".

    `text` itself is not quoted: it may be a secret in the wrong place.
    """
    close = difflib.get_close_matches(text[:64].lower(), sorted(known), n=1, cutoff=0.7)
    return f" Did you mean `{close[0]}`?" if close else ""

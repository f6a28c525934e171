"""The contact for questions about keys: the operator's text, mail address or https URL."""

from __future__ import annotations

import re

#: Characters of a contact, at most. Each refusal repeats it.
MAX_LENGTH = 200

_URL = re.compile(r"https://[\w.\[\]:-]+(?:[/?#][!-~]*)?", re.ASCII)
_MAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", re.ASCII)


def problem(contact: str) -> str | None:
    """Return why `contact` can't be one, for the operator, or None if it can."""
    if not contact.isprintable():
        return "must be printable text in one line"
    if len(contact) > MAX_LENGTH:
        return f"must have at most {MAX_LENGTH} characters"
    if "://" in contact.partition(" ")[0] and not _URL.fullmatch(contact):
        return "must be a text, a mail address or an https URL"
    return None


def link(contact: str) -> str:
    """Return where a link about `contact` leads, or "" if it is neither a mail address nor a URL."""
    if _MAIL.fullmatch(contact):
        return f"mailto:{contact}"
    return contact if _URL.fullmatch(contact) else ""

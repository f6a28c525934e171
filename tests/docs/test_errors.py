"""A code in an error message is a heading of the page that says what to do about it."""

from __future__ import annotations

import re

from mlflow_hokusai_auth.core.denials import CODES
from tests.docs.pages import DOCS

_PAGE = (DOCS / "supplier" / "errors.md").read_text()
_CODES, _, _REST = _PAGE.partition("\n## Messages without a code\n")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def test_every_code_has_its_heading_and_status_and_no_other_has_one() -> None:
    assert sorted(_HEADING.findall(_CODES)[1:]) == sorted(CODES)
    told = re.findall(r"^## (.+)\n\nStatus (\d+)\. ", _CODES, re.MULTILINE)
    assert dict(told) == {name: str(code.status) for name, code in CODES.items()}


def test_no_code_stands_among_the_messages_that_have_none() -> None:
    assert _REST and not set(_HEADING.findall(_REST)) & set(CODES)

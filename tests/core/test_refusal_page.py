"""Refusals as a person with a browser reads them."""

from __future__ import annotations

import ast
import json
import re
from html import unescape
from pathlib import Path

import mlflow_hokusai_auth
from mlflow_hokusai_auth.core.browser import PAGE_HEADERS
from mlflow_hokusai_auth.core.denials import CODES, render
from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.core.refusal_page import Places, heading, render_page
from mlflow_hokusai_auth.core.types import Deny

from .rows import agree, each

PLACES = Places("../hokusai/", "../hokusai/login?next=/a", "../a?b=c&d")
SIGN_IN, OTHER_KEY = "Sign in -> login?next=/a", "Sign in with another key -> login?next=/a"
OWN_KEY, OPEN, AGAIN = "See your key -> keys", "Open MLflow -> ../", "Try again -> ../a?b=c&d"
#: Code -> the heading of its page, and the links, below /hokusai/ as far as they lead there.
PAGES = {
    "KEY_MALFORMED": ("This key can’t be right", [SIGN_IN]),
    "KEY_UNKNOWN": ("This server doesn’t know the key", [SIGN_IN]),
    "KEY_EXPIRED": ("The key has expired", [SIGN_IN]),
    "KEY_REVOKED": ("The key was revoked", [SIGN_IN]),
    "KEY_CONFLICT": ("More than one key", [AGAIN]),
    "SCOPE_MISSING": ("Not open to your key", [OTHER_KEY, OWN_KEY]),
    "ISOLATED": ("Not open to suppliers", [OTHER_KEY, OWN_KEY]),
    "ADDRESS_REFUSED": ("Not open from your address", [OTHER_KEY]),
    "CROSS_SITE": ("Another site sent this request", [OPEN]),
    "INTERCEPTED": ("Refused by a rule of this server", [OTHER_KEY]),
    "INTERCEPTOR_FAILED": ("A rule of this server failed", [AGAIN]),
    "HEADER_MALFORMED": ("This request can’t be read", [AGAIN]),
    "HEADERS_TOO_LARGE": ("This request is too large", [AGAIN]),
    "BODY_TOO_LARGE": ("This request is too large", [AGAIN]),
    "BODY_TIMEOUT": ("This request did not arrive whole", [AGAIN]),
    "AUTHORITY_UNAVAILABLE": ("Not available at the moment", [AGAIN]),
    "RATE_LIMITED": ("Too many requests", [AGAIN]),
    "MISCONFIGURED": ("This server is set up wrongly", [AGAIN]),
}
#: Codes of the gate that no browser shows: the sign-in page comes instead, or only programs send this.
NO_PAGE = {"KEY_MISSING", "SESSION_ENDED", "NOT_CONFIGURED"}


def page(deny: Deny, contact: str = "") -> str:
    return render_page(deny, contact, PLACES).body.decode()


def text(html: str) -> str:
    return " ".join(unescape(re.sub("<[^>]*>", " ", html)).split())


def links(html: str) -> list[str]:
    found = re.findall(r'<a class="button[^"]*" href="([^"]*)">([^<]*)</a>', html)
    return [f"{name} -> {unescape(to).removeprefix(PLACES.root)}" for to, name in found]


def test_each_refusal_of_the_gate_has_a_true_heading_and_a_way_on() -> None:
    package = Path(mlflow_hokusai_auth.__file__).parent
    files = [package / "core/policy.py", package / "core/credentials.py"]
    files += (package / "server/gate").glob("*.py")
    refused = {
        node.args[0].value
        for file in files
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Deny"
        if isinstance(node.args[0], ast.Constant)
    }
    assert refused - NO_PAGE == set(PAGES)
    each(check_page, PAGES.items())
    agree(heading, [("NOT_CONFIGURED", CODES["NOT_CONFIGURED"].detail)])


def check_page(code: str, expected: tuple[str, list[str]]) -> None:
    html = page(Deny(code, "Do this & <that>."))
    title, ways = expected
    assert (heading(code), links(html)) == (title, ways)
    assert f"<h1>{title}</h1>" in html and f"<title>{title} · MLflow</title>" in html
    assert "<p>Do this &amp; &lt;that&gt;.</p>" in html and f"{CODES[code].status} {code}" in html
    assert html.count('class="button primary"') == 1


def test_path_of_ours_that_is_no_page_is_not_explained_as_for_programs() -> None:
    for path, code, missing in (
        ("/hokusai/missing/", "SCOPE_MISSING", True),
        ("/hokusai/nothing", "ISOLATED", True),
        ("/hokusai/nothing", "INTERCEPTED", False),
        ("/hokusai/keys/new", "SCOPE_MISSING", False),
        ("/nothing", "SCOPE_MISSING", False),
    ):
        deny = Deny(code, "Is the path right?", operation=classify("GET", path))
        html = page(deny)
        assert ("<h1>There is no such page</h1>" in html) == missing, path
        assert ("Is the path right?" not in html) == missing, path
        assert (links(html) == [OWN_KEY, OPEN]) == missing, path
        assert render_page(deny, "", PLACES).status == 403


def test_page_keeps_status_and_headers() -> None:
    more = (("RateLimit-Remaining", "0"), ("RateLimit-Reset", "9"))
    for code in CODES:
        deny = Deny(code, "", retry_after=2.5, headers=more)
        plain, shown = render(deny), render_page(deny, "", PLACES)
        headers = dict(shown.headers)
        assert shown.status == plain.status, code
        assert headers.items() >= PAGE_HEADERS.items()
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        assert headers["Content-Length"] == str(len(shown.body))
        kept = [item for item in plain.headers if not item[0].startswith("Content-")]
        assert set(kept) <= set(shown.headers) and len(headers) == len(shown.headers)


def test_refusal_says_in_words_when_to_try_again() -> None:
    for seconds, said in (
        (0.2, "1 second"),
        (41.3, "42 seconds"),
        (119, "119 seconds"),
        (119.5, "about 2 minutes"),
        (3500, "about 58 minutes"),
        (-5, "1 second"),
    ):
        deny = Deny("RATE_LIMITED", "Too much.", retry_after=seconds)
        assert f"Too much. Try again in {said}." in json.loads(render(deny).body)["message"]
        shown = text(page(deny))
        assert f"Too much. Try again in {said}. Try again 429" in shown, shown
    # Nobody knows when an operator mends this.
    assert " in " not in text(page(Deny("MISCONFIGURED", "Tell the operator.")))


def test_page_says_whom_to_ask_if_somebody_can_help() -> None:
    for contact, said in (
        ("ops@example.com", 'Contact: <a href="mailto:ops@example.com">ops@example.com</a>'),
        ("https://example.com/?a&b", '<a href="https://example.com/?a&amp;b">https://'),
        ("<b>", "Contact: &lt;b&gt;</p>"),
    ):
        assert said in page(Deny("AUTHORITY_UNAVAILABLE", ""), contact)
    for deny, contact in (Deny("SCOPE_MISSING", ""), ""), (Deny("CROSS_SITE", ""), "ops"):
        assert "Contact" not in page(deny, contact)

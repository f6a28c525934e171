"""Refusals as they go over the wire."""

from __future__ import annotations

import json

from mlflow_hokusai_auth.core.denials import CODES, REALM, full_message, redirect, render
from mlflow_hokusai_auth.core.types import Deny

from .rows import each

_KEY = [f"KEY_{what}" for what in ("MISSING", "MALFORMED", "UNKNOWN", "EXPIRED", "REVOKED")]
STATUS = {
    400: [
        *("KEY_CONFLICT", "HEADER_MALFORMED", "EXCHANGE_MALFORMED", "GRANT_UNSUPPORTED"),
        *("TOKEN_INVALID", "TOKEN_UNTRUSTED", "TOKEN_AUDIENCE", "TOKEN_EXPIRED"),
        *("TOKEN_NOT_YET_VALID", "TOKEN_KEY_UNKNOWN", "TOKEN_USED"),
        *("PULL_REQUEST_REFUSED", "REPOSITORY_CHANGED"),
    ],
    401: [*_KEY, "SESSION_ENDED"],
    403: [
        *("SCOPE_MISSING", "ADDRESS_REFUSED", "CROSS_SITE", "INTERCEPTED"),
        *("LOCATION_REFUSED", "SOURCE_REFUSED", "TAG_RESERVED"),
        *("NOT_OWNER", "NAME_TAKEN", "NAME_RESERVED", "NAME_REFUSED"),
        *("DELETE_REFUSED", "EXPERIMENT_REFUSED", "ALIAS_PROTECTED", "ARTIFACT_FROZEN", "ISOLATED"),
    ],
    404: ["NOT_CONFIGURED"],
    408: ["BODY_TIMEOUT"],
    413: ["BODY_TOO_LARGE"],
    431: ["HEADERS_TOO_LARGE"],
    429: ["RATE_LIMITED"],
    503: ["INTERCEPTOR_FAILED", "AUTHORITY_UNAVAILABLE", "MISCONFIGURED", "ISSUER_UNAVAILABLE"],
}


def test_a_refusal() -> None:
    expected = {code: status for status, codes in STATUS.items() for code in codes}
    assert set(expected) == set(CODES)
    each(check, expected.items())


def check(code: str, status: int) -> None:
    refusal = render(Deny(code, "Do this."))
    headers = dict(refusal.headers)
    content = json.loads(refusal.body)
    assert refusal.status == status
    assert content["error"] == code
    assert content["detail"] == CODES[code].detail
    assert content["error_code"] == CODES[code].error_code
    assert content["message"].endswith(f"({status} {code}). Do this.")
    assert headers["Content-Type"] == "application/json"
    assert headers["Content-Length"] == str(len(refusal.body))
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert ("WWW-Authenticate" in headers) == (status == 401 or code == "SCOPE_MISSING")
    # A challenge for Basic would make browsers open a dialog.
    assert not any(text.startswith("Basic") for _, text in refusal.headers)
    assert ("Retry-After" in headers) == (status in (429, 503))
    assert all(text.isascii() for pair in refusal.headers for text in pair)


def challenges(deny: Deny) -> list[str]:
    return [value for name, value in render(deny).headers if name == "WWW-Authenticate"]


def test_challenges() -> None:
    realm = f'realm="{REALM}"'
    assert challenges(Deny("KEY_MISSING", "")) == [f"Bearer {realm}"]
    assert challenges(Deny("KEY_UNKNOWN", "")) == [f'Bearer {realm}, error="invalid_token"']
    assert challenges(Deny("SCOPE_MISSING", "", "mlflow:write", ())) == [
        f'Bearer {realm}, error="insufficient_scope", scope="mlflow:write"'
    ]
    # The assistant's refusal is an example: no scope opens it.
    assert challenges(Deny("SCOPE_MISSING", "")) == [f'Bearer {realm}, error="insufficient_scope"']


def test_every_bad_key_looks_the_same_but_for_its_code() -> None:
    bad = [render(Deny(code, "")) for code in CODES if CODES[code].detail.startswith("Invalid")]
    assert len(bad) == 4
    assert len({json.loads(refusal.body)["detail"] for refusal in bad}) == 1
    assert len({dict(refusal.headers)["WWW-Authenticate"] for refusal in bad}) == 1


def test_contact_ends_refusals_that_people_can_help_with() -> None:
    without = set()
    for code in CODES:
        content = json.loads(render(Deny(code, "Do this."), "ask@example.com").body)
        assert content["message"].startswith(full_message(code, "Do this."))
        if content["message"] == full_message(code, "Do this."):
            without.add(code)
        else:
            assert content["message"].endswith("Do this. Contact: ask@example.com"), code
    helped = {*STATUS[401], *STATUS[403]} - {"SESSION_ENDED", "CROSS_SITE", "INTERCEPTED"}
    assert without == set(CODES) - helped


def test_refusal_for_a_missing_scope_names_the_scopes() -> None:
    content = json.loads(render(Deny("SCOPE_MISSING", "", "mlflow:admin", ("read",))).body)
    assert (content["required_scope"], content["current_scopes"]) == ("mlflow:admin", ["read"])
    assert not {"required_scope", "current_scopes"} & set(
        json.loads(render(Deny("KEY_MISSING", "")).body)
    )


def test_retry_after_is_whole_seconds_and_bounded() -> None:
    for asked, said in (None, "1"), (0.2, "1"), (2.1, "3"), (60, "60"), (1e9, "60"), (-5, "1"):
        refusal = render(Deny("RATE_LIMITED", "", retry_after=asked))
        assert dict(refusal.headers)["Retry-After"] == said, asked


def test_refusal_carries_its_own_headers() -> None:
    more = (("RateLimit-Remaining", "0"), ("RateLimit-Reset", "9"))
    sent = render(Deny("RATE_LIMITED", "", retry_after=9, headers=more)).headers
    assert sent[-2:] == more
    assert ("Retry-After", "9") in sent


def test_redirect_to_sign_in_is_not_cached() -> None:
    refusal = redirect("../hokusai/login?next=%2F")
    assert (refusal.status, refusal.body) == (303, b"")
    assert dict(refusal.headers) == {
        "Location": "../hokusai/login?next=%2F",
        "Content-Length": "0",
        "Cache-Control": "no-store",
    }

"""Refusals as they go over the wire."""

from __future__ import annotations

import json

import pytest

from mlflow_hokusai_auth.core.denials import CODES, REALM, redirect, render
from mlflow_hokusai_auth.core.types import Deny

STATUS = {
    "KEY_MISSING": 401,
    "KEY_MALFORMED": 401,
    "KEY_UNKNOWN": 401,
    "KEY_EXPIRED": 401,
    "KEY_REVOKED": 401,
    "SESSION_ENDED": 401,
    "KEY_CONFLICT": 400,
    "SCOPE_MISSING": 403,
    "ADDRESS_REFUSED": 403,
    "CROSS_SITE": 403,
    "LOCATION_REFUSED": 403,
    "SOURCE_REFUSED": 403,
    "INTERCEPTED": 403,
    "INTERCEPTOR_FAILED": 503,
    "BODY_TOO_LARGE": 413,
    "RATE_LIMITED": 429,
    "AUTHORITY_UNAVAILABLE": 503,
    "MISCONFIGURED": 503,
}


def test_every_code_has_its_status() -> None:
    assert {name: code.status for name, code in CODES.items()} == STATUS


@pytest.mark.parametrize("code", CODES)
def test_a_refusal(code: str) -> None:
    refusal = render(Deny(code, "Do this."))
    headers = dict(refusal.headers)
    content = json.loads(refusal.body)
    assert refusal.status == STATUS[code]
    assert content["error"] == code
    assert content["detail"] == CODES[code].detail
    assert content["error_code"] == CODES[code].error_code
    assert content["message"].endswith(f"({refusal.status} {code}). Do this.")
    assert headers["Content-Type"] == "application/json"
    assert headers["Content-Length"] == str(len(refusal.body))
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    challenged = refusal.status == 401 or code == "SCOPE_MISSING"
    assert ("WWW-Authenticate" in headers) == challenged
    assert ("Retry-After" in headers) == (refusal.status in (429, 503))
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
    # As for the assistant, which no scope opens.
    assert challenges(Deny("SCOPE_MISSING", "")) == [f'Bearer {realm}, error="insufficient_scope"']


def test_every_bad_key_looks_the_same_but_for_its_code() -> None:
    bad = [render(Deny(code, "")) for code in CODES if CODES[code].detail.startswith("Invalid")]
    assert len(bad) == 4
    assert len({json.loads(refusal.body)["detail"] for refusal in bad}) == 1
    assert len({dict(refusal.headers)["WWW-Authenticate"] for refusal in bad}) == 1


def test_scopes_are_there_when_they_are_the_reason() -> None:
    content = json.loads(render(Deny("SCOPE_MISSING", "", "mlflow:admin", ("read",))).body)
    assert (content["required_scope"], content["current_scopes"]) == ("mlflow:admin", ["read"])
    assert not {"required_scope", "current_scopes"} & set(
        json.loads(render(Deny("KEY_MISSING", "")).body)
    )


@pytest.mark.parametrize(
    ("asked", "said"), [(None, "1"), (0.2, "1"), (2.1, "3"), (60, "60"), (1e9, "60"), (-5, "1")]
)
def test_retry_after_is_whole_seconds_and_bounded(asked: float | None, said: str) -> None:
    refusal = render(Deny("RATE_LIMITED", "", retry_after=asked))
    assert dict(refusal.headers)["Retry-After"] == said


@pytest.mark.parametrize("code", CODES)
def test_no_refusal_has_a_browser_open_a_dialog(code: str) -> None:
    assert not any(value.startswith("Basic") for value in challenges(Deny(code, "")))


def test_a_refusal_s_own_headers_are_sent_too() -> None:
    more = (("RateLimit-Remaining", "0"), ("RateLimit-Reset", "9"))
    sent = render(Deny("RATE_LIMITED", "", retry_after=9, headers=more)).headers
    assert sent[-2:] == more
    assert ("Retry-After", "9") in sent


def test_the_way_to_sign_in_is_not_kept_by_anyone() -> None:
    refusal = redirect("../hokusai/login?next=%2F")
    assert (refusal.status, refusal.body) == (303, b"")
    assert dict(refusal.headers) == {
        "Location": "../hokusai/login?next=%2F",
        "Content-Length": "0",
        "Cache-Control": "no-store",
    }

"""Vectors 42 to 50 as far as they need no browser: sessions, sign-in, and who may ask how often.

What a real browser does with other sites' pages is in `tests/e2e/test_browser.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from mlflow_hokusai_auth.core import keys
from tests.e2e.test_running import wait_until
from tests.harness import SERVERS, Server, in_one_minute, serve

pytestmark = pytest.mark.servers

PAGE = {"Accept": "text/html"}
WHOAMI = "/api/2.0/hokusai/whoami"
HOST = "registry.example.com"


@pytest.fixture(scope="module", params=["uvicorn", "gunicorn"])
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("site")
    with serve(
        folder,
        SERVERS[request.param],
        HOKUSAI_AUTH_TRUSTED_PROXIES="127.0.0.1",
        MLFLOW_SERVER_ALLOWED_HOSTS=f"127.0.0.1:*,{HOST}",
    ) as running:
        yield running


_addresses = iter(range(1, 250))


def sign_in(
    site: Server, key: str, *, address: str = "", next: str = "/", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    return site.request(
        "POST",
        f"/hokusai/login?{urlencode({'next': next})}",
        headers={
            "Content-Type": "application/x-www-form-urlencoded",
            "Origin": site.origin,
            "Host": site.origin.removeprefix("http://"),
            # An address of its own for each, as attempts are limited by it.
            "X-Forwarded-For": address or f"198.51.100.{next_address()}",
            **headers,
        },
        body=urlencode({"key": key}).encode(),
    )


def next_address() -> int:
    return next(_addresses)


def cookie(headers: dict[str, str]) -> str:
    return headers["set-cookie"].partition(";")[0]


def test_sign_in_makes_a_new_session_and_ends_the_old_one(site: Server) -> None:
    planted = f"hokusai_session={keys.session_token()}"
    status, headers, _ = sign_in(site, site.key("mlflow:read"), Cookie=planted)
    first = cookie(headers)
    assert status == 303 and first != planted
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(headers["set-cookie"].split("; "))
    assert site.request("GET", WHOAMI, headers={"Cookie": first})[0] == 200
    second = cookie(sign_in(site, site.key("mlflow:read"), Cookie=first)[1])
    assert second != first
    assert ended(site, first)
    assert site.request("GET", WHOAMI, headers={"Cookie": second})[0] == 200


def test_cookie_is_for_https_only_except_on_loopback(site: Server) -> None:
    key = site.key("mlflow:read")
    status, headers, _ = sign_in(site, key, Host=HOST, Origin=f"https://{HOST}")
    assert status == 303
    assert headers["set-cookie"].startswith("__Host-hokusai_session=")
    assert "Secure" in headers["set-cookie"]
    status, headers, body = sign_in(site, key, Host=HOST, Origin=f"http://{HOST}")
    assert status == 400 and "set-cookie" not in headers
    assert b"over https only" in body


def test_session_ends_with_sign_out_and_with_its_key(site: Server) -> None:
    record, key = site.store.create(owner="leaves", scopes=["mlflow:read"])
    one, other = (cookie(sign_in(site, key)[1]) for _ in range(2))
    host = site.origin.removeprefix("http://")
    out = {"Cookie": one, "Origin": site.origin, "Host": host}
    status, _, _ = site.request(
        "POST", "/hokusai/logout", headers=out | {"Origin": "https://evil.example"}
    )
    assert status == 403
    assert site.request("GET", WHOAMI, headers={"Cookie": one})[0] == 200
    status, headers, _ = site.request("POST", "/hokusai/logout", headers=out)
    assert status == 303 and "Max-Age=0" in headers["set-cookie"]
    assert ended(site, one)
    assert site.request("GET", WHOAMI, headers={"Cookie": other})[0] == 200
    site.store.revoke(record.key_id)
    assert ended(site, other)


def ended(site: Server, session: str) -> bool:
    """Whether the session is refused as soon as all processes know."""
    answers: list[bytes] = []

    def refused() -> bool:
        status, _, body = site.request("GET", WHOAMI, headers={"Cookie": session})
        answers.append(body)
        return status == 401

    wait_until(refused, 60)
    return bool(json.loads(answers[-1])["error"] == "SESSION_ENDED")


def test_request_with_a_cookie_must_come_from_our_own_page(site: Server) -> None:
    session = cookie(sign_in(site, site.key("mlflow:admin"))[1])
    token = {"Cookie": session}
    path, body = "/api/2.0/hokusai/keys", b'{"owner": "x", "scopes": ["mlflow:admin"]}'
    host = site.origin.removeprefix("http://")
    for headers in (
        {},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1.evil.example"},
        {"Sec-Fetch-Site": "cross-site", "Origin": site.origin},
        {"Sec-Fetch-Site": "same-site", "Origin": site.origin},
        {"Sec-Fetch-Site": "same-origin", "Origin": site.origin},  # without the page's token
        {"Sec-Fetch-Site": "same-origin", "X-CSRF-Token": "0" * 64},
        {"Content-Type": "text/plain", "Origin": "http://127.0.0.1:1"},
    ):
        sent = {**token, "Host": host, **headers}
        status, _, answer = site.request("POST", path, headers=sent, body=body)
        assert status == 403 and json.loads(answer)["error"] == "CROSS_SITE", headers
    read = {**token, "Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"}
    assert site.request("GET", WHOAMI, headers=read)[0] == 403


def test_form_of_another_site_does_not_sign_in(site: Server) -> None:
    for origin in ("https://evil.example", "null"):
        status, headers, body = sign_in(site, site.key("mlflow:read"), Origin=origin)
        assert status == 403 and "set-cookie" not in headers
        # Nor does the page go on by itself, as after a link from elsewhere.
        assert b"data-try" not in body


def test_sign_in_attempts_are_limited_and_strangers_learn_nothing(site: Server) -> None:
    store = site.store
    revoked, gone = store.create(owner="a", scopes=["mlflow:read"])
    store.revoke(revoked.key_id)
    expired = store.create(owner="b", scopes=["mlflow:read"], expires_at=time.time() - 1)[1]
    elsewhere = store.create(owner="c", scopes=["mlflow:read"], networks=("203.0.113.9/32",))[1]
    # Whoever has a key that was good is told what the API tells, and nobody else is.
    for key, code, says in (
        (gone, 401, b"was revoked"),
        (expired, 401, b"has expired"),
        (elsewhere, 403, b"may not be used from"),
    ):
        status, headers, body = sign_in(site, key)
        assert status == code and says in body and "set-cookie" not in headers, says
    wrong = [keys.generate(), keys.generate(), "hk_live_x", "somebody"]
    answers = {sign_in(site, key)[::2] for key in wrong}
    assert len(answers) == 1 and next(iter(answers))[0] == 401
    # A session does not live on in another one.
    session = cookie(sign_in(site, site.key("mlflow:read"))[1]).partition("=")[2]
    assert sign_in(site, session)[0] == sign_in(site, "")[0] == 401
    statuses = in_one_minute(
        lambda run: [sign_in(site, keys.generate(), address=f"192.0.2.{run}")[0] for _ in range(12)]
    )
    workers = 2  # gunicorn's, which count each for itself
    assert statuses[:10] == [401] * 10
    if "gunicorn" not in str(site.process.args):
        assert statuses[10:] == [429] * 2
    # Not the first address that the client names, but the one that the proxy was called by.
    spoofed = [
        sign_in(site, keys.generate(), address=f"10.0.0.{n}, 198.51.100.7")[0]
        for n in range(10 * workers + 1)
    ]
    assert 429 in spoofed


def test_pages_redirect_to_the_sign_in_and_programs_get_json(site: Server) -> None:
    for path, location in (
        ("/", "hokusai/login?next=/"),
        ("/mlflow/", "hokusai/login?next=/"),
        ("/api/mlflow", "mlflow/hokusai/login?next=/"),
        ("/get-artifact?path=a%20b", "hokusai/login?next=/get-artifact%3Fpath%3Da%2520b"),
    ):
        status, headers, _ = site.request("GET", path, headers=PAGE)
        assert (status, headers["location"]) == (303, location)
        status, headers, body = site.request("GET", path)
        assert status == 401 and json.loads(body)["error"] == "KEY_MISSING"
        assert "Basic" not in headers["www-authenticate"]
    # A program that sends a key is told about the key.
    assert site.request("GET", "/", key=keys.generate(), headers=PAGE)[0] == 401


def test_redirect_to_the_sign_in_has_no_key(tmp_path: Path) -> None:
    key = keys.generate()
    with serve(tmp_path, HOKUSAI_AUTH_QUERY_KEY="false") as server:
        status, headers, _ = server.request("GET", f"/get-artifact?api_key={key}", headers=PAGE)
        assert status == 303 and headers["location"] == "hokusai/login?next=/get-artifact"


@pytest.mark.parametrize(
    ("path", "limit", "status"),
    # Reports of leaked keys are not configured here, so nothing of them is read.
    [("/hokusai/login", 4096, b" 413 "), ("/api/2.0/hokusai/keys/leaked", 2**20, b" 404 ")],
)
def test_large_body_without_a_key_is_not_read(
    site: Server, path: str, limit: int, status: bytes
) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    assert status in site.raw(
        f"{head}Content-Length: {limit + 1}\r\n\r\n".encode() + b"x" * (limit + 1)
    )
    chunk = b"x" * (limit + 1)
    chunked = f"{head}Transfer-Encoding: chunked\r\n\r\n{len(chunk):x}\r\n".encode() + chunk
    assert status in site.raw(chunked + b"\r\n0\r\n\r\n").partition(b"\r\n")[0]


def test_pages_can_not_be_framed_or_cached(site: Server) -> None:
    for path, key in (("/hokusai/login", None), ("/hokusai/keys", site.key("mlflow:admin"))):
        status, headers, _ = site.request("GET", path, key=key)
        policy = headers["content-security-policy"]
        assert status == 200 and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and policy.startswith("default-src 'none'")
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "same-origin"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-opener-policy"] == "same-origin"


def test_address_with_too_many_wrong_keys_must_wait_but_a_good_key_is_served(
    tmp_path: Path,
) -> None:
    def statuses(run: int) -> list[int]:
        folder = tmp_path / str(run)
        folder.mkdir()
        with serve(folder, HOKUSAI_AUTH_FAILURES_PER_MINUTE="5") as server:
            known, new = server.key("mlflow:read"), server.key("mlflow:write")
            sent = [known, *(keys.generate() for _ in range(7)), new, known]
            return [server.request("GET", "/version", key=key)[0] for key in sent]

    # A key that was good here within the last day is looked up whatever its address sends.
    assert in_one_minute(statuses) == [200] + [401] * 5 + [429] * 2 + [429, 200]

"""The auth service's client: every kind of reply and of fault, over real sockets."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import ipaddress
import json
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlflow_hokusai_auth.backends import BackendUnavailable, Throttled
from mlflow_hokusai_auth.backends.service import PATH, AuthService
from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.types import Principal, Rejected
from tests.standin import Standin

#: Seconds; long enough for a busy machine to answer in, short enough to wait for.
TIMEOUT = 0.4
#: Seconds by which a busy machine may be late.
LATE = 0.6
GOOD = {"is_valid": True, "key_id": "key_1", "user_id": "acme", "scopes": ["mlflow:write"]}


@pytest.fixture
def service() -> Iterator[Standin]:
    with Standin() as running:
        yield running


@pytest.fixture
def client(service: Standin) -> AuthService:
    return AuthService(service.url, timeout=5)


@pytest.fixture
def hasty(service: Standin) -> AuthService:
    """A client that gives up soon, for services that do not answer."""
    return AuthService(service.url, timeout=TIMEOUT)


def reply(service: Standin, status: int, body: object = GOOD, **headers: str) -> None:
    """Have `service` answer this: JSON, or bytes as they are."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    service.behave("status", status=status, body=raw, headers=named)


def unavailable(client: AuthService, key: str | None = None) -> BackendUnavailable:
    """The refusal of a lookup that must not be answered, checked for the key."""
    key = key or keys.generate("test")
    with pytest.raises(BackendUnavailable) as refused:
        client.lookup(key, "192.0.2.1")
    error: BaseException | None = refused.value
    assert not isinstance(error, Throttled)
    while error is not None:
        assert key not in f"{error!r} {vars(error)}"
        error = error.__cause__ or error.__context__
    return refused.value


# The request


def test_regression_13_the_key_is_sent_as_bearer_and_not_in_the_body(
    service: Standin, client: AuthService
) -> None:
    key = service.add(user_id="acme")
    assert isinstance(client.lookup(key, "192.0.2.1"), Principal)
    (call,) = service.calls
    assert call.path == PATH == "/api/v1/keys/validate"
    assert call.headers["authorization"] == f"Bearer {key}"
    assert json.loads(call.body) == {"service_id": "platform", "client_ip": "192.0.2.1"}
    assert [name for name, value in call.headers.items() if key in value] == ["authorization"]


def test_regression_13_the_standin_takes_no_key_from_a_body() -> None:
    service = Standin()
    key = service.add()
    in_body = json.dumps({"api_key": key, "service_id": "platform"}).encode()
    assert service.verdict({}, in_body)[0] == 401
    assert service.verdict({}, b"")[0] == 400
    assert service.verdict({"x-api-key": key}, b"{}")[0] == 200
    assert service.verdict({"authorization": f"Bearer {key}"}, in_body)[0] == 200


def test_regression_14_the_default_service_id_is_one_that_the_service_knows(
    service: Standin, client: AuthService, caplog: pytest.LogCaptureFixture
) -> None:
    key = service.add()
    assert isinstance(client.lookup(key), Principal)
    caplog.set_level(logging.INFO)
    for wrong in ("ml-platform", "hokusai-data-pipeline", "prediction"):
        found = AuthService(service.url, service_id=wrong).lookup(key)
        assert found == Rejected("API key not valid for this service")
    # An operator whose every key is rejected must be able to read why.
    assert caplog.text.count("API key not valid for this service") == 3


def test_an_unknown_address_is_left_out(service: Standin, client: AuthService) -> None:
    client.lookup(service.add(), "")
    assert json.loads(service.calls[0].body) == {"service_id": "platform"}


def test_the_address_decides_where_a_key_has_a_list(service: Standin, client: AuthService) -> None:
    key = service.add(addresses=["192.0.2.0/24"])
    assert isinstance(client.lookup(key, "192.0.2.9"), Principal)
    assert client.lookup(key, "198.51.100.1") == Rejected("IP address not allowed")
    assert client.by_address


def test_regression_20_a_lookup_is_one_call_and_never_a_debit(
    service: Standin, client: AuthService
) -> None:
    key = service.add(extra={"has_sufficient_balance": False, "balance": 0.0})
    for _ in range(5):
        assert isinstance(client.lookup(key), Principal)
    assert [call.path for call in service.calls] == [PATH] * 5
    assert client.generation() == client.generation() == 0 and not client.watched


@pytest.mark.parametrize("path", ["", "/", "/auth", "/auth/"])
def test_a_url_may_have_a_path_and_a_slash(service: Standin, path: str) -> None:
    client = AuthService(service.url + path)
    expected = path.rstrip("/") + PATH
    with pytest.raises(BackendUnavailable) if path.strip("/") else contextlib.nullcontext():
        client.lookup(service.add())
    assert [call.path for call in service.calls] == [expected]


@pytest.mark.parametrize(
    "url",
    ["", "auth.example.com", "ftp://auth.example.com", "https://", "https://me:pw@auth.example.com"]
    + ["https://auth.example.com?x=1", "https://auth.example.com#x", "file:///etc/passwd"],
)
def test_a_wrong_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="must look like https://"):
        AuthService(url)


# Replies


def test_a_reply_becomes_a_principal(service: Standin, client: AuthService) -> None:
    reply(
        service,
        200,
        {
            **GOOD,
            "email": "ada@acme.example",
            "roles": ["Developer"],
            "user": {"id": "u1", "email": "other@acme.example", "roles": ["Owner"]},
            "is_admin": True,
            "balance": "nonsense",
        },
    )
    assert client.lookup(keys.generate()) == Principal(
        "key_1",
        "ada@acme.example",
        frozenset({"mlflow:write"}),
        email="ada@acme.example",
        roles=frozenset({"Developer", "Owner"}),
        is_admin=True,
    )


@pytest.mark.parametrize(
    ("fields", "owner", "email"),
    [
        ({"email": "a@b.c", "user_id": "u"}, "a@b.c", "a@b.c"),
        ({"user": {"email": "a@b.c"}, "user_id": "u"}, "a@b.c", "a@b.c"),
        ({"user_id": "u", "user": {"id": "v"}}, "u", ""),
        ({"user_id": None, "user": {"id": "v"}}, "v", ""),
        ({"user": None, "email": None}, "k", ""),
        ({}, "k", ""),
    ],
)
def test_the_owner_is_the_email_or_the_user_or_the_key(
    service: Standin, client: AuthService, fields: dict[str, Any], owner: str, email: str
) -> None:
    reply(service, 200, {"is_valid": True, "key_id": "k", **fields})
    found = client.lookup(keys.generate())
    assert isinstance(found, Principal)
    assert (found.owner, found.email) == (owner, email)
    assert found.scopes == found.roles == frozenset()


def test_regression_15_a_200_that_says_invalid_is_a_rejection(
    service: Standin, client: AuthService
) -> None:
    reply(service, 200, {**GOOD, "is_valid": False, "error": "API key expired"})
    assert client.lookup(keys.generate()) == Rejected("API key expired")


@pytest.mark.parametrize("word", ["true", "false", 1, 0, None, [], [True], {}, 1.0])
def test_regression_15_is_valid_counts_as_a_boolean_only(
    service: Standin, client: AuthService, word: object
) -> None:
    reply(service, 200, {**GOOD, "is_valid": word})
    assert "is_valid" in str(unavailable(client))


@pytest.mark.parametrize("word", ["false", "true", 1, [True], {"a": 1}, None, 0, False])
def test_regression_16_nobody_is_admin_by_a_word(
    service: Standin, client: AuthService, word: object
) -> None:
    reply(service, 200, {**GOOD, "is_admin": word, "user": {"is_admin": word}})
    found = client.lookup(keys.generate())
    assert isinstance(found, Principal) and found.is_admin is False


@pytest.mark.parametrize("place", ["top", "user"])
def test_an_admin_is_one_by_true(service: Standin, client: AuthService, place: str) -> None:
    flag = {"is_admin": True}
    reply(service, 200, {**GOOD, **(flag if place == "top" else {"user": flag})})
    found = client.lookup(keys.generate())
    assert isinstance(found, Principal) and found.is_admin is True


_WRONG_LISTS = ("mlflow:admin", {"mlflow:admin": True}, [{"name": "x"}], [1], [None], [["x"]], 1)
_WRONG_TEXTS = (1, True, ["x"], {"x": 1}, "a\r\nX-Admin: 1", "\u0000", "\ud800", "x" * 256)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("scopes", value) for value in (*_WRONG_LISTS, "", False, {})],
        *[("roles", value) for value in _WRONG_LISTS],
        *[("key_id", value) for value in (*_WRONG_TEXTS, None, "", "schlüssel")],
        *[("user_id", value) for value in _WRONG_TEXTS],
        *[("email", value) for value in _WRONG_TEXTS],
        *[("user", value) for value in ("acme", ["x"], 1, False, [], "")],
        *[("user", {"email": value}) for value in _WRONG_TEXTS],
        *[("user", {"id": value}) for value in _WRONG_TEXTS],
        *[("user", {"roles": value}) for value in _WRONG_LISTS],
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_regression_16_a_field_of_the_wrong_shape_is_no_verdict(
    service: Standin, client: AuthService, field: str, value: object
) -> None:
    reply(service, 200, {**GOOD, field: value})
    error = str(unavailable(client))
    assert field.partition("_")[0] in error or isinstance(value, dict)


@pytest.mark.parametrize("field", ["is_valid", "key_id"])
def test_a_field_that_must_be_there(service: Standin, client: AuthService, field: str) -> None:
    reply(service, 200, {name: value for name, value in GOOD.items() if name != field})
    assert field in str(unavailable(client))


@pytest.mark.parametrize(
    "body",
    [
        *[json.dumps(value).encode() for value in ([GOOD], "is_valid", True, 1, None, [], {})],
        b"",
        b"is_valid: true",
        b"<html>is_valid: true</html>",
        b'{"is_valid": true, "key_id": "k"',
        json.dumps(GOOD).encode("utf-16"),
        b'{"is_valid": true, "key_id": "\xff"}',
        json.dumps(GOOD).encode() * 2,
    ],
    ids=lambda body: ascii(body)[:24],
)
def test_regression_17_a_200_that_is_no_object_is_no_verdict(
    service: Standin, client: AuthService, body: bytes
) -> None:
    reply(service, 200, body)
    unavailable(client)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"is_valid": False, "error": "API key expired"}, "API key expired"),
        ({"detail": "Invalid API key"}, "Invalid API key"),
        ({"detail": [{"msg": "x"}]}, ""),
        ({**GOOD}, ""),
        (["x"], ""),
        (b"<html>401</html>", ""),
        (b"", ""),
    ],
)
def test_a_401_is_a_rejection_whatever_it_says(
    service: Standin, client: AuthService, body: object, reason: str
) -> None:
    reply(service, 401, body)
    assert client.lookup(keys.generate()) == Rejected(reason)


_NO_VERDICT = [201, 202, 204, 206, 300, 301, 302, 303, 304, 307, 308, 400, 402, 403, 404, 405, 406]
_NO_VERDICT += [407, 408, 409, 410, 413, 415, 418, 422, 428, 431, 451, 500, 501, 502, 503, 504, 599]


@pytest.mark.parametrize("status", _NO_VERDICT)
@pytest.mark.parametrize("valid", [True, False])
def test_regression_18_and_21_every_other_status_is_no_verdict(
    service: Standin, client: AuthService, status: int, valid: bool
) -> None:
    # Whatever the body says, and though the same key was good a moment ago.
    key = service.add()
    assert isinstance(client.lookup(key), Principal)
    reply(service, status, {**GOOD, "is_valid": valid})
    assert str(status) in str(unavailable(client, key))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_regression_18_a_redirect_is_not_followed(
    service: Standin, client: AuthService, status: int
) -> None:
    with Standin() as other:
        key = other.add()
        reply(service, status, {}, Location=other.url + PATH)
        unavailable(client, key)
        assert other.connections == 0
    assert len(service.calls) == 1


@pytest.mark.parametrize(
    "body", [b"", b'{"detail": "Rate limit exceeded"}', json.dumps(GOOD).encode()]
)
def test_regression_18_a_429_is_passed_on_as_one(
    service: Standin, client: AuthService, body: bytes
) -> None:
    reply(service, 429, body, Retry_After="7")
    with pytest.raises(Throttled) as refused:
        client.lookup(keys.generate())
    assert refused.value.retry_after == 7


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, 1),
        ("", 1),
        ("0", 1),
        ("30", 30),
        (" 30 ", 30),
        ("3600", 60),
        ("9" * 5000, 60),
        ("-5", 1),
        ("1.5", 1),
        ("soon", 1),
        ("nan", 1),
        ("³", 1),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 60),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 1),
        ("Thu, 01 Jan 0001 00:00:00 -0000", 1),
        ("Fri, 31 Dec 99999 23:59:59 GMT", 1),
        ("Fri, 31 Dec 2099 23:59:59 +9999", 1),
    ],
    ids=lambda value: str(value)[:24],
)
def test_retry_after_is_bounded(
    service: Standin, client: AuthService, header: str | None, expected: float
) -> None:
    reply(service, 429, b"", **({} if header is None else {"Retry_After": header}))
    with pytest.raises(Throttled) as refused:
        client.lookup(keys.generate())
    assert refused.value.retry_after == expected


@pytest.fixture
def tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose local time is not UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "JST-9")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize("zone", ["GMT", "-0000"])
@pytest.mark.usefixtures("tokyo")
def test_retry_after_may_be_a_date(service: Standin, client: AuthService, zone: str) -> None:
    date = email.utils.formatdate(time.time() + 31, usegmt=True).replace("GMT", zone)
    reply(service, 429, b"", Retry_After=date)
    with pytest.raises(Throttled) as refused:
        client.lookup(keys.generate())
    assert refused.value.retry_after is not None and 20 < refused.value.retry_after <= 31


def test_an_outage_may_say_how_long_it_lasts(service: Standin, client: AuthService) -> None:
    reply(service, 503, b"", Retry_After="5")
    assert unavailable(client).retry_after == 5
    reply(service, 503, b"")
    assert unavailable(client).retry_after is None


def test_a_reply_may_come_in_chunks(service: Standin, client: AuthService) -> None:
    key = service.add(user_id="acme")
    service.behave("chunked")
    for _ in range(3):
        found = client.lookup(key)
        assert isinstance(found, Principal) and found.owner == "acme"
        assert isinstance(client.lookup(keys.generate()), Rejected)
    assert service.connections == 1


# What is quoted


@pytest.mark.parametrize("status", [400, 403, 422, 500])
@pytest.mark.parametrize("as_json", [True, False])
def test_the_service_s_words_are_quoted_short_and_without_the_key(
    service: Standin, client: AuthService, status: int, as_json: bool
) -> None:
    # Of a shape that no pattern of ours knows.
    key = "partner-0123456789-abcdefghij"
    other = keys.generate()
    said = f"unknown service for {key} and {other}\r\n\x1b[31m forged line " + "x" * 5000
    reply(service, status, {"detail": said} if as_json else said.encode())
    error = str(unavailable(client, key))
    assert "unknown service for *** and hk_live_***" in error
    assert error.isprintable() and other not in error
    assert len(error) < 240


def test_a_rejection_s_words_are_quoted_short_and_without_the_key(
    service: Standin, client: AuthService, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = "partner-0123456789-abcdefghij"
    reply(service, 401, {"error": f"{key} is\nunknown" + "x" * 5000})
    found = client.lookup(key)
    assert isinstance(found, Rejected)
    assert found.reason.startswith("*** is unknown") and len(found.reason) == 200
    assert key not in caplog.text and "*** is unknown" in caplog.text


def test_a_wrong_field_is_named_and_not_shown(service: Standin, client: AuthService) -> None:
    reply(service, 200, {**GOOD, "user_id": ["secret-of-the-service"]})
    assert "secret-of-the-service" not in str(unavailable(client))


# Faults of the network


@pytest.mark.parametrize(
    "kind", ["broken", "html", "truncate", "cut", "oversize", "reset", "hang_up", "garbage"]
)
def test_regression_18_a_fault_is_no_verdict_and_passes(
    service: Standin, client: AuthService, kind: str
) -> None:
    key = service.add()
    started = time.monotonic()
    service.behave(kind)
    unavailable(client, key)
    assert time.monotonic() - started < 2
    service.behave("strict")
    assert isinstance(client.lookup(key), Principal)


@pytest.mark.parametrize("kind", ["slow", "drip", "drip_headers"])
def test_regression_18_an_answer_that_takes_too_long_is_given_up(
    service: Standin, kind: str
) -> None:
    key = service.add()
    # One connection, so that one that is still read would be missed by the next lookup.
    client = AuthService(service.url, timeout=TIMEOUT, connections=1)
    service.behave(kind, seconds=30 if kind == "slow" else TIMEOUT / 20)
    for _ in range(2):
        started = time.monotonic()
        unavailable(client, key)
        assert TIMEOUT * 0.9 < time.monotonic() - started < TIMEOUT + LATE
    time.sleep(0.1)
    service.behave("strict")
    assert isinstance(client.lookup(key), Principal)


def test_the_deadline_is_a_setting(service: Standin) -> None:
    key = service.add()
    service.behave("slow", seconds=TIMEOUT * 1.5)
    unavailable(AuthService(service.url, timeout=TIMEOUT), key)
    assert isinstance(AuthService(service.url, timeout=TIMEOUT * 10).lookup(key), Principal)


def test_a_black_hole_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:
        client = AuthService(f"http://127.0.0.1:{hole.getsockname()[1]}", timeout=TIMEOUT)
        started = time.monotonic()
        unavailable(client)
        assert time.monotonic() - started < TIMEOUT + LATE


def test_a_service_that_is_gone_is_found_again(service: Standin, client: AuthService) -> None:
    key = service.add()
    assert isinstance(client.lookup(key), Principal)
    service.go()
    for _ in range(3):
        assert "refused" in str(unavailable(client, key)).lower()
    service.come_back()
    assert isinstance(client.lookup(key), Principal)


def test_a_name_server_that_does_not_answer_is_given_up(
    service: Standin, hasty: AuthService, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    # Nothing of Python's bounds this call, so the test does not wait for a real name server.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait(10) and [])
    started = time.monotonic()
    unavailable(hasty)
    assert time.monotonic() - started < TIMEOUT + LATE
    released.set()


def test_a_name_that_nobody_has_is_no_verdict() -> None:
    started = time.monotonic()
    unavailable(AuthService("http://auth.invalid", timeout=1))
    assert time.monotonic() - started < 1 + LATE


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 60_000,
        b'{"key_id": ' + b"9" * 5000 + b"}",
        b'{"is_valid": NaN}',
        b"\x00",
        b"\xef\xbb\xbf{}",
    ],
    ids=["deep", "long number", "NaN", "NUL", "BOM"],
)
def test_regression_19_what_breaks_a_parser_is_no_verdict(
    service: Standin, client: AuthService, body: bytes
) -> None:
    reply(service, 200, body)
    unavailable(client)


def test_regression_19_an_error_of_our_own_is_no_verdict(client: AuthService) -> None:
    # No such key passes the gate; should one come here, the HTTP library raises what it likes.
    for key in ("hk_test_\u043a\u043b\u044e\u0447", "hk_test_a\r\nX-Admin: 1"):
        unavailable(client, key)


def test_regression_21_an_outage_admits_nobody_that_was_known(
    service: Standin, client: AuthService
) -> None:
    key = service.add()
    assert isinstance(client.lookup(key), Principal)
    for status in (404, 500, 503):
        reply(service, status)
        unavailable(client, key)
    service.go()
    unavailable(client, key)


# Connections


def test_lookups_in_a_row_share_one_connection(service: Standin, client: AuthService) -> None:
    key = service.add()
    for _ in range(20):
        client.lookup(key)
        client.lookup(keys.generate())
    assert (len(service.calls), service.connections) == (40, 1)


@pytest.mark.parametrize("threads", [8, 40])
def test_lookups_at_once_share_connections_and_mix_nothing_up(
    service: Standin, client: AuthService, threads: int
) -> None:
    owners = {service.add(user_id=f"user{n}"): f"user{n}" for n in range(threads)}

    def ask(key: str) -> list[bool]:
        answers = [client.lookup(key) for _ in range(10)]
        return [isinstance(a, Principal) and a.owner == owners[key] for a in answers]

    with ThreadPoolExecutor(threads) as pool:
        assert all(all(answers) for answers in pool.map(ask, owners))
    assert len(service.calls) == 10 * threads
    assert 1 <= service.connections <= 8


def test_waiting_for_a_connection_counts(service: Standin) -> None:
    client = AuthService(service.url, timeout=TIMEOUT, connections=1)
    service.behave("slow", seconds=TIMEOUT * 0.8)
    started = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(client.lookup, service.add()) for _ in range(6)]
    assert time.monotonic() - started < TIMEOUT + LATE
    failed = [answer for answer in answers if answer.exception() is not None]
    assert len(failed) >= 4
    assert all(isinstance(answer.exception(), BackendUnavailable) for answer in failed)


def test_a_forked_process_has_connections_of_its_own(service: Standin, client: AuthService) -> None:
    key = service.add()
    client.lookup(key)
    child = os.fork()
    if child == 0:
        good = all(isinstance(client.lookup(key), Principal) for _ in range(3))
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert service.connections == 2
    assert isinstance(client.lookup(key), Principal)
    assert service.connections == 2


def test_a_cookie_does_not_go_out_with_the_next_key(service: Standin, client: AuthService) -> None:
    reply(service, 200, GOOD, Set_Cookie="session=of-somebody; Path=/")
    for _ in range(2):
        client.lookup(keys.generate())
    assert "cookie" not in service.calls[1].headers


# The environment


@pytest.fixture
def decoy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    """A proxy that the environment names for everything."""
    with Standin() as running:
        for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, running.url)
        yield running


def test_a_proxy_in_the_environment_gets_no_key(service: Standin, decoy: Standin) -> None:
    assert isinstance(AuthService(service.url).lookup(service.add()), Principal)
    assert decoy.connections == 0


def test_a_proxy_is_used_where_the_operator_says_so(service: Standin, decoy: Standin) -> None:
    client = AuthService(service.url, use_environment_proxies=True, timeout=TIMEOUT)
    unavailable(client)
    assert [call.path for call in decoy.calls] == [service.url + PATH]
    assert service.connections == 0
    # What comes through a proxy has the same deadline.
    decoy.behave("drip_headers", seconds=TIMEOUT / 20)
    started = time.monotonic()
    unavailable(client)
    assert time.monotonic() - started < TIMEOUT + LATE


@pytest.mark.parametrize("proxies", [True, False])
def test_a_netrc_does_not_replace_the_key(
    service: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxies: bool
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password word\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    key = service.add()
    client = AuthService(service.url, use_environment_proxies=proxies)
    assert isinstance(client.lookup(key), Principal)
    assert service.calls[0].headers["authorization"] == f"Bearer {key}"


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that nobody has signed, with its key, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "stand-in")])
    now = datetime.datetime.now(datetime.timezone.utc)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    pem = serialization.Encoding.PEM
    path.write_bytes(
        made.public_bytes(pem)
        + private.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return path


@pytest.fixture
def secure(certificate: Path) -> Iterator[Standin]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with Standin(tls=context) as running:
        yield running


def test_a_certificate_that_nobody_signed_is_refused(
    secure: Standin, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, str(certificate))
    error = unavailable(AuthService(secure.url), secure.add())
    assert "certificate verify failed" in str(error)
    assert secure.calls == []


def test_a_bundle_says_whom_to_trust(secure: Standin, certificate: Path) -> None:
    client = AuthService(secure.url, ca_bundle=str(certificate), timeout=TIMEOUT * 2)
    key = secure.add()
    for _ in range(3):
        assert isinstance(client.lookup(key), Principal)
    assert secure.connections == 1
    secure.behave("drip_headers", seconds=TIMEOUT / 20)
    started = time.monotonic()
    unavailable(client, key)
    assert time.monotonic() - started < TIMEOUT * 2 + LATE

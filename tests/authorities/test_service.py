"""The auth service's client: every kind of reply and of fault, over real sockets."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import ipaddress
import itertools
import json
import logging
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import time_machine

from mlflow_hokusai_auth.authorities.service import PATH, AuthService
from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable, Throttled
from mlflow_hokusai_auth.core.types import Principal, Rejected
from tests import standin
from tests.core.rows import agree, each
from tests.standin import Standin
from tests.store.conftest import LONG

#: Seconds after which a lookup that has no answer is to give up.
SHORT = 0.4
GOOD = {"is_valid": True, "key_id": "key_1", "user_id": "acme", "scopes": ["mlflow:write"]}


@pytest.fixture
def service() -> Iterator[Standin]:
    with Standin() as running:
        yield running


@pytest.fixture
def client(service: Standin) -> AuthService:
    return AuthService(service.url, timeout=LONG)


@pytest.fixture
def hasty(service: Standin) -> AuthService:
    """A client with a short timeout and a single connection, which an unfinished lookup would block."""
    return AuthService(service.url, timeout=SHORT, connections=1)


def reply(service: Standin, status: int, body: object = GOOD, **headers: str) -> None:
    """Make `service` answer this: JSON, or the bytes unchanged."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    service.behave("status", status=status, body=raw, headers=named)


def unavailable(client: AuthService, key: str | None = None) -> AuthorityUnavailable:
    """Return the error of a lookup that must fail, after a check that it does not hold the key."""
    key = key or keys.generate("test")
    with pytest.raises(AuthorityUnavailable) as refused:
        client.lookup(key, "192.0.2.1")
    error: BaseException | None = refused.value
    assert not isinstance(error, Throttled)
    while error is not None:
        assert key not in f"{error!r} {vars(error)}"
        error = error.__cause__ or error.__context__
    return refused.value


def throttled(client: AuthService) -> float | None:
    """Return the seconds in the error's `retry_after`, which must be there."""
    with pytest.raises(Throttled) as refused:
        client.lookup(keys.generate())
    return refused.value.retry_after


def until(call: Callable[[], object]) -> None:
    """Wait until `call` returns true, even on a busy machine."""
    ends = time.monotonic() + LONG
    while not call():
        assert time.monotonic() < ends


def known(client: AuthService, key: str) -> bool:
    """Return True if the service answered in time that it knows `key`."""
    with contextlib.suppress(AuthorityUnavailable):
        return isinstance(client.lookup(key), Principal)
    return False


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
        found = AuthService(service.url, service_id=wrong, timeout=LONG).lookup(key)
        assert found == Rejected("API key not valid for this service")
    # An operator whose keys are all rejected must be able to find the reason.
    assert caplog.text.count("API key not valid for this service") == 3


def test_unknown_address_is_not_sent(service: Standin, client: AuthService) -> None:
    client.lookup(service.add(), "")
    assert json.loads(service.calls[0].body) == {"service_id": "platform"}


def test_key_with_a_list_of_addresses_works_from_those_only(
    service: Standin, client: AuthService
) -> None:
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


def test_a_url_may_have_a_path_and_a_slash(service: Standin) -> None:
    for path in ("", "/", "/auth", "/auth/"):
        client = AuthService(service.url + path, timeout=LONG)
        # The stand-in has nothing below /auth.
        assert known(client, service.add()) is (path in ("", "/"))
        assert service.calls[-1].path == path.rstrip("/") + PATH
    assert len(service.calls) == 4


def test_a_wrong_url_is_refused_at_once() -> None:
    good = "https://auth.example.com"
    for url in (
        *("", "auth.example.com", "ftp://auth.example.com", "https://", "file:///etc/passwd"),
        *("https://me:pw@auth.example.com", f"{good}?x=1", f"{good}#x"),
    ):
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
            "models": ["acme-*", "é"],
            "no_delete": True,
        },
    )
    assert client.lookup(keys.generate()) == Principal(
        "key_1",
        "ada@acme.example",
        frozenset({"mlflow:write"}),
        email="ada@acme.example",
        roles=frozenset({"Developer", "Owner"}),
        is_admin=True,
        owner_id="acme",
        models=("acme-*", "é"),
        no_delete=True,
    )


def test_owner_is_shown_by_the_email_and_known_by_the_user_id_only(
    service: Standin, client: AuthService
) -> None:
    for fields, owner, address, owner_id in (
        ({"email": "a@b.c", "user_id": "u"}, "a@b.c", "a@b.c", "u"),
        ({"user": {"email": "a@b.c"}, "user_id": "u"}, "a@b.c", "a@b.c", "u"),
        ({"user_id": "u", "user": {"id": "v"}}, "u", "", "u"),
        ({"user_id": None, "user": {"id": "v"}}, "v", "", "v"),
        ({"user_id": "", "user": {"id": "v", "email": "a@b.c"}}, "a@b.c", "a@b.c", "v"),
        # The owner of these keys is not known.
        ({"email": "a@b.c", "user": {"email": "d@e.f"}}, "a@b.c", "a@b.c", ""),
        ({"user": None, "email": None}, "k", "", ""),
        ({}, "k", "", ""),
    ):
        reply(service, 200, {"is_valid": True, "key_id": "k", **fields})
        expected = Principal("k", owner, frozenset(), email=address, owner_id=owner_id)
        assert client.lookup(keys.generate()) == expected, fields


def test_regression_15_a_200_that_says_invalid_is_a_rejection(
    service: Standin, client: AuthService
) -> None:
    reply(service, 200, {**GOOD, "is_valid": False, "error": "API key expired"})
    assert client.lookup(keys.generate()) == Rejected("API key expired")


def test_regression_15_is_valid_must_be_a_boolean(service: Standin, client: AuthService) -> None:
    for word in ("true", "false", 1, 0, None, [], [True], {}, 1.0):
        reply(service, 200, {**GOOD, "is_valid": word})
        assert "is_valid" in str(unavailable(client)), word


def test_regression_16_only_is_admin_true_makes_an_administrator(
    service: Standin, client: AuthService
) -> None:
    words = ("false", "true", 1, [True], {"a": 1}, None, 0, False)
    for fields, admin in (
        *(({"is_admin": word, "user": {"is_admin": word}}, False) for word in words),
        ({"is_admin": True}, True),
        ({"user": {"is_admin": True}}, True),
    ):
        reply(service, 200, {**GOOD, **fields})
        found = client.lookup(keys.generate())
        assert isinstance(found, Principal) and found.is_admin is admin, fields


_WRONG_LISTS = ("mlflow:admin", {"mlflow:admin": True}, [{"name": "x"}], [1], [None], [["x"]], 1)
_WRONG_TEXTS = (1, True, ["x"], {"x": 1}, "a\r\nX-Admin: 1", "\u0000", "\ud800", "x" * 256)


WRONG = {
    "scopes": (*_WRONG_LISTS, "", False, {}),
    "roles": _WRONG_LISTS,
    "key_id": (*_WRONG_TEXTS, None, "", "schlüssel"),
    "user_id": _WRONG_TEXTS,
    "email": _WRONG_TEXTS,
    "models": (
        "acme-*",
        {"acme-*": True},
        1,
        True,
        [1],
        [None],
        [""],
        ["*-acme"],
        ["a" * 257],
        ["a\0"],
    ),
    "no_delete": ("true", "", 1, 0, [], [True], {}),
    "rate_limit_per_hour": (0, -1, True, "5", 1.5, [5]),
    "user": (
        *("acme", ["x"], 1, False, [], ""),
        *({"email": value} for value in _WRONG_TEXTS),
        *({"id": value} for value in _WRONG_TEXTS),
        *({"roles": value} for value in _WRONG_LISTS),
    ),
}


def test_regression_16_a_field_of_the_wrong_shape_is_no_verdict(
    service: Standin, client: AuthService
) -> None:
    def check(field: str, value: object) -> None:
        reply(service, 200, {**GOOD, field: value})
        error = str(unavailable(client))
        assert field.partition("_")[0] in error or isinstance(value, dict)

    each(check, ((field, value) for field, values in WRONG.items() for value in values))


#: Bodies that are no object, and some that break a parser.
NO_OBJECTS = [
    *(json.dumps(value).encode() for value in ([GOOD], "is_valid", True, 1, None, [], {})),
    *(b"", b"is_valid: true", b"<html>is_valid: true</html>", b'{"is_valid": true, "key_id": "k"'),
    json.dumps(GOOD).encode("utf-16"),
    b'{"is_valid": true, "key_id": "\xff"}',
    json.dumps(GOOD).encode() * 2,
    *(b"[" * 60_000, b'{"key_id": ' + b"9" * 5000 + b"}", b'{"is_valid": NaN}', b"\x00"),
    b"\xef\xbb\xbf{}",
]


def test_regression_17_a_200_that_is_no_object_is_no_verdict(
    service: Standin, client: AuthService
) -> None:
    def check(body: bytes) -> None:
        reply(service, 200, body)
        unavailable(client)

    each(check, ((body,) for body in NO_OBJECTS))


def test_a_401_is_a_rejection_whatever_it_says(service: Standin, client: AuthService) -> None:
    for body, reason in (
        ({"is_valid": False, "error": "API key expired"}, "API key expired"),
        ({"detail": "Invalid API key"}, "Invalid API key"),
        ({"detail": [{"msg": "x"}]}, ""),
        ({**GOOD}, ""),
        (["x"], ""),
        (b"<html>401</html>", ""),
        (b"", ""),
    ):
        reply(service, 401, body)
        assert client.lookup(keys.generate()) == Rejected(reason), body


_NO_VERDICT = [201, 202, 204, 206, 300, 301, 302, 303, 304, 307, 308, 400, 402, 403, 404, 405, 406]
_NO_VERDICT += [407, 408, 409, 410, 413, 415, 418, 422, 428, 431, 451, 500, 501, 502, 503, 504, 599]


def test_regression_18_and_21_every_other_status_is_no_verdict(
    service: Standin, client: AuthService
) -> None:
    # The body does not matter, nor that the same key was good a moment ago.
    key = service.add()

    def check(status: int, valid: bool) -> None:
        service.behave("strict")
        assert isinstance(client.lookup(key), Principal)
        reply(service, status, {**GOOD, "is_valid": valid})
        assert str(status) in str(unavailable(client, key))

    each(check, itertools.product(_NO_VERDICT, (True, False)))


def test_regression_18_a_redirect_is_not_followed(service: Standin, client: AuthService) -> None:
    with Standin() as other:
        key = other.add()
        for status in (301, 302, 303, 307, 308):
            reply(service, status, {}, Location=other.url + PATH)
            unavailable(client, key)
        assert other.connections == 0
    assert len(service.calls) == 5


def test_regression_18_a_429_becomes_a_429(service: Standin, client: AuthService) -> None:
    for body in (b"", b'{"detail": "Rate limit exceeded"}', json.dumps(GOOD).encode()):
        reply(service, 429, body, Retry_After="7")
        assert throttled(client) == 7


def test_retry_after_is_bounded(service: Standin, client: AuthService) -> None:
    def waits(header: str) -> float | None:
        reply(service, 429, b"", Retry_After=header)
        return throttled(client)

    seconds = {30: ["30", " 30 "], 60: ["3600", "9" * 5000, "Fri, 31 Dec 9999 23:59:59 GMT"]}
    seconds[1] = ["", "0", "-5", "1.5", "soon", "nan", "³", "Thu, 01 Jan 1970 00:00:00 GMT"]
    seconds[1] += ["Thu, 01 Jan 0001 00:00:00 -0000", "Fri, 31 Dec 99999 23:59:59 GMT"]
    seconds[1] += ["Fri, 31 Dec 2099 23:59:59 +9999"]
    agree(waits, ((header, wait) for wait, headers in seconds.items() for header in headers))
    reply(service, 429, b"")
    assert throttled(client) == 1


@pytest.fixture
def tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose local time is not UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "JST-9")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("tokyo")
@time_machine.travel(2_000_000_000, tick=False)
def test_retry_after_may_be_a_date(service: Standin, client: AuthService) -> None:
    date = email.utils.formatdate(time.time() + 31, usegmt=True)
    for zone in ("GMT", "-0000"):
        reply(service, 429, b"", Retry_After=date.replace("GMT", zone))
        assert throttled(client) == 31


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


# Quoted reasons


def test_reason_of_the_service_is_quoted_short_and_without_the_key(
    service: Standin, client: AuthService
) -> None:
    # No pattern of ours fits the shape of this key.
    key = "partner-0123456789-abcdefghij"
    other = keys.generate()
    said = f"unknown service for {key} and {other}\r\n\x1b[31m forged line " + "x" * 5000
    for status, body in itertools.product((400, 403, 422, 500), ({"detail": said}, said.encode())):
        reply(service, status, body)
        error = str(unavailable(client, key))
        assert "unknown service for *** and hk_live_***" in error
        assert error.isprintable() and other not in error
        assert len(error) < 240


def test_reason_of_a_rejection_is_quoted_short_and_without_the_key(
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


def test_regression_18_a_fault_is_no_verdict_and_passes(
    service: Standin, client: AuthService
) -> None:
    key = service.add()
    faults = ("broken", "html", "truncate", "cut", "oversize", "reset", "hang_up", "garbage")
    for kind in faults:
        service.behave(kind)
        # The fault is noticed at once, not at the deadline.
        assert "took more than" not in str(unavailable(client, key)), kind
        service.behave("strict")
        assert isinstance(client.lookup(key), Principal), kind


@pytest.mark.parametrize("kind", ["slow", "drip", "drip_headers"])
def test_regression_18_slow_answer_is_abandoned_at_the_deadline(
    service: Standin, hasty: AuthService, kind: str
) -> None:
    key = service.add(extra={"more": "x" * 1000})
    # Each byte comes in time, but the last one after more than a minute.
    service.behave(kind, seconds=2 * LONG if kind == "slow" else SHORT / 4)
    for _ in range(2):
        unavailable(hasty, key)
    service.behave("strict")
    until(lambda: known(hasty, key))


def test_the_deadline_is_a_setting(service: Standin, client: AuthService) -> None:
    key = service.add()
    service.behave("slow", seconds=SHORT * 1.5)
    unavailable(AuthService(service.url, timeout=SHORT), key)
    assert isinstance(client.lookup(key), Principal)


def test_lookup_in_a_black_hole_ends_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:
        unavailable(AuthService(f"http://127.0.0.1:{hole.getsockname()[1]}", timeout=SHORT))


def test_service_that_comes_back_is_reached_again(service: Standin, client: AuthService) -> None:
    key = service.add()
    assert isinstance(client.lookup(key), Principal)
    service.go()
    for _ in range(3):
        assert "refused" in str(unavailable(client, key)).lower()
    service.come_back()
    assert isinstance(client.lookup(key), Principal)


def test_lookup_ends_at_the_deadline_if_no_name_server_answers(
    hasty: AuthService, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    # Python has no timeout for this call, so the test uses no real name server.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait(LONG) and [])
    assert "took more than" in str(unavailable(hasty))
    released.set()


def test_host_name_that_does_not_exist_is_no_verdict() -> None:
    unavailable(AuthService("http://auth.invalid", timeout=1))


def test_regression_19_an_error_of_our_own_is_no_verdict(client: AuthService) -> None:
    # The gate refuses such a key; if one came here, the HTTP library might raise any error.
    for key in ("hk_test_\u043a\u043b\u044e\u0447", "hk_test_a\r\nX-Admin: 1"):
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


def test_wait_for_a_connection_is_part_of_the_timeout(service: Standin, hasty: AuthService) -> None:
    service.behave("slow", seconds=SHORT * 0.8)
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(hasty.lookup, service.add()) for _ in range(6)]
    failed = [answer for answer in answers if answer.exception() is not None]
    assert len(failed) >= 4
    assert all(isinstance(answer.exception(), AuthorityUnavailable) for answer in failed)


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
    """A proxy that the environment names for all URLs."""
    with Standin() as running:
        for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, running.url)
        yield running


def test_a_proxy_in_the_environment_gets_no_key(
    service: Standin, client: AuthService, decoy: Standin
) -> None:
    assert isinstance(client.lookup(service.add()), Principal)
    assert decoy.connections == 0


def test_proxy_of_the_environment_is_used_only_with_its_setting(
    service: Standin, decoy: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = AuthService(service.url, use_environment_proxies=True, timeout=SHORT, connections=1)

    def asks() -> bool:
        before = len(decoy.calls)
        unavailable(client)
        return len(decoy.calls) > before

    # The stand-in doesn't know the path of a request to a proxy, so it answers 404.
    until(asks)
    assert {call.path for call in decoy.calls} == {service.url + PATH}
    assert service.connections == 0
    # A reply through a proxy has the same deadline: the only connection is free again.
    with monkeypatch.context() as patch:
        patch.setattr(standin, "PATH", service.url + PATH)
        decoy.behave("drip_headers", seconds=SHORT / 4)
        until(asks)
    until(asks)


def test_a_netrc_does_not_replace_the_key(
    service: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password word\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for proxies in (True, False):
        key = service.add()
        client = AuthService(service.url, use_environment_proxies=proxies, timeout=LONG)
        assert isinstance(client.lookup(key), Principal)
        assert service.calls[-1].headers["authorization"] == f"Bearer {key}"


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1 with its key, in one file."""
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


def test_self_signed_certificate_is_refused(
    secure: Standin, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, str(certificate))
    error = unavailable(AuthService(secure.url, timeout=LONG), secure.add())
    assert "certificate verify failed" in str(error)
    assert secure.calls == []


def test_certificate_in_the_bundle_is_trusted(secure: Standin, certificate: Path) -> None:
    client = AuthService(secure.url, ca_bundle=str(certificate), timeout=LONG)
    key = secure.add()
    for _ in range(3):
        assert isinstance(client.lookup(key), Principal)
    assert secure.connections == 1
    hasty = AuthService(secure.url, ca_bundle=str(certificate), timeout=SHORT, connections=1)
    secure.behave("drip_headers", seconds=SHORT / 4)
    for _ in range(2):
        unavailable(hasty, key)
    secure.behave("strict")
    until(lambda: known(hasty, key))


def test_body_of_a_204_or_304_is_not_read_as_the_next_reply() -> None:
    good = json.dumps({**GOOD, "service_id": "platform"}).encode()
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
    wrong = []
    for status in (b"204 No Content", b"304 Not Modified"):
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def serve(status: bytes = status, listening: socket.socket = listening) -> None:
                first = True
                with contextlib.suppress(OSError):
                    while True:
                        connection, _ = listening.accept()
                        late = b""
                        with connection:
                            while _request(connection):
                                if first:
                                    first, late = False, b'{"detail": "late"}'
                                    connection.sendall(b"HTTP/1.1 " + status + b"\r\n\r\n")
                                else:
                                    # The body of the previous reply comes after its lookup has ended.
                                    connection.sendall(late + answer % (len(good), good))

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            client = AuthService(
                f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=LONG, connections=1
            )
            unavailable(client)
            try:
                found = client.lookup(keys.generate("test"))
            except AuthorityUnavailable as error:
                wrong.append(f"{status!r}: {error}")
            else:
                assert isinstance(found, Principal) and found.key_id == "key_1"
    assert not wrong, wrong


def _request(connection: socket.socket) -> bool:
    """Read one request with a body of known length; return False at the end of the connection."""
    data = b""
    while True:
        head, end, body = data.partition(b"\r\n\r\n")
        if end:
            (length,) = re.findall(rb"(?i)content-length: (\d+)", head)
            if len(body) >= int(length):
                return True
        if not (chunk := connection.recv(65536)):
            return False
        data += chunk

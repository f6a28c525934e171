"""Identity tokens of a real issuer: good ones, and everything that attacks try."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import time_machine
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlflow_hokusai_auth.authorities import key_sets
from mlflow_hokusai_auth.authorities.identity_tokens import Judged, Verifier
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.core.trust import Refused, Trust
from tests.harness import wait_until
from tests.issuer import DISCOVERY, Issuer, ec_key, jwk, rsa_key, signed

HERE = "https://registry.example.com"
SUB = "system:serviceaccount:acme:trainer"
CLAIMS = {"sub": SUB, "aud": HERE}


@pytest.fixture(scope="module")
def shared() -> Iterator[Issuer]:
    with Issuer() as running:
        yield running


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with Issuer() as running:
        yield running


class Clock:
    """A monotonic clock that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Server:
    """The verification with a clock of its own, and trusts in `issuer`."""

    def __init__(
        self, *issuers: Issuer, timeout: float = 10.0, patience: float = 30.0, **more: Any
    ) -> None:
        self.clock = Clock()
        self.trusts = {issuer.url: [trust(issuer, **more)] for issuer in issuers}
        sets = key_sets.KeySets(timeout=timeout, patience=patience, timer=self.clock)
        self.verifier = Verifier([HERE, f"{HERE}/api/mlflow"], sets)

    def judge(self, token: str) -> Judged | Refused:
        return self.verifier.judge(token, lambda url: self.trusts.get(url, []), time.time())

    def code(self, token: str) -> str:
        verdict = self.judge(token)
        return verdict.code if isinstance(verdict, Refused) else "ok"


def trust(issuer: Issuer, **more: Any) -> Trust:
    fields = {"kind": "issuer", "claims": (("sub", SUB),), "single_use": True, **more}
    return Trust("trust_1", "ACME", issuer=issuer.url, scopes=("model:write",), **fields)


@pytest.fixture(scope="module")
def server(shared: Issuer) -> Server:
    return Server(shared)


def test_tokens_with_either_kind_of_key_are_good(shared: Issuer, server: Server) -> None:
    for key_id in ("rsa-1", "ec-1"):
        judged = server.judge(shared.token(CLAIMS, key_id))
        assert isinstance(judged, Judged)
        assert judged.accepted.trust.owner == "ACME"
        assert judged.claims["sub"] == SUB
        assert judged.token_id.startswith("id-")
        assert judged.ends_at == judged.claims["exp"] + 60
    one, other = (shared.token(CLAIMS) for _ in range(2))
    digests = {getattr(server.judge(token), "digest", "") for token in (one, other, one)}
    assert len(digests) == 2


def raw(shared: Issuer, claims: object, header: dict[str, object] | None = None) -> str:
    """Return a token that the issuer signed, of any JSON or bytes."""
    content = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    return signed(shared.keys["rsa-1"], {"kid": "rsa-1", **(header or {})}, content)


def part(content: object) -> str:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def test_attacks(shared: Issuer, server: Server) -> None:
    good = shared.token(CLAIMS)
    head, body, signature = good.split(".")
    now = int(time.time())
    full = {"iss": shared.url, "iat": now, "exp": now + 300, "jti": "x", **CLAIMS}
    pem = (
        shared.keys["rsa-1"]
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )

    def hmac_of(alg: str, kid: str) -> str:
        text = f"{part({'alg': alg, 'kid': kid})}.{part(full)}"
        return f"{text}.{part(hmac.new(pem, text.encode(), hashlib.sha256).digest())}"

    thief = rsa_key(1)
    theirs = jwk(thief, "rsa-1")
    deep = b'{"iss": "' + shared.url.encode() + b'", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    twice = json.dumps(full).encode()[:-1] + b', "sub": "' + SUB.encode() + b'"}'
    attacks = {
        "alg none": (f"{part({'alg': 'none', 'kid': 'rsa-1'})}.{body}.{signature}", "INVALID"),
        "alg none, no signature": (f"{part({'alg': 'none'})}.{body}.", "INVALID"),
        "alg None": (f"{part({'alg': 'NoNe', 'kid': 'rsa-1'})}.{body}.{signature}", "INVALID"),
        "HS256 with the public key": (hmac_of("HS256", "rsa-1"), "INVALID"),
        "HS256 that says RS256": (hmac_of("RS256", "rsa-1"), "INVALID"),
        "RS512": (signed(shared.keys["rsa-1"], {"kid": "rsa-1"}, json.dumps(full).encode(), "RS512"),
                  "INVALID"),
        "PS256": (signed(shared.keys["rsa-1"], {"kid": "rsa-1"}, json.dumps(full).encode(), "PS256"),
                  "INVALID"),
        "ES256 with the id of an RSA key": (
            signed(shared.keys["ec-1"], {"kid": "rsa-1"}, json.dumps(full).encode()), "INVALID"),
        "somebody's key": (signed(thief, {"kid": "rsa-1"}, json.dumps(full).encode()), "INVALID"),
        "jwk in the header": (
            signed(thief, {"kid": "rsa-1", "jwk": theirs}, json.dumps(full).encode()), "INVALID"),
        "crit": (raw(shared, full, {"crit": ["exp"], "exp": 1}), "INVALID"),
        "b64": (raw(shared, full, {"b64": False}), "INVALID"),
        "kid is a path": (raw(shared, full, {"kid": "../../../../dev/null"}), "KEY_UNKNOWN"),
        "kid is a URL": (raw(shared, full, {"kid": "https://evil.example/k"}), "KEY_UNKNOWN"),
        "kid is SQL": (raw(shared, full, {"kid": "' OR 1=1 --"}), "KEY_UNKNOWN"),
        "kid is a list": (raw(shared, full, {"kid": ["rsa-1"]}), "INVALID"),
        "kid is long": (raw(shared, full, {"kid": "k" * 501}), "INVALID"),
        "no kid, and two keys": (raw(shared, full, {"kid": ""}), "KEY_UNKNOWN"),
        "another payload": (f"{head}.{part({**full, 'sub': 'other'})}.{signature}", "INVALID"),
        "another header": (f"{part({'alg': 'RS256', 'kid': 'rsa-1'})}.{body}.{signature}", "INVALID"),
        "cut": (good[:-20], "INVALID"),
        "foreign issuer": (raw(shared, {**full, "iss": "https://evil.example"}), "UNTRUSTED"),
        "issuer with a slash": (raw(shared, {**full, "iss": f"{shared.url}/"}), "UNTRUSTED"),
        "issuer is a list": (raw(shared, {**full, "iss": [shared.url]}), "UNTRUSTED"),
        "no issuer": (raw(shared, CLAIMS), "UNTRUSTED"),
        "another sub": (raw(shared, {**full, "sub": "system:serviceaccount:evil:x"}), "UNTRUSTED"),
        "wrong aud": (raw(shared, {**full, "aud": "https://evil.example"}), "AUDIENCE"),
        "aud with a slash": (raw(shared, {**full, "aud": f"{HERE}/"}), "AUDIENCE"),
        "no aud": (raw(shared, {**full, "aud": None}), "INVALID"),
        "aud among others": (raw(shared, {**full, "aud": [HERE, "https://evil.example"]}),
                             "AUDIENCE"),
        "expired": (raw(shared, {**full, "exp": now - 120}), "EXPIRED"),
        "not yet": (raw(shared, {**full, "nbf": now + 600}), "NOT_YET_VALID"),
        "issued in the future": (raw(shared, {**full, "iat": now + 600}), "NOT_YET_VALID"),
        "no exp": (raw(shared, {k: v for k, v in full.items() if k != "exp"}), "INVALID"),
        "exp is text": (raw(shared, {**full, "exp": str(now + 300)}), "INVALID"),
        "exp is true": (raw(shared, {**full, "exp": True}), "INVALID"),
        "exp is huge": (raw(shared, {**full, "exp": 10**400}), "INVALID"),
        "exp is infinite": (raw(shared, json.dumps(full).replace(str(now + 300), "1e999").encode()),
                            "INVALID"),
        "NaN": (raw(shared, json.dumps({**full, "x": float("nan")}).encode()), "INVALID"),
        "no jti": (raw(shared, {k: v for k, v in full.items() if k != "jti"}), "INVALID"),
        "jti is a number": (raw(shared, {**full, "jti": 1}), "INVALID"),
        "jti is long": (raw(shared, {**full, "jti": "j" * 501}), "INVALID"),
        "a claim twice": (raw(shared, twice), "INVALID"),
        "deep JSON": (raw(shared, deep), "INVALID"),
        "JSON of 17 levels": (raw(shared, {**full, "x": json.loads("[" * 16 + "]" * 16)}), "INVALID"),
        "a list": (raw(shared, [full]), "INVALID"),
        "no JSON": (raw(shared, b"sub"), "INVALID"),
        "no UTF-8": (raw(shared, b'{"iss": "\xff"}'), "INVALID"),
        "a long number": (raw(shared, b'{"iss": ' + b"9" * 10_000 + b"}"), "INVALID"),
        "1 MB": (raw(shared, {**full, "x": "y" * 2**20}), "INVALID"),
        "two parts": (f"{head}.{body}", "INVALID"),
        "encrypted": (".".join(["e30"] * 5), "INVALID"),
        "spaces": (f" {good}", "INVALID"),
        "nothing": ("", "INVALID"),
        "a key": ("hk_live_" + "a" * 46, "INVALID"),
    }  # fmt: skip
    found = {name: server.code(token) for name, (token, _) in attacks.items()}
    assert found == {name: f"TOKEN_{code}" for name, (_, code) in attacks.items()}
    assert server.code(good) == "ok"
    # The library refuses these as well, but does not say why.
    for name, why in (
        ("crit", "extensions"),
        ("b64", "extensions"),
        ("ES256 with the id of an RSA key", "is for RS256, not for ES256"),
    ):
        verdict = server.judge(attacks[name][0])
        assert isinstance(verdict, Refused) and why in verdict.message, name


def test_token_that_may_be_exchanged_again_needs_no_id(shared: Issuer) -> None:
    now = int(time.time())
    token = raw(shared, {"iss": shared.url, "iat": now, "exp": now + 300, **CLAIMS})
    assert Server(shared, single_use=False).code(token) == "ok"
    assert Server(shared).code(token) == "TOKEN_INVALID"


def test_headers_that_name_keys_are_not_read(shared: Issuer, server: Server) -> None:
    with Issuer() as evil:
        evil.keys = {"rsa-1": rsa_key(1)}
        for header in ({"jku": f"{evil.url}/jwks"}, {"x5u": f"{evil.url}/jwks"}):
            stolen = {"iss": shared.url, **CLAIMS}
            assert server.code(evil.token(stolen, **header)) == "TOKEN_INVALID"
            # They do no harm beside a good signature.
            assert server.code(shared.token(CLAIMS, **header)) == "ok"
        assert evil.asked == []


def test_messages_say_which_claim_differs_and_by_how_much(shared: Issuer, server: Server) -> None:
    now = int(time.time())

    def refused(**changes: object) -> Refused:
        verdict = server.judge(shared.token({**CLAIMS, **changes}))
        assert isinstance(verdict, Refused)
        return verdict

    late = refused(exp=now - 3700)
    assert late.claim == "exp"
    assert "s in the past by this server's clock" in late.message
    assert 3700 <= int(late.message.split(" lies ")[1].split()[0]) < 3800
    early = refused(iat=now + 1000, nbf=now)
    assert early.claim == "iat"
    assert 900 < int(early.message.split(" lies ")[1].split()[0]) <= 1000
    assert "clocks is off" in early.message
    aud = refused(aud=["https://other.example"])
    assert (aud.claim, aud.came) == ("aud", '["https://other.example"]')
    assert HERE in aud.expected
    assert HERE in aud.message


def test_clocks_may_differ_by_a_minute(shared: Issuer, server: Server) -> None:
    with time_machine.travel(1_800_000_000, tick=False):
        now = time.time()
        for changes, code in (
            ({"exp": now - 59}, "ok"),
            ({"exp": now - 61}, "TOKEN_EXPIRED"),
            ({"iat": now + 59, "nbf": now + 59}, "ok"),
            ({"nbf": now + 61}, "TOKEN_NOT_YET_VALID"),
            ({"iat": now + 61}, "TOKEN_NOT_YET_VALID"),
        ):
            assert server.code(shared.token({**CLAIMS, **changes})) == code, changes


@pytest.fixture(scope="module")
def good_token(shared: Issuer) -> str:
    return shared.token(CLAIMS)


@given(data=st.data())
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_token_with_any_character_changed_is_refused(
    good_token: str, server: Server, data: st.DataObject
) -> None:
    token = good_token
    # The last character of a signature may have bits that say nothing.
    at = data.draw(st.integers(0, len(token) - 2))
    other = data.draw(st.characters(max_codepoint=0x2FF).filter(lambda c: c != token[at]))
    assert server.code(token[:at] + other + token[at + 1 :]) != "ok"


@given(st.text(max_size=200) | st.binary(max_size=200).map(part))
def test_no_text_makes_it_fail(shared: Issuer, server: Server, text: str) -> None:
    for token in (text, f"e30.{text}.e30", f"{text}.e30.e30"):
        assert server.code(token) != "ok"


# Key sets


def test_issuer_is_asked_once_and_only_if_it_is_trusted(issuer: Issuer) -> None:
    server = Server(issuer)
    with Issuer() as other:
        assert server.code(other.token(CLAIMS)) == "TOKEN_UNTRUSTED"
        assert other.asked == []
    for _ in range(5):
        assert server.code(issuer.token(CLAIMS)) == "ok"
    assert issuer.asked == [DISCOVERY, "/jwks"]


def test_keys_rotate(issuer: Issuer) -> None:
    server = Server(issuer)
    before = issuer.token(CLAIMS)
    assert server.code(before) == "ok"
    issuer.rotate()
    after = issuer.token(CLAIMS, "rsa-2")
    # The set is read again for an unknown id, at most once a minute.
    for _ in range(20):
        assert server.code(after) == "TOKEN_KEY_UNKNOWN"
    assert len(issuer.asked) == 2
    server.clock.now += key_sets.INTERVAL
    assert server.code(after) == "ok"
    assert server.code(issuer.token(CLAIMS, "ec-2")) == "ok"
    assert len(issuer.asked) == 4
    # An issuer that took a key back has a reason.
    assert server.code(before) == "TOKEN_KEY_UNKNOWN"


def test_made_up_tokens_cost_no_request(issuer: Issuer) -> None:
    server = Server(issuer)
    assert server.code(issuer.token(CLAIMS)) == "ok"
    asked = len(issuer.asked)
    server.clock.now += key_sets.INTERVAL
    for number in range(200):
        token = signed(rsa_key(1), {"kid": f"made-up-{number}"}, json.dumps(
            {"iss": issuer.url, **CLAIMS}).encode())  # fmt: skip
        assert server.code(token) == "TOKEN_KEY_UNKNOWN"
    assert len(issuer.asked) == asked + 2


def test_set_is_used_for_a_day_without_its_issuer(issuer: Issuer) -> None:
    server = Server(issuer)
    token = issuer.token({**CLAIMS, "exp": int(time.time()) + 10_000})
    assert server.code(token) == "ok"
    issuer.stop()
    for hours in (2, 12, 23):
        server.clock.now = Clock.now + hours * 3600
        assert server.code(token) == "ok", hours
    # The unknown key may be a new one, of which nobody can tell.
    unknown = signed(rsa_key(), {"kid": "new"}, json.dumps({"iss": issuer.url}).encode())
    verdict = server.judge(unknown)
    assert isinstance(verdict, Refused)
    assert verdict.code == "ISSUER_UNAVAILABLE"
    assert verdict.retry_after is not None
    server.clock.now = Clock.now + 25 * 3600
    assert server.code(token) == "ISSUER_UNAVAILABLE"
    issuer.start()

    def again() -> bool:
        # A reading that is still under way puts the next one off when it ends.
        server.clock.now += key_sets.INTERVAL
        return server.code(token) == "ok"

    wait_until(again)


def test_issuer_that_is_down_at_first(issuer: Issuer, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(issuer)
    issuer.stop()
    token = issuer.token(CLAIMS)
    verdict = server.judge(token)
    assert isinstance(verdict, Refused)
    assert (verdict.code, verdict.retry_after) == ("ISSUER_UNAVAILABLE", key_sets.FIRST_INTERVAL)
    (line,) = caplog.messages
    assert f"The keys of {issuer.url} can't be read" in line
    assert "ConnectionRefusedError" in line
    issuer.start()
    assert server.code(token) == "ISSUER_UNAVAILABLE"
    assert issuer.asked == []
    server.clock.now += key_sets.FIRST_INTERVAL
    wait_until(lambda: server.code(token) == "ok")
    assert issuer.asked == [DISCOVERY, "/jwks"]


def test_issuers_that_misbehave(issuer: Issuer, caplog: pytest.LogCaptureFixture) -> None:
    with Issuer() as evil:
        evil.keys = issuer.keys
        described = {"issuer": issuer.url, "jwks_uri": f"{issuer.url}/jwks"}

        def answer(path: str, content: object, status: int = 200, **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            issuer.answers = {path: (status, headers, body)}

        for set_up, why in (
            (lambda: answer(DISCOVERY, b"", 302, Location=evil.url + DISCOVERY), "answers 302"),
            (lambda: answer("/jwks", b"", 302, Location=evil.url + "/jwks"), "answers 302"),
            (lambda: answer(DISCOVERY, b"", 404), "answers 404"),
            (lambda: answer(DISCOVERY, {**described, "issuer": evil.url}), "exactly this name"),
            (lambda: answer(DISCOVERY, b"[" * 100_000), "exactly this name"),
            (lambda: answer(DISCOVERY, {**described, "jwks_uri": "http://192.0.2.1/"}), "no https"),
            (
                lambda: answer(DISCOVERY, {**described, "jwks_uri": "file:///etc/passwd"}),
                "no https",
            ),
            (
                lambda: answer(
                    DISCOVERY, {**described, "jwks_uri": "http://127.0.0.1:80@192.0.2.1/"}
                ),
                "no https",
            ),
            (lambda: answer(DISCOVERY, {"issuer": issuer.url}), "no https"),
            (
                lambda: answer(DISCOVERY, {**described, "jwks_uri": "https://127.0.0.1:1/\n\x1b"}),
                "can't be reached",
            ),
            (lambda: answer("/jwks", b"x" * (key_sets.MAX_DOCUMENT + 1)), "more than 262144 bytes"),
            (lambda: answer("/jwks", {"keys": []}), "no public key"),
            (lambda: answer("/jwks", {"keys": [{}] * 101}), "at most 100 keys"),
            (lambda: answer("/jwks", b"<html>"), "no JSON Web Key Set"),
        ):
            caplog.clear()
            set_up()
            verdict = Server(issuer).judge(issuer.token(CLAIMS))
            assert isinstance(verdict, Refused)
            assert verdict.code == "ISSUER_UNAVAILABLE", why
            # The operator's log has the reason. A stranger sees what the token says, and no address.
            (line,) = caplog.messages
            assert why in line
            assert line.isprintable()
            assert verdict.message == (
                "The token can't be verified now: the keys of its issuer "
                f"'{issuer.url}' can't be read. Try again."
            )
        assert evil.asked == []


def test_slow_issuer_is_given_up_and_does_not_hold_those_who_need_it_not(issuer: Issuer) -> None:
    server = Server(issuer, timeout=0.5)
    token = issuer.token(CLAIMS)
    issuer.delay.clear()
    verdict = server.judge(token)
    assert isinstance(verdict, Refused)
    assert verdict.code == "ISSUER_UNAVAILABLE"
    issuer.delay.set()
    server.clock.now += key_sets.FIRST_INTERVAL
    wait_until(lambda: server.code(token) == "ok")
    # While a thread reads the old set again, the others go on with it.
    server = Server(issuer, timeout=30)
    assert server.code(token) == "ok"
    asked = len(issuer.asked)
    issuer.delay.clear()
    server.clock.now += key_sets.FRESH + 1
    reader = threading.Thread(target=server.code, args=(token,))
    reader.start()
    wait_until(lambda: len(issuer.asked) > asked)
    assert server.code(token) == "ok"
    assert reader.is_alive()
    issuer.delay.set()
    reader.join()


def test_few_threads_wait_for_all_issuers_together_that_hang() -> None:
    with contextlib.ExitStack() as stack:
        issuers = [stack.enter_context(Issuer()) for _ in range(3)]
        server = Server(*issuers, timeout=30)
        for one in issuers:
            one.delay.clear()
        tokens = [issuers[number % 3].token(CLAIMS) for number in range(21)]
        pool = stack.enter_context(ThreadPoolExecutor(len(tokens)))
        verdicts = [pool.submit(server.judge, token) for token in tokens]
        # The last callback of the stack runs first, so that no thread waits for ever.
        stack.callback(lambda: [one.delay.set() for one in issuers])
        answered = len(tokens) - key_sets.MAX_WAITING
        wait_until(lambda: sum(verdict.done() for verdict in verdicts) >= answered)
        for verdict in verdicts:
            if verdict.done():
                refused = verdict.result()
                assert isinstance(refused, Refused)
                assert (refused.code, refused.retry_after) == ("ISSUER_UNAVAILABLE", 1.0)
        assert sum(verdict.done() for verdict in verdicts) == answered
        wait_until(lambda: all(one.asked == [DISCOVERY] for one in issuers))
        for one in issuers:
            one.delay.set()
        assert [verdict.result() for verdict in verdicts].count(refused) < len(tokens)
        wait_until(lambda: all(server.code(one.token(CLAIMS)) == "ok" for one in issuers))
        assert [one.asked for one in issuers] == [[DISCOVERY, "/jwks"]] * 3


def test_nobody_waits_long_and_nobody_again_for_an_issuer_that_hung(issuer: Issuer) -> None:
    token = issuer.token(CLAIMS)
    issuer.delay.clear()
    # The issuer hangs for longer than anybody waits.
    server = Server(issuer, timeout=30, patience=0.1)
    assert server.code(token) == "ISSUER_UNAVAILABLE"
    issuer.delay.set()
    wait_until(lambda: server.code(token) == "ok")
    # It fails at once. Until the pause is over, nobody asks it.
    server = Server(issuer, timeout=60)
    issuer.stop()
    assert server.code(token) == "ISSUER_UNAVAILABLE"
    issuer.start()
    issuer.delay.clear()
    asked = len(issuer.asked)
    verdict = server.judge(token)
    assert isinstance(verdict, Refused)
    assert verdict.retry_after == key_sets.FIRST_INTERVAL
    # Then it is asked once more and hangs, and nobody waits for it: each would for 30 s.
    server.clock.now += key_sets.FIRST_INTERVAL
    assert at_once(server, token) == {"ISSUER_UNAVAILABLE"}
    wait_until(lambda: len(issuer.asked) > asked)
    # It answers at last, but too late: nobody waits for a new key either, which it may have.
    server.clock.now += 31
    issuer.delay.set()
    wait_until(lambda: server.code(token) == "ok")
    assert issuer.asked[asked:] == [DISCOVERY, "/jwks"]
    issuer.rotate()
    issuer.delay.clear()
    server.clock.now += key_sets.INTERVAL
    after = issuer.token(CLAIMS, "rsa-2")
    assert at_once(server, after) == {"ISSUER_UNAVAILABLE"}
    issuer.delay.set()
    wait_until(lambda: server.code(after) == "ok")


def test_server_without_a_thread_to_spare_asks_later(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(issuer)

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        assert server.code(issuer.token(CLAIMS)) == "ISSUER_UNAVAILABLE"
    assert issuer.asked == []
    server.clock.now += key_sets.FIRST_INTERVAL
    wait_until(lambda: server.code(issuer.token(CLAIMS)) == "ok")


def at_once(server: Server, token: str) -> set[str]:
    with ThreadPoolExecutor(1) as pool:
        codes = pool.submit(lambda: {server.code(token) for _ in range(20)})
        wait_until(codes.done, 20)
    return codes.result()


def test_many_threads_ask_the_issuer_once(issuer: Issuer) -> None:
    server = Server(issuer, timeout=30)
    tokens = [issuer.token(CLAIMS) for _ in range(8)]
    with ThreadPoolExecutor(len(tokens)) as pool:
        codes = list(pool.map(server.code, tokens))
    assert set(codes) <= {"ok", "ISSUER_UNAVAILABLE"}
    assert "ok" in codes
    assert {server.code(token) for token in tokens} == {"ok"}
    assert issuer.asked == [DISCOVERY, "/jwks"]


def test_no_password_of_netrc_is_sent(
    issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    sent: list[Any] = []
    handler = issuer._handler
    answer = handler.do_GET

    def remember(self: Any) -> None:
        sent.append(dict(self.headers))
        answer(self)

    handler.do_GET = remember  # type: ignore[method-assign]
    assert Server(issuer).code(issuer.token(CLAIMS)) == "ok"
    assert len(sent) == 2
    assert not any("Authorization" in headers for headers in sent)


def test_key_set_from_a_file_needs_no_issuer(issuer: Issuer) -> None:
    document = json.dumps(issuer.key_set())
    server = Server(issuer, jwks=document)
    assert server.code(issuer.token(CLAIMS)) == "ok"
    assert issuer.asked == []
    issuer.rotate()
    assert server.code(issuer.token(CLAIMS, "rsa-2")) == "TOKEN_KEY_UNKNOWN"
    # A trust with a file beside one without: each is judged by its own keys.
    server.trusts[issuer.url].append(trust(issuer))
    assert server.code(issuer.token(CLAIMS, "rsa-2")) == "ok"
    server.trusts[issuer.url] = [
        trust(issuer, jwks=document),
        trust(issuer, claims=(("sub", "x"),)),
    ]
    assert server.code(issuer.token(CLAIMS, "rsa-2")) == "TOKEN_UNTRUSTED"


def test_each_trust_of_an_issuer_has_its_own_algorithms(issuer: Issuer) -> None:
    job = {"repository": "acme/models", "repository_id": "7", "repository_owner_id": "8"}
    claims = {**CLAIMS, **job, "event_name": "push", "ref": "refs/heads/main"}
    of_github = trust(issuer, kind="github", claims=(("repository", "acme/models"),))
    plain = trust(issuer, claims=(("sub", SUB),))
    server = Server()

    def owner(trusts: list[Trust], key_id: str) -> str:
        owned = [replace(one, owner=one.kind) for one in trusts]
        server.trusts = {issuer.url: owned}
        judged = server.judge(issuer.token(claims, key_id))
        return judged.accepted.trust.owner if isinstance(judged, Judged) else judged.message

    for trusts in ([of_github, plain], [plain, of_github]):
        # ES256 is none of GitHub's algorithms, so only the other trust can take such a token.
        assert owner(trusts, "ec-1") == "issuer"
        assert owner(trusts, "rsa-1") == trusts[0].kind
    assert "must be RS256, not 'ES256'" in owner([of_github], "ec-1")


def test_issuer_below_a_path(issuer: Issuer) -> None:
    server = Server()
    below = f"{issuer.url}/gitlab"
    server.trusts = {below: [replace(trust(issuer), issuer=below)]}
    described = {"issuer": below, "jwks_uri": f"{issuer.url}/jwks"}
    issuer.answers = {f"/gitlab{DISCOVERY}": (200, {}, json.dumps(described).encode())}
    assert server.code(issuer.token({**CLAIMS, "iss": below})) == "ok"
    assert server.code(issuer.token(CLAIMS)) == "TOKEN_UNTRUSTED"


def test_same_key_in_the_sets_of_two_trusts(issuer: Issuer) -> None:
    server = Server(issuer)
    sets = (json.dumps(issuer.key_set()), json.dumps(issuer.key_set(), indent=1))
    other = trust(issuer, jwks=sets[0], claims=(("sub", "x"),))
    server.trusts[issuer.url] = [other, trust(issuer, jwks=sets[1])]
    assert server.code(issuer.token(CLAIMS)) == "ok"
    server.trusts[issuer.url] = [other, trust(issuer)]
    assert server.code(issuer.token(CLAIMS)) == "ok"
    # The refusal by a trust that the token verifies for says more than one by another's key set.
    server.trusts[issuer.url] = [
        other,
        trust(issuer, jwks=json.dumps({"keys": [jwk(rsa_key(1), "x")]})),
    ]
    assert server.code(issuer.token(CLAIMS)) == "TOKEN_UNTRUSTED"


def test_issuer_on_this_machine_is_asked_without_a_proxy(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Issuer() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert Server(issuer).code(issuer.token(CLAIMS)) == "ok"
        assert proxy.asked == []


def test_which_keys_of_a_set_are_used() -> None:
    small = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    other_curve = ec.generate_private_key(ec.SECP384R1())
    good = [jwk(rsa_key(), "a"), jwk(ec_key(), "b"), jwk(rsa_key(1), "c", alg="RS256")]
    without = {name: value for name, value in jwk(rsa_key(), "d").items() if name != "use"}
    bad = [
        jwk(rsa_key(), "use", use="enc"),
        jwk(rsa_key(), "alg", alg="RS512"),
        jwk(small, "small"),
        jwk(other_curve, "curve"),
        {"kty": "oct", "kid": "secret", "k": "c2VjcmV0"},
        {"kty": "RSA", "kid": "broken", "n": "!", "e": "AQAB"},
        {"kty": "EC", "kid": "point", "crv": "P-256", "x": "AQ", "y": "AQ"},
        {**jwk(rsa_key(), "private"), "d": "AQAB"},
        "text",
    ]
    assert set(key_sets.parse(json.dumps({"keys": [*good, without, *bad]}))) == {*"abcd"}
    for nothing in ({"keys": bad}, {"keys": {}}, [], "x"):
        with pytest.raises(ValueError, match="key"):
            key_sets.parse(json.dumps(nothing))
    # A set of one key needs no id.
    only = json.dumps({"keys": [good[0]]})
    assert key_sets.find_in_file(only, "") is not None
    assert key_sets.find_in_file(json.dumps({"keys": good}), "") is None


def test_store_that_is_down_is_no_refusal(shared: Issuer, server: Server) -> None:
    def down(_: str) -> list[Trust]:
        raise AuthorityUnavailable("the key store can't be read")

    with pytest.raises(AuthorityUnavailable):
        server.verifier.judge(shared.token(CLAIMS), down, time.time())

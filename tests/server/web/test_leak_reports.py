"""Leak reports count only if GitHub signed them, and no report can harm or show a key."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import string
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import example, given
from hypothesis import strategies as st

from mlflow_hokusai_auth.core import keys as key_format
from mlflow_hokusai_auth.server.web import leak_reports

BASE62 = string.digits + string.ascii_letters
SIGNER = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())
P384 = ec.generate_private_key(ec.SECP384R1())
KEYS = {"one": SIGNER.public_key(), "two": OTHER.public_key()}
BODY = b'[{"token":"t","type":"hokusai_api_key","url":"https://example.com/a","source":"commit"}]'
PATTERN = re.compile(leak_reports.PATTERN, re.ASCII)


def sign(body: bytes, key: ec.EllipticCurvePrivateKey = SIGNER, *, digest: Any = None) -> str:
    return base64.b64encode(key.sign(body, ec.ECDSA(digest or hashes.SHA256()))).decode()


def pem(key: Any) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()  # type: ignore[no-any-return]


def entry(identifier: object, key: object, current: bool = True) -> dict[str, object]:
    return {"key_identifier": identifier, "key": key, "is_current": current}


def report(**changes: object) -> bytes:
    match = {"token": "t", "type": "hokusai_api_key", "url": "u", "source": "s"} | changes
    return json.dumps([{name: value for name, value in match.items() if value != ()}]).encode()


def refusal(read: Callable[[Any], object], given: object) -> str:
    """The message with which `read` refuses its argument."""
    try:
        return f"nothing is wrong: {read(given)}"
    except ValueError as error:
        return str(error)


# load


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    def save(content: object) -> str:
        path = tmp_path / "keys.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return str(path)

    return save


def test_every_key_of_the_file_counts(saved: Any) -> None:
    answer = {"public_keys": [entry("old", pem(OTHER), False), entry("new", pem(SIGNER))]}
    keys = leak_reports.load(saved(answer))
    assert keys == {"old": OTHER.public_key(), "new": SIGNER.public_key()}
    assert leak_reports.is_genuine(BODY, "old", sign(BODY, OTHER), keys)
    assert leak_reports.is_genuine(BODY, "new", sign(BODY), keys)
    assert not leak_reports.is_genuine(BODY, "old", sign(BODY), keys)


def test_identifier_has_one_key(saved: Any) -> None:
    twice = [entry("one", pem(SIGNER)), entry("one", pem(SIGNER), False)]
    assert list(leak_reports.load(saved({"public_keys": twice}))) == ["one"]
    different = [entry("one", pem(SIGNER)), entry("one", pem(OTHER))]
    with pytest.raises(ValueError, match="two keys with one identifier"):
        leak_reports.load(saved({"public_keys": different}))


PRIVATE = SIGNER.private_bytes(
    serialization.Encoding.PEM,
    serialization.PrivateFormat.PKCS8,
    serialization.NoEncryption(),
).decode()
# secp112r1, which `cryptography` does not know: SEQUENCE of ecPublicKey, the curve, and a point.
UNKNOWN_CURVE = bytes.fromhex("3032301006072a8648ce3d020106052b81040006031e0004") + bytes(28)
WRONG_KEYS = {
    "not text": 7,
    "missing": None,
    "empty": "",
    "no PEM": "MFkwEwYHKoZIzj0CAQ",
    "broken PEM": pem(SIGNER).replace("M", "N", 1),
    "lone surrogate": "\ud800",
    "P-384": pem(P384),
    "secp256k1": pem(ec.generate_private_key(ec.SECP256K1())),
    "unknown curve": "-----BEGIN PUBLIC KEY-----\n"
    + base64.encodebytes(UNKNOWN_CURVE).decode()
    + "-----END PUBLIC KEY-----\n",
    "Ed25519": pem(ed25519.Ed25519PrivateKey.generate()),
    "RSA": pem(rsa.generate_private_key(65537, 2048)),
    "private": PRIVATE,
}


def test_wrong_key_is_refused_even_beside_a_good_one(saved: Any) -> None:
    expected = re.compile(
        rf"public key 2 in .* is not a P-256 key; .*curl.*{leak_reports.KEYS_URL}"
    )
    wrong = []
    for name, key in WRONG_KEYS.items():
        both = [entry("one", pem(SIGNER)), entry("two", key)]
        message = refusal(leak_reports.load, saved({"public_keys": both}))
        if not expected.search(message) or "PRIVATE" in message:
            wrong.append(f"{name}: {message}")
    assert not wrong, "\n".join(wrong)


def test_item_without_identifier_or_key_is_refused(saved: Any) -> None:
    items = [entry(identifier, pem(SIGNER)) for identifier in (None, "", 3, ["one"])]
    wrong = []
    for item in (*items, None, 1, "a", [], {}):
        message = refusal(leak_reports.load, saved({"public_keys": [item]}))
        if "public key 1" not in message:
            wrong.append(f"{item}: {message}")
    assert not wrong, "\n".join(wrong)


MALFORMED = {
    "empty": b"",
    "no JSON": b"<html>rate limited</html>",
    "not UTF-8": b'{"public_keys": ["\xff"]}',
    "a bomb": b'{"public_keys":' + b"[" * 200_000,
    "a list": b"[]",
    "null": b"null",
    "GitHub's error": b'{"message": "API rate limit exceeded"}',
    "no keys": b'{"public_keys": []}',
    "no list": b'{"public_keys": {"a": "b"}}',
}


def test_malformed_file_is_refused(saved: Any) -> None:
    wrong = []
    for name, content in MALFORMED.items():
        message = refusal(leak_reports.load, saved(content))
        if "has no public_keys; save it again: curl" not in message:
            wrong.append(f"{name}: {message}")
    assert not wrong, "\n".join(wrong)


def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "missing", r"can't be read \(No such file"),
        (tmp_path, r"can't be read \(Is a directory"),
        (tmp_path / "a name", r"curl -fsS -o '.*a name' https"),
    ):
        with pytest.raises(ValueError, match=says):
            leak_reports.load(str(path))


# is_genuine


def test_githubs_example(saved: Any) -> None:
    """The request that GitHub's documentation shows verifies with the keys of its time.

    Request: "Sample HTTP POST sent to verify endpoint" in github/docs,
    content/code-security/secret-scanning/secret-scanning-partnership-program/
    secret-scanning-partner-program.md. Its answer with the public keys:
    octokit/octokit.net, Octokit.Tests/Models/MetaPublicKeysTests.cs. The second request is the older
    example, proposed for the same page in github/docs pull request 18776, and signed with a key that
    had `is_current` false later: reports signed with it would have been lost, were such keys left out.
    """
    new = "bcb53661c06b4728e59d897fb6165d5c9cda0fd9cdf9d09ead458168deb7518c"
    old = "90a421169f0a406205f1563a953312f0be898d3c7b6c06b681aa86a874555f4a"
    armour = "-----{} PUBLIC KEY-----\n"
    published = {
        old: "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE9MJJHnMfn2+H4xL4YaPDA4RpJqUq\n"
        "kCmRCBnYERxZanmcpzQSXs1X/AljlKkbJ8qpVIW4clayyef9gWhFbNHWAA==\n",
        new: "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEYAGMWO8XgCamYKMJS6jc/qgvSlAd\n"
        "AjPuDPRcXU22YxgBrz+zoN19MzuRyW87qEt9/AmtoNP5GrobzUvQSyJFVw==\n",
    }
    answer = [
        entry(name, armour.format("BEGIN") + text + armour.format("END"), name == new)
        for name, text in published.items()
    ]
    keys = leak_reports.load(saved({"public_keys": answer}))

    body = (
        b'[{"source":"commit","token":"some_token","type":"some_type",'
        b'"url":"https://example.com/base-repo-url/"}]'
    )
    assert len(body) == 104  # the Content-Length shown
    signature = (
        "MEQCIQDaMKqrGnE27S0kgMrEK0eYBmyG0LeZismAEz/BgZyt7AIf"
        "Xt9fErtRS4XaeSt/AO1RtBY66YcAdjxji410VQV4xg=="
    )
    assert leak_reports.is_genuine(body, new, signature, keys)
    assert not leak_reports.is_genuine(body + b"\n", new, signature, keys)
    assert not leak_reports.is_genuine(body, old, signature, keys)
    assert leak_reports.parse(body) == [
        leak_reports.Leak("some_token", "some_type", "https://example.com/base-repo-url/", "commit")
    ]

    body = b'[{"token":"some_token","type":"some_type","url":"some_url"}]'
    signature = (
        "MEUCIQDKZokqnCjrRtw0tni+2Ltvl/uiMJ1EGumEsp1BsNr32AIg"
        "QY1YXD2nlj+XNfGK4rBfkMJ1JDOQcYXxa2sY8FNkrKc="
    )
    assert leak_reports.is_genuine(body, old, signature, keys)
    assert leak_reports.parse(body) == [
        leak_reports.Leak("some_token", "some_type", "some_url", "")
    ]


def test_signed_body_is_genuine() -> None:
    for body in (BODY, b"", b"\xff\x00", b"x" * 10**6):
        assert leak_reports.is_genuine(body, "one", sign(body), KEYS)
        assert leak_reports.is_genuine(body, "two", sign(body, OTHER), KEYS)


GOOD = sign(BODY)
RAW = base64.b64decode(GOOD)
BAD: dict[str, tuple[bytes, str, str]] = {
    "unknown identifier": (BODY, "three", GOOD),
    "no identifier": (BODY, "", GOOD),
    "identifier in other case": (BODY, "ONE", GOOD),
    "another's identifier": (BODY, "two", GOOD),
    "another key": (BODY, "one", sign(BODY, OTHER)),
    "a key not of the file": (BODY, "one", sign(BODY, ec.generate_private_key(ec.SECP256R1()))),
    "P-384": (BODY, "one", sign(BODY, P384)),
    "SHA-512": (BODY, "one", sign(BODY, digest=hashes.SHA512())),
    "a byte more": (BODY + b" ", "one", GOOD),
    "a byte less": (BODY[:-1], "one", GOOD),
    "a bit changed": (bytes([BODY[0] ^ 1]) + BODY[1:], "one", GOOD),
    "parsed and written again": (json.dumps(json.loads(BODY)).encode(), "one", GOOD),
    "no body": (b"", "one", GOOD),
    "no signature": (BODY, "one", ""),
    "no base64": (BODY, "one", "%%%"),
    "base64 with rubbish in it": (BODY, "one", GOOD[:8] + "!" + GOOD[8:]),
    "base64 cut short": (BODY, "one", GOOD.rstrip("=")[:-1]),
    "not ASCII": (BODY, "one", "é" + GOOD),
    "lone surrogate": (BODY, "one", "\ud800"),
    "garbage": (BODY, "one", base64.b64encode(b"garbage").decode()),
    "DER cut short": (BODY, "one", base64.b64encode(RAW[:-1]).decode()),
    "DER and more": (BODY, "one", base64.b64encode(RAW + b"\0").decode()),
    "r and s of 0": (BODY, "one", base64.b64encode(bytes.fromhex("3006020100020100")).decode()),
    "r and s of 1": (BODY, "one", base64.b64encode(bytes.fromhex("3006020101020101")).decode()),
    "r and s without DER": (BODY, "one", base64.b64encode(b"\1" * 64).decode()),
    "huge": (BODY, "one", "A" * 10**6),
}


def test_body_that_github_did_not_sign_is_not_genuine() -> None:
    assert [name for name, sent in BAD.items() if leak_reports.is_genuine(*sent, KEYS)] == []
    assert not leak_reports.is_genuine(BODY, "one", GOOD, {})


SIGNATURES = st.text() | st.binary().map(lambda raw: base64.b64encode(raw).decode())


@given(st.binary(), st.sampled_from(["one", "two"]) | st.text(), SIGNATURES)
def test_is_genuine_never_raises(body: bytes, identifier: str, signature: str) -> None:
    assert leak_reports.is_genuine(body, identifier, signature, KEYS) is False


@given(st.integers(0), st.integers(1, 255))
def test_changed_signature_or_body_is_not_genuine(position: int, change: int) -> None:
    def changed(text: bytes) -> bytes:
        place = position % len(text)
        return text[:place] + bytes([text[place] ^ change]) + text[place + 1 :]

    assert not leak_reports.is_genuine(BODY, "one", base64.b64encode(changed(RAW)).decode(), KEYS)
    assert not leak_reports.is_genuine(changed(BODY), "one", GOOD, KEYS)


# parse


def test_report_is_read() -> None:
    first, second = key_format.generate(), key_format.generate("dev")
    body = json.dumps(
        [
            {"token": first, "type": "a", "url": "https://example.com/x", "source": "content"},
            {"token": second, "type": "a", "url": "", "source": "npm", "later": {"more": 1}},
        ]
    ).encode()
    assert leak_reports.parse(body) == [
        leak_reports.Leak(first, "a", "https://example.com/x", "content"),
        leak_reports.Leak(second, "a", "", "npm"),
    ]
    assert leak_reports.parse(b" [ ] ") == []


def test_key_counts_without_its_place() -> None:
    for name, value in product(("url", "source"), ((), None, 5, ["x"])):
        (leak,) = leak_reports.parse(report(**{name: value}))
        assert (getattr(leak, name), leak.token) == ("", "t"), (name, value)


def test_match_needs_a_token_and_a_type() -> None:
    wrong = []
    for name, value in product(("token", "type"), ((), None, 5, "", ["x"])):
        message = refusal(leak_reports.parse, report(**{name: value}))
        if "Match 1 of the report has no token or no type" not in message:
            wrong.append(f"{name} {value}: {message}")
    good = {"token": "t", "type": "a"}
    for match in (None, 1, "text", [], {}):
        message = refusal(leak_reports.parse, json.dumps([good, match, good]).encode())
        if "Match 2 of" not in message:
            wrong.append(f"{match}: {message}")
    assert not wrong, "\n".join(wrong)


NO_LIST = {
    "empty": b"",
    "text": b"hello",
    "object": b'{"token": "t", "type": "a"}',
    "null": b"null",
    "a string": b'"t"',
    "two lists": b"[][]",
    "cut short": BODY[:-1],
    "not UTF-8": b'[{"token": "\xff", "type": "a"}]',
    "UTF-16": BODY.decode().encode("utf-16"),
    "UTF-8 with a mark": b"\xef\xbb\xbf" + BODY,
    "NUL": b"\0",
    "deep lists": b"[" * 500_000,
    "deep objects": b'[{"token":' * 300_000,
    "deep and closed": b"[" * 200_000 + b"]" * 200_000,
    "a number too long": b"[" + b"9" * 100_000 + b"]",
}


def test_text_that_is_no_list_of_matches_is_refused() -> None:
    match = {"token": "t", "type": "a", "url": "u", "source": "s"}
    assert (
        len(leak_reports.parse(json.dumps([match] * leak_reports.MAX_LEAKS).encode()))
        == leak_reports.MAX_LEAKS
    )
    counts = (leak_reports.MAX_LEAKS + 1, 100_000)
    too_long = {str(count): json.dumps([match] * count).encode() for count in counts}
    wrong = []
    for name, body in (NO_LIST | too_long).items():
        message = refusal(leak_reports.parse, body)
        if "A report is a JSON list of at most 1000" not in message:
            wrong.append(f"{name}: {message}")
    assert not wrong, "\n".join(wrong)


#: Texts of a report, and their form in the log.
LOGGED = {"type": "kind", "url": "url", "source": "source"}


def test_log_holds_no_key() -> None:
    key = key_format.generate()
    padding = "x" * (leak_reports.MAX_TEXT - 11)  # the limit falls into the key
    for text, logged in {
        f"https://example.com/?key={key}&x": "https://example.com/?key=hk_live_***&x",
        # Removing the unprintable characters would join these parts to a key.
        f"{key[:3]}\0{key[3:]}": "hk_live_***",
        f"{key[:20]}\u200b{key[20:]}": "hk_live_***",
        "https://a/" + key.replace("_", "%5F"): "https://a/hk_live_***",
        padding + key: padding + "hk_live_***",
    }.items():
        for name, field in LOGGED.items():
            (leak,) = leak_reports.parse(report(**{name: text}))
            assert getattr(leak, field) == logged, name


def test_logged_text_is_short_and_printable() -> None:
    for name, field in LOGGED.items():
        (leak,) = leak_reports.parse(
            report(**{name: "a\r\nb\x1b[31m\u202ec\ud800é " + "x" * 10_000})
        )
        logged = getattr(leak, field)
        assert logged.startswith("ab[31mcé xxx"), name
        assert len(logged) == leak_reports.MAX_TEXT and logged.isprintable(), name


def test_leak_does_not_show_its_token() -> None:
    key = key_format.generate()
    (leak,) = leak_reports.parse(report(token=key))
    assert leak.token == key
    assert key not in repr(leak) and key not in str(leak) and key not in f"{[leak]}"


def test_error_does_not_show_the_token() -> None:
    key = key_format.generate()
    for tail in (b"", b"]]", b',{"token": 1}]', b"\xff"):
        with pytest.raises(ValueError) as caught:
            leak_reports.parse(report(token=key)[:-1] + tail)
        # The cause must not hold it either: error reporters show causes, too.
        assert caught.value.__cause__ is None and caught.value.__context__ is None, tail
        assert key not in repr(caught.value), tail


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.sampled_from(["token", "type", "url", "source"]) | st.text(), inner)
    ),
)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
@example(BODY)
@example(rb'[{"token":"\ud800","type":"\u0000","url":"\ud83d"}]')
def test_parse_raises_nothing_but_value_error(body: bytes) -> None:
    try:
        found = leak_reports.parse(body)
    except ValueError as error:
        assert type(error) is ValueError
        return
    for leak in found:
        for text in (leak.kind, leak.url, leak.source):
            assert len(text) <= leak_reports.MAX_TEXT
            assert text.isprintable()
        json.dumps(leak_reports.feedback(leak, False)).encode("ascii")


# feedback


def test_feedback_names_the_key_by_its_digest_alone() -> None:
    key = key_format.generate()
    (leak,) = leak_reports.parse(report(token=key))
    assert leak_reports.feedback(leak, True) == {
        "token_hash": hashlib.sha256(key.encode()).hexdigest(),
        "token_type": "hokusai_api_key",
        "label": "true_positive",
    }
    assert leak_reports.feedback(leak, False)["label"] == "false_positive"
    (leak,) = leak_reports.parse(report(token=key, type=key, url=key, source=key))
    assert key not in json.dumps(
        [leak_reports.feedback(leak, True), leak_reports.feedback(leak, False)]
    )


# PATTERN


def older(length: int, environment: str = "live") -> str:
    return f"hk_{environment}_" + "".join(random.choices(BASE62, k=length))


def test_pattern_finds_every_key_and_all_of_it() -> None:
    for _ in range(500):
        for environment in key_format.ENVIRONMENTS:
            for key in (
                key_format.generate(environment),
                older(32, environment),
                older(40, environment),
            ):
                assert key_format.importable(key)
                for text in (f"{key}", f'"{key}"', f"K={key}\n", f"\\n{key}\\n", f"%3D{key}%26é"):
                    assert PATTERN.findall(text) == [key]
                assert PATTERN.findall(f"{key} {key},é{key}é") == [key] * 3


def test_pattern_finds_no_part_of_something_else() -> None:
    key = key_format.generate()
    body = key.removeprefix("hk_live_")
    others = [body, f"hk_prod_{body}", f"HK_LIVE_{body}", key.replace("_", "-"), f"hk_{body}"]
    others += [older(length) for length in set(range(60)) - {32, 40, 46}]
    assert [text for text in others if PATTERN.search(text)] == []


@given(st.from_regex(PATTERN, fullmatch=True))
def test_match_is_importable_but_for_its_checksum(text: str) -> None:
    exchanged = text.startswith("hk_ci_") and key_format.problem(text) is None
    if exchanged or key_format.importable(text):
        return
    body = text.split("_", 2)[2]
    assert len(body) == 46
    assert key_format.checksum(body[:40]) != body[40:]


def test_pattern_is_one_that_hyperscan_takes() -> None:
    """Hyperscan's reference ("Pattern Support") excludes lookaround, backreferences, atomic groups,
    possessive quantifiers and conditions. The pattern was tried once with Hyperscan 5.4 itself."""
    assert leak_reports.PATTERN.isascii()
    assert set(re.findall(r"\(\?.", leak_reports.PATTERN)) == {"(?:"}
    assert set(re.findall(r"\\.", leak_reports.PATTERN)) == {r"\b"}
    assert not re.search(r"[*+?}][+?]", leak_reports.PATTERN)

"""Keys: the format, its checksum, and that no edit of a key passes for it."""

from __future__ import annotations

import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mlflow_hokusai_auth.core import keys

from .rows import agree

BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
OLD = "hk_live_" + "a" * 32
GENERATED = st.sampled_from([keys.generate(name) for name in keys.ENVIRONMENTS for _ in range(5)])


def test_the_checksum_is_githubs() -> None:
    # GitHub's article has this example: the token zQWBuTSOoRi4A9spHcVY5ncnsDkxkJ0mLq17.
    assert keys.checksum("zQWBuTSOoRi4A9spHcVY5ncnsDkxkJ") == "0mLq17"


@given(st.text(st.characters(max_codepoint=127)))
def test_a_checksum_is_always_six_characters(text: str) -> None:
    assert len(keys.checksum(text)) == 6
    assert set(keys.checksum(text)) <= set(BASE62)


def test_generated_keys() -> None:
    for environment in keys.ENVIRONMENTS:
        key = keys.generate(environment)
        prefix, made_for, body = key.split("_")
        assert (prefix, made_for, len(body)) == ("hk", environment, 46)
        assert keys.checksum(body[:40]) == body[40:]
        assert keys.problem(key) is None
        assert keys.importable(key)
        assert keys.environment(key) == environment


def test_generated_keys_differ_in_every_character() -> None:
    columns = zip(*(keys.generate()[8:48] for _ in range(200)), strict=True)
    assert all(len(set(column)) > 20 for column in columns)


def test_there_are_no_other_environments() -> None:
    for environment in ("", "prod", "LIVE", "live_"):
        with pytest.raises(ValueError, match="live, test, dev"):
            keys.generate(environment)


# Edits


@st.composite
def edits(draw: st.DrawFn) -> tuple[str, str]:
    """Draw a key, and a copy with one character changed, added, removed, swapped or in other case."""
    key = draw(GENERATED)
    at = draw(st.integers(0, len(key) - 1))
    other = draw(st.sampled_from(BASE62 + "_- \x00é\n"))
    edited = draw(
        st.sampled_from(
            [
                key[:at] + other + key[at + 1 :],
                key[:at] + other + key[at:],
                key + other,
                key[:at] + key[at + 1 :],
                key[:at] + key[at + 1 : at + 2] + key[at] + key[at + 2 :],
                key[:at] + key[at].swapcase() + key[at + 1 :],
            ]
        )
    )
    assume(edited != key)
    return key, edited


@given(edits())
def test_no_edit_of_a_key_passes_for_it(pair: tuple[str, str]) -> None:
    key, edited = pair
    assert keys.problem(edited) is not None or keys.digest(edited) != keys.digest(key)
    # It can't be imported by mistake either, except for one in 2**32 with the right checksum.
    assert not keys.importable(edited)


@given(GENERATED, st.integers(8, 52), st.sampled_from(BASE62))
def test_key_with_a_changed_character_needs_no_lookup(key: str, at: int, other: str) -> None:
    assume(other != key[at])
    assert "checksum" in str(keys.problem(key[:at] + other + key[at + 1 :]))


@given(GENERATED, st.integers(8, 46))
def test_key_with_swapped_characters_needs_no_lookup(key: str, at: int) -> None:
    assume(key[at] != key[at + 1])
    turned = key[:at] + key[at + 1] + key[at] + key[at + 2 :]
    assert "checksum" in str(keys.problem(turned))


# Shapes


LONG = ["a" * 257, "a" * 65536]
ODD = ["", *(f"hk_live_abc{odd}" for odd in " \t\r\n\0\x7f,;:=+/.%\"'é\xa0ª²")]
ODD += ["hk_live_\u0661\u0662", "hk_live_abc\n", "\ud800"]


def test_impossible_key_is_refused() -> None:
    for word, texts in (("longer", LONG), ("characters", ODD)):
        for text in texts:
            assert word in str(keys.problem(text)), ascii(text)
            assert not keys.importable(text), ascii(text)


def test_key_of_another_form_may_be_another_authority_s() -> None:
    for key in ("a", "a" * 256, OLD, "hk_live_", "other-authority_KEY-1"):
        assert keys.problem(key) is None, key


def test_store_imports_old_and_new_forms_only() -> None:
    for key in (OLD, OLD + "b" * 8, "hk_dev_" + "Z" * 32, "hk_test_" + "0" * 40):
        assert keys.importable(key), key
    length = [OLD[:-1], OLD + "b", OLD + "b" * 14, OLD + "\n", "hk_live_" + "a" * 31 + "_", ""]
    for text in (*length, "hk_prod_" + "a" * 32, "HK_live_" + "a" * 32, "xhk_live_" + "a" * 32):
        assert not keys.importable(text), text


@given(st.text())
def test_any_text_has_a_digest_and_a_verdict(text: str) -> None:
    assert len(keys.digest(text)) == 64
    keys.problem(text)


def test_the_digest_is_sha256() -> None:
    assert keys.digest("abc").startswith("ba7816bf8f01cfea414140de5dae2223b00361a396177a9c")


# Redaction


@given(GENERATED, st.text(), st.text())
def test_no_key_is_left_in_a_text(key: str, before: str, after: str) -> None:
    assert key[8:] not in keys.redact(before + key + after)


def test_redaction_keeps_the_rest() -> None:
    rows = [
        (f"X-API-Key: {OLD}, next", "X-API-Key: hk_live_***, next"),
        (f"/a?x={OLD}&y={OLD}", "/a?x=hk_live_***&y=hk_live_***"),
        ("hk_dev_abcd/hk_test_abcd", "hk_dev_***/hk_test_***"),
        ("hk_live_ is a prefix", "hk_live_ is a prefix"),
        ("hk_session_AbC-d_9, next", "hk_session_***, next"),
        ("hk%5Fsession%5FAbC-d_9", "hk_session_***"),
        ("HK_Session_AbCd", "hk_Session_***"),
        ("__Host-hokusai_session=x", "__Host-hokusai_session=x"),
        ("nothing", "nothing"),
        ("", ""),
    ]
    agree(keys.redact, rows)


# Sessions


def test_a_session_s_token_is_no_key_and_no_key_is_one() -> None:
    tokens = {keys.session_token() for _ in range(100)}
    assert len(tokens) == 100
    for token in tokens:
        # The token is 256 bits in base64url, whose characters a cookie may have.
        assert len(token) == len("hk_session_") + 43
        assert keys.is_session_token(token)
        assert keys.problem(token) is None
        assert not keys.importable(token)
        assert token[11:] not in keys.redact(f"hokusai_session={token}; x=1")
    for key in (OLD, keys.generate(), "hk_sessio", "", "xhk_session_a", "HK_SESSION_a"):
        assert not keys.is_session_token(key)


@given(st.text())
def test_no_session_is_left_in_a_text(around: str) -> None:
    token = keys.session_token()
    assert token[11:] not in keys.redact(f"{around}{token}{around}")


def test_code_of_a_link_is_read_from_the_link_and_is_no_key() -> None:
    code = keys.link_code()
    for text in (
        code,
        f" {code}\n",
        f"https://registry.example.com/hokusai/link#{code}",
        f"#{code}",
    ):
        assert keys.link_code_in(text) == code, text
    for text in (
        code[:-1],
        f"{code}x",
        f"{code} x",
        f"{code}#",
        "",
        "#",
        keys.generate(),
        f"x{code}",
    ):
        assert keys.link_code_in(text) is None, text
    assert "one-time link" in str(keys.problem(code))
    assert code not in keys.redact(f"https://registry.example.com/hokusai/link#{code}")

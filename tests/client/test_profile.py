"""The sources of the key, and the origins that may get it."""

from __future__ import annotations

import os
from pathlib import Path

import mlflow
import pytest
import requests
from hypothesis import example, given, settings
from hypothesis import strategies as st
from urllib3.util import parse_url

from mlflow_hokusai_auth.client import origin_guard, profile
from mlflow_hokusai_auth.core import keys


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture
def hokusai(clean_environment: Path) -> Path:
    return clean_environment / ".hokusai"


def test_no_key_and_no_warning_if_nothing_is_configured(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert profile.api_key() is None
    assert not caplog.text


def test_sources_have_an_order(
    hokusai: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_env, in_file, in_profile, in_config = (keys.generate() for _ in range(4))
    before = dict(os.environ)
    write(hokusai / "config", f"[default]\napi_endpoint = https://x/%s\napi_key = {in_config}\n")
    assert profile.api_key() == in_config
    assert dict(os.environ) == before

    write(hokusai / "profiles", f"[a]\napi_key = {in_profile}\n[b]\napi_key = 50%\n")
    monkeypatch.setenv("HOKUSAI_PROFILE", "a")
    assert profile.api_key() == in_profile

    monkeypatch.setenv("HOKUSAI_API_KEY_FILE", str(write(tmp_path / "key", f" {in_file}\r\n")))
    assert profile.api_key() == in_file

    monkeypatch.setenv("HOKUSAI_API_KEY", f"\t{in_env}\n")
    assert profile.api_key() == in_env

    monkeypatch.setenv("HOKUSAI_API_KEY", "  ")
    assert profile.api_key() == in_file


def test_changed_files_are_read_again(
    hokusai: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "key"
    monkeypatch.setenv("HOKUSAI_API_KEY_FILE", str(path))
    for age in (0, 3600):
        for _ in range(5):
            made = keys.generate()
            write(path, made)
            os.utime(path, (path.stat().st_mtime - age,) * 2)
            assert profile.api_key() == made == profile.api_key()
    # The file changes twice within one tick of the file system's clock.
    made = keys.generate()
    os.utime(path)
    profile.api_key()
    before = path.stat()
    write(path, made)
    os.utime(path, ns=(before.st_mtime_ns,) * 2)
    assert profile.api_key() == made
    # Kubernetes and editors replace the file by another one, which may have the same time.
    made = keys.generate()
    replacement = write(tmp_path / "new", made)
    os.utime(replacement, ns=(path.stat().st_mtime_ns,) * 2)
    replacement.rename(path)
    assert profile.api_key() == made


def test_unchanged_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "key", keys.generate())
    os.utime(path, (1, 1))
    monkeypatch.setenv("HOKUSAI_API_KEY_FILE", str(path))
    assert profile.api_key() is profile.api_key()


def test_unsendable_key_is_neither_used_nor_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    good = keys.generate()
    for damage in ("\r\n", "\n", " ", "\0", "\x1b[1m", "é", '"', ", "):
        caplog.clear()
        profile._warned.clear()
        bad = good[:20] + damage + good[20:]
        with monkeypatch.context() as patch:
            patch.setenv("HOKUSAI_API_KEY_FILE", str(write(tmp_path / "key", bad)))
            if "\0" not in damage:
                patch.setenv("HOKUSAI_API_KEY", bad)
            assert profile.api_key() is None, repr(damage)
            assert profile.api_key() is None, repr(damage)
        assert len(caplog.records) == 1, repr(damage)
        assert "HOKUSAI_API_KEY" in caplog.text
        assert good[:20] not in caplog.text and good[20:] not in caplog.text, repr(damage)


def test_unusable_source_warns_once_and_no_later_one_is_used(
    hokusai: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = keys.generate()
    write(hokusai / "config", f"[default]\napi_key = {made}\n")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for variable, value, reason in (
        ("HOKUSAI_API_KEY_FILE", str(tmp_path / "absent"), "does not exist"),
        ("HOKUSAI_API_KEY_FILE", made, "does not exist"),
        ("HOKUSAI_API_KEY_FILE", str(tmp_path), "is not a regular file"),
        ("HOKUSAI_API_KEY_FILE", str(pipe), "is not a regular file"),
        ("HOKUSAI_API_KEY_FILE", str(write(tmp_path / "empty", "\n")), "is empty"),
        ("HOKUSAI_API_KEY_FILE", str(write(tmp_path / "big", b"a" * 70_000)), "is larger than"),
        ("HOKUSAI_API_KEY_FILE", str(write(tmp_path / "bin", b"\xff\xfe")), "UnicodeDecodeError"),
        ("HOKUSAI_PROFILE", "absent", "does not exist"),
        ("HOKUSAI_PROFILE", "none", "has no section"),
        ("HOKUSAI_PROFILE", "bare", "has no api_key"),
    ):
        if value == "none":
            write(hokusai / "profiles", "[bare]\nother = 1\n")
        caplog.clear()
        profile._warned.clear()
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            assert profile.api_key() is None
            assert profile.api_key() is None
        assert [reason in record.getMessage() for record in caplog.records] == [True], value
        assert made not in caplog.text
    assert profile.api_key() == made


def test_malformed_config_is_not_quoted(hokusai: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = keys.generate()
    write(hokusai / "config", f"api_key = {made}\n")
    assert profile.api_key() is None
    assert "~/.hokusai/config cannot be parsed" in caplog.text
    assert made not in caplog.text


def test_without_home_no_key(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for home in ("/nowhere", ""):
        monkeypatch.setenv("HOME", home)
        assert profile.api_key() is None
        assert not caplog.text


REG = "https://reg.example.com"
#: Tracking URI, and a URL that the key may be sent to.
SENT = [
    (f"{REG}/api/mlflow", f"{REG}/api/2.0/x"),
    (f"{REG}/api/mlflow", f"{REG}:443"),
    (f"{REG}/api/mlflow", "HTTPS://REG.Example.com:0443/x"),
    (f"{REG}/api/mlflow", f"{REG}?x=1"),
    (f"{REG}/api/mlflow", "https://user:pw@reg.example.com/x"),
    ("https://u:p@reg.example.com", f"{REG}/x"),
    ("http://127.0.0.1:5000", "http://127.0.0.1:5000/x"),
    ("http://127.9.9.9:5000", "http://127.9.9.9:5000/x"),
    ("http://localhost:5000", "http://LOCALHOST:5000/x"),
    ("http://[::1]:5000", "http://[0:0::1]:5000/x"),
    ("https://xn--bcher-kva.example", "https://xn--bcher-kva.example/x"),
]
#: Tracking URI, and a URL that it may not be sent to.
KEPT_BACK = [
    *[
        (REG, url)
        for url in (
            "http://reg.example.com/x", f"{REG}:8443/x", f"{REG}./x", f"{REG}.evil.com/x",
            f"{REG}@evil.com/x", "https://evil.com\\@reg.example.com/x",
            "https://evil.com#@reg.example.com/x", "https://evil.com?@reg.example.com/x",
            "https://a@b@reg.example.com/x", f"{REG}\t.evil.com", f"{REG}\n", f" {REG}",
            "//reg.example.com", "ftp://reg.example.com", f"{REG}:99999", "", "https://reg.exampleͺ.com",
        )
    ],
    *[
        (url, f"{url}{path}")  # even if it is MLflow's tracking URI
        for url in (
            "http://reg.example.com", "http://[::2]:5000", "http://[::ffff:127.0.0.1]:5000",
            "http://127.0.0.1.evil.com", "http://localhost@evil.com", "http://localhost.evil.com",
            "http://2130706433", "http://127.1", "http://127.0.0.1:0", "http://0.0.0.0:5000",
            "https://bücher.example",
        )
        for path in ("", "/x")
    ],
    ("http://localhost:5000", "http://127.0.0.1:5000/x"),
    ("https://token.example", "https://to\u212aen.example/x"),
    ("databricks", REG),
    ("sqlite:///mlflow.db", REG),
]  # fmt: skip


def test_origin_of_the_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = []
    for allowed, pairs in ((True, SENT), (False, KEPT_BACK)):
        for tracking, url in pairs:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
            if profile.origin_allowed(url) is not allowed:
                wrong.append(f"{url!r} by {tracking}: {not allowed}")
    assert not wrong, "allowed wrongly:\n" + "\n".join(wrong)


def test_key_for_this_machine_is_not_sent_to_a_proxy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = "http://proxy.example:3128"
    for environ, allowed in (
        ({}, True),
        ({"HTTP_PROXY": proxy}, False),
        ({"all_proxy": proxy}, False),
        ({"http_proxy": proxy, "NO_PROXY": "other.example"}, False),
        ({"http_proxy": proxy, "NO_PROXY": "localhost,127.0.0.1"}, True),
        ({"https_proxy": proxy}, True),
    ):
        profile._warned.clear()
        with monkeypatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            for url in ("http://localhost:5000", "http://127.0.0.1:5000"):
                caplog.clear()
                patch.setenv("MLFLOW_TRACKING_URI", url)
                assert origin_guard.may_send(f"{url}/x", "hk_live_x") is allowed, (environ, url)
                warned = "Add localhost,127.0.0.1,::1 to NO_PROXY" in caplog.text
                assert warned is not allowed, (environ, url)
            patch.setenv("MLFLOW_TRACKING_URI", "https://tracking.example.com")
            assert origin_guard.may_send("https://tracking.example.com/x", "hk_live_x"), environ


def test_registry_counts_only_beside_a_tracking_uri_that_is_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "https://registry.example.com/api/mlflow")
    mlflow.set_tracking_uri("https://tracking.example.com")
    assert profile.origin_allowed("https://tracking.example.com/x")
    assert not profile.origin_allowed("https://registry.example.com/x")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    assert profile.origin_allowed("https://registry.example.com/x")


def test_allowed_origins_is_the_exact_list(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracking.example.com")
    monkeypatch.setenv(
        "HOKUSAI_ALLOWED_ORIGINS",
        "http://plain.example.com:8080, https://a.example.com/api/mlflow,*,b.example.com,",
    )
    assert profile.origin_allowed("http://plain.example.com:8080/x")
    assert profile.origin_allowed("https://a.example.com/x")
    assert not profile.origin_allowed("http://plain.example.com/x")
    assert not profile.origin_allowed("https://b.example.com/x")
    assert not profile.origin_allowed("https://tracking.example.com/x")
    assert [record.getMessage()[:7] for record in caplog.records] == ["Entry 3", "Entry 4"]
    monkeypatch.setenv("HOKUSAI_ALLOWED_ORIGINS", ",")
    assert not profile.allowed_origins()
    monkeypatch.setenv("HOKUSAI_ALLOWED_ORIGINS", " ")
    assert profile.origin_allowed("https://tracking.example.com/x")


ALLOWED = "https://good.example,http://good.example:8080,http://[::1]:1,http://127.0.0.1"
PIECES = st.one_of(
    st.sampled_from(["https://", "http://", "HTTP://", "http:/", "good.example", "evil.example"]),
    st.sampled_from(["127.0.0.1", "[::1]", "[", "]", "127.1", "localhost", ":8080", ":443", ":0"]),
    st.sampled_from(["//", "%40", "%2e", "%00", "user", "a:b", "xn--", ".."]),
    st.sampled_from("/?#@:\\.%;&=-_* \t\n\r\0\u00ad。ſｇßⓔ"),
)
URLS = st.one_of(
    st.lists(PIECES, max_size=10).map("".join),
    st.tuples(
        st.sampled_from(["http://", "https://"]), st.lists(PIECES, max_size=4).map("".join)
    ).map("".join),
    st.tuples(
        st.sampled_from(
            ["http://good.example", "https://good.example", "http://good.example:8080"]
        ),
        st.lists(PIECES, max_size=4).map("".join),
        st.text(max_size=4),
    ).map("".join),
)


@given(URLS)
@example("http://good.example:0")
@example("https://good.example\\@evil.example")
@settings(max_examples=1000, deadline=None)
def test_requests_connects_to_the_allowed_origin(url: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOKUSAI_ALLOWED_ORIGINS", ALLOWED)
        if not profile.origin_allowed(url):
            return
    try:
        prepared = requests.Request("GET", url, params={"path": "a"}).prepare()
    except requests.exceptions.RequestException:
        return
    assert prepared.url is not None
    goes_to = parse_url(prepared.url)
    assert (goes_to.scheme, goes_to.host, goes_to.port) in {
        ("https", "good.example", None),
        ("https", "good.example", 443),
        ("http", "good.example", 8080),
        ("http", "[::1]", 1),
        ("http", "127.0.0.1", None),
        ("http", "127.0.0.1", 80),
    }

"""`hokusai-auth whoami` and `doctor` name every failure and its fix."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import mlflow
import pytest
import time_machine
from click.testing import CliRunner, Result
from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from mlflow.tracking.request_header.abstract_request_header_provider import RequestHeaderProvider
from mlflow.tracking.request_header.registry import _request_header_provider_registry

from mlflow_hokusai_auth.cli import supplier
from mlflow_hokusai_auth.client.diagnose import doctor, mistakes
from mlflow_hokusai_auth.client.header_provider import HokusaiHeaderProvider
from mlflow_hokusai_auth.core import keys
from tests.client.test_admin import PREFIX, Api, answering

ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
NAMES = [
    "key",
    "other credentials",
    "header providers",
    "tracking URI",
    "origin",
    "plugin",
    "server",
    "key accepted",
    "scope",
    "artifact path",
    "clock",
    "expiry",
    "other ways",
]
IDENTITY = {
    "key_id": "key_1",
    "owner": "ACME",
    "name": "laptop",
    "scopes": ["model:write"],
    "can": ["read", "register"],
    "expires_at": None,
    "deprecated_at": None,
    "networks": [],
    "rate_limit": None,
    "models": [],
    "no_delete": False,
    "default_experiment": None,
}
DAY = 86400


@pytest.fixture
def api(key: str) -> Iterator[Api]:
    """A server that passes every check."""
    with answering() as running:
        running.answers["GET /health"] = (200, b"OK")
        running.on("GET whoami", 200, IDENTITY)
        running.answers[f"GET {ARTIFACTS}"] = (200, {"files": []})
        mlflow.set_tracking_uri(running.uri)
        yield running


@pytest.fixture(autouse=True)
def no_key_is_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The output of the commands, which must hold no key."""
    printed: list[str] = []
    yield printed
    for text in printed:
        assert key not in text and key[8:] not in text


@pytest.fixture
def run(no_key_is_shown: list[str]) -> Any:
    def run(*arguments: str) -> Result:
        command = {"whoami": supplier.whoami, "doctor": supplier.doctor}[arguments[0]]
        result = CliRunner().invoke(command, arguments[1:])
        no_key_is_shown.append(result.output)
        return result

    return run


@pytest.fixture
def failure(run: Any) -> Any:
    """Run the doctor and return its only failure: name, found, fix, and the verdicts by check."""

    def failure() -> tuple[str, str, str, dict[str, bool | None]]:
        result = run("doctor", "--json")
        answer = json.loads(result.stdout)
        checks = answer["checks"]
        assert answer["ok"] is False
        assert [check["check"] for check in checks] == NAMES
        (bad,) = [check for check in checks if check["ok"] is False]
        assert result.exit_code == 1
        # A failure has a fix, and a skipped check says why.
        assert bad["fix"]
        for check in checks:
            assert check["ok"] is not None or "not checked" in check["found"]
        verdicts = {check["check"]: check["ok"] for check in checks}
        return bad["check"], bad["found"], bad["fix"], verdicts

    return failure


@pytest.fixture
def retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow retries its requests once (by default seven times, over minutes)."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")


def skipped(verdicts: dict[str, bool | None]) -> list[str]:
    return [name for name, ok in verdicts.items() if ok is None]


def test_default_experiment_has_a_line_only_if_the_server_names_one(api: Api, run: Any) -> None:
    for name in (None, "", "default:ACME"):
        api.on("GET whoami", 200, {**IDENTITY, "default_experiment": name})
        last = run("doctor").stdout.splitlines()[-1]
        assert ("default experiment" in last) is bool(name)
    assert last == "ok    default experiment: runs that name no experiment go to default:ACME"


def test_every_check_passes(api: Api, key: str, run: Any) -> None:
    result = run("doctor")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line[:6] for line in lines] == ["ok    "] * len(NAMES)
    assert [line[6:].split(": ")[0] for line in lines] == NAMES
    assert "in HOKUSAI_API_KEY, for test" in lines[0]
    assert "ms" in lines[6] and "key_1 of ACME" in lines[7] and "register" in lines[8]
    assert f"{PREFIX}{ARTIFACTS} answered 200" in lines[9]
    # Only the requests that need the key carry it.
    health, whoami, artifacts = api.asked
    assert health.path == f"{PREFIX}/health" and "x-api-key" not in health.headers
    assert whoami.headers["x-api-key"] == artifacts.headers["x-api-key"] == key
    assert artifacts.path == PREFIX + ARTIFACTS


def test_failure_has_two_lines_and_dependent_checks_are_skipped(
    api: Api, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOKUSAI_API_KEY")
    result = run("doctor")
    assert result.exit_code == 1
    assert result.stdout.startswith(
        "FAIL  key: none is configured\n"
        "      fix: Set HOKUSAI_API_KEY to the key that you were given.\n"
        'skip  other credentials: not checked, as "key" did not pass\n'
        'skip  header providers: not checked, as "key" did not pass\n'
        "ok    tracking URI: "
    )
    assert 'skip  key accepted: not checked, as "key" did not pass\n' in result.stdout
    assert [asked.path for asked in api.asked] == [f"{PREFIX}/health"]


def write(home: Path, name: str, text: str) -> None:
    (home / ".hokusai").mkdir(exist_ok=True)
    (home / ".hokusai" / name).write_text(text)


def test_source_of_the_key_is_named(
    api: Api, run: Any, clean_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOKUSAI_API_KEY")
    # From the source with the lowest precedence to the one with the highest.
    for source, value, environment, name, text in (
        ("~/.hokusai/config", "", "live", "config", "[default]\napi_key = {}\n"),
        ("HOKUSAI_PROFILE", "mine", "dev", "profiles", "[mine]\napi_key = {}\n"),
        ("HOKUSAI_API_KEY_FILE", "~/.hokusai/key", "test", "key", "{}\n"),
    ):
        key = keys.generate(environment)
        write(clean_environment, name, text.format(key))
        if value:
            monkeypatch.setenv(source, value)
        result = run("doctor")
        assert result.exit_code == 0
        first = result.stdout.splitlines()[0]
        assert source in first and first.endswith(f", for {environment}")
        assert key[10:] not in result.output


def test_unusable_source_fails(api: Api, failure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOKUSAI_API_KEY")
    monkeypatch.setenv("HOKUSAI_API_KEY_FILE", "/nowhere/key")
    name, found, fix, verdicts = failure()
    assert (name, fix) == ("key", "Correct that, or set HOKUSAI_API_KEY to the key.")
    assert "the file named by HOKUSAI_API_KEY_FILE does not exist" in found
    assert skipped(verdicts) == [
        "other credentials", "header providers", "key accepted", "scope", "artifact path", "expiry",
        "other ways",
    ]  # fmt: skip


def test_damaged_key_fails(
    api: Api, key: str, failure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped = "a" if key[20] != "a" else "b"
    for at, put, why in (
        (20, swapped, "checksum"),
        (20, " ", "characters"),
        (30, "\n", "characters"),
    ):
        damaged = key[:at] + put + key[at + 1 :]
        monkeypatch.setenv("HOKUSAI_API_KEY", damaged)
        name, found, fix, verdicts = failure()
        assert (name, fix) == ("key", "Copy the whole key again.")
        assert found.startswith("in HOKUSAI_API_KEY, but") and why in found
        assert damaged[8:20] not in found
        assert verdicts["key accepted"] is None


def test_other_credentials_are_judged(
    api: Api, key: str, failure: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = keys.generate("test")
    for name in ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        with monkeypatch.context() as patch:
            patch.setenv(name, key)
            assert run("doctor").exit_code == 0
            patch.setenv(name, other)
            check, found, fix, _ = failure()
            assert (check, fix) == ("other credentials", f"Unset {name}.")
            assert name in found and other[8:] not in found
            # The server ignores a credential for another layer.
            patch.setenv(name, "something-else")
            line = run("doctor").stdout.splitlines()[1]
            beside = "not a key, so the server ignores it beside the key"
            assert line == f"ok    other credentials: {name}: {beside}"
            # If neither has our prefix, the server can't tell which is the key.
            patch.setenv("HOKUSAI_API_KEY", "key-of-another-form")
            check, found, fix, _ = failure()
        assert (check, fix) == ("other credentials", f"Unset {name}.")


def test_netrc_password_is_judged(
    api: Api, key: str, failure: Any, run: Any, clean_environment: Path
) -> None:
    uri = urlparse(api.uri)
    netrc = clean_environment / ".netrc"

    def in_netrc(password: str) -> None:
        netrc.write_text(f"machine {uri.hostname} login me password {password}\n")

    def in_uri(password: str) -> None:
        netrc.unlink(missing_ok=True)
        mlflow.set_tracking_uri(uri._replace(netloc=f"me:{password}@{uri.netloc}").geturl())

    sent = "; ~/.netrc has one for this host, which is sent as a Basic password"
    for place, put, end in (("~/.netrc", in_netrc, sent), ("MLFLOW_TRACKING_URI", in_uri, "")):
        for password, text in (
            (key, "none that differs from the key"),
            ("proxy", f"{place}: not a key, so the server ignores it beside the key"),
        ):
            put(password)
            line = run("doctor").stdout.splitlines()[1]
            assert line == f"ok    other credentials: {text}{end}"
        other = keys.generate("test")
        put(other)
        check, found, fix, _ = failure()
        assert check == "other credentials", place
        assert place in found and place in fix and other[8:] not in found


def test_opentelemetry_exporter_without_the_key_fails(
    api: Api, key: str, failure: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for signal in ("", "TRACES_", "METRICS_"):
        endpoint, headers = (f"OTEL_EXPORTER_OTLP_{signal}{end}" for end in ("ENDPOINT", "HEADERS"))
        with monkeypatch.context() as patch:
            patch.setenv(endpoint, "https://collector.example.com")
            assert run("doctor").exit_code == 0, endpoint
            patch.setenv(endpoint, api.uri)
            check, found, fix, _ = failure()
            assert check == "other ways" and endpoint in found and headers in fix
            patch.setenv(headers, f"x-api-key={key}")
            assert run("doctor").exit_code == 0, headers


def test_other_header_providers_are_judged(
    api: Api, key: str, failure: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets: dict[str, str] = {}

    class Own(RequestHeaderProvider):
        def in_context(self) -> bool:
            return True

        def request_headers(self) -> dict[str, str]:
            if "fails" in sets:
                raise ValueError
            return sets

    registered = [*_request_header_provider_registry, Own()]
    monkeypatch.setattr(_request_header_provider_registry, "_registry", registered)
    name = f"{__name__}.Own"
    for headers, text in (
        ({}, "sets nothing now"),
        ({"X-API-Key": key}, "sets X-API-Key"),
        ({"X-Team": "a", "Authorization": "Bearer eyJ.eyJ.x"}, "sets X-Team, Authorization"),
        ({"fails": ""}, "fails (ValueError), so MLflow skips it"),
    ):
        sets.clear()
        sets.update(headers)
        result = run("doctor")
        assert result.exit_code == 0
        assert result.stdout.splitlines()[2] == f"ok    header providers: {name} {text}"
    for header, value in (
        ("X-API-Key", keys.generate("test")),
        ("x-api-key", "another-system-s"),
        ("Authorization", f"Bearer {keys.generate('test')}"),
    ):
        sets.clear()
        sets[header] = value
        check, found, fix, _ = failure()
        assert check == "header providers"
        assert f"{name} sets {header}" in found and f"Remove {header} of {name}" in fix
        assert value[8:] not in found + fix


def test_tracking_uri_without_a_server_fails(
    api: Api, failure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    for uri in ("sqlite:///mlflow.db", "./mlruns", "databricks"):
        mlflow.set_tracking_uri(uri)
        name, _, fix, verdicts = failure()
        assert name == "tracking URI", uri
        assert "Set MLFLOW_TRACKING_URI to the URL of the server, such as https://" in fix
        assert skipped(verdicts) == NAMES[4:5] + NAMES[6:]
        assert sorted(tmp_path.iterdir()) == before, uri


def test_origin_not_on_the_list_fails(
    api: Api, failure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOKUSAI_ALLOWED_ORIGINS", "https://registry.example.com")
    name, found, fix, verdicts = failure()
    assert name == "origin"
    assert f"X-API-Key is not sent to {api.origin}" in found
    assert fix == f"If the key belongs there, add {api.origin} to the list."
    assert skipped(verdicts) == ["key accepted", "scope", "artifact path", "expiry", "other ways"]
    assert [asked.path for asked in api.asked] == [f"{PREFIX}/health"]


def test_plain_http_over_the_network_fails(
    api: Api, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server is its own proxy, so that the host need not be resolved.
    monkeypatch.setenv("http_proxy", api.origin)
    api.answers["GET http://registry.example.com/health"] = (200, b"OK")
    mlflow.set_tracking_uri("http://registry.example.com")
    lines = run("doctor").stdout.splitlines()
    (at,) = [at for at, line in enumerate(lines) if line.startswith("FAIL")]
    assert "plain http would show the key" in lines[at]
    assert "Use https, or set HOKUSAI_ALLOWED_ORIGINS=http://registry.example.com" in lines[at + 1]


def test_missing_plugin_fails(api: Api, failure: Any) -> None:
    registry = _request_header_provider_registry._registry
    before = list(registry)
    registry[:] = [known for known in registry if not isinstance(known, HokusaiHeaderProvider)]
    try:
        name, found, fix, verdicts = failure()
    finally:
        registry[:] = before
    assert name == "plugin" and f"MLflow {mlflow.__version__}" in found
    assert f"{sys.executable} -m pip install" in fix and "mlflow-hokusai-auth" in fix
    assert verdicts["server"] is True and verdicts["key accepted"] is None


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """The port of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_server(failure: Any, found: str, fix: str) -> None:
    name, reason, advice, verdicts = failure()
    assert name == "server"
    assert found in reason and fix in advice
    assert skipped(verdicts) == NAMES[7:]


def test_unreachable_tracking_uri_fails(api: Api, failure: Any) -> None:
    port = "Check the port in MLFLOW_TRACKING_URI"
    for uri, found, fix in (
        (
            "https://registry.invalid/api/mlflow",
            "registry.invalid/api/mlflow/health has no address",
            "Check the host in",
        ),
        (
            f"https://{'a' * 64}.example",
            "cannot be reached",
            "Check MLFLOW_TRACKING_URI and the network.",
        ),
        (f"http://127.0.0.1:{closed_port()}", "nothing listens at", port),
        (api.uri.replace("http:", "https:"), "speaks plain http", port),
    ):
        mlflow.set_tracking_uri(uri)
        check_server(failure, found, fix)


def test_server_that_does_not_answer_fails(failure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.TIMEOUT == 10
    monkeypatch.setattr(doctor, "TIMEOUT", 0.2)
    with silent() as port:
        mlflow.set_tracking_uri(f"http://127.0.0.1:{port}")
        check_server(failure, "did not answer within 0.2 s", "VPN, firewall, proxy")


def test_proxy_that_does_not_answer_fails(
    api: Api, failure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("HOKUSAI_ALLOWED_ORIGINS", str(mlflow.get_tracking_uri()))
    check_server(failure, "the proxy for", "Check HTTP_PROXY, HTTPS_PROXY and NO_PROXY.")


def test_broken_connection_fails(failure: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        mlflow.set_tracking_uri(f"http://127.0.0.1:{listening.getsockname()[1]}")
        taker = threading.Thread(target=lambda: listening.accept()[0].close())
        taker.start()
        check_server(failure, "cannot be reached", "Check MLFLOW_TRACKING_URI and the network.")
        taker.join()


def test_other_status_fails(api: Api, failure: Any) -> None:
    moved = {"Location": "https://new.example/mlflow/health"}
    for answer, found, fix in (
        ((404, b""), "answered 404", "Check the path in MLFLOW_TRACKING_URI"),
        ((401, b""), "answered 401", "something in front of the server"),
        ((503, b""), "answered 503", "Try again in a minute"),
        (
            (308, b"", moved),
            "answered 308, a redirect to https://new.example/mlflow",
            "Set MLFLOW_TRACKING_URI to its target",
        ),
    ):
        api.asked.clear()
        api.answers["GET /health"] = answer
        check_server(failure, found, fix)
        # It asks once; a search at other paths asks for whoami.
        assert [asked.path for asked in api.asked].count(f"{PREFIX}/health") == 1, found
        assert (len(api.asked) == 1) is (answer[0] in (503, 308)), found


def test_refused_key_fails(api: Api, key: str, failure: Any, retries: None) -> None:
    for status, code, fix in (
        (401, "KEY_MISSING", "removes the header X-API-Key"),
        (401, "KEY_MALFORMED", "Copy the whole key again."),
        (401, "KEY_UNKNOWN", "Check that this key was made for this server"),
        (401, "KEY_EXPIRED", "Ask the server's operator for a new key."),
        (401, "KEY_REVOKED", "Ask the server's operator for a new key."),
        (400, "KEY_CONFLICT", "~/.netrc"),
        (403, "ADDRESS_REFUSED", "Use the key from one of its networks"),
        (429, "RATE_LIMITED", "Try again later."),
        (503, "AUTHORITY_UNAVAILABLE", "Try again in a minute."),
        (503, "MISCONFIGURED", "Tell the server's operator."),
        (404, None, "--app-name hokusai-auth"),
    ):
        api.asked.clear()
        message = f"Not {key}.\x1b[31m\nHa."
        body = {"error_code": "UNAUTHENTICATED", "message": message, "error": code}
        api.on("GET whoami", status, body, {"Retry-After": "1"})
        name, found, advice, verdicts = failure()
        assert name == "key accepted" and fix in advice, code
        assert "Not ***. [31m Ha." in found, code
        assert skipped(verdicts) == ["scope", "artifact path", "expiry", "other ways"], code
        assert [asked.path.startswith(PREFIX) for asked in api.asked].count(True) == 2, code


def test_server_without_this_package_fails(api: Api, failure: Any) -> None:
    for answer in ((200, b"<html>" * 999), (200, {}), (502, b"<html>")):
        api.on("GET whoami", *answer)
        name, found, fix, _ = failure()
        assert name == "key accepted" and "--app-name hokusai-auth" in fix, answer
        assert len(found) < 600


def test_key_without_any_right_fails(api: Api, failure: Any) -> None:
    api.on("GET whoami", 200, {**IDENTITY, "scopes": ["a", "b"], "can": []})
    name, found, fix, verdicts = failure()
    assert name == "scope"
    assert fix.endswith("ask the server's operator for a key with the scope model:write.")
    assert "the key can do nothing" in found and "its scopes: a, b" in found
    assert skipped(verdicts) == []


def test_key_that_may_only_read_is_a_warning(api: Api, run: Any) -> None:
    api.on("GET whoami", 200, {**IDENTITY, "scopes": ["model:read"], "can": ["read"]})
    result = run("doctor")
    assert result.exit_code == 3
    assert "WARN  scope: the key can read, so it can't register a model" in result.stdout
    assert "fix: To register models, ask the server's operator" in result.stdout


def test_scope_is_skipped_if_the_server_does_not_say_what_a_key_can_do(api: Api, run: Any) -> None:
    api.on("GET whoami", 200, {"key_id": "key_1", "owner": "ACME", "scopes": []})
    result = run("doctor")
    assert result.exit_code == 0
    assert "skip  scope: this server does not say" in result.stdout
    assert run("whoami").exit_code == 0


def test_artifacts_outside_the_prefix_fail(api: Api, failure: Any) -> None:
    before = _artifact_repository_registry._registry["mlflow-artifacts"]
    _artifact_repository_registry.register("mlflow-artifacts", MlflowArtifactsRepository)
    try:
        name, found, fix, verdicts = failure()
    finally:
        _artifact_repository_registry.register("mlflow-artifacts", before)
    assert name == "artifact path"
    assert f"{api.origin}{ARTIFACTS}, outside of {PREFIX}" in found and "pip install" in fix
    assert skipped(verdicts) == []


def test_artifacts_that_are_not_served_fail(api: Api, failure: Any, retries: None) -> None:
    for status in (404, 502, 503):
        api.asked.clear()
        api.answers[f"GET {ARTIFACTS}"] = (status, b"")
        name, found, fix, _ = failure()
        assert name == "artifact path" and f"{PREFIX}{ARTIFACTS} answered {status}" in found
        assert f"route {PREFIX}/api/2.0/mlflow-artifacts/ to MLflow" in fix
        assert len(api.asked) == 3, status


def test_refused_artifact_request_shows_that_artifacts_are_served(api: Api, run: Any) -> None:
    api.answers[f"GET {ARTIFACTS}"] = (403, {})
    assert run("doctor").exit_code == 0


@pytest.fixture
def now() -> Iterator[float]:
    """The time, frozen."""
    now = 1_796_040_000.0
    with time_machine.travel(now, tick=False):
        yield now


def test_wrong_clock_fails(api: Api, run: Any, failure: Any, now: float) -> None:
    for ahead, found in ((90, "90 s behind the server's"), (-90, "90 s ahead of the server's")):
        date = formatdate(now + ahead, usegmt=True)
        api.answers["GET /health"] = (200, b"OK", {"Date": date})
        name, reason, fix, _ = failure()
        assert (name, reason) == ("clock", found)
        assert fix.startswith("Set this machine's clock")
    for nothing in (None, "noon"):
        api.answers["GET /health"] = (200, b"OK", {"Date": nothing})
        result = run("doctor")
        assert result.exit_code == 0
        assert "skip  clock: the server does not send its time" in result.stdout


def test_key_that_ends_soon_or_was_replaced_is_a_warning(api: Api, run: Any, now: float) -> None:
    new, replace = "Ask the server's operator for a new key.", "Set HOKUSAI_API_KEY to the new key"
    for left, deprecated, text, fix in (
        (15 * DAY, None, "the key ends on", ""),
        (5 * DAY + 60, None, "in 5 days", new),
        (DAY, 1.0, "was replaced and ends on", f"{replace} before then."),
        (15 * DAY, 1.0, "was replaced and ends on", f"{replace} before then."),
    ):
        ends = {"expires_at": now + left, "deprecated_at": deprecated}
        api.on("GET whoami", 200, {**IDENTITY, **ends})
        result = run("doctor", "--json")
        assert result.exit_code == (3 if fix else 0)
        answer = json.loads(result.stdout)
        assert answer["ok"] is True
        (check,) = [check for check in answer["checks"] if check["check"] == "expiry"]
        assert check["ok"] is True and check["fix"] == fix and check["warns"] is bool(fix)
        date = time.strftime("%Y-%m-%d", time.gmtime(now + left))
        assert text in check["found"] and date in check["found"]
        assert (", in " in check["found"]) is (left < 14 * DAY)
        strict = run("doctor", "--strict", "--json")
        assert strict.exit_code == (1 if fix else 0)
        assert json.loads(strict.stdout)["ok"] is not bool(fix)


def test_failure_counts_more_than_a_warning(api: Api, run: Any) -> None:
    api.on("GET whoami", 200, {**IDENTITY, "can": ["read"]})
    api.answers[f"GET {ARTIFACTS}"] = (404, b"")
    result = run("doctor")
    assert result.exit_code == 1 and "WARN  scope" in result.stdout


def test_usual_mistakes_in_the_key_are_recognised(
    api: Api, key: str, failure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOKUSAI_API_KEY")
    file = tmp_path / "key"
    monkeypatch.setenv("HOKUSAI_API_KEY_FILE", str(file))
    for text, what, fix in (
        (key[:-1], "it is cut short: it has 45 characters", "Copy the whole key again."),
        (key[:12], "it is cut short: it has 4 characters", "Copy the whole key again."),
        ("hk_live_YOUR_KEY", "the placeholder of the documentation", "Put the key that you"),
        ("hk_live_...", "the placeholder", "Put the key that you"),
        ("YOUR_API_KEY", "the placeholder", "Put the key that you"),
        (f"HOKUSAI_API_KEY={key}\n", "begins with HOKUSAI_API_KEY=", "Leave only the key itself"),
        (f"export K = '{key}'", "begins with K=", "Leave only the key itself"),
        (f'"{key}"', "in quotes", "Leave only the key itself"),
    ):
        file.write_text(text)
        name, found, advice, _ = failure()
        assert name == "key" and what in found and advice.startswith(fix), what
        assert key[8:20] not in found + advice
    # Keys without a checksum, and other authorities' keys, are no mistakes.
    for good in ("hk_live_" + "Ab1z" * 8, "hk_live_" + "Ab1z" * 10, "another-authority-s"):
        assert mistakes.in_key(good) is None, good


def test_uri_without_a_scheme_is_completed(api: Api, failure: Any) -> None:
    for uri, whole in (
        ("registry.example.com/api/mlflow", "https://registry.example.com/api/mlflow"),
        ("registry.example.com:8443", "https://registry.example.com:8443"),
        ("localhost:5000/mlflow", "http://localhost:5000/mlflow"),
        ("127.0.0.1:5000", "http://127.0.0.1:5000"),
    ):
        mlflow.set_tracking_uri(uri)
        name, found, fix, _ = failure()
        assert name == "tracking URI" and "has no scheme" in found, uri
        assert f"such as {whole}." in fix


def test_uri_with_another_path_that_answers_is_named(api: Api, failure: Any) -> None:
    refusal = {"error_code": "UNAUTHENTICATED", "message": "m", "error": "KEY_MISSING"}
    whoami = "GET /api/2.0/hokusai/whoami"
    other = f"{api.origin}/mlflow"
    for answer, sought in (((401, refusal), True), ((401, {}), False), ((200, b"<html>"), False)):
        api.answers[f"GET {other}{whoami[4:]}".replace(api.origin, "")] = answer
        for broken, part in (("GET /health", "server"), ("GET whoami", "key accepted")):
            before = dict(api.answers)
            api.answers["GET /health"] = (200, b"OK")
            if broken == "GET whoami":
                api.on("GET whoami", 403, {"error": "SCOPE_MISSING", "error_code": "P"})
            else:
                api.answers[broken] = (401, b"")
            api.asked.clear()
            name, _, fix, _ = failure()
            api.answers.clear()
            api.answers.update(before)
            assert name == part
            assert (
                f"Set MLFLOW_TRACKING_URI to {other}: there the server answers." == fix
            ) is sought
            assert "mlflow:admin" not in fix
            # The search sends no key.
            searched = [one for one in api.asked if one.path.startswith("/mlflow/")]
            assert searched and all("x-api-key" not in one.headers for one in searched)


def test_settings_that_mlflow_refuses_fail(
    api: Api, failure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", "/ca.pem")
    name, found, fix, _ = failure()
    assert name == "server" and "server_cert_path" in found
    assert fix == "Change the setting that MLflow's message names."


def test_password_in_the_tracking_uri_is_not_shown(api: Api, run: Any) -> None:
    mlflow.set_tracking_uri(api.uri.replace("://", "://me:secret@"))
    assert run("doctor").exit_code == 0
    api.on("GET whoami", 500, b"down")
    for command in ("doctor", "whoami"):
        result = run(command)
        assert result.exit_code == 1 and "secret" not in result.output


def test_whoami_prints_the_record_of_the_key(api: Api, run: Any) -> None:
    head = f"server:             {api.uri}\nkey from:           HOKUSAI_API_KEY\n"
    assert run("whoami").stdout == head + (
        "key_id:             key_1\n"
        "owner:              ACME\n"
        "name:               laptop\n"
        "scopes:             model:write\n"
        "can:                read, register\n"
        "networks:           everywhere\n"
        "models:             any\n"
        "no_delete:          no\n"
        "expires_at:         never\n"
        "replaced:           no\n"
        "default_experiment: -\n"
        "rate_limit:         none\n"
    )
    more = {
        "name": "\x1b[31mred",
        "can": [],
        "expires_at": 1796133600,
        "deprecated_at": 1796047200.5,
        "networks": ["192.0.2.0/24", "::1/128"],
        "models": ["acme-*", "scorer"],
        "no_delete": True,
        "default_experiment": "default:ACME",
        "rate_limit": {"limit": 1000, "remaining": 990, "reset": 60},
    }
    api.on("GET whoami", 200, {**IDENTITY, **more})
    with time_machine.travel(1796133600 - 3 * DAY - 60, tick=False):
        lines = run("whoami").stdout.splitlines()
        printed = json.loads(run("whoami", "--json").stdout)
    assert lines[4] == "name:               [31mred"
    assert lines[6:] == [
        "can:                nothing",
        "networks:           192.0.2.0/24, ::1/128",
        "models:             acme-*, scorer",
        "no_delete:          yes",
        "expires_at:         2026-12-01 14:00Z, in 3 days",
        "replaced:           on 2026-11-30 14:00Z",
        "default_experiment: default:ACME",
        "rate_limit:         990 of 1000 requests left, more in 60 s",
    ]
    ours = {"ok": True, "server": api.uri, "key_from": "HOKUSAI_API_KEY", "profiles": []}
    assert printed == {**IDENTITY, **more, **ours, "ends_in": 3 * DAY + 60}
    with time_machine.travel(1796133600 + 5, tick=False):  # the clocks differ
        assert "expires_at:         2026-12-01 14:00Z, in the past\n" in run("whoami").stdout


def test_whoami_prints_what_is_owned_and_shared(api: Api, run: Any) -> None:
    owned = {"model": ["a", "b", "c", "d"], "experiment": ["/acme"]}
    grant = {"pattern": "a*", "level": "read", "expires_at": None}
    grants = [
        {**grant, "granted_by": "ACME", "grantee": "GLOBEX"},
        {**grant, "granted_by": "", "grantee": "ACME", "expires_at": 1796133600},
        # Administrators get those of others, too.
        {**grant, "granted_by": "GLOBEX", "grantee": "Bee"},
    ]

    def owners() -> tuple[int, dict[str, Any]]:
        assert api.last.query["owner"] == "ACME"
        rows = [{"name": name} for name in owned[api.last.query["kind"]]]
        return 200, {"owners": rows, "next_page_token": None}

    api.answers["GET /api/2.0/hokusai/owners"] = owners
    api.on("GET grants", 200, {"grants": grants, "next_page_token": None})
    assert run("whoami").stdout.splitlines()[-3:] == [
        "owns:               4 models: a, b, c, … and 1 more; 1 experiment: /acme",
        "shares:             a* with GLOBEX (read)",
        "shared with it:     a* by operators (read until 2026-12-01 14:00Z)",
    ]
    printed = json.loads(run("whoami", "--json").stdout)
    assert (printed["owned"], printed["grants"]) == (owned, grants[:2])
    owned.update(model=[], experiment=[])
    api.on("GET grants", 200, {"grants": [], "next_page_token": None})
    assert run("whoami").stdout.splitlines()[-3:] == [
        "owns:               0 models; 0 experiments",
        "shares:             nothing",
        "shared with it:     nothing",
    ]
    # A server that can't tell, for whatever reason, is no failure.
    for answer in ((409, {"message": "no owners here"}), (503, b""), (200, {"grants": [{}]})):
        api.on("GET grants", *answer)
        result = run("whoami")
        assert (result.exit_code, "shares" in result.stdout) == (0, False), answer


@pytest.fixture
def profiles(clean_environment: Path) -> dict[str, str]:
    """Keys of ~/.hokusai, by name."""
    found = {name: keys.generate("test") for name in ("acme", "other", "~/.hokusai/config")}
    folder = clean_environment / ".hokusai"
    folder.mkdir()
    (folder / "config").write_text(f"[default]\napi_key = {found['~/.hokusai/config']}\n")
    sections = (f"[{name}]\napi_key = {found[name]}\n" for name in ("acme", "other"))
    (folder / "profiles").write_text("".join(sections) + "[empty]\n[cut]\napi_key = hk_test_abc\n")
    return found


def test_whoami_lists_the_keys_of_profiles_and_sends_them_only_if_told(
    api: Api, run: Any, key: str, profiles: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_key() -> tuple[int, Any]:
        names = {**{text: name for name, text in profiles.items()}, key: "used"}
        name = names[api.last.headers["x-api-key"]]
        if name == "other":
            return 401, {"error_code": "UNAUTHENTICATED", "message": f"KEY_UNKNOWN {name}"}
        return 200, {**IDENTITY, "key_id": f"key_{name[:4]}", "expires_at": time.time() + 90_000}

    api.answers["GET /api/2.0/hokusai/whoami"] = of_key
    before = dict(os.environ)
    result = run("whoami")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert lines[lines.index("Keys of ~/.hokusai:") :] == [
        "Keys of ~/.hokusai:",
        "  acme               not checked",
        "  other              not checked",
        "  empty              FAIL: the section of ~/.hokusai/profiles named by HOKUSAI_PROFILE has no "
        "api_key",
        "  cut                FAIL: it is cut short: it has 3 characters after the second _, and a "
        "whole key has 46. Copy the whole key again.",
        "  ~/.hokusai/config  not checked",
        "To check them, --all sends all of them to this server, and --profile NAME sends one.",
    ]
    assert {asked.headers["x-api-key"] for asked in api.asked} == {key}

    lines = run("whoami", "--all").stdout.splitlines()
    about = {line.split()[0]: line for line in lines if line.startswith("  ")}
    for name in ("acme", "~/.hokusai/config"):
        assert f"key_{name[:4]} of ACME, ends: 20" in about[name] and "in 1 day" in about[name]
    assert "FAIL: UNAUTHENTICATED: KEY_UNKNOWN other" in about["other"]
    assert not any(line.startswith("--all") for line in lines)
    printed = json.loads(run("whoami", "--all", "--json").stdout)
    assert [row["ok"] for row in printed["profiles"]] == [True, False, False, False, True]

    # A profile by name counts more than the variables, and only its key is sent.
    api.asked.clear()
    result = run("whoami", "--profile", "acme")
    assert "key from:           [acme] of ~/.hokusai/profiles" in result.stdout
    assert "Keys of" not in result.stdout
    assert {asked.headers["x-api-key"] for asked in api.asked} == {profiles["acme"]}
    assert run("whoami", "--profile", "other").exit_code == 1
    assert "no section" in run("whoami", "--profile", "none").stderr

    assert dict(os.environ) == before
    monkeypatch.delenv("HOKUSAI_API_KEY")
    monkeypatch.setenv("HOKUSAI_PROFILE", "other")
    result = run("whoami", "--all")
    assert result.exit_code == 1 and "KEY_UNKNOWN other" in result.stderr
    about = {line.split()[0]: line for line in result.stdout.splitlines() if line[:1] == " "}
    assert about["other"].endswith("the key in use") and "key_acme of ACME" in about["acme"]


def test_whoami_goes_on_if_the_profiles_can_not_be_read(
    api: Api, run: Any, clean_environment: Path
) -> None:
    (clean_environment / ".hokusai").mkdir()
    (clean_environment / ".hokusai" / "profiles").write_text("no section")
    result = run("whoami")
    assert result.exit_code == 0 and "FAIL: ~/.hokusai/profiles cannot be parsed" in result.stdout


def test_whoami_asks_the_given_server_if_the_key_may_be_sent_there(
    api: Api, run: Any, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering() as other:
        other.on("GET whoami", 200, {**IDENTITY, "key_id": "key_2"})
        result = run("whoami", "--url", other.uri)
        assert (result.exit_code, api.asked) == (0, [])
        assert f"server:             {other.uri}\n" in result.stdout and "key_2" in result.stdout
        assert other.asked[0].headers["x-api-key"] == key
        asked = len(other.asked)
        monkeypatch.setenv("HOKUSAI_ALLOWED_ORIGINS", api.origin)
        result = run("whoami", "--url", other.uri)
        assert result.exit_code == 1 and "it is not in HOKUSAI_ALLOWED_ORIGINS" in result.stderr
        assert len(other.asked) == asked
    result = run("whoami", "--url", "http://registry.example.com")
    assert result.exit_code == 1 and "is not sent to http://registry.example.com" in result.stderr


def test_whoami_names_a_key_that_mlflow_sends_itself(
    api: Api, run: Any, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOKUSAI_API_KEY")
    assert "key from:           nowhere: none is configured" in run("whoami").stdout
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", key)
    assert "key from:           MLFLOW_TRACKING_TOKEN" in run("whoami").stdout
    monkeypatch.setenv("HOKUSAI_API_KEY_FILE", "/nowhere")
    result = run("whoami")
    assert result.exit_code == 1 and "named by HOKUSAI_API_KEY_FILE does not exist" in result.stderr


def test_malformed_answer_gives_no_traceback(api: Api, run: Any) -> None:
    for strange in (
        {"rate_limit": {"limit": 5}},
        {"rate_limit": 5},
        {"expires_at": "soon"},
        {"expires_at": 1e300},
        {"scopes": 5},
    ):
        api.on("GET whoami", 200, {"key_id": "key_1", **strange})
        result = run("whoami")
        assert result.exit_code == 1 and "Check MLFLOW_TRACKING_URI" in result.stderr, strange
        if "expires_at" in strange:
            result = run("doctor")
            assert result.exit_code == 1 and "Check MLFLOW_TRACKING_URI" in result.stdout, strange


def test_whoami_prints_only_known_fields(api: Api, run: Any, key: str, retries: None) -> None:
    body = {"error_code": "UNAUTHENTICATED", "message": f"Unknown:\n{key}"}
    api.on("GET whoami", 503, body)
    for arguments in ((), ("--json",)):
        result = run("whoami", *arguments)
        assert result.exit_code == 1
        if arguments:
            printed = json.loads(result.stdout)
            assert (printed["ok"], printed["error"]) == (False, "UNAUTHENTICATED: Unknown: ***")
            continue
        assert result.stdout == (
            f"server:             {api.uri}\nkey from:           HOKUSAI_API_KEY\n"
        )
        assert result.stderr == (
            "hokusai-auth: UNAUTHENTICATED: Unknown: ***\nRun `hokusai-auth doctor` to find out why.\n"
        )
    assert len(api.asked) == 2
    mlflow.set_tracking_uri("./mlruns")
    result = run("whoami")
    assert result.exit_code == 1
    assert result.stderr.startswith("hokusai-auth: ") and "MLFLOW_TRACKING_URI" in result.stderr


def test_installed_entry_points_are_found(api: Api, key: str, tmp_path: Path) -> None:
    """The test runs in its own process, where no fixture registers anything."""
    code = "from mlflow_hokusai_auth.cli.supplier import doctor; doctor([])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MLFLOW_TRACKING_URI": api.uri},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert key not in done.stdout + done.stderr


def test_commands_import_mlflow_only_when_they_run() -> None:
    code = "import sys, mlflow_hokusai_auth.cli.supplier; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

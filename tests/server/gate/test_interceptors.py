"""Interceptors can add headers and refuse, and cannot break a request."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlflow_hokusai_auth.core.types import Deny
from mlflow_hokusai_auth.server import metrics
from mlflow_hokusai_auth.server.gate import interceptors
from mlflow_hokusai_auth.server.gate.interceptors import Interceptors, load
from mlflow_hokusai_auth.server.interceptors import Refusal, RequestView
from mlflow_hokusai_auth.server.live_settings import Mode
from tests.server.gate.test_adapters import (
    KEYS,
    Adapter,
    Wire,
    both,
    inner_headers,
    make_gate,
    with_key,
)

VIEW = RequestView("GET", "/version", "", "id-1", "GET /version", "key_1", "me", "192.0.2.1")


def answering(request: Any = None, response: Any = None) -> SimpleNamespace:
    """An interceptor that returns these answers, or raises them."""

    def give(answer: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return SimpleNamespace(
        on_request=lambda view: give(request), on_response=lambda view, status: give(response)
    )


def errors(name: str) -> float:
    return float(metrics.INTERCEPTOR_ERRORS.labels(name)._value.get())


def test_interceptors_are_called_in_order_and_all_count() -> None:
    asked: list[str] = []

    def one(name: str) -> SimpleNamespace:
        def on_request(view: RequestView) -> dict[str, str]:
            assert view is VIEW
            asked.append(name)
            return {"X-Name": name}

        def on_response(view: RequestView, status: int) -> dict[str, str]:
            return {"X-Status": f"{name} {status}"}

        return SimpleNamespace(on_request=on_request, on_response=on_response)

    both_of_them = Interceptors((("a", one("a")), ("b", one("b"))))
    assert both_of_them.on_request(VIEW) == [("X-Name", "a"), ("X-Name", "b")]
    assert asked == ["a", "b"]
    assert both_of_them.on_response(VIEW, 201) == [("X-Status", "a 201"), ("X-Status", "b 201")]


def test_interceptor_may_have_one_method_only() -> None:
    found = Interceptors((("none", object()), ("some", answering({"X-A": "1"}, None))))
    assert found.on_request(VIEW) == [("X-A", "1")]
    assert found.on_response(VIEW, 200) == []
    assert not Interceptors() and found


def test_first_refusal_of_an_interceptor_counts() -> None:
    def never(view: RequestView) -> None:
        pytest.fail("asked although the request is refused")

    found = Interceptors(
        (
            ("a", answering({"X-A": "1"})),
            ("b", answering(Refusal("Not on Sundays."))),
            ("c", SimpleNamespace(on_request=never)),
        )
    )
    assert found.on_request(VIEW) == Deny("INTERCEPTED", "Not on Sundays.")


def test_response_that_has_begun_can_not_be_refused() -> None:
    found = Interceptors((("a", answering(None, Refusal("too late"))),), refuse_on_error=True)
    assert found.on_response(VIEW, 200) == []


def test_exception_is_counted_and_ignored_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    canary = KEYS["read"]
    broken = answering(RuntimeError(canary), RuntimeError(canary))
    both_of_them = (("broken", broken), ("good", answering({"X-A": "1"}, {"X-B": "2"})))
    for refuse in (True, False):
        caplog.clear()
        found = Interceptors(both_of_them, refuse)
        before = errors("broken")
        answer = found.on_request(VIEW)
        if refuse:
            assert isinstance(answer, Deny) and answer.code == "INTERCEPTOR_FAILED"
            assert canary not in answer.message
        else:
            assert answer == [("X-A", "1")]
        assert found.on_response(VIEW, 200) == [("X-B", "2")]
        assert errors("broken") == before + 2
        said = [one.getMessage() for one in caplog.records if one.levelno >= logging.INFO]
        assert said == ["Interceptor broken failed: RuntimeError"] * 2


NO_HEADERS: list[Any] = [
    *({"X-A": value} for value in ("a\r\nX-B: b", "a\n", "é", 1, None)),
    *({name: "a"} for name in ("X A", "X-A:", "", "é", 1)),
    *({name: "a"} for name in ("Content-Length", "transfer-encoding", "Connection", "HOST")),
    *({name: "a"} for name in ("Set-Cookie", "X-Hokusai-User-Id", "x_hokusai_user_id")),
    {"Content_Length": "a"},
    # One bad header makes the whole answer invalid.
    {"X-Good": "1", "Host": "evil"},
    "X-A: a",
    ["X-A"],
    7,
]


def test_invalid_headers_are_not_added() -> None:
    good = answering({"X-G": "1"})
    wrong = []
    for answer in NO_HEADERS:
        found = Interceptors((("bad", answering(answer, answer)), ("good", good)))
        before = errors("bad")
        got = found.on_request(VIEW), found.on_response(VIEW, 200), errors("bad") - before
        if got != ([("X-G", "1")], [], 2):
            wrong.append(f"{answer!r}: {got}")
    assert not wrong, "\n".join(wrong)


# Through the adapters


@both
def test_added_headers_reach_mlflow_and_the_client(adapter: Adapter) -> None:
    one = answering({"X-Site": "for MLflow"}, {"X-Seen": "for the client"})
    answer = adapter(with_key("read"), make_gate(interceptors=Interceptors((("a", one),))))
    assert answer.status == 200
    assert ("x-site", "for MLflow") in inner_headers(answer)
    assert answer.header("x-seen") == ["for the client"] and not answer.header("x-site")


@both
def test_refused_request_does_not_reach_mlflow(adapter: Adapter) -> None:
    for answer, refuse, verdict in (
        (Refusal("No."), False, (403, "INTERCEPTED")),
        (ValueError(), True, (503, "INTERCEPTOR_FAILED")),
        (ValueError(), False, (200, "ALLOW")),
    ):
        found = Interceptors((("a", answering(answer)),), refuse)
        got = adapter(with_key("read"), make_gate(interceptors=found))
        assert got.verdict == verdict
        assert len(got.header("x-request-id")) == 1


@both
def test_request_without_a_key_does_not_bypass_interceptors(adapter: Adapter) -> None:
    found = Interceptors((("a", answering(Refusal("No."))),))
    for mode in ("observe", "off"):
        gate = make_gate(interceptors=found, mode=Mode(mode))
        for wire in (with_key("read"), Wire(), with_key("unknown")):
            answer = adapter(wire, gate)
            assert (answer.status, answer.code, answer.inner) == (403, "INTERCEPTED", None)


@both
def test_interceptors_see_no_key_and_only_allowed_requests(adapter: Adapter) -> None:
    seen: list[RequestView] = []
    gate = make_gate(interceptors=Interceptors((("a", SimpleNamespace(on_request=seen.append)),)))
    target = f"/mlflow/version?api_key={KEYS['read']}"
    assert adapter(with_key("unknown", "GET", target), gate).status == 400
    assert adapter(with_key("unknown"), gate).status == 401
    assert seen == []
    assert adapter(with_key("read", "GET", target), gate).status == 200
    (view,) = seen
    assert (view.path, view.prefix, view.rule) == ("/version", "/mlflow", "GET /version")
    assert (view.key_id, view.owner) == ("key_read", "read@example.com")
    assert KEYS["read"][8:] not in repr(view)


# Loading


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a distribution with these entry points, and a module with this text."""

    def made(module: str, text: str, **points: str) -> None:
        (tmp_path / f"{module}.py").write_text(text)
        info = tmp_path / f"{module}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n")
        lines = [f"{name} = {value}" for name, value in points.items()]
        (info / "entry_points.txt").write_text(
            "\n".join(["[mlflow_hokusai_auth.interceptor]", *lines, ""])
        )

    monkeypatch.syspath_prepend(tmp_path)
    return made


GOOD = """
class Added:
    def on_request(self, request):
        return {"X-Class": type(self).__name__}

one = Added()
"""


def test_installed_interceptors_are_loaded_by_name(install: Callable[..., None]) -> None:
    # No interceptor is installed.
    assert not load(refuse_on_error=False)
    install("interceptors_b", GOOD, b="interceptors_b:Added", c="interceptors_b:one")
    install(
        "interceptors_a", "def on_request(request): return {'X-Module': 'a'}", a="interceptors_a"
    )
    found = load(refuse_on_error=True)
    assert [name for name, _ in found.installed] == ["a", "b", "c"]
    assert found.refuse_on_error
    assert found.on_request(VIEW) == [("X-Module", "a"), ("X-Class", "Added"), ("X-Class", "Added")]


def test_interceptor_that_can_not_be_loaded_stops_the_start(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for text, value, says in (
        ("import no_such_module", ":A", "ModuleNotFoundError"),
        ("", ":A", "AttributeError"),
        ("class A:\n    def __init__(self): raise OSError('secret')", ":A", "OSError"),
        ("1 /", "", "SyntaxError"),
        ("", "no_such_module", "ModuleNotFoundError"),
    ):
        module = f"interceptor_{len(names)}"
        names.append(f"broken_{len(names)}")
        value = value if value.startswith("no") else module + value
        install(module, text, **{names[-1]: value})
        # Several are installed by now; the message names this one.
        monkeypatch.setattr(
            interceptors,
            "entry_points",
            lambda group, name=names[-1]: entry_points(group=group, name=name),
        )
        message = rf"interceptor {names[-1]} \(.*\) can't be loaded: {says}$"
        with pytest.raises(ValueError, match=message) as refused:
            load(refuse_on_error=False)
        assert "secret" not in str(refused.value) and refused.value.__cause__ is None

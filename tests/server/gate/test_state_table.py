"""Every answer of an authority, with every state of the cache, every backend and every mode.

The authority is the stand-in, over HTTP; the gate is the one that a server builds from its settings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from mlflow_hokusai_auth.core.prefixes import Prefixes
from mlflow_hokusai_auth.core.types import Allow, NeedKey, Request
from mlflow_hokusai_auth.server import authorities, settings
from mlflow_hokusai_auth.server.exchange import Exchange
from mlflow_hokusai_auth.server.gate.cors import Cors
from mlflow_hokusai_auth.server.gate.flow import decide
from mlflow_hokusai_auth.server.gate.gate import Gate
from mlflow_hokusai_auth.server.live_settings import Mode
from mlflow_hokusai_auth.server.observe.decision_log import DecisionLog
from mlflow_hokusai_auth.store.keys import LocalStore
from tests.server.forked import watchers_rest
from tests.standin import Standin

#: The service's behaviour -> the code of the refusal of a key that the cache doesn't have.
ANSWERS = {
    "strict": None,
    "401": "KEY_UNKNOWN",
    "invalid": "KEY_UNKNOWN",
    "429": "RATE_LIMITED",
    **dict.fromkeys(
        ["400", "403", "404", "422", "302", "500", "502", "503", "html", "empty", "gone"],
        "AUTHORITY_UNAVAILABLE",
    ),
}
#: Answers about the key: unlike an outage they end the use of a stale entry.
ANSWERED = ["400", "403", "404", "422", "empty"]
#: The cache has no entry; a fresh one; a stale one, without and with stale_if_error.
KNOWLEDGE = ["unknown", "known", "stale", "stale but allowed"]


@pytest.fixture
def service() -> Iterator[Standin]:
    with watchers_rest(), Standin() as standin:
        yield standin


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    made = LocalStore(f"sqlite:///{tmp_path}/keys.db")
    made.migrate()
    return made


def behave(service: Standin, answer: str) -> None:
    if answer == "gone":
        service.go()
    elif answer == "html":
        service.behave("status", status=200, body=b"<html>It works!</html>")
    elif answer == "empty":
        service.behave("status", status=200, body=b"{}")
    elif answer == "invalid":
        service.behave("status", status=200, body=b'{"is_valid": false, "key_id": "k"}')
    elif answer == "302":
        service.behave("status", status=302, headers={"Location": "/elsewhere"})
    elif answer != "strict":
        service.behave("status", status=int(answer), body=b"{}")


@contextlib.contextmanager
def served(service: Standin, store: LocalStore, **environ: str) -> Iterator[Gate]:
    """A gate with an empty cache, and a working service without calls."""
    service.calls.clear()
    service.behave("strict")
    environ = {"SERVICE_URL": service.url, "SERVICE_TIMEOUT": "10", **environ}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(f"HOKUSAI_AUTH_{name}", value)
        config = settings.load()
        yield Gate(
            authorities.build(config, store),
            settings.policy_of(config),
            Prefixes(()),
            Cors((), ""),
            DecisionLog(),
            mode=Mode(config.mode),
        )
    # The service listens again if it was gone.
    service.go()
    service.come_back()


def ask(gate: Gate, key: str) -> str | None:
    """The code of the refusal, or None for an allowed request."""
    request = Request("GET", "/version", b"", ((b"x-api-key", key.encode()),), "127.0.0.1")
    step = gate.plan(request)
    verdict = decide(gate, step) if isinstance(step, NeedKey) else step
    verdict = gate.conclude(Exchange(request, "", "", 0.0), verdict)
    return None if isinstance(verdict, Allow) else verdict.code


def test_refusal_depends_on_backend_and_cache(service: Standin, store: LocalStore) -> None:
    own = store.create(owner="operator", scopes=["mlflow:admin"])[1]
    wrong = []
    for answer, backend, knowledge in product(ANSWERS, ["service", "local,service"], KNOWLEDGE):
        environ = {
            "BACKEND": backend,
            "CACHE_TTL": "0.000001" if knowledge.startswith("stale") else "60",
            "STALE_IF_ERROR": "60" if knowledge == "stale but allowed" else "0",
        }
        expected = None if knowledge == "known" else ANSWERS[answer]
        # The service may answer a revoked key with nothing but 429.
        if knowledge == "stale but allowed" and answer not in ANSWERED:
            expected = None if expected == "AUTHORITY_UNAVAILABLE" else expected
        with served(service, store, **environ) as gate:
            key = service.add()
            before = None if knowledge == "unknown" else ask(gate, key)
            behave(service, answer)
            found = [before, ask(gate, key)]
            # A key in the local store needs no service.
            found.append(ask(gate, own) if backend == "local,service" else None)
        if found != [None, expected, None]:
            wrong.append(f"{answer}, {backend}, {knowledge}: {found}, not {expected}")
    assert not wrong, "\n".join(wrong)


def test_only_enforce_refuses(service: Standin, store: LocalStore) -> None:
    wrong = []
    for answer, mode in product(ANSWERS, ["observe", "off"]):
        with served(service, store, BACKEND="service", MODE=mode) as gate:
            key = service.add()
            behave(service, answer)
            found = ask(gate, key), bool(service.calls)
        # A service that is gone can't count its calls.
        if found != (None, mode == "observe" and answer != "gone"):
            wrong.append(f"{answer}, {mode}: {found}")
    assert not wrong, "\n".join(wrong)


def test_no_call_is_made_for_a_request_without_a_key_or_with_a_damaged_one(
    service: Standin, store: LocalStore
) -> None:
    with served(service, store, BACKEND="service") as gate:
        good = service.add()
        damaged = good[:20] + ("a" if good[20] != "a" else "b") + good[21:]
        assert [ask(gate, key) for key in ("", " ", damaged)] == [
            "KEY_MISSING",
            "KEY_MISSING",
            "KEY_MALFORMED",
        ]
        assert service.calls == []

"""A flood of made-up keys from one address costs nobody else anything, and the auth service little."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path

import pytest

from mlflow_hokusai_auth.core import keys
from tests.harness import SERVERS, Server, serve
from tests.standin import Call, Standin

pytestmark = pytest.mark.servers

FLOODING, OTHER = "203.0.113.9", "198.51.100.7"
#: Wrong keys in a minute that are looked up, and those that are sent.
LIMIT, SENT, CONNECTIONS = 20, 1500, 30
PATH = "/api/2.0/mlflow/experiments/get?experiment_id=0"


def status(server: Server, key: str, address: str) -> tuple[int, dict[str, str]]:
    return server.request("GET", PATH, key=key, headers={"X-Forwarded-For": address})[:2]


def asked(calls: list[Call], address: str, *, but: str) -> int:
    """Return the number of the service's lookups for `address`, of all keys except `but`."""
    return sum(
        json.loads(call.body).get("client_ip") == address and but not in str(call.headers)
        for call in calls
    )


@pytest.mark.parametrize("kind", ["uvicorn", "httptools"])
def test_a_flood_of_made_up_keys_stays_within_its_share(kind: str, tmp_path: Path) -> None:
    with (
        Standin() as service,
        serve(
            tmp_path,
            SERVERS[kind],
            HOKUSAI_AUTH_BACKEND="service",
            HOKUSAI_AUTH_SERVICE_URL=service.url,
            HOKUSAI_AUTH_FAILURES_PER_MINUTE=str(LIMIT),
            HOKUSAI_AUTH_TRUSTED_PROXIES="127.0.0.1",
            # So that the good keys are looked up again and again.
            HOKUSAI_AUTH_CACHE_TTL="0.2",
        ) as server,
    ):
        service.behave("slow", seconds=0.05)
        here, there, unseen = (service.add(scopes=["mlflow:read"]) for _ in range(3))
        assert status(server, here, FLOODING)[0] == 200
        answers: Counter[int] = Counter()
        good: Counter[tuple[str, int]] = Counter()
        waits: list[float] = []
        left = iter(range(SENT))
        flooding = threading.Event()
        lock = threading.Lock()

        def flood() -> None:
            while True:
                with lock:
                    if next(left, None) is None:
                        return
                code, headers = status(server, keys.generate("test"), FLOODING)
                with lock:
                    answers[code] += 1
                    waits.extend([float(headers["retry-after"])] if code == 429 else [])
                    if answers[429] > SENT // 10:
                        flooding.set()

        threads = [threading.Thread(target=flood, daemon=True) for _ in range(CONNECTIONS)]
        for thread in threads:
            thread.start()
        assert flooding.wait(120)
        # A key that is new waits, and is not looked up; everybody else is served as ever.
        new, headers = status(server, unseen, FLOODING)
        while any(thread.is_alive() for thread in threads):
            for name, key, address in (("here", here, FLOODING), ("there", there, OTHER)):
                good[name, status(server, key, address)[0]] += 1
        assert set(good) == {("here", 200), ("there", 200)}, good
        assert (new, float(headers["retry-after"]) <= 60) == (429, True)
        assert not any(unseen in str(call.headers) for call in service.calls)
        assert status(server, unseen, OTHER)[0] == 200
        assert set(answers) == {401, 429} and max(waits) <= 60, answers
        # A minute's failures; a few that were under way; and what a second minute would give.
        assert LIMIT <= asked(service.calls, FLOODING, but=here) <= 3 * LIMIT
